"""The plan of a data set: what is fitted to which views, and which pairs come out.

A *frame* is the position of a view in name order among all views of its scene. Two kinds of job:

`kept`    fits `kept` frames and renders the others: `sparse`; from models on the way there: `underfit`; with some of the Gaussians
          turned, resized or left out: `rotate`, `scale`, `drop`.
`halves`  fits two disjoint sets of frames, each renders the other's and what neither knows: `cross`. The first then renders itself
          from a path beside its photos, a third model is fitted to these renders alone and renders the photos' cameras: `cycle`, the
          only kind whose truth the (first) model knew.

Everything random comes from generators seeded by the job's name, so a job's pairs depend on nothing but its scene and settings.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import torch

from s2d.log import logger
from s2d.pairs.corrupt import CORRUPTIONS
from s2d.pairs.fit import FitSettings

Kind = Literal["sparse", "cross", "cycle", "underfit", "rotate", "scale", "drop"]
KINDS: tuple[str, ...] = get_args(Kind)

MIN_KEPT = 2  # one photo says nothing about depth
CYCLE_KEPT = 6  # renders that a cycle's second model is fitted to
MAX_HALF = 10  # photos of one half: more make the model better than what the fixer will ever see


@dataclass(frozen=True)
class PairSettings:
    """What shapes the pairs of every job."""

    fit: FitSettings
    kinds: tuple[str, ...] = KINDS
    views_per_kind: int = 24
    """Largest number of views that one model renders for one kind."""
    min_coverage: float = 0.1
    """Pairs whose guidance covers less are left out: the kept photos say next to nothing about such a view."""


@dataclass(frozen=True)
class PairScene:
    """One scene as the jobs see it."""

    name: str  # as in the pairs' names
    folder: Path  # `load_scene` takes it
    num_views: int
    test_frames: tuple[int, ...]  # fitted by no model; all frames of a test scene may be fitted
    is_test: bool  # all pairs are test pairs

    @property
    def pool(self) -> list[int]:
        """Frames that models may be fitted to."""
        return [frame for frame in range(self.num_views) if frame not in set(self.test_frames)]

    def split_of(self, frame: int) -> str:
        return "test" if self.is_test or frame in self.test_frames else "train"


@dataclass(frozen=True)
class Job:
    """One unit of work: done wholly or not at all."""

    scene: PairScene
    seed: int
    sets: tuple[tuple[int, ...], ...]
    """Frames that are fitted: one set, or the two halves."""
    num_kept: int
    """Views of the sparse models: those of the set, or of the cycle's second model."""

    @property
    def is_halves(self) -> bool:
        return len(self.sets) == 2

    @property
    def what(self) -> str:
        """The part of the pairs' names after the kind."""
        return f"s{self.seed}" if self.is_halves else f"k{self.num_kept}-s{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.scene.name}_{'halves-' * self.is_halves}{self.what}"

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(_hash(f"{self.name} {purpose}"))

    def frames(self, known: Sequence[int]) -> list[int]:
        """Frames of the scene that are not among `known`."""
        return [frame for frame in range(self.scene.num_views) if frame not in set(known)]

    def num_steps(self, settings: PairSettings) -> int:
        """Optimisation steps of the job: the measure of its length."""
        fits = 1
        if self.is_halves:
            fits = 2 * ("cross" in settings.kinds) or 1
            fits += "cycle" in settings.kinds
        return fits * settings.fit.num_steps

    def max_pairs(self, settings: PairSettings) -> int:
        """How many pairs it makes, unless guidance covers too little."""
        kinds, most = set(settings.kinds), settings.views_per_kind
        if not self.is_halves:
            views = min(len(self.frames(self.sets[0])), most)
            corrupted = sum(
                len(range(k, views, 3)) for k in range(3) if tuple(CORRUPTIONS)[k] in kinds
            )
            return views * (("sparse" in kinds) + ("underfit" in kinds)) + corrupted
        tested = len(self.scene.test_frames)
        cross = sum(min(len(self.frames(half)), most) for half in self.sets)
        return ("cross" in kinds) * cross + ("cycle" in kinds) * min(
            len(self.sets[0]) + tested, most
        )


def plan_jobs(
    scenes: Sequence[PairScene],
    keep_counts: Sequence[int],
    seeds: Sequence[int],
    kinds: Sequence[str],
) -> list[Job]:
    """List the jobs: per scene and seed one for each number of kept views, and one for the halves; scenes take turns.

    Counts that leave a scene with no view to render are skipped with a warning.

    Raises:
        ValueError: no scene is large enough for anything.
    """
    jobs: list[Job] = []
    too_small: list[str] = []
    for seed in seeds:
        for scene in scenes:
            pool = scene.pool
            if {"sparse", "underfit", *CORRUPTIONS} & set(kinds):
                for count in keep_counts:
                    if count >= len(pool):
                        too_small.append(f"{scene.name} ({len(pool)} views) keeping {count}")
                        continue
                    jobs.append(Job(scene, seed, (choose_kept(scene, count, seed),), count))
            if {"cross", "cycle"} & set(kinds):
                if len(pool) < 2 * MIN_KEPT:
                    too_small.append(f"{scene.name} ({len(pool)} views) in halves")
                    continue
                halves = choose_halves(scene, seed)
                jobs.append(Job(scene, seed, halves, min(CYCLE_KEPT, len(halves[0]))))
    too_small = list(dict.fromkeys(too_small))
    if too_small:
        logger.warning("too few views, skipped: %s", "; ".join(too_small))
    if not jobs:
        raise ValueError(
            f"No scene has enough views: {'; '.join(too_small)}. Expected more views than are kept, test frames not counted. "
            "Lower --keep-counts, raise --test-every, or add photos."
        )
    return jobs


def choose_kept(scene: PairScene, count: int, seed: int) -> tuple[int, ...]:
    """Keep frames all along the scene: for seed 0 evenly spaced like stage 0's --keep-count, else one at random from each of `count` pieces."""
    pool = scene.pool
    if seed == 0:
        return tuple(pool[round((len(pool) - 1) * i / (count - 1))] for i in range(count))
    generator = torch.Generator().manual_seed(_hash(f"{scene.name} kept {count} {seed}"))
    edges = [len(pool) * i // count for i in range(count + 1)]
    return tuple(
        pool[int(torch.randint(low, high, (), generator=generator))]
        for low, high in pairwise(edges)
    )


def choose_halves(scene: PairScene, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Deal the pool out in neighbouring pairs, one to each half; of more than MAX_HALF pairs a random choice."""
    generator = torch.Generator().manual_seed(_hash(f"{scene.name} halves {seed}"))
    pool = scene.pool
    num_pairs = len(pool) // 2
    chosen = torch.randperm(num_pairs, generator=generator)[:MAX_HALF].sort().values.tolist()
    swap = torch.rand(len(chosen), generator=generator) < 0.5
    first = [pool[2 * row + int(other)] for row, other in zip(chosen, swap, strict=True)]
    second = [pool[2 * row + 1 - int(other)] for row, other in zip(chosen, swap, strict=True)]
    return tuple(first), tuple(second)


def pair_name(scene: str, what: str, frame: int) -> str:
    """`<scene>_<what>_<frame>.png`; docs/data_formats.md says what reads it."""
    return f"{scene}_{what}_{frame:04d}.png"


def photo_name(scene: str, frame: int) -> str:
    return f"{scene}_{frame:04d}.png"


def _hash(text: str) -> int:
    """The same number for the same text in every process. 48 bits"""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
