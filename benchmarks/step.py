"""How long one training step takes, phase by phase, on Gaussians that need no data; and how long the plain PyTorch twin would."""

from __future__ import annotations

import itertools
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
from rich.console import Console
from rich.table import Table

from benchmarks.workloads import camera_before, front_camera, ply_gaussians, synthetic_gaussians
from s2d.cameras import Cameras
from s2d.gaussians import Gaussians, gaussians_from_points
from s2d.losses import photometric_loss
from s2d.optim import LearningRates, create_optimizer
from s2d.rasterize import cpus_for_kernels, rasterize
from s2d.scene import load_scene

# The PyTorch twin looks at every Gaussian at every pixel; this many pairs fit into memory.
TWIN_SIZE = (84, 63)
TWIN_GAUSSIANS = 1500


@dataclass(frozen=True)
class Step:
    """One training step: render, L1 + SSIM, backward, Adam."""

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
    console = Console()
    with cpus_for_kernels():
        rows = _measure_step(gaussians, cameras, cfg.repeats)
    stats = dict(_native.last_stats)
    table = Table(title=_title(gaussians, cameras, stats), title_justify="left")
    for column in ("phase", "median ms", "best ms"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, values in rows.items():
        style = "bold" if name == "step" else None
        table.add_row(name, f"{statistics.median(values):.2f}", f"{min(values):.2f}", style=style)
    console.print(table)
    console.print(
        f"{1e3 / statistics.median(rows['step']):.1f} steps/s (median), {1e3 / min(rows['step']):.1f} (best)"
    )
    if cfg.twin:
        console.print(_measure_twin(gaussians, cameras, statistics.median(rows["step"])))


def _title(gaussians: Gaussians, cameras: Cameras, stats: dict[str, float]) -> str:
    return (
        f"{gaussians.num} Gaussians ({stats['visible']} visible, {stats['instances']} in tiles), "
        f"{cameras.width}x{cameras.height}, SH degree {gaussians.sh_degree}, {native_build.num_threads()} threads, "
        f"{_native.library().s2d_lanes()} lanes"
    )


def _measure_step(gaussians: Gaussians, cameras: Cameras, repeats: int) -> dict[str, list[float]]:
    """Train against a perturbed render of itself; return milliseconds of each phase and step."""
    with torch.no_grad():
        clean = rasterize(gaussians, cameras).rgb[0]
        target = (clean + 0.1 * torch.randn_like(clean)).clamp(0, 1)
    optimizer = create_optimizer(gaussians, LearningRates(), scene_extent=1.0)
    background = torch.zeros(3)
    rows: dict[str, list[float]] = {}

    def record(name: str, milliseconds: float) -> None:
        rows.setdefault(name, []).append(milliseconds)

    for step in range(repeats + 3):
        if step == 3:  # the first steps compile, fault in memory and fill the caches
            rows.clear()
        probe = torch.zeros(1, gaussians.num, 2, requires_grad=True)
        times = [time.perf_counter()]
        out = rasterize(gaussians, cameras, background=background, means2d_probe=probe)
        times.append(time.perf_counter())
        loss = photometric_loss(out.rgb[0], target)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        render, loss_forward, backward, adam = (1e3 * (b - a) for a, b in itertools.pairwise(times))
        kernel = {name: _native.last_stats[name] for name in _native.PHASES}
        for name, value in kernel.items():
            record(name, value)
        forward_phases, backward_phases = _native.PHASES[:3], _native.PHASES[3:]
        record(
            "loss and its gradient",
            loss_forward + backward - sum(kernel[p] for p in backward_phases),
        )
        record("Adam", adam)
        record("rest of the render call", render - sum(kernel[p] for p in forward_phases))
        record("step", 1e3 * (times[-1] - times[0]))
    return rows


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
