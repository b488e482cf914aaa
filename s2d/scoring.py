"""The numbers of an evaluation: every picture that has a truth is scored, and views are averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

import s2d
from s2d.cameras import Cameras
from s2d.images import list_images, read_image
from s2d.log import progress
from s2d.metrics import Lpips, Metrics, psnr, score
from s2d.scene import Scene
from s2d.split import Split
from s2d.stage_io import Manifest

# What is scored: the key in results.json, and the column of the report that shows it.
SCORED = {"stage1": "stage1", "stage2": "fixed", "stage3": "stage3"}


@dataclass
class Run:
    """What the evaluation knows of a run: manifests, cameras, and the pictures per view and column."""

    model_dir: Path
    manifests: dict[str, Manifest]
    split: Split
    scene: Scene
    given: Cameras
    """The kept cameras as stage 0 knew them."""
    novel_cameras: Cameras
    placements: dict[str, str] = field(default_factory=dict)
    """Stage → how the test cameras were placed, where they are not as given."""
    test: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Test view → column → picture."""
    novel: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Novel view → column → picture."""
    coverage: dict[str, Path] = field(default_factory=dict)
    """View → mask of what its guidance covers."""
    masks: dict[str, Path] = field(default_factory=dict)
    """View → picture that is black where nothing is scored; empty: everything is."""

    def mask(self, name: str) -> Tensor | None:
        """Where a view is scored, 0 or 1, or None for everywhere. [H, W]"""
        if not self.masks:
            return None
        mask = read_image(self.masks[name]).amax(-1)
        width, height = self.scene.cameras.select([name]).sizes[0]
        mask = F.interpolate(mask[None, None], (height, width), mode="nearest-exact")[0, 0]
        return (mask > 0.5).float()

    def truth(self, name: str) -> Tensor | None:
        """The photo of a view as 8 bits hold it, or None for a generated camera. [H, W, 3]"""
        if name not in self.scene.cameras.names:
            return None
        return (self.scene.image(name) * 255).round() / 255


def find_masks(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Find the mask of every view: a picture of its name, whatever its suffix.

    Raises:
        FileNotFoundError: No folder, or a view without a mask.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--mask-dir: no folder {folder}. Give one with a mask per test view."
        )
    found = {Path(name).with_suffix("").as_posix(): folder / name for name in list_images(folder)}
    masks = {name: found.get(Path(name).with_suffix("").as_posix()) for name in names}
    if missing := [name for name, path in masks.items() if path is None]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} scored views have no mask in {folder} (first: {missing[0]}). Masks are pictures of the views' "
            "names, black where nothing is scored."
        )
    return masks


def scored_views(run: Run) -> list[str]:
    """The test and novel views that have a photo, in name order."""
    return [name for name in sorted({*run.test, *run.novel}) if name in run.scene.names]


def score_views(run: Run, networks: dict[str, Lpips]) -> dict[str, dict[str, dict[str, Metrics]]]:
    """Score every picture that has a truth.

    Returns:
        Stage ("stage1", "stage2", "stage3", "guidance") → "test" or "novel" → view → numbers.
    """
    groups = {"test": run.test, "novel": run.novel}
    per_view = {stage: {group: {} for group in groups} for stage in (*SCORED, "guidance")}
    names = scored_views(run)
    with progress(len(names), "scores") as bar:
        for done, name in enumerate(names, start=1):
            truth, mask = run.truth(name), run.mask(name)
            known: dict[
                bytes, Metrics
            ] = {}  # under the S2D protocol a view is test and novel: score it once
            for group, views in groups.items():
                columns = views.get(name, {})
                for stage, column in SCORED.items():
                    if column in columns:
                        content = columns[column].read_bytes()
                        if content not in known:
                            known[content] = score(
                                read_image(columns[column]), truth, networks, mask
                            )
                        per_view[stage][group][name] = known[content]
                if "guidance" in columns:
                    covered = read_image(run.coverage[name])[..., 0]
                    per_view["guidance"][group][name] = score_guidance(
                        read_image(columns["guidance"]),
                        truth,
                        covered if mask is None else covered * mask,
                    )
            bar.update(done)
    return per_view


def score_guidance(guidance: Tensor, truth: Tensor, mask: Tensor) -> Metrics:
    """Measure the share of covered pixels and the PSNR on those alone; None where nothing is covered."""
    value = psnr(guidance, truth, mask)
    return {
        "coverage": float((mask > 0.5).float().mean()),
        "psnr_covered": None if math.isnan(value) else value,
    }


def mean_metrics(
    views: dict[str, Metrics], keys: Sequence[str]
) -> dict[str, float | int | None] | None:
    """Average over views; a number that no view has is None, and no view at all gives None."""
    if not views:
        return None
    means = {}
    for key in keys:
        values = [metrics[key] for metrics in views.values() if metrics.get(key) is not None]
        means[key] = sum(values) / len(values) if values else None
    return {**means, "num_views": len(views)}


def summarise(run: Run, per_view: dict) -> dict:
    """Build results.json."""
    keys = ("psnr", "ssim", "lpips_vgg", "lpips_alex")
    stages = {}
    for stage in SCORED:
        manifest = run.manifests.get(stage)
        stages[stage] = manifest and {
            "test": mean_metrics(per_view[stage]["test"], keys),
            "novel": mean_metrics(per_view[stage]["novel"], keys),
            "num_gaussians": manifest.info.get("num_gaussians"),
            "seconds": manifest.timings["total"],
            "peak_rss_mb": manifest.data["peak_rss_mb"],
        }
    stage0 = run.manifests["stage0"]
    return {
        "scene": run.scene.name,
        "protocol": run.split.protocol,
        "kept": list(run.split.kept),
        "novel": list(run.novel_cameras.names),
        "test": list(run.split.test),
        "stages": stages,
        "guidance": {
            **{
                group: mean_metrics(per_view["guidance"][group], ("coverage", "psnr_covered"))
                for group in ("test", "novel")
            },
            "seconds": stage0.timings["total"],
            "peak_rss_mb": stage0.data["peak_rss_mb"],
        },
        "total_seconds": round(
            sum(manifest.timings["total"] for manifest in run.manifests.values()), 3
        ),
        "leaks_test_photos": bool(stage0.data["info"].get("leaks_test_photos")),
        "device": run.manifests["stage1"].data["device"],
        "version": s2d.__version__,
    } | ({"test_cameras": run.placements} if run.placements else {})
