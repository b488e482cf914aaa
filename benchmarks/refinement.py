"""What refinement is worth: held-out PSNR with given cameras, with cameras made worse, and with those refined.

The kept cameras of a scene are turned by a given angle about random axes and shifted by a given part of the rig in random directions, each by
itself. Stage 1 runs on the given ones, on these as they are, and on these with --optim-pose. Test cameras are never made worse; they
are carried into each model's frame by the kept photos (`s2d.scored_cameras`). Points come from stage 0 with the given cameras, or with
--worse-points from the cameras that were made worse, as they would if a scene came like this.

Reads   SCENE (-s)
Writes  OUT/<seed>_<variant>/stage0, stage1 (-m; a temporary folder where not given); prints a table. --json FILE

Example
    python benchmarks/refinement.py -s $S2D_DATA/scenes/fern --max-side 252 --sample-iteration 1500
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import torch
from rich.table import Table
from tyro.conf import arg

import stage0_point_guidance
import stage1_3dgs_init
from benchmarks.machine import describe
from benchmarks.tables import Printer
from s2d.alignment import align_cameras
from s2d.cameras import Cameras
from s2d.colmap_io import find_model, read_model, write_model
from s2d.config import run_script
from s2d.files import atomic_write_json
from s2d.gaussians import Gaussians, load_checkpoint
from s2d.metrics import psnr
from s2d.rasterize import rasterize
from s2d.refinement import moved_camera
from s2d.scene import Scene, load_scene
from s2d.scored_cameras import carried_cameras
from s2d.split import Split

VARIANTS = ("given", "worse", "refined")


@dataclass(frozen=True)
class Config:
    """Compare given cameras, worse ones, and worse ones refined."""

    source: Annotated[Path, arg(aliases=["-s"])]
    """The scene; with COLMAP cameras, or photos larger than --max-side."""
    model_dir: Annotated[Path | None, arg(aliases=["-m"])] = None
    """Where the runs are written; finished stages are used again."""
    keep_count: int = 6
    """As in stage 0, with --eval."""
    max_side: int = 252
    """As in stage 0."""
    sample_iteration: int = 1500
    """As in stage 1."""
    max_init_points: int = 40_000
    """As in stage 1."""
    degrees: float = 1.0
    """Angle by which each kept camera is turned."""
    percent: float = 1.0
    """Shift of each kept camera, in percent of the rig's extent."""
    seeds: tuple[int, ...] = (0, 1)
    """One set of worse cameras, and one order of training views, each."""
    variants: tuple[str, ...] = VARIANTS
    """What to run."""
    worse_points: bool = False
    """Also make stage 0's points with the worse cameras."""
    markdown: bool = False
    """Print Markdown, for docs."""
    json: Path | None = None
    """Write the numbers to this file."""


@dataclass(frozen=True)
class Row:
    """One run."""

    seed: int
    variant: str
    rotation: float
    """Mean error of the kept cameras after alignment, degrees."""
    center: float
    """The same, % of the rig's extent."""
    pixels: float
    """Median distance between where points are seen and where the given cameras see them, after alignment."""
    psnr: float
    """Mean over the test views, dB."""


def main(cfg: Config) -> list[Row]:
    """Run all, print the table; returns its rows."""
    if cfg.model_dir is None:
        with tempfile.TemporaryDirectory(prefix="s2d-refinement-") as folder:
            rows = run_all(cfg, Path(folder))
    else:
        rows = run_all(cfg, cfg.model_dir)
    report(cfg, rows)
    return rows


def run_all(cfg: Config, folder: Path) -> list[Row]:
    """Run every variant with every seed."""
    given = folder / "given"
    run_stage0(cfg, cfg.source, given)
    prepared = given / "stage0" / "scene"
    source = prepared if prepared.is_dir() else cfg.source
    truth = load_scene(source)
    split = Split.load(given / "stage0" / "split.json")
    rows = []
    for seed in cfg.seeds:
        scene = folder / f"scene_{seed}"
        if not scene.is_dir():
            worsen(cfg, source, split, seed, scene)
        for variant in cfg.variants:
            out = folder / f"{seed}_{variant}"
            if not (out / "stage0").is_dir():
                if cfg.worse_points and variant != "given":
                    run_stage0(cfg, scene, out)
                else:  # without the prepared scene: the cameras come from `scene`
                    ignored = shutil.ignore_patterns("scene")
                    shutil.copytree(given / "stage0", out / "stage0", ignore=ignored)
            stage1_3dgs_init.main(
                stage1_3dgs_init.Config(
                    source=source if variant == "given" else scene,
                    model_dir=out,
                    sample_iteration=cfg.sample_iteration,
                    max_init_points=cfg.max_init_points,
                    optim_pose=variant == "refined",
                    seed=seed,
                )
            )
            rows.append(score(seed, variant, out, truth, split))
            print(rows[-1], flush=True)
    return rows


