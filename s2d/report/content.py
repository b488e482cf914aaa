"""What a report shows, as plain values and paths: the contract between the evaluation and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from s2d.stage_io import Manifest

Metrics = dict[str, float | None]  # psnr, ssim, lpips_vgg, lpips_alex

# Column of a view's row → what people read. The order is the order on the page.
COLUMN_TITLES = {
    "truth": "Truth",
    "stage1": "Stage 1",
    "guidance": "Guidance",
    "fixed": "Fixed",
    "stage3": "Final",
    "support": "Support",
}
METRIC_TITLES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips_vgg": "LPIPS VGG",
    "lpips_alex": "LPIPS Alex",
}


@dataclass(frozen=True)
class ViewRecord:
    """One row of pictures: a camera with what each stage made of it."""

    name: str
    roles: tuple[str, ...]
    """Of "test" and "novel"; both under the S2D protocol."""
    images: dict[str, Path]
    """Column → file; a column that this view does not have is absent."""
    coverage: Path | None = None
    """Mask of the pixels that the guidance covers; the others are shown as holes."""
    metrics: dict[str, Metrics] = field(default_factory=dict)
    """Column → numbers against the truth."""

    def psnr(self, column: str) -> float | None:
        """PSNR of a column, or None where it was not scored."""
        return self.metrics.get(column, {}).get("psnr")

    @property
    def final(self) -> str:
        """The last column that has a score: what the view is sorted by."""
        scored = [
            column for column in ("stage3", "fixed", "stage1") if self.psnr(column) is not None
        ]
        return scored[0] if scored else ""

    @property
    def gain(self) -> float | None:
        """PSNR of the final render minus that of stage 1, in dB."""
        before, after = self.psnr("stage1"), self.psnr("stage3")
        return None if before is None or after is None else after - before


@dataclass(frozen=True)
class StageRecord:
    """What one stage took and how it went."""

    key: str
    """`stage0` … `stage3`: also the CSS class that colours it."""
    title: str
    seconds: float
    timings: dict[str, float]
    """Part → seconds."""
    peak_rss_mb: float | None = None
    history: dict[str, list[float]] = field(default_factory=dict)
    """step, loss, num_gaussians, seconds: a list each, one entry per recorded step; steps count on from stage to stage."""
    settings: str = ""
    """Its config.yaml."""

    @staticmethod
    def of_manifest(key: str, title: str, manifest: Manifest) -> StageRecord:
        """Read what a finished stage recorded."""
        history = manifest.dir / "history.json"
        return StageRecord(
            key=key,
            title=title,
            seconds=manifest.timings["total"],
            timings={
                part: seconds for part, seconds in manifest.timings.items() if part != "total"
            },
            peak_rss_mb=manifest.data["peak_rss_mb"],
            history=json.loads(history.read_text("utf-8")) if history.is_file() else {},
            settings=(manifest.dir / "config.yaml").read_text("utf-8"),
        )


@dataclass(frozen=True)
class TrialRecord:
    """One kept photo that a fit was made without, and what stage 2's fixer made of its render."""

    name: str
    images: dict[str, Path]
    """truth, render, fixed, calibrated → file."""
    psnr: dict[str, float]
    """render, fixed, calibrated → dB against the photo."""


@dataclass(frozen=True)
class TrialsRecord:
    """What stage 2 learned about its fixer before it used it."""

    decision: str
    adaptation: str | None
    """Whether the network was adapted to the scene; None where nobody asked."""
    failed: Sequence[str]
    """Views without a trial."""
    trials: Sequence[TrialRecord]

    @staticmethod
    def of_manifest(manifest: Manifest) -> TrialsRecord | None:
        """Read stage 2's trials, or None where it made none."""
        path = manifest.dir / "trials.json"
        if not path.is_file():
            return None
        found = json.loads(path.read_text("utf-8"))
        trials = [
            TrialRecord(
                trial["view"],
                {
                    picture: manifest.dir / "trials" / f"{trial['name']}_{picture}.png"
                    for picture in ("truth", "render", "fixed", "calibrated")
                },
                trial["psnr"],
            )
            for trial in found["trials"]
        ]
        adaptation = found["adaptation"] and found["adaptation"]["decision"]
        return TrialsRecord(found["decision"], adaptation, list(found["failed"]), trials)


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page."""

    results: dict[str, Any]
    """The content of results.json."""
    kept: dict[str, Path]
    """Kept view → photo."""
    views: Sequence[ViewRecord]
    stages: Sequence[StageRecord]
    facts: dict[str, str] = field(default_factory=dict)
    """Versions, machine, command, date: a name and a text each."""
    notes: Sequence[str] = ()
    """What a reader must know before believing the numbers (a stage is missing, LPIPS is not available, …)."""
    ply_path: str | None = None
    """The final splat, relative to the report."""
    top_view: Path | None = None
    """Picture of the kept and novel cameras over the points, from above; None where stage 0 left none."""
    trials: TrialsRecord | None = None
    """None where stage 2 made none."""


def choose_views(views: Sequence[ViewRecord], count: int) -> list[ViewRecord]:
    """Choose which views the page shows where not all fit: half of them the worst, the rest evenly spaced.

    The worst are by the last scored PSNR. Order in = order out, and a larger count contains the smaller one's worst views.
    """
    if count >= len(views):
        return list(views)
    scored = sorted((v for v in views if v.final), key=lambda v: v.psnr(v.final))
    chosen = {v.name for v in scored[: count // 2]}
    rest = [v.name for v in views if v.name not in chosen]
    missing = count - len(chosen)
    step = (len(rest) - 1) / max(missing - 1, 1)
    chosen.update(rest[round(i * step)] for i in range(missing))
    return [v for v in views if v.name in chosen]


def run_facts(manifests: dict[str, Manifest]) -> dict[str, str]:
    """Gather versions, machine and commands of a run, for the foot of its report."""
    first = manifests["stage0"].data
    machine = first["machine"]
    return {
        "Made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "Machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
        **{f"Command, {stage}": manifest.data["command"] for stage, manifest in manifests.items()},
        "Seed": str(manifests["stage1"].data["seed"]),
    }
