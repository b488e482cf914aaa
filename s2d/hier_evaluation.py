"""`tools/evaluate.py hier`: how good hierarchical Gaussians are on views that they were not made from. Protocol: docs/hier_data.md.

Reads   a chunk data set and its published evaluation index, or posed scenes; weights (several to compare)
Writes  OUT/results.json, per_case.json, table.md, index.json (posed scenes), sheet_<contestant>.png, films/*.mp4, ply/*.ply

Example
    python tools/evaluate.py hier --data data/re10k --index data/evaluation_index_re10k.json --published re10k \
        --weights out/hier/model_final.safetensors --output-dir out/hier_re10k
    python tools/evaluate.py hier --data data/scenes --scenes fern,fox --weights out/hier/model_final.safetensors --analytic --output-dir out/hier_scenes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.checks import check_range
from s2d.config import config_to_dict, no_effect
from s2d.export import write_video
from s2d.files import atomic_write_json, atomic_write_text, content_hash, locked
from s2d.guidance.mvs import reconstruct
from s2d.hier.analytic import analytic_levels
from s2d.hier.config import NUM_LEVELS
from s2d.hier.data.index import write_evaluation_index
from s2d.hier.data.overlap import PairRule, PairSampler
from s2d.hier.data.posed import load_posed
from s2d.hier.data.samples import as_batch, as_views, frame_sample
from s2d.hier.data.sources import Case, chunk_cases, posed_cases
from s2d.hier.gaussians import HierGaussians
from s2d.hier.judging import Judged, Predict, Scores, fly, judge, mean_scores, score, write_sheet
from s2d.hier.views import Views
from s2d.hier.weights import load_model
from s2d.log import logger, progress
from s2d.metrics import find_lpips
from s2d.pairs.dataset import read_json
from s2d.scene import Scene

METRICS = ("psnr", "ssim", "lpips")
# PSNR, SSIM, LPIPS as HiSplat's authors published them; zero-shot: trained on RealEstate10K alone.
PUBLISHED = {
    "re10k": {
        "pixelSplat": (25.89, 0.858, 0.142),
        "MVSplat": (26.39, 0.869, 0.128),
        "TranSplat": (26.69, 0.875, 0.125),
        "HiSplat": (27.21, 0.881, 0.117),
    },
    "acid": {
        "pixelSplat": (28.14, 0.839, 0.150),
        "MVSplat": (28.25, 0.843, 0.144),
        "TranSplat": (28.35, 0.845, 0.143),
        "HiSplat": (28.75, 0.853, 0.133),
    },
    "dtu": {
        "pixelSplat, zero-shot": (12.89, 0.382, 0.560),
        "MVSplat, zero-shot": (13.94, 0.473, 0.385),
        "TranSplat, zero-shot": (14.93, 0.531, 0.326),
        "HiSplat, zero-shot": (16.05, 0.671, 0.277),
    },
    "acid-zero-shot": {
        "pixelSplat, zero-shot": (27.64, 0.830, 0.160),
        "MVSplat, zero-shot": (28.15, 0.841, 0.147),
        "TranSplat, zero-shot": (28.17, 0.842, 0.146),
        "HiSplat, zero-shot": (28.66, 0.850, 0.137),
    },
    "replica": {
        "pixelSplat, zero-shot": (23.98, 0.821, 0.202),
        "MVSplat, zero-shot": (23.79, 0.817, 0.165),
        "HiSplat, zero-shot": (27.17, 0.899, 0.113),
    },
}
SAVE_EVERY = 20  # cases
FILM_FRAMES, FILM_FPS = 60, 24
SHEET_ROWS = 12

Rows = dict[str, list[Scores]]  # case → scores of each level


@dataclass(frozen=True)
class HierEvaluation:
    """Score hierarchical Gaussians on views that they were not made from."""

    data: Path = no_effect()
    """A chunk data set (its test/ is used), a posed scene, or a folder of posed scenes."""
    output_dir: Path = no_effect()
    """Folder of the results; the same command again goes on where it was."""
    index: Path | None = no_effect(None)
    """Evaluation index of a chunk data set."""
    scenes: tuple[str, ...] = ()
    """Posed scenes to judge by. Default: all."""
    weights: tuple[Path, ...] = no_effect(())
    """Weights to judge; each becomes a contestant."""
    dino: Path | None = no_effect(None)
    """DINOv2 ViT-B/14 weights, for weights of the paper's size."""
    analytic: bool = no_effect(False)
    """Also judge what needs no weights: the analytic ladder, and its finest level alone."""
    published: Literal["re10k", "acid", "dtu", "acid-zero-shot", "replica"] | None = no_effect(None)
    """Published table to put the results beside. It holds for --image-size 256,256 and the whole index."""
    image_size: tuple[int, int] = (256, 256)
    """Width and height of the pictures."""
    near: float = 1.0
    """Chunks whose scenes do not bring a range: nearest depth, world units."""
    far: float = 100.0
    """And the farthest."""
    max_pairs: int = 6
    """Posed scenes: pairs of context views per scene."""
    max_targets: int = 3
    """Posed scenes: views between them that are scored."""
    max_cases: int = no_effect(0)
    """Judge no more cases than this, evenly spread. 0: all."""
    films: int = no_effect(2)
    """Films between the context views, of this many cases."""
    plys: int = no_effect(2)
    """Splats in world coordinates, of this many cases."""


