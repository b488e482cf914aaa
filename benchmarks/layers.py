"""Layers against one model per level and against parts of one model: quality at test views, bytes, transparent Gaussians, rendering time.

Three ways to have every level of detail, all trained here on the same kept photos from the same points:

- layers: `--layers 8,4,2,1`, each on top of those before;
- independent: a model per level, of as many Gaussians as the layers have at that level at most, with as many steps as the layer has;
- downsampled: the finest independent model, cut down to the Gaussians that add most to the kept views, as many as the layers have.

What is finished is not done again, so the command can be stopped and repeated.

Reads   $S2D_DATA/scenes/<scene> (or --data-dir)
Writes  OUT_DIR/<scene>_<kept>_s<seed>/{stage0,layers/,level_<k>/,scores.json}; docs/layers_results.md

Example
    python benchmarks/layers.py                                              # fern, kitchen, fox; all and 6 kept: hours on 2 cores
    python benchmarks/layers.py --scenes fern --keep-count 6 --max-side 252 --layers 4,2,1 --layer-iters 300 --max-gaussians 12000
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import torch

from s2d.cameras import Cameras
from s2d.config import config_to_dict, no_effect, run_script
from s2d.files import atomic_write_json, atomic_write_text
from s2d.gaussians import Gaussians
from s2d.layers.convert import pack
from s2d.layers.levels import gaussians_of_level, write_levels
from s2d.layers.manifest import Levels, load_levels
from s2d.layers.options import LayerFlags, plan_layers
from s2d.layers.records import Encoding
from s2d.layers.reduce import contributions
from s2d.layers.rows import TRANSPARENT, pick_rows, visible_rows
from s2d.layers.score import score_views
from s2d.log import describe_machine, logger
from s2d.metrics import Lpips, LpipsUnavailable, load_lpips
from s2d.rasterize import cpus_for_kernels, rasterize
from s2d.scene import Scene, load_scene
from s2d.split import Split

ROOT = Path(__file__).resolve().parent.parent
PACKED = Encoding("quantised", "uint8", "zstd")
ALL = 0  # of --keep-count
METHODS = ("layers", "independent", "downsampled")
SCORES = (("psnr", "{:.2f}"), ("ssim", "{:.3f}"), ("lpips", "{:.3f}"))


@dataclass(frozen=True)
class Config:
    """Train layers and both baselines per scene and kept count, score them, write the tables."""

    scenes: tuple[str, ...] = ("fern", "kitchen", "fox")
    """Names of scene folders."""
    keep_count: tuple[int, ...] = (ALL, 6)
    """Numbers of kept photos; 0 keeps all that are not held out."""
    layers: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0)
    """How many times smaller the photos are for each layer."""
    layer_iters: int = 2500
    """Steps of each layer, and of each independent model."""
    max_gaussians: int = 80_000
    """Of all layers together."""
    max_side: int = 640
    """Longest side of the photos at full size, pixels."""
    stage_flags: str = ""
    """More flags for stage 3, as one word: "--layer-points 0.3 --freeze all"."""
    seed: int = 0
    """Of the training."""
    lpips: bool = True
    """Also measure LPIPS (VGG)."""
    data_dir: Path | None = no_effect(None)
    """Folder with the scenes; $S2D_DATA/scenes if not given."""
    out_dir: Path = no_effect(ROOT / "out" / "layers")
    """Folder for the models."""
    table: Path = no_effect(ROOT / "docs" / "layers_results.md")
    """The tables to write."""


def main(cfg: Config) -> Path:
    """Run what is missing; returns the tables' path."""
    if cfg.data_dir is None and "S2D_DATA" not in os.environ:
        raise ValueError(
            "No scenes: S2D_DATA is not set. Set it to the folder that holds scenes/, or pass --data-dir."
        )
    data_dir = cfg.data_dir or Path(os.environ["S2D_DATA"]) / "scenes"
    network = None
    if cfg.lpips:
        try:
            network = load_lpips("vgg")
        except LpipsUnavailable as error:
            logger.warning("%s", error)
    finished: dict[tuple[str, int], dict] = {}
    for scene in cfg.scenes:
        for keep in cfg.keep_count:
            finished[scene, keep] = run_setting(cfg, data_dir / scene, keep, network)
            atomic_write_text(cfg.table, page(cfg, finished))
    logger.info("tables: %s", cfg.table)
    return cfg.table


