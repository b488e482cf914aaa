"""How long each kernel takes on a GPU, beside the least time that its memory traffic and its arithmetic allow.

Bytes and operations are those of benchmarks/kernel_model.py, counted as the CPU kernels count them, for the formulas are the same; what
differs is how the phases are cut, and the size of the records.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from diff_gaussian_rasterization.general import RenderOptions, SceneTensors, forward
from native_build import cuda
from native_build.cuda import module
from native_build.cuda.driver import Driver

from benchmarks import kernel_model as model
from benchmarks.gpu_contestants import Contestant, Task

SPLAT, SUMS, INSTANCE, STATE = (
    48,
    40,
    4,
    24,
)  # bytes: two records, a list's entry, a pixel's saved state
SEGMENT = 256
RAW_BYTES = 4 * model.RAW


@dataclass(frozen=True)
class Limits:
    """Measured rates of one GPU."""

    flops: float
    """Float operations a second; a multiply-add is two."""
    bytes: float
    """Bytes a second between chip and memory; reads and writes both count."""


def measure_limits(device: torch.device) -> Limits:
    """Measure both rates: a long chain of multiply-adds, a copy of 1 GiB."""
    peak = cuda.Kernels("benchmark", [Path(__file__).with_name("gpu_peak.cu")])
    blocks, rounds = 64 * torch.cuda.get_device_properties(device).multi_processor_count, 4096
    out = torch.empty(blocks * 256, device=device)
    seconds = best_seconds(lambda: peak.launch("fma_peak", blocks, 256, out, rounds), device)
    source = torch.randint(256, (2**30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = best_seconds(lambda: target.copy_(source), device)
    return Limits(2 * 16 * rounds * out.numel() / seconds, 2 * source.numel() / copying)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """The shortest of some runs, after two that warm up."""
    return min(milliseconds(work, device, repeats, warm_up=2)) / 1e3


def milliseconds(
    work: Callable[[], object], device: torch.device, repeats: int, warm_up: int
) -> list[float]:
    """Time each of some runs: by events of the GPU, on a CPU by its clock."""
    for _ in range(warm_up):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


@dataclass
class TimedDriver:
    """Passes everything on to a driver, and times the launches."""

    inner: Driver
    spans: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def launch(
        self,
        device: int,
        stream: int,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        arguments: Sequence[Any],
    ) -> None:
        begin, end = _clock(), _clock()
        begin.record()
        self.inner.launch(device, stream, function, grid, block, shared, arguments)
        end.record()
        self.spans[str(function)].append((begin, end))

    def milliseconds(self, names: dict[str, str]) -> dict[str, list[float]]:
        """By kernel, once all is done; `names` tells functions apart that the driver knows as numbers."""
        return {
            names.get(function, function): [begin.elapsed_time(end) for begin, end in spans]
            for function, spans in self.spans.items()
        }


class _WallClock:
    """An event where there is no GPU: launches are done when they return."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _WallClock) -> float:
        return 1e3 * (end.at - self.at)


def _clock() -> Any:
    return torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else _WallClock()


@contextmanager
def timed_launches() -> Iterator[TimedDriver]:
    """Time every launch until the block ends."""
    driver = TimedDriver(module.driver())
    with mock.patch.dict(module._settings, driver=driver):
        yield driver


def kernel_times(contestant: Contestant, views: int, steps: int) -> dict[str, float]:
    """Median milliseconds of each kernel in a training step; "sorting and the rest" is what torch does between them."""
    from diff_gaussian_rasterization import _cuda as raster
    from fused_ssim import _cuda as ssim

    for step in range(3):
        contestant.step(step % views)
    device = contestant.task.photos.device
    with timed_launches() as driver:
        whole = milliseconds(
            lambda: contestant.step(len(driver.spans) % views), device, steps, warm_up=0
        )
    names = {
        str(function): kernel
        for package in (raster, ssim)
        for (kernel, _), function in package.kernels()._functions.items()
    }
    times = {kernel: median(spans) for kernel, spans in driver.milliseconds(names).items()}
    return {
        **times,
        "sorting and the rest": median(whole) - sum(times.values()),
        "step": median(whole),
    }


def count(task: Task, view: int = 0) -> model.Counts:
    """Count the work of a step: what is visible and in tiles on the GPU, pairs with the kernels for CPUs (seconds for a million Gaussians)."""
    from diff_gaussian_rasterization import _cuda

    width, height = task.size
    degree = int((1 + task.gaussians["shN"].shape[1]) ** 0.5) - 1
    options = RenderOptions(width, height, degree)
    one = slice(view, view + 1)
    viewmats, Ks, background = task.viewmats[one], task.Ks[one], torch.zeros(3)
    with torch.no_grad():
        scene = SceneTensors(**task.gaussians)
        images, gpu_frame = _cuda.render(scene, viewmats, Ks, background, None, options, keep=False)
        with mock.patch.dict(module._settings, device_type="cuda"):  # in tests it is another
            on_cpu = SceneTensors(**{name: t.cpu() for name, t in task.gaussians.items()})
            _, (frame,) = forward(on_cpu, viewmats.cpu(), Ks.cpu(), background, None, options)
    pairs = frame.pairs()
    return model.Counts(
        gaussians=images.radii.numel(),
        visible=int((images.radii > 0).sum()),
        instances=len(gpu_frame.instances),
        pixels=width * height,
        coefficients=(degree + 1) ** 2,
        degree=degree,
        blended=pairs["blended"],
        forward=pairs["blended"],
        backward=pairs["blended"],
        listed=pairs["listed"],
    )


def kernel_work(c: model.Counts) -> dict[str, model.Work]:
    """The least that each kernel of a training step must do; pairs are those that any renderer must blend."""
    phases = model.step_work(c)
    color, numbers = 4 * 3 * c.coefficients, model.RAW + 3 * c.coefficients
    states = c.instances / SEGMENT * SEGMENT * STATE
    pixel_images = 20  # colour, alpha, depth

    def work(phase: str, num_bytes: float) -> model.Work:
        return model.Work(phases[phase].flop, num_bytes, phases[phase].items, phases[phase].unit)

    return {
        "project_forward": work(
            "project", c.gaussians * (RAW_BYTES + 12) + c.visible * (color + SPLAT)
        ),
        "emit_instances": model.Work(0.0, c.gaussians * 16 + c.visible * 24 + c.instances * 6, c.instances, "instances"),
        "tile_ranges": model.Work(0.0, c.instances * (2 + 8 + 4 + 4), c.instances, "instances"),
        "rasterize_forward": work(
            "forward",
            c.instances * (INSTANCE + SPLAT) + states + c.pixels * (pixel_images + 8),
        ),
        "ssim_forward": model.Work(c.pixels * 3 * model.LOSS / 2, c.pixels * 3 * 4 * (2 + 3), c.pixels, "pixels"),
        "ssim_gradient": model.Work(c.pixels * 3 * model.LOSS / 2, c.pixels * 3 * 4 * (2 + 3 + 1), c.pixels, "pixels"),
        "rasterize_backward": work(
            "backward_tiles",
            c.instances * (INSTANCE + SPLAT + SUMS) + states + c.pixels * (pixel_images + 8 + 12),
        ),
        "project_update": work(
            "backward_project",
            c.gaussians * 4 + c.visible * (numbers * 24 + SUMS + 16),
        ),
    }  # fmt: skip
