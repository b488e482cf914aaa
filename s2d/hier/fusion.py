"""What one level tells the next: where the picture is still wrong, and how much of the older Gaussians should remain.

Error Aware: the Gaussians so far are rendered into the context views themselves, and the absolute error is an input of the next level. Modulating Fusion:
every older Gaussian compares itself with what the new level puts at its place, and fades by a weight in (0, 1). The error gates the comparison: where
nothing is wrong, the weight depends on no Gaussian.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.hier.blocks import reduced
from s2d.hier.gaussians import HierGaussians, render
from s2d.hier.views import Views

HIDDEN = 32


def context_error(
    gaussians: HierGaussians | None,
    views: Views,
    height: int,
    width: int,
) -> Tensor:
    """Measure |picture - render| in the context views.

    Args:
        gaussians: Those so far; where there are none, the error is 0.
        views: Context views.
        height: Of the result; what lies below or right of the pictures is 0.
        width: Of the result.

    Returns:
        [B, V, 3, height, width]

    Differentiable.
    """
    if gaussians is None:
        return views.images.new_zeros(*views.images.shape[:3], height, width)
    error = (views.images - render(gaussians, views)).abs()
    return F.pad(error, (0, width - views.width, 0, height - views.height))


class Fading(nn.Module):
    """The Modulating Fusion Module; one for all levels."""

    def __init__(self, num_parameters: int):
        """`num_parameters`: numbers that describe a Gaussian: raw scale, quaternion and SH, and its opacity."""
        super().__init__()
        self.first = nn.Conv1d(2 * num_parameters, HIDDEN, 1)
        self.second = nn.Conv1d(HIDDEN, HIDDEN, 1)
        self.third = nn.Conv1d(HIDDEN, HIDDEN, 1)
        self.weight = nn.Conv1d(HIDDEN, 1, 1)

    def forward(self, old: Tensor, new: Tensor, error: Tensor) -> Tensor:
        """Weigh the Gaussians of one older level.

        Args:
            old: Their parameters. [B, V, P, h, w]
            new: Those of the newest level, on any multiple of this grid. [B, V, P, H, W]
            error: Of the context views, on any multiple of this grid. [B, V, 3, H', W']

        Returns:
            Weights in (0, 1). [B, V, h, w]
        """
        num_scenes, num_views, _, height, width = old.shape
        new = reduced(new.flatten(0, 1), new.shape[-1] // width).unflatten(0, (num_scenes, -1))
        error = reduced(error.flatten(0, 1).mean(1, keepdim=True), error.shape[-1] // width)
        both = torch.cat([old, new], 2).transpose(1, 2).flatten(2)  # [B, 2 P, V h w]
        for layer in (self.first, self.second):
            # One group: mean and deviation over all Gaussians and channels of a scene, as published; no view has a part of its own.
            both = F.gelu(F.group_norm(layer(both), 1))
        gate = error.reshape(num_scenes, 1, -1)
        weights = self.weight(F.gelu(self.third(both * gate))).to(old.dtype).sigmoid()
        return weights.reshape(num_scenes, num_views, height, width)
