"""Density control: where Gaussians are added, divided and removed.

The *mechanism* is free functions over (gaussians, optimizer, state): `clone`, `split`, `prune`, `reset_opacity`. They
all go through `update_rows`, the one place that keeps Adam's moments aligned with the rows they belong to. The
*policy*, when and which, is a frozen dataclass and `densify_and_prune`. Rules and numbers are 3DGS's (Kerbl et al.
2023, section 5.2 and their published settings) unless a comment says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2d.gaussians import Gaussians
from s2d.geometry import quat_to_rotation

SPLIT_CHILDREN = 2
# Two children of 1/1.6 the size cover about what their parent did.
SPLIT_SHRINK = 1.6
# Opacity after a reset: above the pruning threshold, so that what is needed has time to come back.
RESET_OPACITY = 0.01


@dataclass(frozen=True)
class DensifyPolicy:
    """When to add and remove Gaussians, and which."""

    enabled: bool = True
    """Off: the number of Gaussians stays as initialised, only transparent ones are pruned."""
    start_step: int = 500
    """First step with density control; statistics are gathered from the start."""
    stop_share: float = 0.5
    """Last step with density control, as a share of all steps."""
    every: int = 100
    """Steps between two rounds."""
    grad_threshold: float = 2e-4
    """Mean length of the 2D position gradient (normalised device units) above which a Gaussian is cloned or split. Lower grows more."""
    split_scale: float = 0.01
    """Size, in scene extents, above which a Gaussian is split instead of cloned."""
    min_opacity: float = 0.005
    """Gaussians fainter than this are removed."""
    reset_every: int = 3000
    """Steps between two resets of all opacities to 0.01. 0 disables."""
    max_gaussians: int = 150_000
    """Never grow beyond this number; those with the largest gradients go first."""


@dataclass
class DensifyState:
    """What is measured between two rounds, per Gaussian."""

    grad_sum: Tensor  # [N] sum of the 2D gradient's length over the views that saw the Gaussian
    num_views: Tensor  # [N] how many those were
    parents: Tensor | None = None  # [N] which row each was in before the round; None: no round yet

    @staticmethod
    def zeros(
        num: int, device: torch.device | str = "cpu", parents: Tensor | None = None
    ) -> "DensifyState":
        return DensifyState(
            torch.zeros(num, device=device), torch.zeros(num, device=device), parents
        )

    def rows(self, stay: Tensor) -> "DensifyState":
        """Of those rows alone [M]; not of a new round, so without parents."""
        return DensifyState(self.grad_sum[stay], self.num_views[stay])

    def mean_gradient(self) -> Tensor:
        """Average length over the views that saw a Gaussian; 0 if none did. [N]"""
        return self.grad_sum / self.num_views.clamp(min=1)


def update_rows(
    gaussians: Gaussians,
    optimizer: torch.optim.Adam,
    param_fn: Callable[[str, Tensor], Tensor],
    moment_fn: Callable[[Tensor], Tensor],
) -> None:
    """Replace every parameter and its Adam moments together: the only function that touches optimiser state.

    Args:
        gaussians: Changed in place: each tensor becomes a new leaf, `param_fn(name, old)`.
        optimizer: Its groups are named after the tensors; changed in place.
        param_fn: New values of a tensor; may change the number of rows.
        moment_fn: New value of `exp_avg` and `exp_avg_sq`; must change the rows in the same way.
    """
    for group in optimizer.param_groups:
        name = group["name"]
        old = group["params"][0]
        new = param_fn(name, old.detach()).contiguous().requires_grad_(True)
        state = optimizer.state.pop(old, None)
        if state is not None:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = moment_fn(state[key]).contiguous()
            optimizer.state[new] = state
        group["params"] = [new]
        setattr(gaussians, name, new)


def clone(gaussians: Gaussians, optimizer: torch.optim.Adam, mask: Tensor) -> None:
    """Append a copy of the Gaussians in `mask` [N]; copies start with zero moments and then move apart."""
    update_rows(
        gaussians,
        optimizer,
        lambda _, values: torch.cat([values, values[mask]]),
        lambda moment: torch.cat([moment, torch.zeros_like(moment[mask])]),
    )


def split(
    gaussians: Gaussians, optimizer: torch.optim.Adam, mask: Tensor, generator: torch.Generator
) -> None:
    """Replace the Gaussians in `mask` [N] by two smaller ones each, drawn from the Gaussian itself.

    The rest keeps its order; the children are appended.
    """
    values = gaussians.detached()
    scales = values.log_scales[mask].exp().repeat(SPLIT_CHILDREN, 1)
    noise = torch.randn(scales.shape, generator=generator).to(scales.device) * scales
    rotations = quat_to_rotation(values.quats[mask]).repeat(SPLIT_CHILDREN, 1, 1)
    offsets = (rotations @ noise[:, :, None])[:, :, 0]

    def children(name: str, old: Tensor) -> Tensor:
        new = old[mask].repeat(SPLIT_CHILDREN, *[1] * (old.dim() - 1))
        if name == "means":
            new = new + offsets
        elif name == "log_scales":
            new = (scales / SPLIT_SHRINK).log()
        return torch.cat([old[~mask], new])

    def moments(moment: Tensor) -> Tensor:
        born = torch.zeros_like(moment[mask]).repeat(SPLIT_CHILDREN, *[1] * (moment.dim() - 1))
        return torch.cat([moment[~mask], born])

    update_rows(gaussians, optimizer, children, moments)


def prune(gaussians: Gaussians, optimizer: torch.optim.Adam, mask: Tensor) -> None:
    """Remove the Gaussians in `mask` [N]."""
    update_rows(gaussians, optimizer, lambda _, values: values[~mask], lambda moment: moment[~mask])


def reset_opacity(gaussians: Gaussians, optimizer: torch.optim.Adam) -> None:
    """Lower every opacity to at most 0.01 and forget its moments, so that floaters must earn theirs again."""
    ceiling = torch.logit(torch.tensor(RESET_OPACITY)).item()
    for group in optimizer.param_groups:
        if group["name"] == "opacity_logits":
            parameter = group["params"][0]
            with torch.no_grad():
                parameter.clamp_(max=ceiling)
            state: dict[str, Any] = optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key].zero_()


def densify_and_prune(
    policy: DensifyPolicy,
    gaussians: Gaussians,
    optimizer: torch.optim.Adam,
    state: DensifyState,
    scene_extent: float,
    generator: torch.Generator,
    grow: Tensor | None = None,  # [N]
    doomed: Tensor | None = None,  # [N]
) -> DensifyState:
    """Run one round: clone the small, split the large, prune the faint.

    3DGS also removes Gaussians larger than a tenth of the scene extent, from its first opacity reset on. With few photos
    from one side the extent (radius of the rig) is small against the scene, and that rule removes nearly everything.

    Args:
        policy: Thresholds.
        gaussians, optimizer: Changed in place.
        state: Statistics since the last round.
        scene_extent: Radius of the camera rig in world units.
        generator: Source of the positions of split children; the only randomness.
        grow: Who is cloned or split; by the gradient and its threshold where None. [N] bool
        doomed: Who goes besides the faint, with all children. [N] bool

    Returns:
        Fresh statistics for the new rows, with their parents.
    """
    parents = torch.arange(gaussians.num, device=gaussians.means.device)
    if policy.enabled:
        if grow is None:
            gradient = state.mean_gradient()
            grow = _largest(
                gradient, gradient >= policy.grad_threshold, policy.max_gaussians - gaussians.num
            )
        largest_scale = gaussians.log_scales.detach().amax(1).exp()
        small = largest_scale <= policy.split_scale * scene_extent
        num_clones = int((grow & small).sum())
        clone(gaussians, optimizer, grow & small)
        to_split = torch.cat([grow & ~small, grow.new_zeros(num_clones)])
        split(gaussians, optimizer, to_split, generator)
        parents = torch.cat([parents, parents[grow & small]])
        parents = torch.cat([parents[~to_split], parents[to_split].repeat(SPLIT_CHILDREN)])
    faint = torch.sigmoid(gaussians.opacity_logits.detach()) < policy.min_opacity
    doomed = faint if doomed is None else faint | doomed[parents]
    # An empty scene can't be optimised or saved: when all are doomed, keep them and let the next round decide.
    if not bool(doomed.all()):
        prune(gaussians, optimizer, doomed)
        parents = parents[~doomed]
    return DensifyState.zeros(gaussians.num, gaussians.means.device, parents)


def _largest(values: Tensor, mask: Tensor, room: int) -> Tensor:
    """Keep at most `room` of `mask` [N], those with the largest `values`."""
    if int(mask.sum()) <= room:
        return mask
    chosen = torch.zeros_like(mask)
    if room > 0:
        chosen[torch.where(mask, values, values.new_tensor(-1.0)).topk(room).indices] = True
    return chosen
