"""Which views of a capture make a sample: a function of the capture, the training step and a random generator."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from s2d.hier.data.capture import Capture
from s2d.hier.data.index import Pick


class Sampler(Protocol):
    """Chooses views."""

    def pick(
        self,
        capture: Capture,
        step: int,
        num_context: int,
        num_targets: int,
        rng: np.random.Generator,
    ) -> Pick | None:
        """Rows of a sample, or None where the capture has none to offer."""
        ...


@dataclass(frozen=True)
class BoundedSampler:
    """Videos: two frames some way apart, and targets between them. The way grows with training, as published for RealEstate10K.

    The gap is drawn evenly from [min, max]. (The released configuration never used its maximum: there the gap was always the minimum.)
    """

    min_gap: tuple[int, int] = (25, 45)
    """Frames between the outermost context views, at least: at the start, and after the warm-up."""
    max_gap: tuple[int, int] = (45, 192)
    """At most."""
    warm_up_steps: int = 150_000

    def gaps(self, step: int) -> tuple[int, int]:
        """Smallest and largest gap of a step."""
        share = min(1.0, step / self.warm_up_steps) if self.warm_up_steps else 1.0
        return tuple(
            round(first + (last - first) * share) for first, last in (self.min_gap, self.max_gap)
        )

    def pick(
        self,
        capture: Capture,
        step: int,
        num_context: int,
        num_targets: int,
        rng: np.random.Generator,
    ) -> Pick | None:
        """See `Sampler`. Targets may coincide with a context view; None for a capture shorter than the smallest gap."""
        low, high = self.gaps(step)
        high = min(high, len(capture) - 1)
        if high < max(low, num_context - 1):
            return None
        gap = int(rng.integers(max(low, num_context - 1), high + 1))
        left = int(rng.integers(0, len(capture) - gap))
        inside = rng.choice(np.arange(left + 1, left + gap), num_context - 2, replace=False)
        target = rng.integers(left, left + gap + 1, num_targets)
        return Pick((left, *sorted(inside.tolist()), left + gap), tuple(target.tolist()))


@dataclass(frozen=True)
class EvaluationSampler:
    """What an evaluation index says."""

    index: Mapping[str, Pick | None]

    def pick(
        self,
        capture: Capture,
        step: int,
        num_context: int,
        num_targets: int,
        rng: np.random.Generator,
    ) -> Pick | None:
        """See `Sampler`; None for a scene that is not in the index, or is null there."""
        return self.index.get(capture.key)


@dataclass(frozen=True)
class ArbitrarySampler:
    """Given rows, or any at all."""

    context: tuple[int, ...] | None = None
    target: tuple[int, ...] | None = None

    def pick(
        self,
        capture: Capture,
        step: int,
        num_context: int,
        num_targets: int,
        rng: np.random.Generator,
    ) -> Pick | None:
        """See `Sampler`; None for a capture with fewer views than asked for."""
        if len(capture) < max(
            num_context, 1 + max((*(self.context or ()), *(self.target or ()), 0))
        ):
            return None
        context = self.context or tuple(
            rng.choice(len(capture), num_context, replace=False).tolist()
        )
        target = self.target or tuple(rng.integers(0, len(capture), num_targets).tolist())
        return Pick(context, target)
