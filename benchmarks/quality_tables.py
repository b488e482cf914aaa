"""Tables of `tools/benchmark.py quality`: means of each variant, differences to the default, and what stage 3 adds to stage 1."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import Setting, markdown

DEFAULT = "default"
METRICS = {"psnr": ("PSNR", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS", 3)}

# Of every setting: variant → scores of each seed, in the order of the seeds that are there.
Scores = dict[Setting, dict[str, dict[int, dict[str, Any]]]]


def tables(scores: Scores) -> str:
    """Tables in Markdown: each variant's means, its difference to the default on every setting, and where stage 3 was run its gain."""
    parts = [mean_table(scores), paired_table(scores)]
    if any("stage1" in run for run in all_runs(scores)):
        parts.append(stage_table(scores))
    return "\n\n".join(parts) + "\n"


def all_runs(scores: Scores) -> list[dict[str, Any]]:
    return [
        run for variants in scores.values() for seeds in variants.values() for run in seeds.values()
    ]


def stage_table(scores: Scores) -> str:
    """Stage 1 → final scene of each variant on every setting, PSNR / LPIPS, means over seeds; then the mean differences."""
    names = list(dict.fromkeys(name for runs in scores.values() for name in runs))
    rows, gains = [], {name: [] for name in names}
    for setting, runs in scores.items():
        row = [str(setting)]
        for name in names:
            both = [run for run in runs.get(name, {}).values() if "stage1" in run]
            cells = []
            for metric, (_, digits) in METRICS.items():
                if metric == "ssim" or not both or both[0][metric] is None:
                    continue
                before, after = (
                    statistics.fmean(run[metric] for run in part)
                    for part in ([run["stage1"] for run in both], both)
                )
                cells.append(f"{before:.{digits}f} → {after:.{digits}f}")
                if metric == "psnr":
                    gains[name].append(after - before)
            row.append(" / ".join(cells) or "–")
        rows.append(row)
    means = [
        f"{difference_cell(found, 2)}, {sum(gain > 0 for gain in found)} of {len(found)}"
        for found in gains.values()
    ]
    return (
        "Stage 1 → final scene, PSNR in dB / LPIPS; last row: gain in dB, and on how many settings.\n\n"
        + table_text(["setting", *names], [*rows, ["gain", *means]])
    )


def mean_table(scores: Scores) -> str:
    """Per variant the mean over settings ± the mean deviation over seeds, for the settings on which every variant has run."""
    variants = list(dict.fromkeys(name for runs in scores.values() for name in runs))
    complete = [setting for setting, runs in scores.items() if set(variants) <= set(runs)]
    rows = []
    for variant in variants:
        row = [variant]
        for metric, (_, digits) in METRICS.items():
            runs = [list(scores[setting][variant].values()) for setting in complete]
            row.append(mean_cell([[run[metric] for run in seeds] for seeds in runs], digits))
        counts = [
            run["num_gaussians"]
            for setting in complete
            for run in scores[setting][variant].values()
        ]
        rows.append([*row, f"{statistics.fmean(counts):,.0f}" if counts else "–"])
    head = ["variant", *(title for title, _ in METRICS.values()), "Gaussians"]
    where = ", ".join(map(str, complete))
    return f"Means over {len(complete)} settings ({where}).\n\n" + table_text(head, rows)


def mean_cell(values: Sequence[Sequence[float | None]], digits: int) -> str:
    """Mean over settings of the means over seeds; ± the mean over settings of the standard deviation over seeds, if there are several."""
    known = [[value for value in seeds if value is not None] for seeds in values]
    known = [seeds for seeds in known if seeds]
    if not known:
        return "–"
    text = f"{statistics.fmean(map(statistics.fmean, known)):.{digits}f}"
    deviations = [statistics.stdev(seeds) for seeds in known if len(seeds) > 1]
    return f"{text} ± {statistics.fmean(deviations):.{digits}f}" if deviations else text


def paired_table(scores: Scores) -> str:
    """Difference to the default of the same setting and seed: PSNR in dB per setting; then the means, their standard error, and LPIPS."""
    variants = [
        name
        for name in dict.fromkeys(name for runs in scores.values() for name in runs)
        if name != DEFAULT
    ]
    rows = []
    for variant in variants:
        gains = {setting: paired(runs, variant, "psnr") for setting, runs in scores.items()}
        known = [gain for gain in gains.values() if gain is not None]
        lpips = [
            gain for runs in scores.values() if (gain := paired(runs, variant, "lpips")) is not None
        ]
        rows.append(
            [
                variant,
                *("–" if gain is None else f"{gain:+.2f}" for gain in gains.values()),
                difference_cell(known, 2),
                f"{sum(gain > 0 for gain in known)} of {len(known)}",
                difference_cell(lpips, 4),
            ]
        )
    head = ["variant", *map(str, scores), "mean dB", "better", "mean LPIPS"]
    return (
        "Difference to the default, PSNR in dB; ± is the standard error over settings.\n\n"
        + table_text(head, rows)
    )


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with names on the left and numbers on the right."""
    return markdown(head, rows).replace("| ---: ", "| --- ", 1)


def paired(runs: Mapping[str, Mapping[int, Any]], variant: str, metric: str) -> float | None:
    """Mean over the seeds that both have of variant minus default."""
    both = [
        seed for seed in runs.get(variant, {}) if seed in runs[DEFAULT]
        and runs[variant][seed][metric] is not None
    ]  # fmt: skip
    if not both:
        return None
    return statistics.fmean(runs[variant][s][metric] - runs[DEFAULT][s][metric] for s in both)


def difference_cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    text = f"{statistics.fmean(values):+.{digits}f}"
    if len(values) < 2:
        return text
    return f"{text} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"
