"""Whole training steps of real models, and each phase against what the machine allows: pairs, operations, bytes, share of the limit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diff_gaussian_rasterization import _native
from rich.table import Table

from benchmarks.kernel_model import BACKWARD_PAIR, FORWARD_PAIR, Counts, Work, step_work
from benchmarks.machine import (
    Limits,
    copy,
    describe,
    limits_json,
    limits_table,
    measure_limits,
)
from benchmarks.tables import Printer
from benchmarks.workloads import (
    Workload,
    camera_before,
    front_camera,
    made_up_workload,
    model_workload,
    ply_gaussians,
    synthetic_gaussians,
)
from s2d import training
from s2d.files import atomic_write_json
from s2d.optim import LearningRates, set_means_rate
from s2d.rasterize import cpus_for_kernels, rasterize

WARM_UP = 8  # steps that fault in memory and fill the caches
REFERENCE_PEAK = (
    2 * 100e9
)  # FLOP/s: two cores of an ordinary laptop, to which steps per second are scaled
LABELS = {
    "project": "project + SH",
    "bin": "bin + sort",
    "backward_tiles": "backward, tiles",
    "backward_project": "backward, projection + Adam",
    "loss": "loss + gradient",
}


@dataclass(frozen=True)
class Kernels:
    """Phases of the training step in ms, pairs/s and shares of the limit; whole steps per second."""

    model_dir: tuple[Path, ...] = ()
    """Finished stage 1 runs (OUT folders); each is trained on for some steps, from memory: nothing is written there."""
    source: Path | None = None
    """The scene of --model-dir, where it is no longer at the place that OUT/stage1/manifest.json names."""
    ply: Path | None = None
    """Without --model-dir: a trained model, seen from in front of its middle."""
    num_gaussians: int = 60_000
    """Without --model-dir: Gaussians that are made up, or at most taken from --ply."""
    width: int = 504
    height: int = 377
    steps: int = 80
    """Measured training steps, and as many again whose phases are timed."""
    markdown: bool = False
    """Print Markdown, for docs."""
    json: Path | None = None
    """Also write all numbers to this file."""
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """One workload's counts and times."""

    name: str
    size: str
    """Of the images, for people."""
    counts: Counts
    steps: list[float]
    """Milliseconds of whole steps, nothing else being timed."""
    phases: dict[str, list[float]]
    """Milliseconds by phase, of other steps."""
    limits: Limits
    bandwidth: float
    """Bytes/s of all threads copying arrays as large together as what a step touches."""


def main(cfg: Kernels) -> None:
    """Measure and print; one table per model."""
    torch.manual_seed(cfg.seed)
    printer = Printer(cfg.markdown)
    limits = measure_limits()
    printer.table(limits_table(limits))
    results = []
    for workload in _workloads(cfg):
        measured = measure(workload, cfg.steps, limits)
        printer.table(phase_table(measured))
        for line in summary(measured):
            printer.line(line)
        results.append(measured)
    if cfg.json is not None:
        payload = {
            **describe(),
            "limits": limits_json(limits),
            "models": [to_json(measured) for measured in results],
        }
        atomic_write_json(cfg.json, payload)


def _workloads(cfg: Kernels) -> Iterator[Workload]:
    for model_dir in cfg.model_dir:
        yield model_workload(model_dir, cfg.source)
    if cfg.model_dir:
        return
    if cfg.ply is not None:
        gaussians = ply_gaussians(cfg.ply, cfg.num_gaussians)
        camera = camera_before(gaussians.means, cfg.width, cfg.height)
        yield made_up_workload(cfg.ply.name, gaussians, camera)
    else:
        camera = front_camera(cfg.width, cfg.height)
        yield made_up_workload("synthetic", synthetic_gaussians(cfg.num_gaussians), camera)


