"""A running average of the weights: what the last few hundred steps agree on, without their noise."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Average of parameters: each update moves it by 1 - decay towards them.

    The decay grows from 0.1 to its value as (1 + n) / (10 + n), so that the random start is forgotten.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in parameters.items()}
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, value in self.parameters.items():
            self.average[name].lerp_(value.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the parameters' place; they come back at the end of the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.parameters.items():
            kept = value.detach().clone()
            value.copy_(self.average[name])
            self.average[name] = kept

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"average": self.average, "num_updates": self.num_updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for name, value in self.average.items():
            value.copy_(state["average"][name])
        self.num_updates = state["num_updates"]
