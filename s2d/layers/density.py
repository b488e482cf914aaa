"""Density control on [foundation | new]: 3DGS's rules, with a budget, and with a foundation that may lend copies and nothing else.

Foundation rows gather gradients like any other, and clones and children of theirs are new rows at the end: a coarse Gaussian is often in the
very place where the next layer needs fine ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from s2d.densify import RESET_OPACITY, DensifyPolicy, DensifyState, clone, prune, split
from s2d.layers.foundation import OPACITY, Foundation
from s2d.layers.options import Reset
from s2d.training import TrainingRun


def density_round(run: TrainingRun, policy: DensifyPolicy, foundation: Foundation) -> None:
    """Clone the small, split the large, prune the faint; `policy.max_gaussians` counts all rows.

    A large foundation row is cloned, and its clone is split: two Gaussians more, where a large new row makes one more.
    """
    gaussians, optimizer = run.gaussians, run.optimizer
    if policy.enabled:
        gradient = run.densify_state.mean_gradient()
        large = gaussians.log_scales.detach().amax(1).exp() > policy.split_scale * run.scene_extent
        divided = foundation.not_divided(large)
        cost = torch.where(large & ~divided, 2, 1)
        grow = affordable(
            gradient,
            gradient >= policy.grad_threshold,
            cost,
            policy.max_gaussians - gaussians.num,
        )
        cloned = grow & ~divided
        clone(gaussians, optimizer, cloned)
        # Clones stand behind the old rows, in the order of their parents.
        split(gaussians, optimizer, torch.cat([grow & divided, large[cloned]]), run.generator)
    opacities = torch.sigmoid(gaussians.opacity_logits.detach())
    remove_rows(run, opacities < policy.min_opacity, foundation)
    run.densify_state = DensifyState.zeros(gaussians.num, gaussians.means.device)


def affordable(
    gradient: Tensor,  # [N]
    wanted: Tensor,  # [N]
    cost: Tensor,  # [N]
    room: int,
) -> Tensor:
    """Of the rows that are wanted, those with the largest gradients whose costs together fit into the room. [N] bool"""
    rows = wanted.nonzero()[:, 0]
    rows = rows[gradient[rows].argsort(descending=True, stable=True)]
    chosen = torch.zeros_like(wanted)
    chosen[rows[cost[rows].cumsum(0) <= room]] = True
    return chosen


def remove_rows(run: TrainingRun, doomed: Tensor, foundation: Foundation) -> int:
    """Remove new rows of the mask `doomed` [N], unless none would be left at all; returns how many. Statistics stay with their rows."""
    doomed = foundation.not_removed(doomed)
    if bool(doomed.all()):
        return 0
    prune(run.gaussians, run.optimizer, doomed)
    state = run.densify_state
    if len(state.grad_sum) == len(doomed):
        run.densify_state = DensifyState(state.grad_sum[~doomed], state.num_views[~doomed])
    return int(doomed.sum())


@dataclass(frozen=True)
class ResetRule:
    """Whose opacities are lowered, and how often."""

    whose: Reset = "new"
    every: int = 3000
    foundation_to: float | None = None
    """Opacity that foundation rows are set to; None lowers them like all others."""


@torch.no_grad()
def reset_opacities(run: TrainingRun, rule: ResetRule, foundation: Foundation) -> None:
    """Lower opacities to at most 0.01 and forget their moments: floaters must earn theirs again."""
    parameter = run.gaussians.opacity_logits
    everyone = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
    rows = foundation.not_reset(everyone, rule.whose)
    ceiling = torch.logit(parameter.new_tensor(RESET_OPACITY))
    lowered = parameter.clamp(max=ceiling)
    if rule.foundation_to is not None:
        lowered[foundation.mask(len(parameter), parameter.device)] = torch.logit(
            parameter.new_tensor(rule.foundation_to)
        )
    parameter[rows] = lowered[rows]
    for group in run.optimizer.param_groups:
        if group["name"] == OPACITY:
            state = run.optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key][rows] = 0
