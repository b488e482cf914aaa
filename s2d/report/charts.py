"""Small charts as inline SVG text: no script, no library, colours from the page's CSS classes (`s-stage0` … `s-stage3`).

Every chart function returns one `<svg>` element whose numbers a reader can hover (`<title>`) and select.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 26, 14, 34
MAX_POINTS = 400  # per line: more than the chart has pixels adds bytes, not information


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    css_class: str
    xs: Sequence[float]
    ys: Sequence[float]


def line_chart(title: str, series: Sequence[Series], x_label: str, *, log_y: bool = False) -> str:
    """Draw lines over one common x axis; points that are not finite (or not positive, where log) are left out."""
    lines = [(s, _usable(s, log_y)) for s in series]
    lines = [(s, points) for s, points in lines if points]
    if not lines:
        return f'<p class="muted">{escape(title)}: nothing was recorded.</p>'
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    x_ticks = _nice_ticks(min(xs), max(xs))
    y_ticks = _log_ticks(min(ys), max(ys)) if log_y else _nice_ticks(min([0.0, *ys]), max(ys))
    x0, x1 = min(xs), max(xs)
    y0, y1 = y_ticks[0], y_ticks[-1]  # ticks enclose the values

    def px(x: float) -> float:
        return LEFT + (x - x0) / max(x1 - x0, 1e-9) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        if log_y:
            y, low, high = math.log10(y), math.log10(y0), math.log10(y1)
        else:
            low, high = y0, y1
        return HEIGHT - BOTTOM - (y - low) / max(high - low, 1e-12) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{py(tick) + 4:.1f}" text-anchor="end">{short_number(tick)}</text>'
        )
    for tick in x_ticks:
        if x0 <= tick <= x1:
            parts.append(
                f'<text x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short_number(tick)}</text>'
            )
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end" class="axis">{escape(x_label)}</text>'
    )
    for s, points in lines:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        last_x, last_y = points[-1]
        parts.append(
            f'<polyline class="{s.css_class}" points="{path}"><title>{escape(s.label)}</title></polyline>'
            f'<circle class="{s.css_class}" cx="{px(last_x):.1f}" cy="{py(last_y):.1f}" r="3.5">'
            f"<title>{escape(s.label)}: {short_number(last_y)} at {short_number(last_x)}</title></circle>"
        )
    return _figure(title, [(s.label, s.css_class) for s, _ in lines], WIDTH, HEIGHT, parts)


def bar_chart(
    title: str, bars: Sequence[tuple[str, str, Sequence[tuple[str, float]]]], unit
) -> str:
    """Draw one horizontal stacked bar per row.

    Args:
        title: The heading.
        bars: Per row its label, CSS class and parts (label, value), drawn left to right.
        unit: Formats a value for people, as in `seconds_text`.
    """
    if not bars:
        return f'<p class="muted">{escape(title)}: nothing was recorded.</p>'
    row_height, label_width, value_width = 34, 80, 96
    height = row_height * len(bars) + 6
    longest = max(sum(value for _, value in parts) for _, _, parts in bars) or 1.0
    scale = (WIDTH - label_width - value_width) / longest
    out = []
    for row, (label, css_class, parts) in enumerate(bars):
        y, x = row * row_height + 6, float(label_width)
        out.append(
            f'<text x="{label_width - 10}" y="{y + 16}" text-anchor="end" class="axis">{escape(label)}</text>'
        )
        for index, (part_label, value) in enumerate(parts):
            width = max(value * scale, 0.5)
            out.append(
                f'<rect class="{css_class} part{index % 3}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" rx="3">'
                f"<title>{escape(label)} · {escape(part_label)}: {escape(unit(value))}</title></rect>"
            )
            x += width
        total = sum(value for _, value in parts)
        out.append(f'<text x="{x + 8:.1f}" y="{y + 16}">{escape(unit(total))}</text>')
    return _figure(title, [], WIDTH, height, out)


def dumbbell_chart(
    title: str,
    rows: Sequence[tuple[str, float, float]],
    labels: tuple[str, str],
    classes: tuple[str, str],
) -> str:
    """Draw one line per view from its value before to its value after: who gained, who lost, at a glance.

    Args:
        title: The heading.
        rows: (view, before, after), in the order to draw.
        labels: What before and after are called.
        classes: Their CSS classes.
    """
    rows = [row for row in rows if math.isfinite(row[1]) and math.isfinite(row[2])]
    if not rows:
        return f'<p class="muted">{escape(title)}: no view has both values.</p>'
    row_height, label_width = 20, 150
    height = row_height * len(rows) + 34
    values = [value for row in rows for value in row[1:]]
    ticks = _nice_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]  # ticks enclose the values

    def px(value: float) -> float:
        return label_width + (value - low) / max(high - low, 1e-12) * (WIDTH - label_width - 24)

    out = []
    for tick in ticks:
        out.append(
            f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="4" y2="{height - 26}"/>'
            f'<text x="{px(tick):.1f}" y="{height - 8}" text-anchor="middle">{short_number(tick)}</text>'
        )
    for index, (name, before, after) in enumerate(rows):
        y = index * row_height + 14
        direction = "gain" if after >= before else "loss"
        short_name = name if len(name) <= 20 else "…" + name[-19:]
        out.append(
            f'<text x="{label_width - 10}" y="{y + 4}" text-anchor="end">{escape(short_name)}</text>'
            f'<line class="link {direction}" x1="{px(before):.1f}" x2="{px(after):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="{classes[0]}" cx="{px(before):.1f}" cy="{y}" r="4.5">'
            f"<title>{escape(name)} · {escape(labels[0])}: {before:.2f}</title></circle>"
            f'<circle class="{classes[1]}" cx="{px(after):.1f}" cy="{y}" r="4.5">'
            f"<title>{escape(name)} · {escape(labels[1])}: {after:.2f} ({after - before:+.2f})</title></circle>"
        )
    return _figure(title, list(zip(labels, classes, strict=True)), WIDTH, height, out)


def short_number(value: float) -> str:
    """Write an axis number: 1500 → 1,500; 0.05 → 0.05; 120000 → 120k."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e5:
        return f"{value / 1e3:g}k"
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}"


def seconds_text(seconds: float) -> str:
    """Write a duration: 0.42 s, 12 s, 3 min 05 s, 1 h 02 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def megabytes_text(megabytes: float) -> str:
    """Write an amount of memory: 812 MB, 1.4 GB."""
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


def _figure(
    title: str, legend: Sequence[tuple[str, str]], width: int, height: int, parts: Sequence[str]
) -> str:
    keys = "".join(
        f'<span class="key {css_class}">{escape(label)}</span>' for label, css_class in legend
    )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{keys}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _usable(series: Series, log_y: bool) -> list[tuple[float, float]]:
    points = [
        (float(x), float(y))
        for x, y in zip(series.xs, series.ys, strict=True)
        if x is not None
        and y is not None
        and math.isfinite(x)
        and math.isfinite(y)
        and (y > 0 or not log_y)
    ]
    if len(points) <= MAX_POINTS:
        return points
    # Averages over equal bins: a loss of single random views is noise without them.
    edges = [round(i * len(points) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    bins = [points[a:b] for a, b in pairwise(edges)]
    return [(b[-1][0], sum(y for _, y in b) / len(b)) for b in bins]


def _nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    span = max(high - low, 1e-9 * max(abs(high), 1.0))
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude * count >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
    below = [t for t in ticks if t <= low]
    inside = [t for t in ticks if low < t < high]
    above = [t for t in ticks if t >= high]
    return [*below[-1:], *inside, *above[:1]]
