"""Growth where the photos are not yet explained (Bulò et al. 2024, "Revising Densification in Gaussian Splatting").

The screen gradient of 3DGS is small where a blurred patch is wrong everywhere alike. The score here is the error that a Gaussian has a part in,
E_k = max over photos of Σ_u w_k(u) e(u), e the mean absolute difference of colours; the Gaussians with the largest scores are cloned or split.
(The paper takes SSIM's error and a threshold; a share of the number per round makes the threshold's unit immaterial.)
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.rasterize import rasterize
from s2d.strategies.blend_weights import blend_weights


@torch.no_grad()
def residual_scores(gaussians: Gaussians, photos: Iterable[tuple[Cameras, Tensor]]) -> Tensor:
    """Score each Gaussian by its part in the error of the photo that shows most of it.

    Args:
        gaussians: N Gaussians.
        photos: Camera and photo [H, W, 3] of each kept view.

    Returns:
        In pixels times colour difference, >= 0. [N]
    """
    values = gaussians.detached()
    scores = torch.zeros(values.num, device=values.means.device)
    for camera, photo in photos:
        rgb = rasterize(values, camera).rgb.squeeze(0)
        error = (rgb - photo.to(rgb.device)).abs().mean(-1, keepdim=True)
        torch.maximum(
            scores, blend_weights(values, camera, error.expand(-1, -1, 3))[:, 0], out=scores
        )
    return scores


def most_wanted(
    scores: Tensor,  # [N]
    growth: float,
    max_gaussians: int,
) -> Tensor:
    """Choose the Gaussians with the largest scores above 0: at most a share `growth`, and no more than the budget has room for. [N] bool"""
    num = len(scores)
    count = max(0, min(int(growth * num), max_gaussians - num, int((scores > 0).sum())))
    chosen = torch.zeros(num, dtype=torch.bool, device=scores.device)
    chosen[scores.topk(count).indices] = True
    return chosen
