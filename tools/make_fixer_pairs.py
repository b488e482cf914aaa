"""Make training pairs for the fixer from posed scenes: renders with artifacts, the photos they should look like, point guidance.

Our own stages 0 and 1 run on some views of each scene and render the others, over and over with other views and seeds.

Reads   SCENE (-s, repeated; or folders of scenes): COLMAP scenes or folders with transforms.json, with all their photos
Writes  DATASET/{train,test}_{A,B,P,M}/<scene>_<what>_<frame>.png, photos/, pairs.jsonl, manifest.json, preview.png
        DATASET/jobs/ what is finished: the same command goes on from there, and one with more scenes, seeds or keep counts adds to it

Example
    python tools/make_fixer_pairs.py -s data/scenes -o data/pairs --seeds 0,1,2,3 --test-scenes fern,fox
    python tools/make_fixer_pairs.py -s demo/study -o out/pairs --preset tiny      # a minute: to see that it runs
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import torch
from tyro.conf import UseAppendAction, arg

from s2d.checks import check_range
from s2d.config import config_to_dict, no_effect, run_script
from s2d.device import choose_device, run_on
from s2d.files import locked
from s2d.log import describe_machine, logger, progress, versions
from s2d.pairs.dataset import MANIFEST, PAIRS, PREVIEW, Dataset
from s2d.pairs.fit import FitSettings
from s2d.pairs.plan import KINDS, MIN_KEPT, Job, Kind, PairScene, PairSettings, plan_jobs
from s2d.pairs.preview import write_preview
from s2d.pairs.scenes import add_scene, find_scenes
from s2d.pairs.workers import run_jobs, suitable_workers

# Of one pair: A and P are as large as their photo, M next to nothing, B is a link.
PHOTOS_PER_PAIR = 2.0
# Where a worker dies.
ADVICE = "use fewer --workers or a smaller --max-side"


@dataclass(frozen=True)
class Config:
    """Make training pairs for the fixer: artifact renders, photos, point guidance."""

    sources: Annotated[tuple[Path, ...], arg(aliases=["-s"]), UseAppendAction] = no_effect(())
    """A scene, or a folder of scenes. Repeat the flag for more."""
    output_dir: Annotated[Path, arg(aliases=["-o"])] = no_effect(Path("out/pairs"))
    """The data set, made if missing; finished parts of it are kept."""
    keep_counts: tuple[int, ...] = no_effect((3, 6))
    """Numbers of kept views of the sparse models, separated by commas; each is a fit per scene and seed."""
    seeds: tuple[int, ...] = no_effect((0,))
    """One set of fits per seed, with other kept views. Seed 0 keeps the views that stage 0 keeps."""
    kinds: tuple[Kind, ...] = KINDS
    """What to make: models of few views (sparse), not yet done (underfit), with part of their Gaussians turned, resized or left out (rotate,
    scale, drop); halves of the views that render each other (cross); models of another model's renders (cycle)."""
    test_scenes: tuple[str, ...] = no_effect(())
    """Scenes whose pairs are all test pairs, by folder name; the other scenes' are train pairs. Without: see --test-every."""
    test_every: int = 8
    """Without --test-scenes: every n-th view of each scene is a test view, which no model is fitted to. 0: no test pairs."""
    views_per_kind: int = 24
    """Largest number of views that one model renders for one kind."""
    min_coverage: float = 0.1
    """Leave out pairs whose guidance covers less: the kept photos say next to nothing about such a view."""
    num_steps: int = 2000
    """Optimisation steps of each model. Stage 1 takes 4000; most of the time goes here."""
    max_init_points: int = 25_000
    """Start with at most this many Gaussians."""
    max_gaussians: int = 35_000
    """Never grow beyond this number."""
    sh_degree: int = 2
    """Degree of the view-dependent colour, 0 to 3."""
    max_side: int = 512
    """Photos with a longer side are scaled down to this, pixels. 0 keeps them as they are."""
    workers: int = no_effect(0)
    """Processes side by side, of one thread and about 1 GB each. 0: one per core, on a GPU as many as its memory takes."""
    device: str = no_effect("auto")
    """Where Gaussians are fitted: auto (a GPU if one can be used, else the CPU), cpu, cuda or cuda:N."""
    overwrite: bool = no_effect(False)
    """Remove the pairs that are there and start anew."""


