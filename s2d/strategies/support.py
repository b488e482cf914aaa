"""Support: what was seen and what was invented, per Gaussian.

While training, blending weights are summed over the drawn samples, those of kept photos and those of fixed views (times the gradient's weight)
apart; children inherit their parent's sums. At the end it is counted how many kept photos see the Gaussian. Then

    support = (number of kept photos that see it) x (share of its weight that came from kept photos)

0: made up by the fixer, or seen by nobody. Below 1: mostly. 1: one photo, its depth is a guess. 2 and more: triangulated.
"""

from typing import Any

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.rasterize import rasterize
from s2d.sh import rgb_to_sh0
from s2d.strategies.blend_weights import blend_weights

EVERY = (
    10  # steps between two samples: a share needs no more, and each costs a render and its way back
)
# What each level of support is painted with: vermilion, yellow, blue, which colour-blind eyes tell apart too.
LEVELS = (
    ("made up", (0.84, 0.37, 0.0)),
    ("one photo", (0.94, 0.89, 0.26)),
    ("two photos or more", (0.0, 0.45, 0.70)),
)
# Sum of blending weights, in pixels, from which on a photo sees a Gaussian: half a pixel.
MIN_SEEN = 0.5


class Support:
    """Sums of blending weights over training samples; one row per Gaussian."""

    def __init__(self, num: int, device: torch.device | str = "cpu") -> None:
        self.weights = torch.zeros(num, 2, device=device)  # of kept photos, of fixed views

    def add(
        self,
        gaussians: Gaussians,
        camera: Cameras,
        is_kept: bool,
        gradient_weight: Tensor | None,  # [H, W, 1]
    ) -> None:
        """Take one training sample into the sums; `gradient_weight` as in the loss, None is 1 everywhere."""
        if gradient_weight is None:
            gradient_weight = self.weights.new_ones(camera.height, camera.width, 1)
        sums = blend_weights(gaussians, camera, gradient_weight.expand(-1, -1, 3))[:, 0]
        self.weights[:, 0 if is_kept else 1] += sums

    def follow(self, parents: Tensor) -> None:
        """Rows were added, moved or removed: row k comes from `parents[k]`. [M]"""
        self.weights = self.weights[parents]

    def of(self, gaussians: Gaussians, kept: Cameras) -> Tensor:
        """Support of each Gaussian, see the module's docstring; without any sample the share is 1. [N]"""
        views = torch.zeros_like(self.weights[:, 0])
        for camera in kept:
            ones = views.new_ones(camera.height, camera.width, 3)
            views += (blend_weights(gaussians, camera, ones)[:, 0] >= MIN_SEEN).float()
        total = self.weights.sum(1)
        share = torch.where(
            total > 0, self.weights[:, 0] / total.clamp(min=1e-12), torch.ones_like(total)
        )
        return views * share

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"].to(self.weights.device, copy=True)


def support_colours(
    support: Tensor,  # [N]
) -> Tensor:
    """Colour of each Gaussian by what holds it up, `LEVELS` at 0, 1, and 2 and more, mixed in between. [N, 3]"""
    none, one, more = (torch.tensor(colour, device=support.device) for _, colour in LEVELS)
    level = support.clamp(0, 2)[:, None]
    return torch.where(
        level < 1, torch.lerp(none, one, level), torch.lerp(one, more, level.clamp(min=1) - 1)
    )


def draw_support(
    gaussians: Gaussians,
    support: Tensor,  # [N]
    camera: Cameras,
) -> Tensor:
    """Paint a view by what holds it up, see `support_colours`; black where nothing is drawn. [H, W, 3]"""
    values = gaussians.detached()
    painted = Gaussians(
        values.means,
        values.log_scales,
        values.quats,
        values.opacity_logits,
        rgb_to_sh0(support_colours(support))[:, None],
        values.shN[:, :0],
    )
    return rasterize(painted, camera).rgb.squeeze(0)
