"""Lays out a `ReportContent` as one HTML file: pictures as data URIs, styles and script inline, charts as SVG."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import cv2
import numpy as np

from s2d.checks import check_range
from s2d.files import atomic_write_text
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
    METRIC_TITLES,
    Metrics,
    ReportContent,
    ViewRecord,
    choose_views,
)

ASSETS = Path(__file__).parent
MAX_SIDE = 1000  # pixels a picture is shown with at most: larger ones are scaled down for the page
WEBP_QUALITY = 88
DEFAULT_MAX_MB = 14.0
KEPT_HEIGHT = 300  # twice the height it is shown with, for sharp screens
STAGE_ROWS = (
    ("stage1", "Stage 1", "stage1"),
    ("stage2", "Fixed images", "stage2"),
    ("stage3", "Final", "stage3"),
)


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
    budget = max_mb * 1e6 - sum(map(len, kept.values()))
    shown = list(content.views)
    encoded: dict[str, dict[str, str]] = {}
    while True:
        for view in shown:
            if view.name not in encoded:
                encoded[view.name] = _encode_view(view)
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
        tiles=_tiles(content),
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        kept=_kept_strip(kept),
        hero_numbers=_gain_chart(content),
        hero_hidden="" if shown else "hidden",
        summary=_summary_table(content),
        views="".join(_view_row(view, encoded[view.name], view is _hero(shown)) for view in _worst_first(shown)),
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


def _read(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(
            f"report: {path} is not a readable image. Expected the PNG that its stage wrote. Run that stage again."
        )
    return image


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


def _tiles(content: ReportContent) -> str:
    results = content.results
    tiles = []
    first, last = _metrics(results, "stage1", "test"), _metrics(results, "stage3", "test")
    if last or first:
        shown = last or first
        delta = (
            _delta_html(shown["psnr"], first["psnr"], "dB over stage 1") if last and first else ""
        )
        what = "test PSNR, final" if last else "test PSNR, stage 1"
        tiles.append((f"{shown['psnr']:.2f} dB", f"{what} {delta}"))
        tiles.append(
            (
                f"{shown['ssim']:.3f}",
                f"SSIM {_delta_html(shown['ssim'], first['ssim'], '', 3) if delta else ''}",
            )
        )
        net = next((net for net in ("lpips_vgg", "lpips_alex") if shown.get(net) is not None), None)
        if net:
            change = (
                _delta_html(shown[net], first[net], "", 3, lower_is_better=True) if delta else ""
            )
            tiles.append((f"{shown[net]:.3f}", f"{METRIC_TITLES[net]} (lower is better) {change}"))
    gaussians = [
        s["num_gaussians"] for s in results["stages"].values() if s and s.get("num_gaussians")
    ]
    if gaussians:
        tiles.append((f"{gaussians[-1]:,}", "Gaussians"))
    tiles.append(
        (
            seconds_text(results["total_seconds"]),
            f"stages 0 to 3 on {escape(str(results['device']))}",
        )
    )
    return "".join(
        f'<div class="card tile num"><b>{value}</b><span>{label}</span></div>'
        for value, label in tiles
    )


def _kept_strip(kept: dict[str, str]) -> str:
    return "".join(
        f'<figure><img src="{uri}" alt="kept photo {escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
        for name, uri in kept.items()
    )


def _summary_table(content: ReportContent) -> str:
    results = content.results
    same_views = list(results["test"]) == list(results["novel"])
    groups = [("test", "Test and novel views" if same_views else "Test views")]
    if not same_views and results["novel"]:
        groups.append(("novel", "Novel views"))
    nets = [key for key in METRIC_TITLES if _any_metric(results, key)]
    head = "".join(
        f'<th class="group" colspan="{len(nets)}">{label} ({_num_views(results, group)})</th>'
        for group, label in groups
    )
    head = f'<tr><th></th>{head}<th class="group" colspan="3">Cost</th></tr>'
    head += f"<tr><th>Stage</th>{''.join(f'<th>{METRIC_TITLES[n]}</th>' for _ in groups for n in nets)}<th>Gaussians</th><th>Time</th><th>Memory</th></tr>"
    rows = []
    for key, title, css_class in STAGE_ROWS:
        stage = results["stages"].get(key)
        cells = []
        for group, _ in groups:
            for net in nets:
                cells.append(_metric_cell(results, key, group, net))
        cost = [
            f"{stage['num_gaussians']:,}" if stage and stage.get("num_gaussians") else "–",
            seconds_text(stage["seconds"]) if stage and stage.get("seconds") is not None else "–",
            megabytes_text(stage["peak_rss_mb"]) if stage and stage.get("peak_rss_mb") else "–",
        ]
        cells += [f"<td>{text}</td>" for text in cost]
        state = "" if stage else ' <span class="muted">(not run)</span>'
        rows.append(
            f'<tr><td><span class="dot s-{css_class}"></span>{title}{state}</td>{"".join(cells)}</tr>'
        )
    guidance = results.get("guidance") or {}
    lines = []
    for group, label in groups:
        scored = guidance.get(group)
        if scored:
            psnr = "–" if scored["psnr_covered"] is None else f"{scored['psnr_covered']:.2f} dB"
            lines.append(
                f"{label.lower()}: {scored['coverage']:.1%} of the pixels covered, PSNR on those {psnr}"
            )
    note = f'<p class="muted">Point guidance at the {"; at the ".join(lines)}.</p>' if lines else ""
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def _metric_cell(results: dict, stage: str, group: str, net: str) -> str:
    lower_is_better = net.startswith("lpips")
    value = (_metrics(results, stage, group) or {}).get(net)
    if value is None:
        return "<td>–</td>"
    others = [(_metrics(results, key, group) or {}).get(net) for key, _, _ in STAGE_ROWS]
    others = [other for other in others if other is not None]
    best = value == (min(others) if lower_is_better else max(others)) and len(others) > 1
    digits = 2 if net == "psnr" else 3
    baseline = (_metrics(results, "stage1", group) or {}).get(net)
    delta = ""
    if stage != "stage1" and baseline is not None:
        delta = _delta_html(value, baseline, "", digits, lower_is_better, tag="small")
    return f'<td class="{"best" if best else ""}">{value:.{digits}f}{delta}</td>'


def _view_row(view: ViewRecord, uris: dict[str, str], hero: bool) -> str:
    figures = []
    for column, title in COLUMN_TITLES.items():
        if column not in uris:
            figures.append(f'<figure><div class="empty">no {title.lower()}</div></figure>')
            continue
        numbers = _numbers(view.metrics.get(column))
        figures.append(
            f'<figure><button class="shot" title="Click two pictures of a row to compare them">'
            f'<img class="source" data-column="{column}" src="{uris[column]}" alt="{escape(view.name)}: {title}"></button>'
            f'<figcaption><b>{title}</b> <span class="numbers num">{numbers}</span></figcaption></figure>'
        )
    gain = "" if view.gain is None else _delta_html(view.gain, 0.0, "dB", 2)
    final = view.psnr(view.final)
    return (
        f'<section class="view card" data-name="{escape(view.name)}" data-role="{" ".join(view.roles)}" data-hero="{int(hero)}" '
        f'data-final="{"" if final is None else f"{final:.4f}"}" data-gain="{"" if view.gain is None else f"{view.gain:.4f}"}">'
        f'<h3>{escape(view.name)} <span class="role">{" + ".join(view.roles)}</span> <span class="delta">{gain}</span>'
        f'<button>Compare</button></h3><div class="row" style="--columns: {len(COLUMN_TITLES)}">{"".join(figures)}</div></section>'
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
            [(s.title, f"s-{s.key}", _parts(s.seconds, s.timings)) for s in content.stages],
            seconds_text,
        )
    )
    charts.append(
        bar_chart(
            "Peak memory",
            [
                (s.title, f"s-{s.key}", [("peak", s.peak_rss_mb)])
                for s in content.stages
                if s.peak_rss_mb
            ],
            megabytes_text,
        )
    )
    return "".join(f'<div class="card">{chart}</div>' for chart in charts)


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


def _metrics(results: dict, stage: str, group: str) -> Metrics | None:
    return (results["stages"].get(stage) or {}).get(group)


def _any_metric(results: dict, key: str) -> bool:
    return key in ("psnr", "ssim") or any(
        (_metrics(results, stage, group) or {}).get(key) is not None
        for stage, _, _ in STAGE_ROWS
        for group in ("test", "novel")
    )


def _num_views(results: dict, group: str) -> int:
    counts = [
        metrics["num_views"]
        for stage, _, _ in STAGE_ROWS
        if (metrics := _metrics(results, stage, group))
    ]
    return max(counts, default=0)


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
    if metrics.get("coverage") is not None:
        parts.append(f"{metrics['coverage']:.0%} covered")
    return " · ".join(parts)


def _delta_html(
    value: float,
    baseline: float,
    unit: str,
    digits: int = 2,
    lower_is_better: bool = False,
    tag: str = "span",
) -> str:
    delta = value - baseline
    better = delta < 0 if lower_is_better else delta > 0
    css_class = "" if abs(delta) < 0.5 * 10**-digits else "gain" if better else "loss"
    return f'<{tag} class="{css_class}">{delta:+.{digits}f}{" " + unit if unit else ""}</{tag}>'
