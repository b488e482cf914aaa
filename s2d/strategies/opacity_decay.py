"""Opacity decay (Binocular3DGS, Han et al. 2024): o ← λ o after every step.

Gaussians with large gradients win their opacity back in their next step; floaters, which no loss holds up, fade until they are pruned.
"""

import torch
from torch import Tensor


@torch.no_grad()
def decay_opacity(
    opacity_logits: Tensor,  # [N]
    factor: float,
) -> None:
    """Multiply all opacities, in place.

    The paper's factor is 0.995 with 30,000 steps on dense gradients of a whole photo; per-step factors act through Adam's step size: at
    o = 0.5 a factor of 0.995 moves the logit by 0.01, Adam by up to 0.025.
    """
    opacities = factor * torch.sigmoid(opacity_logits)
    opacity_logits.copy_(torch.logit(opacities, eps=1e-6))
