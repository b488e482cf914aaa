"""The Gaussians that the model predicts, for B scenes at once, and how they are looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.hier.views import Views
from s2d.rasterize import rasterize

# Opacities this near to 0 or 1 have no finite logit in float32.
OPACITY_MARGIN = 1e-6


@dataclass
class HierGaussians:
    """N Gaussians in each of B scenes, level after level, coarsest first; world coordinates and standard conventions."""

    means: Tensor  # [B, N, 3] world
    log_scales: Tensor  # [B, N, 3] log of world units
    quats: Tensor  # [B, N, 4] wxyz, world, unit
    opacities: Tensor  # [B, N] in (0, 1)
    sh: Tensor  # [B, N, K, 3] world
    levels: Tensor  # [N] int64: the level that each row comes from, ascending

    @property
    def num(self) -> int:
        return self.means.shape[1]

    def scene(self, b: int) -> Gaussians:
        """Return scene `b` as raw parameters, as everything else here takes them. Differentiable."""
        return Gaussians(
            means=self.means[b],
            log_scales=self.log_scales[b],
            quats=self.quats[b],
            opacity_logits=torch.logit(self.opacities[b], eps=OPACITY_MARGIN),
            sh0=self.sh[b, :, :1],
            shN=self.sh[b, :, 1:],
        )


def render(
    gaussians: HierGaussians,
    views: Views,
) -> Tensor:
    """Look at every scene from its views, over black.

    The rasteriser draws nothing nearer than 0.2 world units. Each scene is therefore drawn in units of its own smallest `near`, which
    changes nothing else; the pictures do not depend on the unit of the world.

    Args:
        gaussians: Of B scenes.
        views: Cameras of the same scenes; their images are not read. V views

    Returns:
        Pictures, 0 and above; not clamped at 1. [B, V, 3, H, W]

    Differentiable in the Gaussians.
    """
    pictures = []
    for b in range(views.num_scenes):
        unit = views.near[b].min()
        scene = gaussians.scene(b)
        scene.means = scene.means / unit
        scene.log_scales = scene.log_scales - unit.log()
        viewmats = views.viewmats[b].clone()
        viewmats[:, :3, 3] /= unit
        cameras = Cameras(
            viewmats=viewmats,
            Ks=views.Ks[b],
            sizes=((views.width, views.height),) * views.num_views,
            names=tuple(str(v) for v in range(views.num_views)),
        )
        pictures.append(rasterize(scene, cameras).rgb.permute(0, 3, 1, 2))
    return torch.stack(pictures)
