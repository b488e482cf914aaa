"""Gaussians that need no data, as plain tensors: for benchmarks on machines that have little beside torch."""

from __future__ import annotations

import torch
from torch import Tensor


def synthetic_tensors(num: int) -> dict[str, Tensor]:
    """Gaussians as a trained scene has them: flat, of very different sizes, on surfaces one behind the other, a third out of sight."""
    layers = torch.tensor([2.0, 3.0, 4.5, 7.0])[torch.randint(4, (num,))]
    x, y = (torch.rand(2, num) * 2 - 1) * torch.tensor(
        [[0.85], [0.65]]
    )  # a third outside of the view
    relief = 1 + 0.08 * torch.sin(9 * x + layers) * torch.cos(7 * y - layers)
    z = layers * relief
    means = torch.stack([x * z, y * z, z], dim=1)
    # As large as the distance to the neighbours, with the spread that an optimisation gives it.
    spacing = z * (4 * 4 * 0.85 * 0.65 / num) ** 0.5
    sizes = 0.55 * spacing[:, None] * torch.exp(0.6 * torch.randn(num, 3))
    sizes[:, 2] *= 0.2
    return {
        "means": means,
        "log_scales": sizes.log(),
        "quats": torch.randn(num, 4),
        "opacity_logits": 0.5 + 2.0 * torch.randn(num),
        "sh0": torch.randn(num, 1, 3),
        "shN": 0.1 * torch.randn(num, 15, 3),
    }
