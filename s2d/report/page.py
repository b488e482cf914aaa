"""Lays out a `ReportContent` as one HTML file: pictures as data URIs, styles and script inline, charts as SVG."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from string import Template

import cv2
import numpy as np

from s2d.checks import check_range
from s2d.files import atomic_write_text
from s2d.images import read_image
from s2d.report.charts import (
    Series,
    bar_chart,
    dumbbell_chart,
    line_chart,
    megabytes_text,
    seconds_text,
)
from s2d.report.content import (
    COLUMN_TITLES,
    Metrics,
    ReportContent,
    ViewRecord,
    choose_views,
)
from s2d.report.summary import delta_html, headline_tiles, summary_table
from s2d.report.support import support_legend
from s2d.report.trials import trials_section

ASSETS = Path(__file__).parent
MAX_SIDE = 1000  # pixels a picture is shown with at most: larger ones are scaled down for the page
WEBP_QUALITY = 88
DEFAULT_MAX_MB = 14.0
KEPT_HEIGHT = 300  # twice the height it is shown with, for sharp screens


def write_report(path: Path, content: ReportContent, max_mb: float = DEFAULT_MAX_MB) -> Path:
    """Write the report, all or nothing.

    Where the pictures of all views would make the file larger than `max_mb`, only some views are shown (the worst, and evenly
    spaced ones), and the page says so. The tables and charts always cover all views.

    Args:
        path: The .html file.
        content: What to show.
        max_mb: Limit for the embedded pictures, in 10⁶ bytes of HTML.
    """
    check_range("max_mb", max_mb, above=0.0)
    kept = {name: _thumbnail(photo, KEPT_HEIGHT) for name, photo in content.kept.items()}
    trials = trials_section(content.trials, _data_uri)
    budget = max_mb * 1e6 - sum(map(len, kept.values())) - len(trials)
    shown = list(content.views)
    encoded: dict[str, dict[str, str]] = {}
    while True:
        missing = [view for view in shown if view.name not in encoded]
        with ThreadPoolExecutor() as threads:  # OpenCV works outside Python's lock
            names = [view.name for view in missing]
            encoded |= zip(names, threads.map(_encode_view, missing), strict=True)
        size = sum(len(uri) for view in shown for uri in encoded[view.name].values())
        if size <= budget or len(shown) <= 2:
            break
        shown = choose_views(
            content.views, max(2, min(len(shown) - 1, int(len(shown) * budget / size)))
        )
    notes = list(content.notes)
    if len(shown) < len(content.views):
        notes.append(
            f"{len(shown)} of {len(content.views)} views are shown with pictures (the worst half and evenly spaced ones), to keep "
            "this file small. Tables and charts cover all views; the other pictures are in the stage folders."
        )
    page = Template((ASSETS / "report.html").read_text("utf-8")).substitute(
        css=(ASSETS / "report.css").read_text("utf-8"),
        js=(ASSETS / "report.js").read_text("utf-8"),
        column_titles=json.dumps(COLUMN_TITLES),
        scene=escape(content.results["scene"]),
        subtitle=_subtitle(content),
        tiles=headline_tiles(content.results),
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        kept=_kept_strip(kept),
        top_view=_top_view(content.top_view),
        legend=support_legend() if "support" in _columns(content.views) else "",
        hero_numbers=_gain_chart(content),
        hero_hidden="" if shown else "hidden",
        summary=summary_table(content.results),
        trials=trials,
        views="".join(
            _view_row(view, encoded[view.name], view is _hero(shown), _columns(content.views)) for view in _worst_first(shown)
        ),
        filters=_filters(shown),
        charts=_charts(content),
        settings=_settings(content),
        facts="".join(
            f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in content.facts.items()
        ),
        ply=escape(content.ply_path or "point_cloud/"),
    )  # fmt: skip
    atomic_write_text(path, page)
    return path


# -------------------------------------------------------------------------------------------------------------- pictures


def _encode_view(view: ViewRecord) -> dict[str, str]:
    return {
        column: _data_uri(view.images[column], view.coverage if column == "guidance" else None)
        for column in COLUMN_TITLES
        if column in view.images
    }


def _data_uri(path: Path, coverage: Path | None = None) -> str:
    image = _read(path)
    if coverage is not None:
        mask = cv2.imread(str(coverage), cv2.IMREAD_GRAYSCALE)
        if mask is not None and mask.shape == image.shape[:2]:
            image = np.dstack([image, np.where(mask > 0, 255, 0).astype(np.uint8)])
    scale = MAX_SIDE / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return _webp(image)


def _thumbnail(path: Path, height: int) -> str:
    image = _read(path)
    scale = height / image.shape[0]
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return _webp(image)


def _read(path: Path) -> np.ndarray:  # [H, W, 3] uint8 BGR, as OpenCV encodes it
    pixels = (read_image(path, oriented=False) * 255).round().byte().numpy()
    return np.ascontiguousarray(pixels[..., ::-1])


def _webp(image: np.ndarray) -> str:
    _, data = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])
    return "data:image/webp;base64," + base64.b64encode(data.tobytes()).decode()


# -------------------------------------------------------------------------------------------------------------- sections


def _subtitle(content: ReportContent) -> str:
    results = content.results
    num_kept, num_test = len(results["kept"]), len(results["test"])
    protocol = {
        "s2d": "all other photos are novel and test views",
        "eval": "test views are used for scoring alone",
    }
    return (
        f"{num_kept} photo{'s' * (num_kept != 1)} in, {num_test} held out for scoring · protocol {escape(results['protocol'])}: "
        f"{protocol.get(results['protocol'], '')} · device {escape(str(results['device']))} · S2D {escape(str(results['version']))}"
    )


def _kept_strip(kept: dict[str, str]) -> str:
    return "".join(
        f'<figure><img src="{uri}" alt="kept photo {escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
        for name, uri in kept.items()
    )


def _top_view(picture: Path | None) -> str:
    if picture is None:
        return ""
    return (
        '<h2>Where the views stand</h2><div class="card from-above">'
        f'<img src="{_data_uri(picture)}" alt="cameras from above"></div>'
    )


def _columns(views: Sequence[ViewRecord]) -> dict[str, str]:
    """The columns of the page: support has one only where it was asked for."""
    has_support = any("support" in view.images for view in views)
    return {key: title for key, title in COLUMN_TITLES.items() if key != "support" or has_support}


def _view_row(view: ViewRecord, uris: dict[str, str], hero: bool, columns: dict[str, str]) -> str:
    figures = []
    for column, title in columns.items():
        if column not in uris:
            figures.append(f'<figure><div class="empty">no {title.lower()}</div></figure>')
            continue
        numbers = _numbers(view.metrics.get(column))
        figures.append(
            f'<figure><button class="shot" title="Click two pictures of a row to compare them">'
            f'<img class="source" data-column="{column}" src="{uris[column]}" alt="{escape(view.name)}: {title}"></button>'
            f'<figcaption><b>{title}</b> <span class="numbers num">{numbers}</span></figcaption></figure>'
        )
    gain = "" if view.gain is None else delta_html(view.gain, 0.0, "dB", 2)
    final = view.psnr(view.final)
    return (
        f'<section class="view card" data-name="{escape(view.name)}" data-role="{" ".join(view.roles)}" data-hero="{int(hero)}" '
        f'data-final="{"" if final is None else f"{final:.4f}"}" data-gain="{"" if view.gain is None else f"{view.gain:.4f}"}">'
        f'<h3>{escape(view.name)} <span class="role">{" + ".join(view.roles)}</span> <span class="delta">{gain}</span>'
        f'<button>Compare</button></h3><div class="row" style="--columns: {len(columns)}">{"".join(figures)}</div></section>'
    )


def _filters(views: Sequence[ViewRecord]) -> str:
    roles = {view.roles for view in views}
    if len(roles) < 2:
        return ""
    buttons = [("all", "All", "true"), ("test", "Test", "false"), ("novel", "Novel", "false")]
    return "".join(
        f'<button data-role-filter="{role}" aria-pressed="{pressed}">{label}</button>'
        for role, label, pressed in buttons
    )


def _charts(content: ReportContent) -> str:
    trained = [stage for stage in content.stages if stage.history.get("step")]
    charts = [
        line_chart(title, [
            Series(stage.title, f"s-{stage.key}", stage.history["step"], stage.history[key])
            for stage in trained
        ], "step", log_y=log_y)
        for title, key, log_y in (("Loss", "loss", True), ("Number of Gaussians", "num_gaussians", False))
    ]  # fmt: skip
    charts.append(
        bar_chart(
            "Time",
            [(_short(s.title), f"s-{s.key}", _parts(s.seconds, s.timings)) for s in content.stages],
            seconds_text,
        )
    )
    charts.append(
        bar_chart(
            "Peak memory",
            [
                (_short(s.title), f"s-{s.key}", [("peak", s.peak_rss_mb)])
                for s in content.stages
                if s.peak_rss_mb
            ],
            megabytes_text,
        )
    )
    return "".join(f'<div class="card">{chart}</div>' for chart in charts)


def _short(title: str) -> str:  # "Stage 1: 3DGS" → "Stage 1"
    return title.partition(":")[0]


def _parts(seconds: float, timings: dict[str, float]) -> list[tuple[str, float]]:
    """The timed parts, and the rest under its own name, so that a bar is as long as its stage."""
    rest = seconds - sum(timings.values())
    return [*timings.items(), *([("everything else", rest)] if rest > 0.05 else [])]


def _gain_chart(content: ReportContent) -> str:
    rows = [
        (v.name, v.psnr("stage1"), v.psnr("stage3")) for v in content.views if v.gain is not None
    ]
    rows.sort(key=lambda row: row[2])
    title = "PSNR per view, dB"
    if len(rows) > 30:  # the chart stands beside a picture
        rows, title = rows[:15] + rows[-15:], "PSNR per view, dB (15 worst and 15 best)"
    return dumbbell_chart(title, rows, ("Stage 1", "Final"), ("s-stage1", "s-stage3"))


def _settings(content: ReportContent) -> str:
    return "".join(
        f"<details><summary>{escape(stage.title)}</summary><pre>{escape(stage.settings)}</pre></details>"
        for stage in content.stages
        if stage.settings
    )


# --------------------------------------------------------------------------------------------------------------- details


def _worst_first(views: Sequence[ViewRecord]) -> list[ViewRecord]:
    return sorted(views, key=lambda v: (not v.final, v.psnr(v.final) or 0.0))


def _hero(views: Sequence[ViewRecord]) -> ViewRecord | None:
    """The view in the middle of the ranking: neither the show-piece nor the accident."""
    complete = [view for view in _worst_first(views) if "stage3" in view.images and view.final]
    ranked = complete or _worst_first(views)
    return ranked[len(ranked) // 2] if ranked else None


def _numbers(metrics: Metrics | None) -> str:
    if not metrics:
        return ""
    parts = []
    if metrics.get("psnr") is not None:
        parts.append(f"{metrics['psnr']:.2f} dB")
    if metrics.get("ssim") is not None:
        parts.append(f"SSIM {metrics['ssim']:.3f}")
    lpips = [
        f"{metrics[key]:.3f}" for key in ("lpips_vgg", "lpips_alex") if metrics.get(key) is not None
    ]
    if lpips:
        parts.append(f"LPIPS {' / '.join(lpips)}")
    if metrics.get("psnr_covered") is not None:
        parts.append(f"{metrics['psnr_covered']:.2f} dB")
    if metrics.get("coverage") is not None:
        parts.append(f"on {metrics['coverage']:.0%} of the pixels")
    return " · ".join(parts)
