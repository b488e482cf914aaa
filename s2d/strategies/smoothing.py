"""The 3D smoothing filter of Mip-Splatting (Yu et al. 2024): no Gaussian is finer than the photos' pixels can show.

A photo samples a surface at depth d every d / f world units. With ν the highest such rate (f / d) over the kept photos that see a Gaussian, its
covariance becomes Σ + (0.2 / ν²) I and its opacity is multiplied by √(|Σ| / |Σ'|). Training goes through the filter; what is saved is the
filtered Gaussians, which every viewer draws as they are. `unfiltered` takes the filter off again where training goes on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.cameras import Cameras
from s2d.geometry import project

VARIANCE = 0.2  # of the filter, in squared sampling intervals; the paper's
MARGIN = 0.15  # of the picture's size: a Gaussian with its centre this far outside is still seen
# Logarithm of the smallest standard deviation that `unfiltered` gives back, relative to the filter's.
FLOOR = 1e-3


@torch.no_grad()
def filter_variances(
    means: Tensor,  # [N, 3]
    cameras: Cameras,
) -> Tensor:
    """Variance of each Gaussian's filter in squared world units; of one that no camera sees, the smallest of all. [N]"""
    rates = torch.zeros_like(means[:, 0])
    for camera in cameras.to(means.device):
        xy, z = project(means, camera.Ks[0], camera.viewmats[0])
        size = xy.new_tensor(camera.sizes[0])
        seen = (z > 0) & ((xy > -MARGIN * size) & (xy < (1 + MARGIN) * size)).all(1)
        rate = float(camera.Ks[0, 0, 0]) / z.clamp(min=1e-6)
        rates = torch.where(seen, torch.maximum(rates, rate), rates)
    if not bool((rates > 0).any()):
        return torch.zeros_like(rates)
    rates = torch.where(rates > 0, rates, rates.max())
    return VARIANCE / rates**2


def filtered(
    log_scales: Tensor,  # [N, 3]
    opacity_logits: Tensor,  # [N]
    variances: Tensor,  # [N]
) -> tuple[Tensor, Tensor]:
    """Log scales and opacity logits of the filtered Gaussians. Differentiable in the first two. [N, 3], [N]"""
    squared = (2 * log_scales).exp() + variances[:, None]
    wider = 0.5 * squared.log()
    return wider, _scaled_logits(opacity_logits, (log_scales - wider).sum(1))


@torch.no_grad()
def unfiltered(
    log_scales: Tensor,  # [N, 3]
    opacity_logits: Tensor,  # [N]
    variances: Tensor,  # [N]
) -> tuple[Tensor, Tensor]:
    """Invert `filtered`, as far as digits allow: a Gaussian much finer than its filter comes back with a thousandth of the filter's size."""
    squared = (2 * log_scales).exp() - variances[:, None]
    finer = 0.5 * torch.maximum(squared, (FLOOR**2 * variances)[:, None]).clamp(min=1e-30).log()
    return finer, _scaled_logits(opacity_logits, (log_scales - finer).sum(1))


def _scaled_logits(logits: Tensor, log_factor: Tensor) -> Tensor:
    """Logits of the opacities times exp(log_factor), at most 1 - 1e-6: log o' - log(1 - o')."""
    log_opacity = (F.logsigmoid(logits) + log_factor).clamp(max=-1e-6)
    return log_opacity - torch.log(-torch.expm1(log_opacity))
