"""Depth of stage 0 as a supervisor of layers: relative inverse depth, patch by patch.

Notation: q = 1 / z, inverse depth; w a pixel's weight, 0 where either depth is unknown; a bar is the weighted mean over a patch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.images import resize_image
from s2d.optim import decayed_rate

PATCH = 16  # pixels; smaller than most surfaces, larger than stereo's noise
# LapisGS: from a quarter of the steps on; before that, depth of a half-made scene says little. It ends at a hundredth of the weight.
START_SHARE, FINAL_SHARE = 0.25, 0.01
MIN_ALPHA = 0.5  # fainter, the expected depth is not one of a surface


class DepthTarget(NamedTuple):
    """What is known of one view's depth."""

    inv_depth: Tensor  # [H, W] per world unit, 0 where unknown
    weight: Tensor  # [H, W] confidence in [0, 1], 0 where unknown


def depth_target(
    depth: Tensor,  # [H, W]
    confidence: Tensor,  # [H, W]
    width: int,
    height: int,
) -> DepthTarget:
    """Bring a depth map to a view's size: inverse depths are averaged by confidence over the area of each new pixel.

    Args:
        depth: Camera z, world units, <= 0 where there is none. [H, W]
        confidence: In [0, 1]. [H, W]
        width, height: Pixels, no more than the map has.
    """
    weight = torch.where(depth > 0, confidence, 0.0)
    scale = float(1 / depth[depth > 0].min()) if bool((depth > 0).any()) else 1.0
    # resize_image keeps to [0, 1]: in units of the largest inverse depth, then.
    inverse = torch.where(depth > 0, 1 / depth.clamp(min=1e-12), 0.0) / scale
    stacked = torch.stack([inverse * weight, weight], -1)
    summed, weight = resize_image(stacked, width, height).unbind(-1)
    return DepthTarget(scale * summed / weight.clamp(min=1e-6) * (weight > 1e-6), weight)


def relative_depth_loss(
    depth: Tensor,  # [H, W, 1]
    alpha: Tensor,  # [H, W, 1]
    target: DepthTarget,
    patch: int = PATCH,
) -> Tensor:
    """Compare inverse depths within patches: mean of w |(q - q̄) - (t - t̄)| / t̄.

    A patch may lie nearer or farther as a whole: stereo and networks know the shape of a surface better than its place. The division makes it
    relative, so that near and far count alike; 0.01 is a bump of one percent of the distance.

    Args:
        depth: Rendered camera z, world units; 0 where nothing was drawn. [H, W, 1]
        alpha: Rendered. [H, W, 1]
        target: Of the same view and size.
        patch: Side in pixels.

    Returns:
        Scalar, 0 where no pixel is known. Differentiable in `depth`.
    """
    z, drawn = depth[..., 0], (alpha.detach()[..., 0] > MIN_ALPHA) & (depth.detach()[..., 0] > 0)
    weight = target.weight * drawn
    q = torch.where(drawn, 1 / torch.where(drawn, z, 1.0), 0.0)
    mean_q, mean_t = (_patch_mean(values, weight, patch) for values in (q, target.inv_depth))
    bump = (q - mean_q) - (target.inv_depth - mean_t)
    return (weight * bump.abs() / mean_t.clamp(min=1e-12)).sum() / weight.sum().clamp(min=1e-6)


def depth_weight(initial: float, progress: float) -> float:
    """The weight at a share of a layer's steps: 0 at first, then `initial`, falling to a hundredth of it."""
    if initial == 0 or progress < START_SHARE:
        return 0.0
    later = (progress - START_SHARE) / (1 - START_SHARE)
    return decayed_rate(initial, FINAL_SHARE * initial, later)


def _patch_mean(values: Tensor, weight: Tensor, patch: int) -> Tensor:
    """Weighted mean over the patch that a pixel is in; patches at the right and lower edge may be smaller. [H, W]"""
    height, width = values.shape
    both = torch.stack([values * weight, weight])
    both = F.pad(both, (0, -width % patch, 0, -height % patch))
    summed, total = F.avg_pool2d(both[None], patch)[0]
    mean = summed / total.clamp(min=1e-12)
    return mean.repeat_interleave(patch, 0).repeat_interleave(patch, 1)[:height, :width]
