"""A chart as a file of its own: SVG text, drawn without a library, for docs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 36, 48
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's


@dataclass(frozen=True)
class Line:
    """Points that belong together, and their name in the legend."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    dashed: bool = False
    """For what is not measured: a bar to pass, a slope to compare with."""


def plot_svg(
    title: str, lines: Sequence[Line], x_label: str, y_label: str, *, log: bool = False
) -> str:
    """Draw lines over common axes, both logarithmic where `log`; returns the text of an SVG file.

    Raises:
        ValueError: There is no point, or one that has no place on a logarithmic axis.
    """
    xs = [float(x) for line in lines for x in line.xs]
    ys = [float(y) for line in lines for y in line.ys]
    if not xs:
        raise ValueError(f"plot_svg: {title!r} has no points. Pass at least one line with some.")
    if log and min(*xs, *ys) <= 0:
        raise ValueError(f"plot_svg: {title!r} has values <= 0, which a logarithmic axis lacks.")
    x_axis = _Axis(xs, LEFT, WIDTH - RIGHT, log)
    y_axis = _Axis(ys, HEIGHT - BOTTOM, TOP, log)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for tick in x_axis.ticks:
        x = x_axis(tick)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,.6g}</text>'
        )
    for tick in y_axis.ticks:
        y = y_axis(tick)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for row, line in enumerate(lines):
        color = COLORS[row % len(COLORS)]
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        points = [(x_axis(x), y_axis(y)) for x, y in zip(line.xs, line.ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>'
        )
        if not line.dashed:
            for (x, y), raw_x, raw_y in zip(points, line.xs, line.ys, strict=True):
                tip = escape(f"{line.label}: {raw_y:,.4g} at {raw_x:,.6g}")
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"><title>{tip}</title></circle>'
                )
        y = TOP + 8 + 20 * row
        left = WIDTH - RIGHT + 12
        parts.append(
            f'<line x1="{left}" x2="{left + 18}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"{dash}/>'
            f'<text x="{left + 24}" y="{y + 4}">{escape(line.label)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """Where on the paper a value lies; its ticks enclose all values."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = min(values), max(values)
        self.ticks = _decade_ticks(low, high) if log else _round_ticks(low, high)
        self.low, self.high = self._scale(self.ticks[0]), self._scale(self.ticks[-1])

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.start + (self._scale(value) - self.low) / (self.high - self.low) * (
            self.end - self.start
        )


def _round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, four to ten of them, around all values."""
    span = max(high - low, 1e-9 * max(abs(high), 1e-9))
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 8)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _decade_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around all values; powers alone where those are too many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    all_ticks = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
    below = max(t for t in all_ticks if t <= low * (1 + 1e-9))
    above = min((t for t in all_ticks if t >= high * (1 - 1e-9)), default=10.0 ** (last + 1))
    ticks = [t for t in all_ticks if below <= t <= above]
    if len(ticks) <= 7:
        return ticks if len(ticks) > 1 else [ticks[0], 2 * ticks[0]]
    return [10.0**k for k in range(first, max(last, first + 1) + 1)]
