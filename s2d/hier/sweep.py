"""Plane sweep: how well do the views agree if a pixel of the reference view lies at this depth?

Every view is the reference once, and all other views are compared with it. Hypotheses are inverse depths, because equal steps in inverse depth are equal
steps in the pictures. A plane of constant depth maps pixels p = (x, y, 1) of the reference to A p + b / z in another view, with A = K' R K⁻¹ and
b = K' t; division by the third coordinate gives pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.geometry import invert_rigid, pixel_grid
from s2d.hier.blocks import reduced

# Contrast (root mean square, pictures in [0, 1]) below which a patch says little: two steps of an 8-bit picture.
MIN_CONTRAST = 2 / 255
# Of the depth in the reference: nearer points are as good as beside or behind the other camera.
MIN_DEPTH = 1e-3


def inverse_depths(
    near: Tensor,  # [B, V]
    far: Tensor,  # [B, V]
    num: int,
) -> Tensor:
    """List hypotheses, uniform in inverse depth from 1/far to 1/near, both included. [B, V, num]"""
    share = torch.linspace(0, 1, num, device=near.device, dtype=near.dtype)
    return 1 / far[..., None] + share * (1 / near - 1 / far)[..., None]


def plane_sweep(
    features: Tensor,  # [B, V, C, h, w]
    hypotheses: Tensor,  # [B, V, D]
    viewmats: Tensor,  # [B, V, 4, 4]
    Ks: Tensor,  # [B, V, 3, 3]
    sources: Tensor | None = None,  # [B, V, C, h', w']
) -> Tensor:
    """Score every depth of every pixel by the mean inner product of its features with those that other views have there.

    Views that do not see the point (behind them, outside of their picture) have no say; where no view sees it the score is 0.

    Args:
        features: Of each view. [B, V, C, h, w]
        hypotheses: Inverse depths (camera z) in each reference view. [B, V, D]
        viewmats: World to camera. [B, V, 4, 4]
        Ks: Pixels of h x w. [B, V, 3, 3]
        sources: Unit vectors that the other views are looked up in instead, sampled at points from rim to rim of the picture on a grid of their own; what
            lies between them is made a unit vector again. A finer grid finds depth between the cells: interpolating over a whole cell would
            favour depths that lie on cells. [B, V, C, h', w']

    Returns:
        Scores. [B, V, D, h, w]

    Differentiable in features and hypotheses.
    """
    num_scenes, num_views, channels, height, width = features.shape
    num = hypotheses.shape[-1]
    if num_views < 2:
        raise ValueError(
            f"plane_sweep: expected at least 2 views, got {num_views}. Depth needs parallax."
        )
    total = features.new_zeros(num_scenes, num_views, num, height, width)
    count = torch.zeros_like(total)
    for offset in range(1, num_views):
        other = [(view + offset) % num_views for view in range(num_views)]
        with torch.autocast(features.device.type, enabled=False):
            places, seen = _places(
                hypotheses, viewmats, Ks, viewmats[:, other], Ks[:, other], height, width
            )
        warped = F.grid_sample(
            (features if sources is None else sources)[:, other].flatten(0, 1),
            places.flatten(0, 1).flatten(1, 2).to(features.dtype),
            padding_mode="border",  # what lies outside is masked; at the rim the nearest value is the best
            align_corners=sources
            is not None,  # true: -1 and 1 are the first and the last point, not the edges of their pixels
        ).reshape(num_scenes, num_views, channels, num, height, width)
        score = (warped * features[:, :, :, None]).sum(2)
        if sources is not None:
            score = score / warped.norm(dim=2).clamp(min=1e-6)
        total = total + seen * score
        count = count + seen
    return total / count.clamp(min=1)


def _places(
    hypotheses: Tensor,  # [B, V, D]
    viewmats: Tensor,
    Ks: Tensor,
    other_viewmats: Tensor,
    other_Ks: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Where each pixel of the reference lies in the other view at each depth.

    Returns:
        - positions, -1 to 1 from edge to edge of the other picture [B, V, D, h, w, 2]
        - 1 where it is in front of the other camera and in its picture, else 0 [B, V, D, h, w]
    """
    grid = F.pad(pixel_grid(width, height, Ks.device, Ks.dtype), (0, 1), value=1.0)
    other_from_ref = other_viewmats @ invert_rigid(viewmats)
    turned = other_Ks @ other_from_ref[..., :3, :3] @ torch.linalg.inv(Ks)  # A
    parallax = (other_Ks @ other_from_ref[..., :3, 3:])[..., 0]  # b
    points = (grid @ turned.mT[:, :, None])[:, :, None]  # [B, V, 1, h, w, 3]
    points = points + (hypotheses[..., None] * parallax[:, :, None])[:, :, :, None, None]
    depth = points[..., 2:]  # in units of the depth in the reference
    xy = points[..., :2] / torch.where(depth > MIN_DEPTH, depth, torch.ones_like(depth))
    places = 2 * xy / grid.new_tensor([width, height]) - 1
    seen = (depth[..., 0] > MIN_DEPTH) & (places.abs() < 1).all(-1)
    return places, seen.to(places.dtype)


def patch_descriptors(
    images: Tensor,  # [M, 3, H, W]
    stride: int,
) -> tuple[Tensor, Tensor]:
    """Describe surroundings by 5 x 5 patches of brightness, without their mean, at the resolution of half-cells.

    A last channel holds the least contrast that counts; with it all descriptors are unit vectors. The inner product of two is close to the normalised
    cross-correlation of their patches, and close to 1 where both are plain. It needs no training.

    Args:
        images: [M, 3, H, W] in [0, 1], H and W multiples of `stride`.
        stride: Pixels per cell along each axis, even.

    Returns:
        - of every cell, around its centre [M, 26, H / stride, W / stride]
        - around every corner of half-cells, the picture's rim included: `sources` of `plane_sweep` [M, 26, 2 H / stride + 1, 2 W / stride + 1]
    """
    grey = reduced(images.mean(1, keepdim=True), stride // 2)
    rows, columns = (side + 1 for side in grey.shape[-2:])
    # Mean of the four half-cells at each corner: the centre of a cell is such a corner.
    corners = F.avg_pool2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), 2, 1)
    patches = F.unfold(F.pad(corners, (2, 2, 2, 2), mode="replicate"), 5)
    patches = patches - patches.mean(1, keepdim=True)
    patches = F.pad(patches, (0, 0, 0, 1), value=5 * MIN_CONTRAST)
    dense = F.normalize(patches, dim=1).unflatten(2, (rows, columns))
    return dense[..., 1::2, 1::2], dense


def expected_inverse_depth(
    logits: Tensor,  # [B, V, D, h, w]
    hypotheses: Tensor,  # [B, V, D]
) -> tuple[Tensor, Tensor]:
    """Turn scores into an inverse depth and how sure it is.

    Returns:
        - expectation of the inverse depth under softmax(logits) [B, V, h, w]
        - largest probability [B, V, h, w]
    """
    probability = logits.softmax(2)
    inverse = (probability * hypotheses[..., None, None]).sum(2)
    return inverse, probability.amax(2)
