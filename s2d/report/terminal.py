"""The results of a run as a table on the terminal (stdout)."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table


def print_results(results: dict) -> None:
    """Print the summary to stdout."""
    same = results["test"] == results["novel"]
    table = Table(
        title=f"{results['scene']}: {len(results['kept'])} kept views, protocol {results['protocol']}"
    )
    for heading in (
        "stage",
        "views",
        "PSNR",
        "SSIM",
        "LPIPS VGG",
        "LPIPS Alex",
        "Gaussians",
        "seconds",
        "MB",
    ):
        table.add_column(heading, justify="left" if heading in ("stage", "views") else "right")
    names = {"stage1": "stage 1", "stage2": "fixed", "stage3": "stage 3"}
    for stage, row in results["stages"].items():
        if row is None:
            continue
        groups = [
            group for group in ("test", "novel") if row[group] and not (same and group == "novel")
        ]
        for group in groups or ["-"]:
            metrics = row.get(group) or {}
            scores = [
                _show(metrics.get(key), digits)
                for key, digits in (("psnr", 2), ("ssim", 3), ("lpips_vgg", 3), ("lpips_alex", 3))
            ]
            label = f"{group} ({metrics['num_views']})" if metrics else "nothing to score"
            table.add_row(
                names[stage],
                label,
                *scores,
                _show(row["num_gaussians"], 0),
                _show(row["seconds"], 1),
                _show(row["peak_rss_mb"], 0),
            )
    # A file or a pipe has no width; 80 columns would break the headings.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    for group in ("test", "novel"):
        guidance = results["guidance"][group]
        if guidance and not (same and group == "novel"):
            console.print(
                f"guidance, {group} views: covers {guidance['coverage']:.1%}, PSNR on covered pixels {_show(guidance['psnr_covered'], 2)} dB"
            )


def _show(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
