"""Which views of a capture look at the same things, from points that each of them is known to see.

overlap[i, j]   share of the points seen by view i that lie inside view j
angle[i, j]     median angle at those points between the rays to both cameras, degrees: how much parallax there is, and how unlike
                the two look; it also tells cameras on the same side of a thing from those on opposite sides
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.geometry import in_picture, project
from s2d.hier.data.index import Pick
from s2d.sampling import spread

MIN_POINTS = 8  # fewer say nothing about a view


@dataclass(frozen=True)
class PairRule:
    """When two views make a pair of context views."""

    min_overlap: float = 0.5
    """Of both with each other."""
    min_angle: float = 1.5
    """Degrees; below this there is nothing to triangulate."""
    max_angle: float = 35.0
    """Degrees; above this nothing looks alike."""


@dataclass(frozen=True, eq=False)
class Overlaps:
    """How the N views of a capture relate."""

    overlap: Tensor  # [N, N] in [0, 1]
    angle: Tensor  # [N, N] degrees; 0 where there is no overlap
    distance: Tensor  # [N, N] between the cameras, world units

    def pairs(self, rule: PairRule) -> list[tuple[int, int]]:
        """All pairs (i < j) that the rule allows, ascending."""
        mutual = torch.minimum(self.overlap, self.overlap.mT)
        angle = torch.minimum(self.angle, self.angle.mT)
        widest = torch.maximum(self.angle, self.angle.mT)
        good = (mutual >= rule.min_overlap) & (angle >= rule.min_angle)
        good &= widest <= rule.max_angle
        return [(i, j) for i, j in good.nonzero().tolist() if i < j]

    def between(self, i: int, j: int, rule: PairRule) -> list[int]:
        """Views that a pair can show: nearer to both cameras than these are to each other, and overlapping with one of them."""
        reach = self.distance[i, j]
        near = (self.distance[i] < reach) & (self.distance[j] < reach)
        seen = torch.maximum(self.overlap[:, i], self.overlap[:, j]) >= rule.min_overlap
        return [k for k in (near & seen).nonzero()[:, 0].tolist() if k not in (i, j)]

    def beside(self, i: int, j: int, rule: PairRule) -> list[int]:
        """Views that may join a pair as further context: they overlap with both."""
        mutual = torch.minimum(self.overlap, self.overlap.mT)
        good = torch.minimum(mutual[i], mutual[j]) >= rule.min_overlap
        return [k for k in good.nonzero()[:, 0].tolist() if k not in (i, j)]


def measure_overlaps(cameras: Cameras, seen: Sequence[Tensor]) -> Overlaps:
    """Measure how the views overlap.

    Args:
        cameras: N cameras.
        seen: World points that each view is known to see. N × [P, 3]
    """
    num = len(cameras)
    overlap, angle = torch.zeros(num, num), torch.zeros(num, num)
    centers = cameras.centers.double()
    for i in range(num):
        points = seen[i].double()
        if len(points) < MIN_POINTS:
            continue
        to_i = torch.nn.functional.normalize(centers[i] - points, dim=-1)
        for j in range(num):
            xy, z = project(points, cameras.Ks[j].double(), cameras.viewmats[j].double())
            inside = in_picture(xy, z, cameras.sizes[j])
            overlap[i, j] = inside.double().mean()
            if bool(inside.any()):
                to_j = torch.nn.functional.normalize(centers[j] - points[inside], dim=-1)
                # Through the chord: arccos of a cosine near 1 has no digits left.
                chord = (to_i[inside] - to_j).norm(dim=-1).clamp(max=2.0)
                angle[i, j] = torch.rad2deg(2 * torch.asin(chord / 2)).median()
    return Overlaps(overlap, angle, torch.cdist(centers, centers).float())


class HasOverlaps(Protocol):
    """A capture whose views have been compared. `posed.PosedCapture` is one."""

    overlaps: Overlaps


@dataclass(frozen=True)
class PairSampler:
    """Pairs of overlapping views, and what lies between them: for captures that have `overlaps`. A `samplers.Sampler`."""

    rule: PairRule = PairRule()

    def pick(
        self,
        capture: HasOverlaps,
        step: int,
        num_context: int,
        num_targets: int,
        rng: np.random.Generator,
    ) -> Pick | None:
        """See `Sampler`. Where fewer views lie between than are asked for, the context views themselves are targets too."""
        pairs = self.training_pairs(capture.overlaps)
        if not pairs:
            return None
        i, j = pairs[int(rng.integers(len(pairs)))]
        others = capture.overlaps.beside(i, j, self.rule)
        if len(others) < num_context - 2:
            return None
        more = rng.choice(others, num_context - 2, replace=False).tolist() if others else []
        context = rng.permutation([i, j, *more]).tolist()
        between = [k for k in capture.overlaps.between(i, j, self.rule) if k not in context]
        target = rng.permutation(between).tolist()[:num_targets]
        target += rng.choice(context, num_targets - len(target)).tolist()
        return Pick(tuple(context), tuple(target))

    def training_pairs(self, overlaps: Overlaps) -> list[tuple[int, int]]:
        """Pairs with something between them, else all pairs."""
        return _training_pairs(overlaps, self.rule)


@functools.lru_cache(maxsize=4096)
def _training_pairs(overlaps: Overlaps, rule: PairRule) -> list[tuple[int, int]]:
    pairs = overlaps.pairs(rule)
    return [pair for pair in pairs if overlaps.between(*pair, rule)] or pairs


def evaluation_pairs(
    overlaps: Overlaps, rule: PairRule, max_pairs: int, max_targets: int
) -> list[Pick]:
    """The pairs that a scene is judged by: spread evenly over all pairs with a view between them, and so are their targets.

    A function of cameras and points alone: nothing is drawn.
    """
    pairs = [pair for pair in overlaps.pairs(rule) if overlaps.between(*pair, rule)]
    picks = []
    for row in spread(len(pairs), max_pairs):
        between = overlaps.between(*pairs[row], rule)
        targets = [between[k] for k in spread(len(between), max_targets)]
        picks.append(Pick(pairs[row], tuple(targets)))
    return picks