def run_setting(cfg: Config, source: Path, keep: int, network: Lpips | None) -> dict[str, Any]:
    """Train and score one scene with one number of kept photos, unless this very setting is finished."""
    folder = cfg.out_dir / f"{source.name}_{keep or 'all'}_s{cfg.seed}"
    key = config_to_dict(cfg, only_hashed=True) | {"scenes": source.name, "keep_count": keep}
    stored = folder / "scores.json"
    if stored.is_file():
        scores = json.loads(stored.read_text("utf-8"))
        if scores["key"] == key:
            logger.info("%s is finished", folder.name)
            return scores
    logger.info("== %s", folder.name)
    chosen = ["--keep-every", 1] if keep == ALL else ["--keep-count", keep]
    common = ["-s", source, "-m", folder, "--max-side", cfg.max_side]
    run_stage("stage0_point_guidance", *common, "--eval", *chosen)

    plan = plan_layers(LayerFlags(layers=cfg.layers), cfg.max_gaussians)
    train(cfg, source, folder / "layers", cfg.layers, cfg.layer_iters, ())
    layered = load_levels(folder / "layers" / "stage3" / "layers")
    independent = []
    for k, layer in enumerate(plan):
        budget = sum(below.budget for below in plan[: k + 1])
        train(cfg, source, folder / f"level_{k}", (layer.factor,), cfg.layer_iters, (budget,))
        independent.append(load_levels(folder / f"level_{k}" / "stage3" / "layers"))

    photos, kept, test = views(folder, source)
    rows = []
    finest = gaussians_of_level(independent[-1], 0)
    importance = contributions(finest, kept)
    for k, level in enumerate(layered.levels):
        own = gaussians_of_level(layered, k)
        best = importance.argsort(descending=True)[: level.stop]
        part = pick_rows(finest, best)
        part_levels = write_levels(folder / f"part_{k}", [part], [None], [level.rescale])
        models = [
            ("layers", own, layered, k),
            ("independent", gaussians_of_level(independent[k], 0), independent[k], 0),
            ("downsampled", part, part_levels, 0),
        ]
        for method, gaussians, levels, number in models:
            logger.info("%s: level %d, %s", folder.name, k, method)
            # A part has the Gaussians of a model that was trained at full size.
            trained_for = 1.0 if method == "downsampled" else level.rescale
            opacities = torch.sigmoid(gaussians.opacity_logits)
            small = test.scaled(level.rescale)
            rows.append(
                {
                    "level": k,
                    "rescale": level.rescale,
                    "method": method,
                    "gaussians": gaussians.num,
                    "transparent": float((opacities < TRANSPARENT).float().mean()),
                    "own": score_views(gaussians, test, photos, level.rescale, network),
                    "full": score_views(
                        gaussians, test, photos, 1.0, network, own_rescale=trained_for
                    ),
                    "ms": render_ms(gaussians, small),
                    "ms_visible": render_ms(visible_rows(gaussians), small),
                    **size_of(levels, number, folder / f"packed_{method}_{k}"),
                }
            )
    scores = {"key": key, "rows": rows}
    atomic_write_json(stored, scores)
    return scores


