"""How long one training step takes, phase by phase, on Gaussians that need no data; and how long the plain PyTorch twin would."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import native_build
import torch
from diff_gaussian_rasterization import _native
from diff_gaussian_rasterization.general import rasterize_gaussians_raw
from diff_gaussian_rasterization.reference import rasterize_reference
from rich.table import Table

from benchmarks.kernels import LABELS, WARM_UP, timed_step
from benchmarks.tables import Printer
from benchmarks.workloads import (
    camera_before,
    front_camera,
    made_up_workload,
    ply_gaussians,
    synthetic_gaussians,
)
from s2d.cameras import Cameras
from s2d.gaussians import Gaussians, gaussians_from_points
from s2d.rasterize import cpus_for_kernels
from s2d.scene import load_scene

# The PyTorch twin looks at every Gaussian at every pixel; this many pairs fit into memory.
TWIN_SIZE = (84, 63)
TWIN_GAUSSIANS = 1500


@dataclass(frozen=True)
class Step:
    """One training step on Gaussians that need no data, and the plain PyTorch twin beside it."""

    num_gaussians: int = 50_000
    """Gaussians of the synthetic scene, and at most so many of --ply or --scene."""
    width: int = 504
    height: int = 377
    ply: Path | None = None
    """Measure a trained model instead, seen from in front of its middle."""
    scene: Path | None = None
    """Measure a scene's SfM points with its first camera, as the first steps of an optimisation see them."""
    repeats: int = 30
    """Steps that are measured; the median and the best are printed."""
    twin: bool = True
    """Also measure the plain PyTorch twin, at a reduced size."""
    seed: int = 0


def main(cfg: Step) -> None:
    """Measure and print."""
    torch.manual_seed(cfg.seed)
    gaussians, cameras = _workload(cfg)
    workload = made_up_workload("step", gaussians, cameras)
    with cpus_for_kernels():
        for _ in range(WARM_UP):
            timed_step(workload)
        steps = [timed_step(workload) for _ in range(cfg.repeats)]
    printer = Printer()
    table = Table(title=_title(gaussians, cameras), title_justify="left")
    for column in ("phase", "median ms", "best ms"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name in steps[0]:
        values = [step[name] for step in steps]
        style = "bold" if name == "step" else None
        row = (LABELS.get(name, name), f"{statistics.median(values):.2f}", f"{min(values):.2f}")
        table.add_row(*row, style=style)
    printer.table(table)
    whole = [step["step"] for step in steps]
    median = statistics.median(whole)
    printer.line(f"{1e3 / median:.1f} steps/s (median), {1e3 / min(whole):.1f} (best)")
    if cfg.twin:
        printer.line(_measure_twin(gaussians, cameras, median))


def _title(gaussians: Gaussians, cameras: Cameras) -> str:
    stats = _native.last_stats
    return (
        f"{gaussians.num} Gaussians ({stats['visible']} visible, {stats['instances']} in tiles), "
        f"{cameras.width}x{cameras.height}, SH degree {gaussians.sh_degree}, {native_build.num_threads()} threads, "
        f"{_native.library().s2d_lanes()} lanes"
    )


def _measure_twin(gaussians: Gaussians, cameras: Cameras, step_ms: float) -> str:
    """Time the twin's render and backward pass beside the kernel's on a small piece, and scale up by pixels x Gaussians."""
    width, height = TWIN_SIZE
    every = max(1, gaussians.num // TWIN_GAUSSIANS)
    few = {
        name: t.detach()[::every][:TWIN_GAUSSIANS].clone()
        for name, t in gaussians.tensors().items()
    }
    scale = torch.tensor([width / cameras.width, height / cameras.height, 1.0])
    Ks = cameras.Ks * scale[:, None]
    milliseconds = {}
    for name, function in (("twin", rasterize_reference), ("kernel", rasterize_gaussians_raw)):
        best = math.inf
        for _ in range(3):
            leaves = {key: t.clone().requires_grad_() for key, t in few.items()}
            start = time.perf_counter()
            out = function(**leaves, viewmats=cameras.viewmats, Ks=Ks, width=width, height=height)
            out.rgb.square().mean().backward()
            best = min(best, 1e3 * (time.perf_counter() - start))
        milliseconds[name] = best
    pairs = cameras.width * cameras.height * gaussians.num
    factor = pairs / (width * height * len(few["means"]))
    scaled = milliseconds["twin"] * factor
    return (
        f"PyTorch twin, {len(few['means'])} Gaussians at {width}x{height}: render + backward "
        f"{milliseconds['twin']:.0f} ms, the kernel {milliseconds['kernel']:.2f} ms. Scaled by pixels x Gaussians "
        f"(x{factor:.0f}; at full size it does not fit into memory) the twin would need {scaled / 1e3:.0f} s a step: "
        f"{scaled / step_ms:.0f} times this kernel's."
    )


def _workload(cfg: Step) -> tuple[Gaussians, Cameras]:
    if cfg.scene is not None:
        scene = load_scene(cfg.scene)
        if scene.sfm is None:
            raise ValueError(f"benchmark: {cfg.scene} has no SfM points. Pass --ply instead.")
        points, rgbs = scene.sfm.points[: cfg.num_gaussians], scene.sfm.rgbs[: cfg.num_gaussians]
        return gaussians_from_points(points, rgbs, sh_degree=3), scene.cameras[0]
    if cfg.ply is not None:
        gaussians = ply_gaussians(cfg.ply, cfg.num_gaussians)
        return gaussians, camera_before(gaussians.means, cfg.width, cfg.height)
    return synthetic_gaussians(cfg.num_gaussians), front_camera(cfg.width, cfg.height)
