"""Support in the report: the final render painted by what holds it up, and what the colours mean (docs/strategies.md)."""

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.rasterize import rasterize
from s2d.strategies.support import LEVELS, draw_support

# Share of the colour; the rest is the render in grey, so that one sees what is painted.
PAINT = 0.65
LUMA = (0.299, 0.587, 0.114)


def support_overlay(
    gaussians: Gaussians,
    support: Tensor,  # [N]
    camera: Cameras,
) -> Tensor:
    """Lay the colours of support over the render in grey; on the CPU, wherever the Gaussians are. [H, W, 3]"""
    grey = rasterize(gaussians, camera).rgb[0].cpu().clamp(0, 1) @ torch.tensor(LUMA)
    painted = draw_support(gaussians, support, camera).cpu()
    return torch.lerp(grey[..., None].expand_as(painted), painted, PAINT).clamp(0, 1)


def support_legend() -> str:
    """HTML of the legend."""
    swatches = "".join(
        f'<span class="swatch" style="--swatch: rgb({", ".join(f"{255 * c:.0f}" for c in colour)})">{name}</span>'
        for name, colour in LEVELS
    )
    return f'<p class="legend muted">Support, what holds the final picture up: {swatches}</p>'