def measure(workload: Workload, num_steps: int, limits: Limits) -> Measured:
    """Train `num_steps` steps for the time of whole steps, then as many for that of the phases."""
    with cpus_for_kernels():
        counts = count(workload)
        for _ in range(WARM_UP):
            take_step(workload)
        steps = [_milliseconds(lambda: take_step(workload)) for _ in range(num_steps)]
        phases: dict[str, list[float]] = {}
        for _ in range(num_steps):
            for name, value in timed_step(workload).items():
                phases.setdefault(name, []).append(value)
    touched = sum(work.bytes for work in step_work(counts).values())
    each = int(touched / 2 / limits.threads)  # a copy touches twice its size
    sizes = sorted({f"{width}x{height}" for width, height in workload.cameras.sizes})
    bandwidth = copy(each, limits.threads)
    return Measured(workload.name, ", ".join(sizes), counts, steps, phases, limits, bandwidth)


def take_step(workload: Workload) -> None:
    """All that a step of stage 1 does, except for the density control of every hundredth step."""
    run = workload.run
    set_means_rate(run.optimizer, LearningRates(), run.scene_extent, 1.0)  # as at stage 1's end
    _, name = run.sampler.draw()
    loss = training.optimise_view(
        run,
        workload.cameras.select([name]),
        workload.image(name),
        ssim_weight=0.2,
        sh_degree=run.gaussians.sh_degree,
    )
    training.record(run, loss)


def timed_step(workload: Workload) -> dict[str, float]:
    """Take a step; return the milliseconds of its phases, of the "rest" and of the whole "step".

    The kernels time themselves. The loss is timed from its call and, on the way back, from the gradient of the loss to that of
    the render.
    """
    times: dict[str, float] = {}
    marks: dict[str, float] = {}
    original_loss = training.photometric_loss

    def begin_backward(gradient: torch.Tensor) -> None:
        marks["loss"] = time.perf_counter()

    def end_backward(gradient: torch.Tensor) -> None:
        times["loss"] += 1e3 * (time.perf_counter() - marks["loss"])

    def timed_loss(rendered: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        start = time.perf_counter()
        loss = original_loss(rendered, *args, **options)
        times["loss"] = 1e3 * (time.perf_counter() - start)
        loss.register_hook(begin_backward)
        rendered.register_hook(end_backward)
        return loss

    with mock.patch.object(training, "photometric_loss", timed_loss):
        step = _milliseconds(lambda: take_step(workload))
    times.update({name: _native.last_stats[name] for name in _native.PHASES})
    return {**times, "rest": step - sum(times.values()), "step": step}


def count(workload: Workload) -> Counts:
    """Count the work of a step on each view; return the mean over the views."""
    gaussians = workload.run.gaussians
    rows = []
    for camera in workload.cameras:
        # The workspace of a render belongs to its node in the autograd graph, for the backward pass.
        frame = rasterize(gaussians, camera).rgb.grad_fn.frames[0]
        rows.append({**frame.stats(), **frame.pairs(), "pixels": camera.width * camera.height})
    means = {
        name: statistics.mean(row[name] for row in rows)
        for name in ("visible", "instances", "pixels", "blended", "forward", "backward", "listed")
    }
    coefficients = 1 + gaussians.shN.shape[1]
    return Counts(
        gaussians=gaussians.num, coefficients=coefficients, degree=gaussians.sh_degree, **means
    )


def _milliseconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def phase_table(measured: Measured) -> Table:
    """Format one model's phases for a terminal."""
    c = measured.counts
    table = Table(
        title=f"{measured.name}: {c.gaussians:,} Gaussians, {c.visible:,.0f} visible, {c.instances:,.0f} in tiles, {measured.size}, "
        f"SH degree {c.degree}. Per pixel {c.blended / c.pixels:.1f} blended; visited {c.forward / c.pixels:.1f} forward, "
        f"{c.backward / c.pixels:.1f} backward",
        title_justify="left",
    )
    columns = (
        "phase",
        "median ms",
        "best ms",
        "M/s",
        "of",
        "GFLOP/s",
        "GB/s",
        "limit ms",
        "bound by",
        "of limit",
    )
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("phase", "of", "bound by") else "right"
        )
    work = step_work(c)
    order = [*dict.fromkeys([*work, *_native.PHASES]), "rest"]
    for name in order:
        times = measured.phases[name]
        median = statistics.median(times)
        row = [LABELS.get(name, name), f"{median:.2f}", f"{min(times):.2f}"]
        if name in work:
            row += _against_limit(work[name], median, measured)
        table.add_row(*row)
    whole = statistics.median(measured.steps)
    limit = 1e3 * sum(limit_seconds(w, measured)[0] for w in work.values())
    table.add_row(
        "whole step",
        f"{whole:.2f}",
        f"{min(measured.steps):.2f}",
        *[""] * 4,
        f"{limit:.2f}",
        "",
        f"{limit / whole:.0%}",
        style="bold",
    )
    return table


