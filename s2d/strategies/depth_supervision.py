"""Rendered depth held to stage 0's: depth, normals, and smoothness where the photo has no edge.

Notation: D rendered depth, D0 stage 0's, c its confidence, all [H, W]; A the render's alpha, as a constant. Inverse depth is what stereo
measures: its error is about even over near and far (SparseNeRF, DNGaussian and FSGS supervise monocular depth; here it is the photos' own stereo,
so absolute values may be asked for). All terms are means over all pixels, as the photometric loss is: a photo with few hints is held loosely.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.geometry import pixel_grid

# Where less is drawn, the expected depth says little.
MIN_ALPHA = 0.1
# Neighbours further apart than this share of their depth lie on two surfaces: no normal, no smoothness.
MAX_STEP = 0.05
# Photo differences (sum over channels) of this size count as an edge.
EDGE = 0.1


def depth_loss(
    depth: Tensor,  # [H, W]
    alpha: Tensor,  # [H, W]
    target: Tensor,  # [H, W]
    confidence: Tensor,  # [H, W]
) -> Tensor:
    """Mean of c A |D0 / D - 1|: the relative difference of inverse depths. 0 where D = D0.

    Differentiable in `depth` alone. Pixels with D0 <= 0 or alpha below 0.1 do not count.
    """
    weight = _weight(alpha, target, confidence)
    return (weight * (target / depth.clamp(min=1e-6) - 1).abs()).mean()


def pearson_loss(
    depth: Tensor,  # [H, W]
    alpha: Tensor,  # [H, W]
    target: Tensor,  # [H, W]
    confidence: Tensor,  # [H, W]
) -> Tensor:
    """1 - Pearson's correlation of 1 / D and 1 / D0 with the weights c A, times the mean weight. In [0, 2]; FSGS (Zhu et al. 2024) uses it.

    Does not change when D0's inverse is scaled or shifted. Differentiable in `depth` alone.
    """
    weight = _weight(alpha, target, confidence)
    # Without any weight all below is 0, whatever it is divided by.
    total = weight.sum().clamp(min=1e-12)

    def centred(inverse: Tensor) -> Tensor:
        return inverse - (weight * inverse).sum() / total

    x = centred(1 / depth.clamp(min=1e-6))
    y = centred(torch.where(target > 0, 1 / target.clamp(min=1e-6), torch.zeros_like(target)))
    spread = (weight * x * x).sum() * (weight * y * y).sum()
    correlation = (weight * x * y).sum() / spread.clamp(min=1e-24).sqrt()
    return (1 - correlation) * weight.mean()


def normal_loss(
    depth: Tensor,  # [H, W]
    alpha: Tensor,  # [H, W]
    target: Tensor,  # [H, W]
    confidence: Tensor,  # [H, W]
    K: Tensor,  # [3, 3]
) -> Tensor:
    """Mean of c A (1 - n · n0), n and n0 the normals of the two depth maps in camera axes. Differentiable in `depth` alone."""
    normals, known = normals_of(target, K)
    rendered, drawn = normals_of(depth, K)
    weight = _weight(alpha, target, confidence)[:-1, :-1] * (known & drawn)
    return (weight * (1 - (rendered * normals).sum(-1))).sum() / depth.numel()


def smoothness_loss(
    depth: Tensor,  # [H, W]
    alpha: Tensor,  # [H, W]
    photo: Tensor,  # [H, W, 3]
) -> Tensor:
    """Mean relative step of inverse depth between neighbours, times exp(-|photo's step| / 0.1) (Godard et al. 2017). Differentiable in `depth`."""
    drawn = (alpha.detach() > MIN_ALPHA) & (depth.detach() > 0)
    middle = torch.where(drawn, depth.detach(), torch.nan).nanmedian().nan_to_num(nan=1.0)
    inverse = middle / depth.clamp(min=1e-6)
    total = depth.new_zeros(())
    for axis in (0, 1):
        size = depth.shape[axis] - 1
        near, far = (torch.narrow(inverse, axis, k, size) for k in (0, 1))
        both = torch.narrow(drawn, axis, 0, size) & torch.narrow(drawn, axis, 1, size)
        edge = photo.diff(dim=axis).abs().sum(-1)
        total = total + (torch.exp(-edge / EDGE) * both * (far - near).abs()).sum()
    return total / depth.numel()


def normals_of(
    depth: Tensor,  # [H, W]
    K: Tensor,  # [3, 3]
) -> tuple[Tensor, Tensor]:
    """Unit normals that face the camera, from each pixel and its right and lower neighbours, in camera axes.

    Returns:
        - normals [H-1, W-1, 3]; zero where unknown
        - where they are known [H-1, W-1] bool: three depths, of one surface
    """
    height, width = depth.shape
    grid = pixel_grid(width, height, depth.device, depth.dtype)
    rays = F.pad(grid, (0, 1), value=1.0) @ torch.linalg.inv_ex(K).inverse.mT
    points = rays * depth[..., None]
    here, right, below = points[:-1, :-1], points[:-1, 1:], points[1:, :-1]
    # Right x below points away from the camera, below x right towards it.
    normals = F.normalize(torch.linalg.cross(below - here, right - here), dim=-1, eps=1e-20)
    fixed = depth.detach()
    z, across, down = fixed[:-1, :-1], fixed[:-1, 1:], fixed[1:, :-1]
    known = (z > 0) & (across > 0) & (down > 0)
    known &= ((across - z).abs() < MAX_STEP * z) & ((down - z).abs() < MAX_STEP * z)
    return normals, known


def _weight(alpha: Tensor, target: Tensor, confidence: Tensor) -> Tensor:
    alpha = alpha.detach()
    return confidence * alpha * ((target > 0) & (alpha > MIN_ALPHA))