def main(cfg: HierEvaluation) -> Path:
    """Evaluate; returns OUT/table.md."""
    check_config(cfg)
    with locked(cfg.output_dir, "--output-dir"):
        cases, num_missing = find_cases(cfg)
        contestants = find_contestants(cfg)
        rows = {
            name: judge_contestant(cfg, name, predict, state, cases)
            for name, (predict, state) in contestants.items()
        }
        results = summarise(cfg, rows, num_missing)
        atomic_write_json(cfg.output_dir / "per_case.json", rows)
        atomic_write_json(cfg.output_dir / "results.json", results)
        table = as_table(results)
        atomic_write_text(cfg.output_dir / "table.md", table)
    logger.info("%s\n%s", cfg.output_dir / "table.md", table)
    return cfg.output_dir / "table.md"


def find_cases(cfg: HierEvaluation) -> tuple[list[tuple[str, Case]], int]:
    """What to judge by: (name, case), and how many cases of the index are not here."""
    missing = 0
    if cfg.index is not None:
        cases, missing = chunk_cases(cfg.data, cfg.index, cfg.near, cfg.far)
        if missing:
            logger.warning("%d scenes of %s are not in %s", missing, cfg.index, cfg.data)
    else:
        captures = load_posed([cfg.data], cfg.output_dir / "cache")
        unknown = sorted(set(cfg.scenes) - {capture.key for capture in captures})
        if unknown:
            raise ValueError(f"--scenes {unknown[0]}: {cfg.data} has no scene of that name.")
        captures = [
            capture for capture in captures if capture.key in (cfg.scenes or (capture.key,))
        ]
        found = posed_cases(captures, PairSampler(PairRule()), cfg.max_pairs, cfg.max_targets)
        counts: dict[str, int] = {}
        cases = []
        for capture, pick in found:
            number = counts[capture.key] = counts.get(capture.key, -1) + 1
            cases.append((f"{capture.key}_{number:02d}", (capture, pick)))
        if not cases:
            raise ValueError(
                f"{cfg.data}: no two views of a scene overlap and have a third between them (docs/hier_data.md)."
            )
        write_evaluation_index(
            cfg.output_dir / "index.json", {name: pick for name, (_, pick) in cases}
        )
    if 0 < cfg.max_cases < len(cases):
        step = len(cases) / cfg.max_cases
        cases = [cases[int((k + 0.5) * step)] for k in range(cfg.max_cases)]
    return cases, missing


