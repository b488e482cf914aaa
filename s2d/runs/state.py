"""Everything that a training step reads or changes, and its one file."""

import pickle
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.files import atomic_torch_save
from s2d.runs.ema import Ema


@dataclass
class TrainingState:
    """A training between two steps."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    scaler: Any | None = None
    """torch's GradScaler, where half precision needs one."""
    step: int = 0
    """Finished steps."""
    history: dict[str, list[dict[str, float]]] = field(
        default_factory=lambda: {"train": [], "eval": []}
    )
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of the loss terms since the last row of the history."""
    seconds_before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Training time over all processes that worked on it one after another."""
        return self.seconds_before + time.monotonic() - self.started

    def add(self, terms: dict[str, float]) -> None:
        """Count a step's terms towards the next row."""
        for name, value in terms.items():
            self.sums[name] += value
        self.sums["steps"] += 1

    def close_row(self, **columns: float) -> dict[str, float]:
        """Append the means since the last row to the history, and begin the next one."""
        steps = self.sums.pop("steps")
        means = {name: total / steps for name, total in self.sums.items()}
        row = {"step": self.step, **means, **columns, "seconds": round(self.seconds, 2)}
        self.history["train"].append(row)
        self.sums.clear()
        return row

    def save(self, path: Path) -> None:
        """Write it, all or nothing."""
        content = {
            "parameters": _plain(self.parameters),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "step": self.step,
            "history": self.history,
            "sums": dict(self.sums),
            "seconds": self.seconds,
        }
        atomic_torch_save(path, content)

    def load(self, path: Path) -> None:
        """Take over what `save` wrote.

        Raises:
            ValueError: The file is damaged, or of another model.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for name, value in self.parameters.items():
                    value.copy_(content["parameters"][name])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(content["ema"])
            if self.scaler is not None and content["scaler"] is not None:
                self.scaler.load_state_dict(content["scaler"])
            self.step = content["step"]
            self.history = content["history"]
            self.sums.update(content["sums"])
            self.seconds_before = content["seconds"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{path} cannot be continued ({reason}). Start again with --overwrite, or from a model in its folder with "
                "--init-weights and another --output-dir."
            ) from error


def _plain(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in parameters.items()}
