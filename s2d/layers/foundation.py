"""The rows that a layer builds on, and the one place that keeps them as they are.

Rows are [foundation | new]. What may happen to a row in training, and what keeps it from a foundation row:

| path | guard |
|---|---|
| gradient, optimiser state | `hold` after every step: the kernel updates all visible rows, and their old bits are put back |
| clone | none needed: it appends |
| split | `not_divided`: a parent would be replaced by its children; a foundation row lends a copy instead, and that is split |
| prune, redundancy, importance | `not_removed` |
| opacity reset | `not_reset` |
| SH culling | `not_culled` |
| relocation, and whatever a later rule does to rows | `check` after every round: training stops rather than goes on with a layer that was changed |
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from s2d.gaussians import Gaussians
from s2d.layers.options import Freeze, Reset

OPACITY = "opacity_logits"


@dataclass(frozen=True)
class Foundation:
    """The first `num` rows, and what of them must not change."""

    num: int
    frozen: dict[str, Tensor]
    """Column → its values in the foundation's rows."""

    @staticmethod
    def of(gaussians: Gaussians, num: int, freeze: Freeze) -> "Foundation":
        """Take down the first `num` rows as they are now."""
        return Foundation(
            num,
            {
                name: tensor.detach()[:num].clone()
                for name, tensor in gaussians.tensors().items()
                if freeze == "all" or name != OPACITY
            },
        )

    @torch.no_grad()
    def hold(self, gaussians: Gaussians) -> None:
        """Put the frozen values back, whatever a step of the optimiser has made of them."""
        for name, values in self.frozen.items():
            getattr(gaussians, name)[: self.num] = values

    def check(self, gaussians: Gaussians, when: str) -> None:
        """Raise unless the frozen values are where they were, bit for bit.

        Raises:
            RuntimeError: They are not: a defect of the density control, not of the data.
        """
        for name, values in self.frozen.items():
            now = getattr(gaussians, name).detach()[: self.num]
            # As bits: a NaN must equal itself, and -0 must not equal 0.
            if now.shape != values.shape or not torch.equal(
                now.contiguous().view(torch.int32), values.view(torch.int32)
            ):
                raise RuntimeError(
                    f"{when} changed {name} of the layers below, which are frozen. This is a defect: please report it with the command."
                )

    def mask(self, num: int, device: torch.device | str = "cpu") -> Tensor:
        """True for the foundation's rows among `num`. [num]"""
        mask = torch.zeros(num, dtype=torch.bool, device=device)
        mask[: self.num] = True
        return mask

    def not_divided(self, rows: Tensor) -> Tensor:
        """Of the rows [N] to be split, those that may be."""
        return rows & ~self.mask(len(rows), rows.device)

    def not_removed(self, rows: Tensor) -> Tensor:
        """Of the rows [N] to be removed, those that may be."""
        return rows & ~self.mask(len(rows), rows.device)

    def not_reset(self, rows: Tensor, reset: Reset) -> Tensor:
        """Of the rows [N] whose opacity is to be lowered, those that may be."""
        return (
            rows
            if reset == "all" and OPACITY not in self.frozen
            else rows & ~self.mask(len(rows), rows.device)
        )

    def not_culled(self, rows: Tensor) -> Tensor:
        """Of the rows [N] whose colour is to be made simpler, those that may be."""
        return rows & ~self.mask(len(rows), rows.device)