def find_contestants(cfg: HierEvaluation) -> dict[str, tuple[Predict, str]]:
    """What is judged: name → (predictor, hash of what it depends on)."""
    found: dict[str, tuple[Predict, str]] = {}
    for path in cfg.weights:
        model = load_model(path, cfg.dino)
        name = path.stem if path.stem not in found else path.parent.name
        found[name] = (model, content_hash(path))
    if cfg.analytic:
        for name, levels in (("analytic", None), ("analytic, one level", (NUM_LEVELS - 1,))):
            found[name] = (AnalyticLadder(levels), name)
    return found


@dataclass(frozen=True)
class AnalyticLadder:
    """What `--init depth` starts from: stage 0's depth of the context views alone, then `analytic_levels`."""

    levels: tuple[int, ...] | None
    """None: all."""

    def __call__(self, context: Views) -> list[HierGaussians]:
        levels = tuple(range(NUM_LEVELS)) if self.levels is None else self.levels
        return analytic_levels(context, *stereo_depth(context), levels=levels)


def stereo_depth(context: Views) -> tuple[Tensor, Tensor]:
    """Depth and confidence of one scene's views from stage 0's dense matching; all 0 where nothing matches. [1, V, H, W] each"""
    names = tuple(str(view) for view in range(context.num_views))
    sizes = ((context.width, context.height),) * context.num_views
    cameras = Cameras(context.viewmats[0], context.Ks[0], sizes, names)
    photos = dict(zip(names, context.images[0].permute(0, 2, 3, 1).contiguous(), strict=True))
    scene = Scene("context", cameras, (Path(),) * context.num_views, None, photos)
    try:
        maps = reconstruct(scene).depth_maps
    except ValueError as error:
        logger.warning("%s", error)
        nothing = torch.zeros(1, context.num_views, context.height, context.width)
        return nothing, nothing
    stacks = (
        torch.stack([torch.as_tensor(getattr(maps[name], part)).float() for name in names])[None]
        for part in ("depth", "confidence")
    )
    return tuple(stacks)