def run_stage0(cfg: Config, source: Path, out: Path) -> None:
    stage0_point_guidance.main(
        stage0_point_guidance.Config(
            source=source,
            model_dir=out,
            eval=True,
            keep_count=cfg.keep_count,
            max_side=cfg.max_side,
        )
    )


def worsen(cfg: Config, source: Path, split: Split, seed: int, target: Path) -> None:
    """Write the scene with its kept cameras turned and shifted."""
    kept = load_scene(source).cameras.select(split.kept)
    g = torch.Generator().manual_seed(1000 + seed)

    def directions() -> torch.Tensor:
        vectors = torch.randn(len(kept), 3, generator=g, dtype=torch.float64)
        return vectors / vectors.norm(dim=1, keepdim=True)

    turns = math.radians(cfg.degrees) * directions()
    shifts = 0.01 * cfg.percent * kept.extent * directions()
    model = read_model(find_model(source))
    viewmats = torch.as_tensor(model.viewmats).clone()
    for name, motion in zip(kept.names, torch.cat([turns, shifts], 1), strict=True):
        row = model.names.index(name)
        viewmats[row] = moved_camera(viewmats[row].double(), motion, 1.0)
    shutil.copytree(source / "images", target / "images")
    write_model(target / "sparse" / "0", model._replace(viewmats=viewmats.numpy()))


def score(seed: int, variant: str, out: Path, truth: Scene, split: Split) -> Row:
    """Measure a run against the given cameras and the test photos."""
    used = Cameras.from_json(out / "stage1" / "kept_cameras.json")
    given = truth.cameras.select(used.names)
    fit = align_cameras(given, used)
    gaussians = load_checkpoint(next(out.glob("chkpnt_stage1_*.pth"))).gaussians
    test, _ = carried_cameras(truth.cameras.select(split.test), truth.cameras, used)
    return Row(
        seed,
        variant,
        float(fit.rotation_errors.mean()),
        float(fit.center_errors.mean()),
        pixel_error(fit.sim3.inverse().cameras(used), given, gaussians, fit.sim3.inverse().points),
        mean_psnr(gaussians, test, truth),
    )


def pixel_error(cameras: Cameras, given: Cameras, gaussians: Gaussians, to_given) -> float:
    points = to_given(gaussians.means[::50])

    def seen(these: Cameras) -> torch.Tensor:
        local = torch.einsum("cij,pj->cpi", these.viewmats[:, :3, :3], points)
        local = local + these.viewmats[:, None, :3, 3]
        return torch.einsum("cij,cpj->cpi", these.Ks, local / local[..., 2:])[..., :2]

    return float((seen(cameras) - seen(given)).norm(dim=-1).median())


@torch.no_grad()
def mean_psnr(gaussians: Gaussians, cameras: Cameras, truth: Scene) -> float:
    """Score renders as files of 8 bits hold them, as tools/evaluate.py does; mean over views, dB."""
    values = []
    for camera in cameras:
        rgb = rasterize(gaussians, camera).rgb[0].clamp(0, 1)
        photo = truth.image(camera.names[0])
        values.append(psnr((rgb * 255).round() / 255, (photo * 255).round() / 255))
    return sum(values) / len(values)


def report(cfg: Config, rows: list[Row]) -> None:
    """Print the table; write the file that was asked for."""
    title = (
        f"{cfg.source.name}, {cfg.keep_count} kept, {cfg.degrees:g} degrees and {cfg.percent:g} %"
    )
    table = Table(title=title, title_justify="left")
    for column in ("seed", "cameras", "rotation °", "centre %", "pixels", "PSNR dB", "to given"):
        table.add_column(column, justify="right")
    for row in rows:
        best = next((r.psnr for r in rows if (r.seed, r.variant) == (row.seed, "given")), math.nan)
        errors = (f"{row.rotation:.3f}", f"{row.center:.2f}", f"{row.pixels:.2f}")
        quality = (f"{row.psnr:.2f}", f"{row.psnr - best:+.2f}")
        table.add_row(str(row.seed), row.variant, *errors, *quality)
    Printer(cfg.markdown).table(table)
    if cfg.json is not None:
        rows_as_json = [vars(row) for row in rows]
        atomic_write_json(cfg.json, {**describe(), "title": title, "rows": rows_as_json})


if __name__ == "__main__":
    run_script(main, Config, "refinement")
