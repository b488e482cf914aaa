"""Bounds on a Gaussian's size and shape, kept after every step.

Large Gaussians are haze that few photos contradict; needles (PhysGaussian, Xie et al. 2024; effective-rank regularisation, Hyung et al. 2024)
fit one photo's pixels and show from the side. PhysGaussian bounds the longest axis by the shortest; here it is bounded by the middle one, because
a flat disc is what a surface wants and a needle is not.
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def bound_scales(
    log_scales: Tensor,  # [N, 3]
    max_log_scale: float | None,
    max_elongation: float,
) -> None:
    """Clamp, in place: every axis to exp(max_log_scale), the longest to `max_elongation` times the middle one. None and 0: no bound."""
    if max_log_scale is not None:
        log_scales.clamp_(max=max_log_scale)
    if max_elongation > 0:
        x, y, z = log_scales.unbind(1)
        # The median of three, three times as fast as torch's.
        middle = torch.maximum(torch.minimum(x, y), torch.minimum(torch.maximum(x, y), z))
        longest = middle[:, None] + math.log(max_elongation)
        torch.minimum(log_scales, longest, out=log_scales)
