"""PSNR on the test views over seconds of stage 1's training.

Runs stages 0 and 1 as they are, with S2D's protocol: the views that are not kept are the test views, all of them. Seconds are those of
the optimisation, checkpoints included; those of the evaluation in between do not count.

Reads   SCENE (-s)
Writes  OUT/stage0, OUT/stage1 (-m; a temporary folder where not given); prints a table. --json FILE, --svg FILE

Example
    python benchmarks/training_curve.py -s $S2D_DATA/scenes/fern --keep-count 8 --svg docs/training_curve.svg
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from unittest import mock

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import torch
from rich.table import Table
from torch import Tensor
from tyro.conf import arg

import stage0_point_guidance
import stage1_3dgs_init
from benchmarks.machine import describe
from benchmarks.plot import Line, plot_svg
from benchmarks.tables import Printer
from s2d.config import run_script
from s2d.files import atomic_write_json, atomic_write_text
from s2d.gaussians import Gaussians
from s2d.metrics import psnr
from s2d.rasterize import rasterize
from s2d.scene import Scene, load_scene
from s2d.split import Split
from s2d.training import TrainingRun, record

# OpenSplat, the other trainer with a CPU path, on `fern --keep-count 8`, 504x377, two cores.
PUBLIC_PSNR, PUBLIC_SECONDS = 21.3, 964


@dataclass(frozen=True)
class Config:
    """Record the quality of stage 1 over seconds of training."""

    source: Annotated[Path, arg(aliases=["-s"])]
    """The scene."""
    model_dir: Annotated[Path | None, arg(aliases=["-m"])] = None
    """Where stages 0 and 1 write; what stage 0 has finished there is used again."""
    keep_count: int | None = None
    """As in stage 0."""
    keep_every: int | None = None
    """As in stage 0."""
    keep_indices: tuple[int, ...] | None = None
    """As in stage 0."""
    sample_iteration: int = 4000
    """As in stage 1."""
    max_gaussians: int = 60_000
    """As in stage 1."""
    seed: int = 0
    every: float = 2.0
    """Seconds of training between two evaluations."""
    markdown: bool = False
    """Print Markdown, for docs."""
    json: Path | None = None
    """Write the curve to this file."""
    svg: Path | None = None
    """Draw the curve."""


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    seconds: float
    step: int
    num_gaussians: int
    psnr: float
    """Mean over the test views, dB."""


@dataclass
class Curve:
    """Evaluates a run whenever it is time to; stands in for `s2d.training.record`, which every step calls."""

    views: Scene
    every: float
    last_step: int
    points: list[Point] = field(default_factory=list)
    evaluating: float = 0.0
    """Seconds spent here."""

    def __call__(self, run: TrainingRun, loss: Tensor) -> None:
        record(run, loss)
        seconds = run.seconds - self.evaluating
        if seconds < self.every * len(self.points) and run.step < self.last_step:
            return
        start = time.monotonic()
        quality = mean_psnr(run.gaussians, self.views)
        self.points.append(Point(seconds, run.step, run.gaussians.num, quality))
        self.evaluating += time.monotonic() - start


def main(cfg: Config) -> list[Point]:
    """Train, print the curve; returns it."""
    if cfg.model_dir is None:
        with tempfile.TemporaryDirectory(prefix="s2d-curve-") as folder:
            points = record_curve(cfg, Path(folder))
    else:
        points = record_curve(cfg, cfg.model_dir)
    report(cfg, points)
    return points


def record_curve(cfg: Config, model_dir: Path) -> list[Point]:
    """Run stage 0, unless it has finished, and stage 1; return the evaluations of the latter."""
    stage0_point_guidance.main(
        stage0_point_guidance.Config(
            source=cfg.source,
            model_dir=model_dir,
            keep_count=cfg.keep_count,
            keep_every=cfg.keep_every,
            keep_indices=cfg.keep_indices,
            seed=cfg.seed,
        )
    )
    stage0 = model_dir / "stage0"
    prepared = stage0 / "scene"
    scene = load_scene(prepared if prepared.is_dir() else cfg.source)
    views = scene.subset(Split.load(stage0 / "split.json").test)
    for name in views.cameras.names:
        views.image(name)  # read before the clock starts
    curve = Curve(views, cfg.every, cfg.sample_iteration)
    with mock.patch.object(stage1_3dgs_init, "record", curve):
        stage1_3dgs_init.main(
            stage1_3dgs_init.Config(
                source=cfg.source,
                model_dir=model_dir,
                sample_iteration=cfg.sample_iteration,
                ensemble=1,
                max_gaussians=cfg.max_gaussians,
                seed=cfg.seed,
                overwrite=True,
            )
        )
    return curve.points


def mean_psnr(gaussians: Gaussians, views: Scene) -> float:
    """Score renders as files of 8 bits hold them, as tools/evaluate.py does; mean over views, dB."""
    values = []
    with torch.no_grad():
        for camera in views.cameras:
            rgb = rasterize(gaussians, camera).rgb[0].clamp(0, 1)
            truth = views.image(camera.names[0])
            values.append(psnr((rgb * 255).round() / 255, (truth * 255).round() / 255))
    return sum(values) / len(values)


def seconds_to_reach(points: list[Point], value: float) -> float | None:
    """Return when the curve first was at `value` dB or above; None if never."""
    return next((point.seconds for point in points if point.psnr >= value), None)


def report(cfg: Config, points: list[Point]) -> None:
    """Print the table; write the files that were asked for."""
    table = Table(title=f"{cfg.source.name}: PSNR on the test views", title_justify="left")
    for column in ("seconds", "step", "Gaussians", "PSNR dB"):
        table.add_column(column, justify="right")
    for point in points:
        row = (f"{point.seconds:.1f}", str(point.step), f"{point.num_gaussians:,}")
        table.add_row(*row, f"{point.psnr:.2f}")
    printer = Printer(cfg.markdown)
    printer.table(table)
    best = max(points, key=lambda point: point.psnr)
    reached = seconds_to_reach(points, PUBLIC_PSNR)
    when = "never" if reached is None else f"after {reached:.0f} s"
    printer.line(
        f"{PUBLIC_PSNR} dB {when}; best {best.psnr:.2f} dB after {best.seconds:.0f} s; "
        f"{points[-1].psnr:.2f} dB at the end, after {points[-1].seconds:.0f} s"
    )
    if cfg.json is not None:
        atomic_write_json(
            cfg.json,
            {**describe(), "scene": cfg.source.name, "points": [vars(point) for point in points]},
        )
    if cfg.svg is not None:
        atomic_write_text(cfg.svg, chart(cfg.source.name, points))


def chart(scene: str, points: list[Point]) -> str:
    """Draw the curve, and where the other trainer arrives."""
    seconds = [point.seconds for point in points]
    lines = [
        Line("stage 1", seconds, [point.psnr for point in points]),
        Line(f"{PUBLIC_PSNR} dB", [0.0, seconds[-1]], [PUBLIC_PSNR, PUBLIC_PSNR], dashed=True),
    ]
    return plot_svg(
        f"{scene}: quality over time", lines, "seconds of training", "PSNR on test views, dB"
    )


if __name__ == "__main__":
    run_script(main, Config, "training_curve")
