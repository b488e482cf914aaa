"""Average of the parameters over the last steps (stochastic weight averaging, Izmailov et al. 2018).

Apart from the centres no rate falls, so the last steps wander around the optimum by what single photos want. The mean is nearer to it.
"""

from typing import Any

import torch
from torch import Tensor

from s2d.gaussians import Gaussians

EVERY = 10  # steps between two samples: neighbours are nearly equal


class Average:
    """Running mean of a set of Gaussians; starts anew when their number changes."""

    def __init__(self) -> None:
        self.count = 0
        self.means: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, gaussians: Gaussians) -> None:
        """Take the parameters as they are into the mean."""
        tensors = gaussians.detached().tensors()
        if not self.means or len(self.means["means"]) != gaussians.num:
            self.count, self.means = 0, {name: torch.zeros_like(t) for name, t in tensors.items()}
        self.count += 1
        for name, tensor in tensors.items():
            self.means[name].lerp_(tensor, 1 / self.count)

    @torch.no_grad()
    def write_to(self, gaussians: Gaussians) -> None:
        """Give the Gaussians the mean, in place; nothing happens without samples of this number of Gaussians."""
        if self.count and len(self.means["means"]) == gaussians.num:
            for name, tensor in gaussians.tensors().items():
                tensor.copy_(self.means[name])

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "means": dict(self.means)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        self.count = state["count"]
        self.means = {name: mean.to(device) for name, mean in state["means"].items()}
