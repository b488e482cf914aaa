"""The work of one job: fit, render, write the pictures of its pairs. What jobs there are: `plan`."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.guidance.cloud import SurfaceCloud
from s2d.guidance.render import render_cloud
from s2d.images import read_image, write_image
from s2d.metrics import psnr
from s2d.pairs.corrupt import CORRUPTIONS, shifted_cameras, uniform
from s2d.pairs.fit import CPU, Fitted, fit
from s2d.pairs.plan import Job, PairSettings, pair_name, photo_name
from s2d.rasterize import rasterize
from s2d.scene import Scene, load_scene

MAX_REFERENCES = 8
# Where in the schedule the early models are taken: hardly begun, and blurred.
EARLY_SHARES = ((0.05, 0.2), (0.2, 0.5))


def run_job(
    job: Job,
    folder: Path,
    settings: PairSettings,
    on_steps: Callable[[int], None] = lambda num: None,
    device: torch.device = CPU,
) -> list[dict]:
    """Do a job: fit, render, write `A`, `P` and `M` below `folder`.

    Args:
        job: From `plan_jobs`.
        folder: Made if missing; one file per pair and letter, `A/<name>.png` ….
        settings: See there.
        on_steps: Called with the number of optimisation steps done since the last call.
        device: Where Gaussians are fitted; all else is done on the CPU.

    Returns:
        The pairs' lines of pairs.jsonl, and for those that were left out {"kind", "dropped": True}.

    Raises:
        ValueError: a fit failed (see `fit`).
    """
    scene = load_scene(job.scene.folder)
    maker = _PairMaker(job, folder, settings, scene, device)
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
    model = _fit_to(kept, job, maker, scene, on_steps, steps)
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
    model = _fit_to(first, job, maker, scene, on_steps)
    if "cross" in settings.kinds:
        other = _fit_to(second, job, maker, scene, on_steps)
        for label, known, fitted in (("a-", first, model), ("b-", second, other)):
            maker.use(fitted.cloud, known, label)
            for frame in maker.choose("cross", job.frames(known)):
                maker.add("cross", frame, fitted.gaussians)
    if "cycle" in settings.kinds:
        back = _fit_to_renders(job, maker, scene, model, on_steps)
        maker.use(back.cloud, first)
        for frame in maker.choose("cycle", (*first, *job.scene.test_frames)):
            maker.add("cycle", frame, back.gaussians)


def _fit_to(
    known: Sequence[int],
    job: Job,
    maker: "_PairMaker",
    scene: Scene,
    on_steps: Callable[[int], None],
    early_steps: Sequence[int] = (),
) -> Fitted:
    """Fit a model to some frames, as stage 1 does; the others are its novel cameras."""
    novel = _subset(scene, job.frames(known)).cameras
    return maker.fit(_subset(scene, known), on_steps, early_steps, novel)


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
    fitted = maker.fit(views, on_steps)
    shutil.rmtree(scratch)
    return fitted


@dataclass
class _PairMaker:
    """Writes the pictures of one job and keeps its rows."""

    job: Job
    folder: Path
    settings: PairSettings
    scene: Scene
    device: torch.device
    rows: list[dict] = field(default_factory=list)
    cloud: SurfaceCloud | None = None  # these three: see `use`
    known: Sequence[int] = ()
    label: str = ""

    def fit(
        self,
        views: Scene,
        on_steps: Callable[[int], None],
        early_steps: Sequence[int] = (),
        novel: Cameras | None = None,
    ) -> Fitted:
        """Fit Gaussians to the views on the job's device, and bring them to the CPU."""
        found = fit(
            *(views, self.settings.fit, self.job.seed, early_steps, on_steps, self.device, novel)
        )
        early = [model.to(CPU) for model in found.early]
        return found._replace(gaussians=found.gaussians.to(CPU), early=early)

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


def nearest_first(cameras: Cameras, frame: int, known: Sequence[int]) -> Iterator[int]:
    """The frames of `known` by the distance of their cameras to that of `frame`: how stage 2 chooses references."""
    known = list(known)
    distances: Tensor = cameras[frame].pose_distances(cameras[known])[0]
    return (known[row] for row in distances.argsort(stable=True).tolist())


def _subset(scene: Scene, frames: Sequence[int]) -> Scene:
    return scene.subset([scene.names[frame] for frame in frames])


def _as_stored(image: Tensor) -> Tensor:
    return (image * 255).round() / 255
