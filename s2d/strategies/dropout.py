"""Random dropout of Gaussians at training (DropGaussian, Park et al. 2025).

In each step every Gaussian is left out with probability r; r grows with the schedule, because overfitting does, until TAIL of it is left: the last
steps, where all are there, bring back the fine detail that half-trained neighbours have blurred (ours, not the paper's).
So those behind and beside get gradients that the front ones would have kept for themselves, and no photo is explained by one layer alone.

The paper makes up for the missing by opacity o / (1 - r), which can exceed 1. Here the mean logarithm of the transmittance stays what it
was: (1 - r) log(1 - o') = log(1 - o). For faint Gaussians that is the same, and o' < 1 always.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.device import generator_on

# Opacity 1e-9: far below 1/255, so it is not drawn.
LEFT_OUT = -20.0
# Share of the schedule, at its end, without dropout.
TAIL = 0.05


def drop_rate(largest: float, progress: float) -> float:
    """r at this share of the schedule."""
    return largest * max(progress, 0.0) if progress < 1 - TAIL else 0.0


def draw_kept(
    opacity_logits: Tensor,  # [N]
    rate: float,
    generator: torch.Generator,
) -> Tensor:
    """Which Gaussians stay in this step. [N] bool"""
    device = opacity_logits.device
    own = generator_on(device, generator)
    return torch.rand(len(opacity_logits), generator=own, device=device) >= rate


def dropped_logits(
    opacity_logits: Tensor,  # [N]
    kept: Tensor,  # [N] bool
    rate: float,
) -> Tensor:
    """Opacity logits for one training render: raised where kept, far below visibility where not. [N]

    With s = softplus(logit) = -log(1 - o) the raised logit is s' + log(o'), s' = s / (1 - r). Differentiable in `opacity_logits`.
    """
    raised, opacities = _raised(opacity_logits, rate)
    return (raised + opacities.log()).masked_fill(~kept, LEFT_OUT)


@torch.no_grad()
def dropped_opacity(
    opacity_logits: Tensor,  # [N]
    kept: Tensor,  # [N] bool
    rate: float,
) -> tuple[Tensor, Tensor]:
    """Return `dropped_logits` and their derivative by `opacity_logits`, o / ((1 - r) o') and 0 where left out. [N], [N]"""
    raised, opacities = _raised(opacity_logits, rate)
    slope = torch.sigmoid(opacity_logits) / ((1.0 - rate) * opacities)
    logits, left_out = raised + opacities.log(), ~kept
    return logits.masked_fill_(left_out, LEFT_OUT), slope.masked_fill_(left_out, 0.0)


def _raised(
    opacity_logits: Tensor,  # [N]
    rate: float,
) -> tuple[Tensor, Tensor]:
    """-> s' = -log(1 - o') [N], o' [N], of the faintest just not zero"""
    raised = F.softplus(opacity_logits) / (1.0 - rate)
    return raised, -torch.expm1(-raised.clamp(min=1e-12))