def judge_contestant(
    cfg: HierEvaluation, name: str, predict: Predict, state: str, cases: Sequence[tuple[str, Case]]
) -> Rows:
    """Score a contestant on all cases; what an interrupted run has scored is not done again."""
    slug = name.replace(", ", "-").replace(" ", "-")
    partial = cfg.output_dir / "scored" / f"{slug}.json"
    key = {**config_to_dict(cfg, only_hashed=True), "data": str(cfg.data), "index": str(cfg.index), "contestant": state}  # fmt: skip
    stored = read_json(partial) if partial.is_file() else {}
    rows: Rows = stored["rows"] if stored.get("key") == key else {}
    lpips = find_lpips("vgg")
    shown: list[Judged] = []
    show_every = max(1, len(cases) // SHEET_ROWS)
    try:
        with progress(len(cases), name) as bar:
            for number, (case_name, case) in enumerate(cases):
                shows = number % show_every == 0 and len(shown) < SHEET_ROWS
                if case_name not in rows or shows:
                    sample = frame_sample(*case, cfg.image_size)
                    judged = judge(case_name, predict, sample)
                    rows[case_name] = score(judged, lpips)
                    if shows:
                        shown.append(judged)
                    write_pictures(cfg, slug, number, judged, sample)
                if (number + 1) % SAVE_EVERY == 0:
                    atomic_write_json(partial, {"key": key, "rows": rows})
                bar.update(number + 1, psnr=rows[case_name][-1]["psnr"])
    finally:
        atomic_write_json(partial, {"key": key, "rows": rows})
    write_sheet(cfg.output_dir / f"sheet_{slug}.png", shown)
    return {case_name: rows[case_name] for case_name, _ in cases}


def write_pictures(
    cfg: HierEvaluation, slug: str, number: int, judged: Judged, sample: dict[str, Tensor]
) -> None:
    """Film and splat of the first cases."""
    whole = judged.levels[-1]
    if number < cfg.films:
        context = as_views(as_batch(sample), "context")
        path = cfg.output_dir / "films" / f"{judged.name}_{slug}.mp4"
        write_video(path, fly(whole, context, FILM_FRAMES), FILM_FPS)
    if number < cfg.plys:
        path = cfg.output_dir / "ply" / f"{judged.name}_{slug}.ply"
        with torch.no_grad():
            whole.scene(0).detached().save_ply(path)


def summarise(cfg: HierEvaluation, rows: dict[str, Rows], num_missing: int) -> dict[str, Any]:
    """Means: over the cases of a scene (posed scenes have several), then over scenes."""
    contestants = {}
    for name, cases in rows.items():
        scenes: dict[str, list[list[Scores]]] = {}
        for case_name, levels in cases.items():
            scene = case_name if cfg.index is not None else case_name.rpartition("_")[0]
            scenes.setdefault(scene, []).append(levels)
        by_scene = {
            scene: [mean_scores(level) for level in zip(*found, strict=True)]
            for scene, found in scenes.items()
        }
        contestants[name] = {
            "levels": [mean_scores(level) for level in zip(*by_scene.values(), strict=True)],
            "scenes": {scene: levels[-1] for scene, levels in by_scene.items()}
            if cfg.index is None
            else len(by_scene),
            "num_cases": len(cases),
        }
    return {
        "data": cfg.data.name,
        "index": cfg.index and cfg.index.name,
        "missing": num_missing,
        "image_size": list(cfg.image_size),
        "contestants": contestants,
        "published": PUBLISHED.get(cfg.published or "", {}),
    }


def as_table(results: dict[str, Any]) -> str:
    """Everything as Markdown: PSNR / SSIM / LPIPS, the published rows below ours, then each scene and each level."""
    lines = ["| | PSNR | SSIM | LPIPS | cases |", "|---|---|---|---|---|"]
    for name, found in results["contestants"].items():
        lines.append(f"| {name} | {_cells(found['levels'][-1], ' | ')} | {found['num_cases']} |")
    for name, values in results["published"].items():
        scores = dict(zip(METRICS, values, strict=True))
        lines.append(f"| {name} (published) | {_cells(scores, ' | ')} | whole index |")
    lines += ["", "Prefixes of the levels:", "", "| | level | PSNR | SSIM | LPIPS |", "|---|---|---|---|---|"]  # fmt: skip
    for name, found in results["contestants"].items():
        for level, scores in enumerate(found["levels"]):
            lines.append(f"| {name} | {level} | {_cells(scores, ' | ')} |")
    names = list(results["contestants"])
    scenes = [found["scenes"] for found in results["contestants"].values()]
    if names and isinstance(scenes[0], dict):
        lines += ["", "| scene | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for scene in scenes[0]:
            lines.append(f"| {scene} | {' | '.join(_cells(of[scene], ' / ') for of in scenes)} |")
    return "\n".join(lines) + "\n"


def _cells(scores: Scores, separator: str) -> str:
    digits = {"psnr": 2, "ssim": 3, "lpips": 3}
    return separator.join(
        "–" if scores.get(name) is None else f"{scores[name]:.{digits[name]}f}" for name in METRICS
    )


def check_config(cfg: HierEvaluation) -> None:
    """Raise before anything is read or written."""
    if not cfg.weights and not cfg.analytic:
        raise ValueError("There is nothing to judge. Pass --weights FILE ..., or --analytic.")
    if cfg.published is not None and cfg.index is None:
        raise ValueError("--published needs the --index that the numbers were made with.")
    check_range("image_size", torch.tensor(cfg.image_size), 16)
    for name in ("max_pairs", "max_targets"):
        check_range(name, getattr(cfg, name), 1)
    for name in ("max_cases", "films", "plys"):
        check_range(name, getattr(cfg, name), 0)
    check_range("near", cfg.near, above=0, below=cfg.far)
