"""How the cost of a training step grows: with threads, with pixels, with Gaussians; and how much memory it takes."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import native_build
import torch
from diff_gaussian_rasterization import _native
from rich.table import Table

from benchmarks.kernel_model import Counts
from benchmarks.kernels import LABELS, WARM_UP, count, timed_step
from benchmarks.machine import LARGE, copy, describe, peak
from benchmarks.plot import Line, plot_svg
from benchmarks.tables import Printer
from benchmarks.workloads import (
    Workload,
    front_camera,
    made_up_workload,
    model_workload,
    synthetic_gaussians,
)
from s2d.cameras import Cameras
from s2d.files import atomic_write_json, atomic_write_text
from s2d.rasterize import cpus_for_kernels, rasterize

MIN_STEPS = 4
MANY, FULL_HD = 1_000_000, (1920, 1080)


@dataclass(frozen=True)
class Scaling:
    """Cost of a training step over threads, pixels and Gaussians; memory; a million Gaussians at 1920x1080."""

    model_dir: Path | None = None
    """Measure threads and pixels on this finished stage 1 instead of made-up Gaussians."""
    widths: tuple[int, ...] = (250, 504, 1000, 2000)
    """Image widths; the view and the Gaussians stay what they are, so pairs grow as pixels do."""
    gaussians: tuple[int, ...] = (10_000, 30_000, 100_000, 300_000, 1_000_000)
    """Numbers of made-up Gaussians at 504x377; they shrink as they grow in number, so that they cover the same surfaces."""
    seconds: float = 1.0
    """Time for the steps of each setting."""
    markdown: bool = False
    """Print Markdown, for docs."""
    json: Path | None = None
    """Also write all numbers to this file."""
    svg: Path | None = None
    """Also draw the cost over pixels, pairs and Gaussians."""
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One setting and what a step of it costs."""

    setting: str
    times: dict[str, float]
    """Medians in milliseconds: phases, "rest", "step"."""
    counts: Counts
    workspace: dict[str, int]
    """Bytes that the kernels hold, room to grow included, by what they grow with."""
    state: int
    """Bytes of parameters, gradients and moments."""
    start_rss: int
    """Bytes of the process before there was a Gaussian."""
    peak_rss: int


@dataclass(frozen=True)
class Threads:
    """A step with some threads, beside what the machine gives that many."""

    threads: int
    times: dict[str, float]
    peak_ratio: float
    """Copies of the peak test side by side: how many times one thread's rate."""
    copy_ratio: float
    """The same of copying large arrays."""


def main(cfg: Scaling) -> None:
    """Measure and print four tables."""
    torch.manual_seed(cfg.seed)
    printer = Printer(cfg.markdown)
    base = _base(cfg.model_dir)
    with cpus_for_kernels():
        threads = _over_threads(base, cfg.seconds)
    printer.table(_thread_table(base.name, threads))
    pixels = [_alone(_measure_width, cfg, width) for width in cfg.widths]
    printer.table(_cost_table(f"{base.name}: the same view at other sizes", pixels))
    gaussians = [_alone(_measure_number, cfg, number) for number in cfg.gaussians]
    printer.table(_cost_table("synthetic, 504x377: other numbers of Gaussians", gaussians))
    printer.table(_memory_table([*pixels, *gaussians]))
    render = _render_many()
    printer.line(f"{MANY:,} Gaussians at {FULL_HD[0]}x{FULL_HD[1]}: {render:.2f} s a render")
    if cfg.json is not None:
        rows = {"threads": threads, "pixels": pixels, "gaussians": gaussians}
        payload = {name: [asdict(row) for row in group] for name, group in rows.items()}
        atomic_write_json(cfg.json, {**describe(), **payload, "render_many_seconds": render})
    if cfg.svg is not None:
        atomic_write_text(cfg.svg, chart(pixels, gaussians))


def _alone(measure: Callable[[Scaling, int], Row], cfg: Scaling, value: int) -> Row:
    """Measure in a process of its own, which has no memory of the settings before."""
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply(measure, (cfg, value))
    finally:
        pool.close()
        pool.join()


def _base(model_dir: Path | None) -> Workload:
    if model_dir is not None:
        return model_workload(model_dir)
    return made_up_workload("synthetic", synthetic_gaussians(60_000), front_camera(504, 377))


def _over_threads(workload: Workload, seconds: float) -> list[Threads]:
    """Measure with 1, 2, 4, … and all threads."""
    most, lanes = native_build.num_threads(), _native.library().s2d_lanes()
    counts = sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most})
    one_peak, one_copy = peak(lanes, 1), copy(LARGE, 1)
    rows = []
    try:
        for threads in counts:
            native_build.set_num_threads(threads)
            times = _step_times(workload, seconds)
            peak_ratio, copy_ratio = (
                peak(lanes, threads) / one_peak,
                copy(LARGE, threads) / one_copy,
            )
            rows.append(Threads(threads, times, peak_ratio, copy_ratio))
    finally:
        native_build.set_num_threads(None)
    return rows


def _measure_width(cfg: Scaling, width: int) -> Row:
    start_rss = _peak_rss()
    torch.manual_seed(cfg.seed)
    base = _base(cfg.model_dir)
    camera = base.cameras[0]
    height = round(camera.height * width / camera.width)
    scale = torch.tensor([width / camera.width, height / camera.height, 1.0])
    scaled = Cameras(camera.viewmats, camera.Ks * scale[:, None], ((width, height),), camera.names)
    workload = made_up_workload(base.name, base.run.gaussians.detached(), scaled)
    return _measure(f"{width}x{height}", workload, cfg.seconds, start_rss)


