"""Leave-one-out trials: fit a scene's kept photos without one, render that one's camera, and see how far the render is from the photo.

A trial is a pair from the scene itself, as stage 2 will meet its views: render, point guidance, coverage, the nearest remaining
photos as references, and the truth. Nothing but kept photos is read.

    FOLDER/<view>.png.partial/   at work
    FOLDER/<view>.png/           complete: render.png, guidance.png, coverage.png, truth.png, trial.json
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.device import Choice, DeviceUnusable, choose_device, run_on
from s2d.files import atomic_write_json, fsync_dir
from s2d.guidance.hidden import hidden_points, witnesses_of
from s2d.guidance.render import render_cloud
from s2d.images import write_image
from s2d.log import logger, progress
from s2d.model_folder import render_name
from s2d.pairs.dataset import PARTIAL, read_json
from s2d.pairs.fit import CPU, FitSettings, Fitted, fit
from s2d.pairs.workers import run_jobs, suitable_workers
from s2d.rasterize import rasterize
from s2d.scene import Scene, load_scene

RECORD = "trial.json"
PICTURES = ("render", "guidance", "coverage", "truth")
MIN_KEPT = 3  # a fit takes two photos


@dataclass(frozen=True)
class TrialSettings:
    """How trials are made."""

    num_views: int = 3
    """Trials at most; 0: none."""
    num_steps: int = 600
    """Optimisation steps of each fit."""
    seed: int = 0
    check_guidance: bool = True
    """Leave out of the guidance what the remaining photos do not show, as stage 2 does with its views."""

    @property
    def fit(self) -> FitSettings:
        """Fewer Gaussians than stage 1 has, as befits fewer steps."""
        return FitSettings(
            self.num_steps, max_init_points=20_000, max_gaussians=25_000, sh_degree=2
        )


@dataclass(frozen=True)
class TrialJob:
    """One trial to be made."""

    source: Path  # `load_scene` takes it
    kept: tuple[str, ...]
    view: str  # the one that is left out

    @property
    def name(self) -> str:
        return f"the trial of {self.view}"


@dataclass(frozen=True)
class TrialPair:
    """A finished trial's files."""

    view: str
    folder: Path
    references: tuple[Path, ...]  # the remaining kept photos, nearest camera first

    @property
    def name(self) -> str:
        """Of its files: the view's without suffix."""
        return Path(self.view).with_suffix("").as_posix()

    def path(self, picture: str) -> Path:
        """One of `PICTURES`."""
        return self.folder / f"{picture}.png"


def choose_trial_views(kept: Sequence[str], count: int) -> tuple[str, ...]:
    """Choose the photos to leave out, evenly spread: one from the middle of each of as many equal pieces."""
    kept = sorted(kept)
    count = min(count, len(kept))
    return tuple(kept[int((row + 0.5) * len(kept) / count)] for row in range(count))