def main(cfg: Config) -> Path:
    """Make the pairs; returns the data set's folder."""
    check_config(cfg)
    found = find_scenes(cfg.sources)
    check_test_scenes(cfg, found)
    settings = PairSettings(
        FitSettings(cfg.num_steps, cfg.max_init_points, cfg.max_gaussians, cfg.sh_degree),
        cfg.kinds,
        cfg.views_per_kind,
        cfg.min_coverage,
    )
    dataset = Dataset(cfg.output_dir)
    try:
        with locked(cfg.output_dir, "--output-dir"):
            make_pairs(cfg, dataset, settings, found)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"The disk is full: {error.filename or cfg.output_dir}. What is finished is kept: free some space and run the same "
                "command again, or choose another --output-dir."
            ) from error
        raise
    return cfg.output_dir


def make_pairs(
    cfg: Config, dataset: Dataset, settings: PairSettings, found: dict[str, Path]
) -> None:
    """Plan, run what is not finished, and describe the whole."""
    dataset.begin(shared_settings(cfg), cfg.overwrite)
    test_every = 0 if cfg.test_scenes else cfg.test_every
    scenes = [
        add_scene(dataset, source, name, cfg.max_side, test_every, name in cfg.test_scenes)
        for name, source in found.items()
    ]
    jobs = plan_jobs(scenes, cfg.keep_counts, cfg.seeds, cfg.kinds)
    todo = unfinished(dataset, jobs)
    if not todo and (dataset.dir / MANIFEST).is_file():
        logger.info("%s is up to date: all %d jobs are finished", dataset.dir, len(jobs))
        return
    check_space(dataset, scenes, todo, settings)
    for name in (MANIFEST, PAIRS):  # complete no longer
        (dataset.dir / name).unlink(missing_ok=True)
    if todo:
        run_on(choose_device(cfg.device), lambda device: work(cfg, dataset, jobs, settings, device))
    write_preview(dataset, dataset.pairs(), dataset.dir / PREVIEW)
    manifest = dataset.finish(
        {
            "command": " ".join(sys.argv),
            "settings": config_to_dict(cfg),
            "versions": versions(),
            "machine": describe_machine(),
        }
    )
    report(manifest, dataset)


def unfinished(dataset: Dataset, jobs: Sequence[Job]) -> list[Job]:
    """The jobs to be done; moves pictures of the others that a run has left where it was killed, or where its GPU failed."""
    todo = []
    for job in jobs:
        if dataset.is_finished(job):
            dataset.collect(job.name)
        else:
            todo.append(job)
    return todo


def work(
    cfg: Config,
    dataset: Dataset,
    jobs: Sequence[Job],
    settings: PairSettings,
    device: torch.device,
) -> None:
    """Run what is not finished in worker processes; moves what they finish and shows how far they are."""
    todo = unfinished(dataset, jobs)
    num_workers = min(cfg.workers or suitable_workers(len(todo), device), len(todo))
    total = sum(job.num_steps(settings) for job in todo)
    logger.info(
        "%d jobs to do, about %d pairs, %d processes",
        len(todo),
        sum(job.max_pairs(settings) for job in todo),
        num_workers,
    )
    started, steps, pairs, finished = time.monotonic(), 0, 0, 0
    # closing: the workers end here, whatever ends the loop.
    with (
        progress(total, "steps") as bar,
        closing(
            run_jobs(
                partial(dataset.work, settings=settings, device=device), todo, num_workers, ADVICE
            )
        ) as results,
    ):
        for job, event, value in results:
            if event == "steps":
                steps += value
            elif event == "done":
                dataset.collect(job.name)
                finished += 1
                pairs += len(value["pairs"])
                if value["failed"]:
                    logger.warning("%s gave no pairs: %s", job.name, value["failed"])
            bar.update(steps, jobs=f"{finished}/{len(todo)}", pairs=pairs)
    logger.info("%d pairs in %.1f minutes", pairs, (time.monotonic() - started) / 60)