def limit_seconds(work: Work, measured: Measured) -> tuple[float, str]:
    """Return the least time that this machine allows for a phase, and what binds it."""
    arithmetic, memory = work.flop / measured.limits.peak_all, work.bytes / measured.bandwidth
    return max((arithmetic, "arithmetic"), (memory, "memory"))


def _against_limit(work: Work, milliseconds: float, measured: Measured) -> list[str]:
    seconds = 1e-3 * milliseconds
    limit, bound = limit_seconds(work, measured)
    return [
        f"{work.items / seconds / 1e6:,.0f}",
        work.unit,
        f"{work.flop / seconds / 1e9:.0f}",
        f"{work.bytes / seconds / 1e9:.1f}",
        f"{1e3 * limit:.2f}",
        bound,
        f"{limit / seconds:.0%}",
    ]


def tile_pass_share(measured: Measured) -> float:
    """Share of the FMA peak in the forward and backward passes over tiles, counting the arithmetic of the visited pairs."""
    flop = measured.counts.forward * sum(FORWARD_PAIR.values())
    flop += measured.counts.backward * sum(BACKWARD_PAIR.values())
    milliseconds = sum(statistics.median(measured.phases[p]) for p in ("forward", "backward_tiles"))
    return flop / (1e-3 * milliseconds) / measured.limits.peak_all


def summary(measured: Measured) -> list[str]:
    """Say how fast whole steps are, here and on the reference machine, and how near the tile passes are to the peak."""
    rate = 1e3 / statistics.median(measured.steps)
    scale = REFERENCE_PEAK / measured.limits.peak_all
    return [
        f"{rate:.1f} steps/s (median; {1e3 / min(measured.steps):.1f} best). Scaled to 2 cores of 100 GFLOP/s: "
        f"{rate * scale:.1f} steps/s. Copy bandwidth at this size: {measured.bandwidth / 1e9:.0f} GB/s",
        f"forward + backward over tiles: {tile_pass_share(measured):.0%} of the FMA peak",
    ]


def to_json(measured: Measured) -> dict[str, Any]:
    """All numbers of one model."""
    work = step_work(measured.counts)
    rate = 1e3 / statistics.median(measured.steps)
    phases = {
        name: {
            "median_ms": statistics.median(times),
            "best_ms": min(times),
            **(asdict(work[name]) if name in work else {}),
            **({"limit_ms": 1e3 * limit_seconds(work[name], measured)[0]} if name in work else {}),
        }
        for name, times in measured.phases.items()
    }
    return {
        "name": measured.name,
        "size": measured.size,
        "counts": asdict(measured.counts),
        "phases": phases,
        "step_median_ms": statistics.median(measured.steps),
        "step_best_ms": min(measured.steps),
        "steps_per_second": rate,
        "steps_per_second_at_2x100_gflops": rate * REFERENCE_PEAK / measured.limits.peak_all,
        "tile_passes_share_of_peak": tile_pass_share(measured),
        "bandwidth": measured.bandwidth,
    }
