"""The tables of benchmarks/gpu.py, from the numbers in gpu.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tables(results: dict[str, Any]) -> str:
    """All tables as Markdown; what was not measured has none."""
    machine = results["machine"]
    title = (
        f"{machine.get('gpu', machine['device'])}; {machine['reason']}; torch {machine['torch']}"
    )
    parts = [title, *steps(results["steps"])]
    parts += [kernels(row) for row in results["kernels"]]
    if results["fixer"]:
        parts.append(fixer(results["fixer"]))
    return "\n\n".join(parts) + "\n"


def steps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One table per number of Gaussians and size; factors are against the fastest gsplat."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if "missing" not in row:
            key = (row["gaussians"], row["width"], row["height"])
            groups.setdefault(key, []).append(row)
    found = [_step_table(key, group) for key, group in groups.items()]
    missing = [row["missing"] for row in rows if "missing" in row]
    return [*found, *(f"Not measured: {reason}" for reason in missing)]


def _step_table(key: tuple[int, int, int], rows: Sequence[dict[str, Any]]) -> str:
    number, width, height = key
    others = [r for r in rows if r["contestant"].startswith("gsplat") and "failed" not in r]
    best = {
        "step": min((r["step_ms"] for r in others), default=None),
        "fps": max((r["render_fps"] for r in others), default=None),
        "peak": min((r["peak_bytes"] or 0 for r in others), default=None),
    }
    lines = [
        f"{number:,} Gaussians, {width}x{height} (× against the best of gsplat)",
        "",
        "| | step ms | × | best ms | renders/s | × | peak MB | × |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['contestant']} | {row['failed']} |  |  |  |  |  |  |")
            continue
        peak = row["peak_bytes"]
        cells = [
            row["contestant"],
            f"{row['step_ms']:.2f}",
            _factor(best["step"], row["step_ms"]),
            f"{row['step_best_ms']:.2f}",
            f"{row['render_fps']:.0f}",
            _factor(row["render_fps"], best["fps"]),
            "" if peak is None else f"{peak / 1e6:,.0f}",
            _factor(peak, best["peak"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kernels(row: dict[str, Any]) -> str:
    """One table: what each kernel takes, and of that the share it cannot do without."""
    title = f"{row['gaussians']:,} Gaussians, {row['width']}x{row['height']}: kernels of a step"
    if "failed" in row:
        return f"{title}: {row['failed']}"
    rates = row["limits"]
    lines = [
        f"{title} (measured limits: {rates['tflops']:.1f} TFLOP/s, {rates['gb_per_s']:.0f} GB/s)",
        "",
        "| kernel | ms | memory floor ms | arithmetic floor ms | floor / time |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, values in row["kernels"].items():
        floors = [values.get("memory_floor_ms"), values.get("arithmetic_floor_ms")]
        shown = ["" if value is None else f"{value:.3f}" for value in floors]
        known = [value for value in floors if value is not None]
        share = f"{max(known) / values['ms']:.0%}" if known else ""
        lines.append(f"| {name} | {values['ms']:.3f} | {shown[0]} | {shown[1]} | {share} |")
    return "\n".join(lines)


def fixer(rows: Sequence[dict[str, Any]]) -> str:
    """One table of networks."""
    lines = [
        "| fixer | frame | how | ms a frame | peak MB |",
        "|---|---|---|--:|--:|",
    ]
    for row in rows:
        frame = "x".join(map(str, row["frame"]))
        if "failed" in row:
            lines.append(f"| {row['network']} | {frame} | {row['failed']} |  |  |")
            continue
        peak = row["peak_bytes"]
        shown = "" if peak is None else f"{peak / 1e6:,.0f}"
        for how, taken in row["frame_ms"].items():
            lines.append(f"| {row['network']} | {frame} | {how} | {taken:.1f} | {shown} |")
    return "\n".join(lines)


def _factor(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else ""