def train(
    cfg: Config,
    source: Path,
    folder: Path,
    factors: tuple[float, ...],
    steps: int,
    budget: tuple[int, ...],
) -> None:
    """Run stage 3 on the stage 0 that all runs of a setting share."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = folder / "stage0"
    if not shared.exists():
        shared.symlink_to(Path("..") / "stage0", target_is_directory=True)
    arguments: list[object] = ["--layers", *factors, "--layer-iters", steps, "--seed", cfg.seed]
    arguments += ["--max-gaussians", cfg.max_gaussians, *shlex.split(cfg.stage_flags)]
    if budget:
        arguments += ["--layer-budget", *budget]
    common = ["-s", source, "-m", folder, "--no-pseudo-views"]
    run_stage("stage3_3dgs_mixed_opt", *common, *arguments)


def run_stage(name: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)]
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"{name} failed; it has said why. Command: {shlex.join(command)}"
        ) from error


def views(folder: Path, source: Path) -> tuple[Scene, Cameras, Cameras]:
    """All photos, the kept and the test cameras."""
    prepared = folder / "stage0" / "scene"
    scene = load_scene(prepared if prepared.is_dir() else source)
    split = Split.load(folder / "stage0" / "split.json")
    return scene, scene.cameras.select(split.kept), scene.cameras.select(split.test)


def size_of(levels: Levels, k: int, folder: Path) -> dict[str, int]:
    """Bytes of everything that has to be there to show level k, as trained and packed."""
    packed = pack(levels, folder, PACKED)
    return {
        "bytes": levels.num_bytes(k),
        "bytes_packed": packed.num_bytes(k),
        "bytes_new": sum(levels.files[name].bytes for name in levels.new_files(k)),
        "bytes_packed_new": sum(packed.files[name].bytes for name in packed.new_files(k)),
    }


def render_ms(gaussians: Gaussians, cameras: Cameras, rounds: int = 5) -> float:
    """Milliseconds per view, the best of some rounds."""
    best = float("inf")
    with cpus_for_kernels(), torch.no_grad():
        for _ in range(rounds):
            start = time.perf_counter()
            for camera in cameras:
                rasterize(gaussians, camera)
            best = min(best, 1000 * (time.perf_counter() - start) / len(cameras))
    return round(best, 3)


# ----------------------------------------------------------------------------------------------------------------- tables


def page(cfg: Config, finished: dict[tuple[str, int], dict]) -> str:
    """Build the page from the scores of every finished setting."""
    machine = describe_machine()
    parts = [
        "# Layers: results",
        f"Made by one command:\n\n    {shlex.join(['python', 'benchmarks/layers.py', *sys.argv[1:]])}",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, no GPU. {cfg.layer_iters} steps per layer and per independent "
        "model. Test views of `--eval`, which no training sees; *own*: at the level's resolution, *full*: at full size, where "
        "layers and independent models show their own picture enlarged, as viewers do, and parts, which were trained there, are drawn. kB: "
        "all that has to be there to show the level; *packed*: quantised, 8-bit opacities, zstd. ms: one view at the level's resolution, with "
        "and without the Gaussians that are invisible there.",
    ]
    for (scene, keep), scores in finished.items():
        parts.append(f"## {scene}, {'all non-test' if keep == ALL else keep} photos kept")
        parts.append(summary(scores["rows"]))
        parts.append(table(scores["rows"]))
    return "\n\n".join(parts) + "\n"


def summary(rows: list[dict]) -> str:
    """How layers compare: the largest loss against independent models, and all bytes."""
    of = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    pairs = list(zip(of["layers"], of["independent"], strict=True))
    loss = max(theirs["own"]["psnr"] - ours["own"]["psnr"] for ours, theirs in pairs)
    shares = [
        sum(ours[f"{key}_new"] for ours, _ in pairs) / sum(theirs[key] for _, theirs in pairs)
        for key in ("bytes", "bytes_packed")
    ]
    return (
        f"Layers are at worst {max(loss, 0.0):.2f} dB below the independent model of a level (best case counted as 0), and all of them together "
        f"take {shares[0]:.0%} of the bytes of all independent models ({shares[1]:.0%} packed)."
    )


def table(rows: list[dict]) -> str:
    head = ["level", "method"]
    head += [f"{name.upper()} {where}" for where in ("own", "full") for name, _ in SCORES]
    head += ["Gaussians", "transparent", "kB", "kB packed", "ms, all drawn"]
    lines = [
        f"| {' | '.join(head)} |",
        f"| {' | '.join(['---'] * 2 + ['---:'] * (len(head) - 2))} |",
    ]
    for row in rows:
        cells = [f"{row['level']} (1/{1 / row['rescale']:g})", row["method"]]
        for where in ("own", "full"):
            cells += [
                "–" if row[where].get(name) is None else form.format(row[where][name])
                for name, form in SCORES
            ]
        cells += [
            f"{row['gaussians']:,}",
            f"{row['transparent']:.1%}",
            f"{row['bytes'] / 1000:,.0f}",
            f"{row['bytes_packed'] / 1000:,.0f}",
            f"{row['ms']:.1f}, {row['ms_visible']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, Config, "layers")
