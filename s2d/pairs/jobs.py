"""What is fitted to which views, and which pairs come out: the plan of a data set, and the work of one job.

A *frame* is the position of a view in name order among all views of its scene. Two kinds of job:

`kept`    fits `kept` frames and renders the others: `sparse`; from models on the way there: `underfit`; with some of the Gaussians
          turned, resized or left out: `rotate`, `scale`, `drop`.
`halves`  fits two disjoint sets of frames, each renders the other's and what neither knows: `cross`. The first then renders itself
          from a path beside its photos, a third model is fitted to these renders alone and renders the photos' cameras: `cycle`, the
          only kind whose truth the (first) model knew.

Everything random comes from generators seeded by the job's name, so a job's pairs depend on nothing but its scene and settings.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.guidance.cloud import SurfaceCloud
from s2d.guidance.render import render_cloud
from s2d.images import read_image, write_image
from s2d.log import logger
from s2d.metrics import psnr
from s2d.pairs.corrupt import CORRUPTIONS, shifted_cameras, uniform
from s2d.pairs.fit import FitSettings, Fitted, fit
from s2d.rasterize import rasterize
from s2d.scene import Scene, load_scene

Kind = Literal["sparse", "cross", "cycle", "underfit", "rotate", "scale", "drop"]
KINDS: tuple[str, ...] = get_args(Kind)

MIN_KEPT = 2  # one photo says nothing about depth
CYCLE_KEPT = 6  # renders that a cycle's second model is fitted to
MAX_HALF = 10  # photos of one half: more make the model better than what the fixer will ever see
MAX_REFERENCES = 8
# Where in the schedule the early models are taken: hardly begun, and blurred.
EARLY_SHARES = ((0.05, 0.2), (0.2, 0.5))


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


def run_job(
    job: Job,
    folder: Path,
    settings: PairSettings,
    on_steps: Callable[[int], None] = lambda num: None,
) -> list[dict]:
    """Do a job: fit, render, write `A`, `P` and `M` below `folder`.

    Args:
        job: From `plan_jobs`.
        folder: Made if missing; one file per pair and letter, `A/<name>.png` ….
        settings: See there.
        on_steps: Called with the number of optimisation steps done since the last call.

    Returns:
        The pairs' lines of pairs.jsonl, and for those that were left out {"kind", "dropped": True}.

    Raises:
        ValueError: a fit failed (see `fit`).
    """
    scene = load_scene(job.scene.folder)
    maker = _PairMaker(job, folder, settings, scene)
    if job.is_halves:
        _run_halves(job, maker, scene, on_steps)
    else:
        _run_kept(job, maker, scene, on_steps)
    return maker.rows


def _run_kept(job: Job, maker: "_PairMaker", scene: Scene, on_steps: Callable[[int], None]) -> None:
    (kept,) = job.sets
    kinds, settings = maker.settings.kinds, maker.settings
    generator = job.generator("early")
    shares = [uniform(bounds, generator) for bounds in EARLY_SHARES] if "underfit" in kinds else []
    steps = [max(1, round(share * settings.fit.num_steps)) for share in shares]
    model = fit(_subset(scene, kept), settings.fit, job.seed, steps, on_steps)
    maker.use(model.cloud, kept)
    others = job.frames(kept)
    if "sparse" in kinds:
        for frame in maker.choose("sparse", others):
            maker.add("sparse", frame, model.gaussians)
    if "underfit" in kinds:
        for i, frame in enumerate(maker.choose("underfit", others)):
            which = i % len(model.early)
            maker.add("underfit", frame, model.early[which], shares[which])
    # Each corrupted kind has a third of the views: a fit says more than a coin.
    for i, frame in enumerate(maker.choose("corrupt", others)):
        kind = tuple(CORRUPTIONS)[i % len(CORRUPTIONS)]
        if kind in kinds:
            corrupted, share = CORRUPTIONS[kind](model.gaussians, job.generator(f"{kind} {frame}"))
            maker.add(kind, frame, corrupted, share)


def _run_halves(
    job: Job, maker: "_PairMaker", scene: Scene, on_steps: Callable[[int], None]
) -> None:
    settings = maker.settings
    first, second = job.sets
    model = fit(_subset(scene, first), settings.fit, job.seed, (), on_steps)
    if "cross" in settings.kinds:
        other = fit(_subset(scene, second), settings.fit, job.seed, (), on_steps)
        for label, known, fitted in (("a-", first, model), ("b-", second, other)):
            maker.use(fitted.cloud, known, label)
            for frame in maker.choose("cross", job.frames(known)):
                maker.add("cross", frame, fitted.gaussians)
    if "cycle" in settings.kinds:
        back = _fit_to_renders(job, maker, scene, model, on_steps)
        maker.use(back.cloud, first)
        for frame in maker.choose("cycle", (*first, *job.scene.test_frames)):
            maker.add("cycle", frame, back.gaussians)


def _fit_to_renders(
    job: Job, maker: "_PairMaker", scene: Scene, model: Fitted, on_steps: Callable[[int], None]
) -> Fitted:
    """Fit a model to what another shows from beside its photos: stage 0 and 1 on renders alone."""
    first = job.sets[0]
    rows = [round((len(first) - 1) * i / (job.num_kept - 1)) for i in range(job.num_kept)]
    cameras = shifted_cameras(
        _subset(scene, [first[row] for row in rows]).cameras,
        model.cloud.points,
        job.generator("shift"),
    ).renamed([f"{row:04d}.png" for row in range(len(rows))])
    scratch = maker.folder / "scratch"
    paths = [
        write_image(scratch / camera.names[0], rasterize(model.gaussians, camera).rgb[0])
        for camera in cameras
    ]
    views = Scene(scene.name, cameras, tuple(paths), None)
    fitted = fit(views, maker.settings.fit, job.seed, (), on_steps)
    shutil.rmtree(scratch)
    return fitted


@dataclass
class _PairMaker:
    """Writes the pictures of one job and keeps its rows."""

    job: Job
    folder: Path
    settings: PairSettings
    scene: Scene
    rows: list[dict] = field(default_factory=list)
    cloud: SurfaceCloud | None = None  # these three: see `use`
    known: Sequence[int] = ()
    label: str = ""

    def use(self, cloud: SurfaceCloud, known: Sequence[int], label: str = "") -> None:
        """From now on draw guidance from `cloud`, take references from `known`, and tell names apart by `label`."""
        self.cloud, self.known, self.label = cloud, known, label

    def choose(self, purpose: str, frames: Sequence[int]) -> list[int]:
        """At most `views_per_kind` of the frames, in random order."""
        frames = sorted(frames)
        generator = self.job.generator(f"choose {purpose} {self.label}")
        order = torch.randperm(len(frames), generator=generator)
        return [frames[row] for row in order[: self.settings.views_per_kind].tolist()]

    def add(
        self, kind: str, frame: int, gaussians: Gaussians, strength: float | None = None
    ) -> None:
        """Render a frame and write its A, P and M."""
        camera = self.scene.cameras[frame]
        guidance = render_cloud(self.cloud, camera)
        coverage = float(guidance.coverage.float().mean())
        if coverage < self.settings.min_coverage:
            self.rows.append({"kind": kind, "dropped": True})
            return
        name = pair_name(self.job.scene.name, f"{kind}-{self.label}{self.job.what}", frame)
        rendered = rasterize(gaussians, camera).rgb[0].clamp(0, 1)
        # Not scene.image(), which keeps what it reads: a scene may have hundreds of views.
        truth = read_image(self.scene.image_paths[frame], oriented=False)
        write_image(self.folder / "A" / name, rendered)
        write_image(self.folder / "P" / name, guidance.rgb)
        write_image(self.folder / "M" / name, guidance.coverage.float())
        references = [
            row for row in nearest_first(self.scene.cameras, frame, self.known) if row != frame
        ]
        self.rows.append(
            {
                "name": name,
                "split": self.job.scene.split_of(frame),
                "scene": self.job.scene.name,
                "kind": kind,
                "frame": frame,
                "view": self.scene.names[frame],
                "references": [
                    photo_name(self.job.scene.name, row) for row in references[:MAX_REFERENCES]
                ],
                "psnr": round(psnr(_as_stored(rendered), truth), 3),
                "coverage": round(coverage, 4),
                "strength": None if strength is None else round(strength, 4),
            }
        )


def pair_name(scene: str, what: str, frame: int) -> str:
    """`<scene>_<what>_<frame>.png`; docs/data_formats.md says what reads it."""
    return f"{scene}_{what}_{frame:04d}.png"


def photo_name(scene: str, frame: int) -> str:
    return f"{scene}_{frame:04d}.png"


def nearest_first(cameras: Cameras, frame: int, known: Sequence[int]) -> Iterator[int]:
    """The frames of `known` by the distance of their cameras to that of `frame`: how stage 2 chooses references."""
    known = list(known)
    distances: Tensor = cameras[frame].pose_distances(cameras[known])[0]
    return (known[row] for row in distances.argsort(stable=True).tolist())


def _subset(scene: Scene, frames: Sequence[int]) -> Scene:
    return scene.subset([scene.names[frame] for frame in frames])


def _as_stored(image: Tensor) -> Tensor:
    return (image * 255).round() / 255


def _hash(text: str) -> int:
    """The same number for the same text in every process. 48 bits"""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
