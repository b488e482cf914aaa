"""Fewer and simpler Gaussians for the same pictures, after Reduced-3DGS (Papantonakis et al. 2024) and LightGaussian (Fan et al. 2023).

Every function measures and returns a mask of all rows; whether a row may be touched at all is the foundation's business.
"""

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.rasterize import rasterize
from s2d.sh import SH_C0, eval_sh

# Gaussians in the room of one pixel; more of them draw nothing that these could not.
PER_PIXEL_ROOM = 3
# Reduced-3DGS: colours that spread less than this over the views are one colour; a distance of 6 of 255 between colours is not seen.
FLAT_COLOUR, SAME_COLOUR = 0.04, 6 / 255
# Shares of a layer's steps: rounds of importance pruning, and SH culling after the last.
IMPORTANCE_SHARES = (0.55, 0.6, 0.65, 0.7)
SH_CULL_SHARE = 0.75


def redundant_rows(
    gaussians: Gaussians,
    cameras: Cameras,
    first: Tensor,  # [N]
) -> Tensor:
    """Find Gaussians beyond the third in the room of one pixel, the faintest ones.

    The room is a cube as wide as a pixel of the nearest camera is at that depth, rounded down to a power of two, so that cubes of one size form a
    grid. Gaussians in front of no camera are in no room.

    Args:
        gaussians: N rows.
        cameras: Of the resolution in question, where the Gaussians are.
        first: Rows that come first in their room however faint they are, because they stay anyway. [N] bool

    Returns:
        [N] bool
    """
    means = gaussians.means.detach()
    depths = means @ cameras.viewmats[:, 2, :3].T + cameras.viewmats[:, 2, 3]  # [N, C]
    footprints = torch.where(depths > 0, depths / cameras.Ks[:, 0, 0], torch.inf).amin(1)
    seen = footprints.isfinite()
    exponent = torch.where(seen, footprints, 1.0).log2().floor()
    cells = torch.cat([(means / exponent.exp2()[:, None]).floor(), exponent[:, None]], 1)
    _, room = torch.unique(cells, dim=0, return_inverse=True)
    score = torch.sigmoid(gaussians.opacity_logits.detach()) + first
    by_score = score.argsort(descending=True, stable=True)
    order = by_score[room[by_score].argsort(stable=True)]  # room by room, the strongest first
    counts = torch.bincount(room)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[room[order]]
    return seen & (rank >= PER_PIXEL_ROOM)


def contributions(gaussians: Gaussians, cameras: Cameras) -> Tensor:
    """Sum each Gaussian's blending weights over all pixels of all cameras. [N]

    The derivative of a picture by the constant colour of a Gaussian is its blending weight, so one backward pass measures all of them.
    """
    grey = gaussians.detached()
    grey.sh0 = torch.zeros_like(grey.sh0).requires_grad_(True)
    grey.shN = grey.shN[:, :0]
    for camera in cameras:
        rasterize(grey, camera).rgb[..., 0].sum().backward()
    return grey.sh0.grad[:, 0, 0] / SH_C0


def least_important(
    weights: Tensor,  # [N]
    candidates: Tensor,  # [N]
    share: float,
) -> Tensor:
    """Find this share of the candidates, those with the smallest weights. [N] bool"""
    rows = candidates.nonzero()[:, 0]
    rows = rows[weights[rows].argsort(stable=True)]
    chosen = torch.zeros_like(candidates)
    chosen[rows[: int(share * len(rows))]] = True
    return chosen


@torch.no_grad()
def cull_colours(gaussians: Gaussians, cameras: Cameras, candidates: Tensor) -> int:
    """Take view dependence from Gaussians that do not show it: all of it, or the higher degrees.

    A Gaussian whose colour hardly varies over the cameras that see it gets their mean colour. Otherwise the lowest degree is kept that
    comes within what is seen as the same colour. One that no camera sees keeps its constant colour.

    Args:
        gaussians: Their sh0 and shN change in place.
        cameras: The kept ones, where the Gaussians are.
        candidates: Rows that may change. [N] bool

    Returns:
        How many of them have no view dependence left.
    """
    values = gaussians.detached()
    seen = torch.stack([rasterize(values, camera).radii[0] > 0 for camera in cameras])  # [C, N]
    weight = seen / seen.sum(0).clamp(min=1)
    directions = values.means[None] - cameras.centers[:, None]
    all_degrees = torch.cat([values.sh0, values.shN], 1)

    def colours(degree: int) -> Tensor:
        return eval_sh(all_degrees[None, :, : (degree + 1) ** 2], directions)  # [C, N, 3]

    def over_views(values: Tensor) -> Tensor:
        return torch.einsum("cn,cnk->nk", weight, values)

    full = colours(values.sh_degree)
    mean = over_views(full)
    spread = over_views((full - mean).square()).sqrt().amax(1)
    flat = candidates & (spread < FLAT_COLOUR)
    shown = flat & seen.any(0)
    gaussians.sh0[shown] = ((mean[shown] - 0.5) / SH_C0)[:, None]
    gaussians.shN[flat] = 0
    left = candidates & ~flat
    for degree in range(1, values.sh_degree):
        distance = over_views((full - colours(degree)).square()).sum(1).sqrt()
        enough = left & (distance < SAME_COLOUR)
        higher = gaussians.shN[enough]
        higher[:, (degree + 1) ** 2 - 1 :] = 0
        gaussians.shN[enough] = higher
        left &= ~enough
    return int(flat.sum())