def make_trials(
    kept: Scene, source: Path, settings: TrialSettings, folder: Path, device: str = "cpu"
) -> tuple[list[TrialPair], dict[str, str]]:
    """Make the trials that `folder` does not hold yet, in processes of one thread side by side.

    Args:
        kept: The kept views, at least `MIN_KEPT`.
        source: The scene that they are of, as `load_scene` takes it.
        settings: See there.
        folder: Made if missing. Whatever ends this call, finished trials stay there.
        device: Where Gaussians are fitted, as `--device` of the stages: where a GPU fails, auto makes the other trials on the CPU.

    Returns:
        The trials in name order, and for each whose fit failed (photos that share no surface) its view and why.

    Raises:
        OSError: the disk is full.
        DeviceUnusable: the GPU that was asked for cannot be used, or failed.
        ValueError: a worker died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        TrialJob(source, kept.names, view)
        for view in choose_trial_views(kept.names, settings.num_views)
    ]
    if not all(_is_finished(job, folder) for job in jobs):
        run_on(choose_device(device), partial(_make_missing, jobs, settings, folder))
    photos = dict(zip(kept.names, kept.image_paths, strict=True))
    trials, failed = [], {}
    for job in jobs:
        record = read_json(_folder(folder, job.view) / RECORD)
        if record["failed"] is not None:
            failed[job.view] = record["failed"]
            logger.warning("no trial of %s: %s", job.view, record["failed"])
            continue
        references = tuple(photos[name] for name in record["references"])
        trials.append(TrialPair(job.view, _folder(folder, job.view), references))
    return trials, failed


def _make_missing(
    jobs: Sequence[TrialJob], settings: TrialSettings, folder: Path, device: torch.device
) -> None:
    """Make the trials that are not finished on a device."""
    todo = [job for job in jobs if not _is_finished(job, folder)]
    work = partial(make_trial, settings=settings, folder=folder, device=device)
    advice = "close other programs, or pass --trial-views 0"
    results = run_jobs(work, todo, suitable_workers(len(todo), device), advice)
    steps, finished = (len(jobs) - len(todo)) * settings.num_steps, len(jobs) - len(todo)
    # closing: the workers end here, whatever ends the loop.
    with (
        progress(len(jobs) * settings.num_steps, "trials", start=steps) as bar,
        closing(results),
    ):
        for _, event, value in results:
            if event == "steps":
                steps += value
            elif event == "done":
                finished += 1
            bar.update(steps, trials=f"{finished}/{len(jobs)}")


def make_trial(
    job: TrialJob,
    settings: TrialSettings,
    folder: Path,
    on_steps: Callable[[int], None],
    device: torch.device = CPU,
) -> None:
    """Make one trial in its `.partial` folder and rename it. Called in worker processes.

    Raises:
        DeviceUnusable: The GPU failed, or its memory does not suffice. Going on on the CPU is up to `make_trials`, whose warning is heard.
    """
    final = _folder(folder, job.view)
    partial_dir = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir(parents=True)
    scene = load_scene(job.source).subset(job.kept)
    others = scene.subset([name for name in job.kept if name != job.view])
    camera = scene.cameras.select([job.view])
    record = {"failed": None, "references": [others.names[row] for row in _nearest(camera, others)]}

    def attempt(device: torch.device) -> tuple[Tensor, Fitted]:
        fitted = fit(
            *(others, settings.fit, settings.seed),
            on_steps=on_steps,
            device=device,
            novel=camera,
        )
        return rasterize(fitted.gaussians, camera).rgb[0].clamp(0, 1).cpu(), fitted

    try:
        rendered, fitted = run_on(Choice(device, "the stage's", asked=str(device)), attempt)
    except DeviceUnusable:
        raise
    except ValueError as error:
        record["failed"] = str(error)
    else:
        guidance = render_cloud(fitted.cloud, camera)
        coverage = guidance.coverage
        if settings.check_guidance:
            witnesses = witnesses_of(others, fitted.depths)
            coverage = coverage & ~hidden_points(rendered, guidance, camera, witnesses)
        pictures = {
            "render": rendered,
            "guidance": guidance.rgb * coverage[..., None],
            "coverage": coverage.float(),
            "truth": scene.image(job.view),
        }
        for name in PICTURES:
            write_image(partial_dir / f"{name}.png", pictures[name])
    atomic_write_json(partial_dir / RECORD, record)
    os.rename(partial_dir, final)
    fsync_dir(final.parent)


def _nearest(camera: Cameras, others: Scene) -> list[int]:
    """Rows of the other views by the distance of their cameras, as stage 2 chooses references."""
    return camera.pose_distances(others.cameras)[0].argsort(stable=True).tolist()


def _is_finished(job: TrialJob, folder: Path) -> bool:
    return (_folder(folder, job.view) / RECORD).is_file()


def _folder(folder: Path, view: str) -> Path:
    return folder / render_name(view)  # with its suffix: the view `a` must not be a folder of `a/b`
