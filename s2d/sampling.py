"""Which view is drawn next: shuffled rounds of the kept views, or S2D's random sample drop.

Notation: `alpha` is the target share of kept views in the sequence of training samples; a *sample* is a pair
(is_kept, name). Everything here is a pure function of the seed and can be saved and restored mid-run.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SampleDrop = Literal["normalised", "literal"]


@dataclass
class ShuffledStack:
    """Draw names without replacement and reshuffle when all have been seen (3DGS's order of views)."""

    names: Sequence[str]
    rng: random.Random
    stack: list[str] = field(default_factory=list)

    def draw(self) -> str:
        if not self.stack:
            self.stack = list(self.names)
            self.rng.shuffle(self.stack)
        return self.stack.pop()


class ViewSampler:
    """Draw the training views; without fixed views it is a plain shuffled stack of the kept ones.

    `normalised` draws the class first, a kept view with probability alpha, then the next view of that class's
    stack: proper rejection sampling without the wasted draws, so the achieved share is alpha for any number of
    views. `literal` is the published rule: draw uniformly from all views, then drop a kept view with
    probability 1 - min(1, alpha / r) and a novel one with 1 - min(1, (1 - alpha) / (1 - r)), r being the share
    of kept views accepted so far. Both acceptances are clipped at 1, so it cannot lift a share that uniform
    drawing leaves too low: 6 kept and 300 novel views end at 0.06, not at 0.7.
    """

    def __init__(
        self,
        kept: Sequence[str],
        fixed: Sequence[str] = (),
        alpha: float = 1.0,
        sample_drop: SampleDrop = "normalised",
        seed: int = 0,
    ) -> None:
        if not kept:
            raise ValueError(
                "There are no kept views to train on: the split is empty. Keep at least two photos."
            )
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha is the share of kept views: expected 0 to 1, got {alpha}.")
        self.rng = random.Random(seed)
        self.alpha = alpha
        self.sample_drop = sample_drop
        self.kept = ShuffledStack(tuple(kept), self.rng)
        self.fixed = ShuffledStack(tuple(fixed), self.rng)
        self.num_kept = 0
        self.num_drawn = 0

    def draw(self) -> tuple[bool, str]:
        """Return (is it a kept view, its name) of the next training sample."""
        is_kept = not self.fixed.names or self._draw_class()
        self.num_kept += is_kept
        self.num_drawn += 1
        return is_kept, (self.kept if is_kept else self.fixed).draw()

    def _draw_class(self) -> bool:
        if self.sample_drop == "normalised":
            return self.rng.random() < self.alpha
        # At the ends of the range the rule would drop every sample of the only class left, for ever.
        if self.alpha in (0.0, 1.0):
            return self.alpha == 1.0
        pool_share = len(self.kept.names) / (len(self.kept.names) + len(self.fixed.names))
        while True:
            is_kept = self.rng.random() < pool_share
            share = self.num_kept / self.num_drawn if self.num_drawn else pool_share
            target, current = (self.alpha, share) if is_kept else (1.0 - self.alpha, 1.0 - share)
            if current <= target or self.rng.random() < target / current:
                return is_kept

    @property
    def kept_share(self) -> float:
        """Share of kept views among the samples drawn so far (0 before the first)."""
        return self.num_kept / max(1, self.num_drawn)

    def state_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers (readable with weights_only=True) that restore this sampler."""
        version, internal, gauss = self.rng.getstate()
        return {
            "rng": [version, list(internal), gauss],
            "kept_stack": list(self.kept.stack),
            "fixed_stack": list(self.fixed.stack),
            "num_kept": self.num_kept,
            "num_drawn": self.num_drawn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        version, internal, gauss = state["rng"]
        self.rng.setstate((version, tuple(internal), gauss))
        self.kept.stack = list(state["kept_stack"])
        self.fixed.stack = list(state["fixed_stack"])
        self.num_kept = state["num_kept"]
        self.num_drawn = state["num_drawn"]


def spread(num: int, count: int) -> list[int]:
    """Positions of `count` of `num` things, evenly spread over all of them; all where there are no more."""
    return (
        [(2 * k + 1) * num // (2 * count) for k in range(count)]
        if count < num
        else list(range(num))
    )
