"""The summary on top of a report, as HTML: headline numbers, and the table of stages by metrics."""

from __future__ import annotations

from html import escape

from s2d.report.charts import megabytes_text, seconds_text
from s2d.report.content import METRIC_TITLES, Metrics

STAGE_ROWS = (
    ("stage1", "Stage 1", "stage1"),
    ("stage2", "Fixed images", "stage2"),
    ("stage3", "Final", "stage3"),
)


def headline_tiles(results: dict) -> str:
    """Show the final test scores, the number of Gaussians and the time."""
    tiles = []
    first, last = _metrics(results, "stage1", "test"), _metrics(results, "stage3", "test")
    if last or first:
        shown = last or first
        delta = (
            delta_html(shown["psnr"], first["psnr"], "dB over stage 1") if last and first else ""
        )
        what = "test PSNR, final" if last else "test PSNR, stage 1"
        tiles.append((f"{shown['psnr']:.2f} dB", f"{what} {delta}"))
        tiles.append(
            (
                f"{shown['ssim']:.3f}",
                f"SSIM {delta_html(shown['ssim'], first['ssim'], '', 3) if delta else ''}",
            )
        )
        net = next((net for net in ("lpips_vgg", "lpips_alex") if shown.get(net) is not None), None)
        if net:
            change = (
                delta_html(shown[net], first[net], "", 3, lower_is_better=True) if delta else ""
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


def summary_table(results: dict) -> str:
    """Show every stage's scores and cost; the best of a column is bold, and changes are against stage 1."""
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
    best = value == (min(others) if lower_is_better else max(others)) and min(others) < max(others)
    digits = 2 if net == "psnr" else 3
    baseline = (_metrics(results, "stage1", group) or {}).get(net)
    delta = ""
    if stage != "stage1" and baseline is not None:
        delta = delta_html(value, baseline, "", digits, lower_is_better, tag="small")
    return f'<td class="{"best" if best else ""}">{value:.{digits}f}{delta}</td>'


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


def delta_html(
    value: float,
    baseline: float,
    unit: str,
    digits: int = 2,
    lower_is_better: bool = False,
    tag: str = "span",
) -> str:
    """Show a signed change, green where it is for the better and red where for the worse."""
    delta = value - baseline
    better = delta < 0 if lower_is_better else delta > 0
    css_class = "" if abs(delta) < 0.5 * 10**-digits else "gain" if better else "loss"
    return f'<{tag} class="{css_class}">{delta:+.{digits}f}{" " + unit if unit else ""}</{tag}>'