def check_config(cfg: Config) -> None:
    """Raise before anything is read or written."""
    if not cfg.sources:
        raise ValueError("No scene was given. Pass -s SCENE, or a folder of scenes.")
    for name in ("keep_counts", "seeds", "kinds"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name.replace('_', '-')} is empty. Expected at least one value.")
    check_range("keep_counts", min(cfg.keep_counts), MIN_KEPT)
    check_range("seeds", min(cfg.seeds), 0)
    check_range("num_steps", cfg.num_steps, 1)
    check_range("views_per_kind", cfg.views_per_kind, 1)
    check_range("min_coverage", cfg.min_coverage, 0.0, 1.0)
    check_range("sh_degree", cfg.sh_degree, 0, 3)
    check_range("workers", cfg.workers, 0)
    if cfg.test_every == 1 or cfg.test_every < 0:
        raise ValueError(
            f"--test-every must be 0 (no test pairs) or at least 2, got {cfg.test_every}: no view would be left to fit."
        )


def check_test_scenes(cfg: Config, found: dict[str, Path]) -> None:
    unknown = [name for name in cfg.test_scenes if name not in found]
    if unknown:
        raise ValueError(
            f"--test-scenes {unknown[0]} is none of the {len(found)} scenes: {', '.join(found)}. Give their folders' names."
        )


def shared_settings(cfg: Config) -> dict[str, object]:
    """What all pairs of a data set have in common; scenes, seeds and keep counts may be added later."""
    values = config_to_dict(cfg, only_hashed=True)
    values["kinds"] = sorted(values["kinds"])
    if cfg.test_scenes:
        values["test_every"] = 0  # has no effect then
    return values


def check_space(
    dataset: Dataset, scenes: Sequence[PairScene], todo: Sequence[Job], settings: PairSettings
) -> None:
    """Raise ValueError where the pairs will not fit on the disk: better now than in the night."""
    needed = 0.0
    for scene in scenes:
        photos = [path.stat().st_size for path in dataset.photos_dir.glob(f"{scene.name}_*.png")]
        pairs = sum(job.max_pairs(settings) for job in todo if job.scene.name == scene.name)
        needed += pairs * PHOTOS_PER_PAIR * sum(photos) / max(len(photos), 1)
    free = shutil.disk_usage(dataset.dir).free
    if needed > free:
        raise ValueError(
            f"{dataset.dir}: the pairs need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. "
            "Free some space, choose another --output-dir, or lower --views-per-kind or --max-side."
        )


def report(manifest: dict, dataset: Dataset) -> None:
    """Log what there is now."""
    for kind, numbers in manifest["kinds"].items():
        spread = numbers["psnr"]
        logger.info(
            "%-8s %5d train %4d test  PSNR %.2f dB (%.1f to %.1f)  coverage %.0f %%",
            kind,
            numbers["train"],
            numbers["test"],
            spread["mean"],
            spread["p10"],
            spread["p90"],
            100 * numbers["coverage"],
        )
    if manifest["dropped"]:
        logger.info("left out for too little coverage: %s", json.dumps(manifest["dropped"]))
    num_pairs = sum(manifest["num_pairs"].values())
    minutes = manifest["cpu_seconds"] / 60
    logger.info("%d pairs, %.0f per minute of one core", num_pairs, num_pairs / max(minutes, 1e-9))
    logger.info("preview: %s", dataset.dir / PREVIEW)
    if not num_pairs:
        raise ValueError(
            f"No pair came out of {manifest['num_jobs']} jobs; the warnings above say why. Try larger --keep-counts, or --min-coverage 0."
        )


if __name__ == "__main__":
    run_script(main, Config, "make_fixer_pairs")