def _measure_number(cfg: Scaling, number: int) -> Row:
    start_rss = _peak_rss()
    torch.manual_seed(cfg.seed)
    workload = made_up_workload("synthetic", synthetic_gaussians(number), front_camera(504, 377))
    return _measure(f"{number:,} Gaussians", workload, cfg.seconds, start_rss)


def _measure(setting: str, workload: Workload, seconds: float, start_rss: int) -> Row:
    with cpus_for_kernels():
        times = _step_times(workload, seconds)
        peak_rss = _peak_rss()
        counts = count(workload)
        frame = rasterize(workload.run.gaussians, workload.cameras).rgb.grad_fn.frames[0]
    numbers = sum(tensor.numel() for tensor in workload.run.gaussians.tensors().values())
    state = 4 * 3 * numbers  # float32: value, two moments; gradients stay in the cache
    return Row(setting, times, counts, frame.memory(), state, start_rss, peak_rss)


def _step_times(workload: Workload, seconds: float) -> dict[str, float]:
    """Medians in milliseconds of the phases and of whole steps, over about `seconds`."""
    start = time.perf_counter()
    for _ in range(WARM_UP):
        timed_step(workload)
        if time.perf_counter() - start > seconds:
            break
    rows: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(rows) < MIN_STEPS or time.perf_counter() - start < seconds:
        rows.append(timed_step(workload))
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _render_many() -> float:
    """Median seconds of a render without gradients, images and all."""
    gaussians, camera = synthetic_gaussians(MANY), front_camera(*FULL_HD)
    times = []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            rasterize(gaussians, camera)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one takes its memory from the system


def _peak_rss() -> int:
    """Bytes of this process at its peak."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage in a child starts from what its parent had
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _thread_table(name: str, rows: list[Threads]) -> Table:
    table = Table(title=f"{name}: milliseconds by threads (times faster)", title_justify="left")
    table.add_column("phase")
    for row in rows:
        table.add_column(f"{row.threads} thread{'s' if row.threads > 1 else ''}", justify="right")

    def add(label: str, values: list[float], style: str | None = None) -> None:
        cells = [f"{value:.2f} (x{values[0] / value:.2f})" for value in values]
        table.add_row(label, *cells, style=style)

    for phase in rows[0].times:
        if phase != "step":
            add(LABELS.get(phase, phase), [row.times[phase] for row in rows])
    add("the kernels", [sum(row.times[phase] for phase in _native.PHASES) for row in rows])
    add("whole step", [row.times["step"] for row in rows], style="bold")
    table.add_row("the peak test side by side", *[f"x{row.peak_ratio:.2f}" for row in rows])
    table.add_row("copies side by side", *[f"x{row.copy_ratio:.2f}" for row in rows])
    return table


def _cost_table(title: str, rows: list[Row]) -> Table:
    """What should stay the same from row to row, if cost is linear, stands in the columns after the step's time."""
    table = Table(title=title, title_justify="left")
    columns = ("", "pixels", "visible", "in tiles", "M pairs", "step ms", "tile passes: ps a pair")
    for column in (*columns, "loss: ns a pixel", "other phases: ns a Gaussian", "rest ms"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        c, times = row.counts, row.times
        pairs = c.forward + c.backward
        tiles = times["forward"] + times["backward_tiles"]
        others = times["step"] - tiles - times["loss"] - times["rest"]
        table.add_row(
            row.setting,
            f"{c.pixels:,.0f}",
            f"{c.visible:,.0f}",
            f"{c.instances:,.0f}",
            f"{pairs / 1e6:.1f}",
            f"{times['step']:.1f}",
            f"{1e9 * tiles / pairs:.0f}",
            f"{1e6 * times['loss'] / c.pixels:.0f}",
            f"{1e6 * others / c.gaussians:.0f}",
            f"{times['rest']:.1f}",
        )
    return table


def _memory_table(rows: list[Row]) -> Table:
    table = Table(
        title="memory in MB; the workspace includes its room to grow", title_justify="left"
    )
    columns = ("", "parameters, moments", "workspace", "process at start", "at its peak")
    more = ("bytes a Gaussian", "bytes an instance", "bytes a pixel")
    for column in (*columns, *more):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        c, parts = row.counts, row.workspace
        table.add_row(
            row.setting,
            *[
                f"{b / 1e6:,.0f}"
                for b in (row.state, sum(parts.values()), row.start_rss, row.peak_rss)
            ],
            f"{row.state / c.gaussians:,.0f} + {parts['gaussians'] / c.gaussians:,.0f}",
            f"{parts['instances'] / c.instances:,.0f}",
            f"{parts['image'] / c.pixels:,.0f}",
        )
    return table


def chart(pixels: list[Row], gaussians: list[Row]) -> str:
    """Draw the cost of a step over pixels and over Gaussians, each axis a multiple of the smallest; a slope of 1 is linear."""
    by_pixels = [row.counts.pixels for row in pixels]
    by_number = [float(row.counts.gaussians) for row in gaussians]
    longest = max(by_pixels[-1] / by_pixels[0], by_number[-1] / by_number[0])

    def relative(values: list[float]) -> list[float]:
        return [value / values[0] for value in values]

    lines = [
        Line("over pixels", relative(by_pixels), relative([r.times["step"] for r in pixels])),
        Line("over Gaussians", relative(by_number), relative([r.times["step"] for r in gaussians])),
        Line("linear", [1.0, longest], [1.0, longest], dashed=True),
    ]
    return plot_svg("Cost of a training step", lines, "times as many", "times as long", log=True)
