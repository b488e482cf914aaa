"""Tables of `tools/benchmark.py quality`: means of each variant, differences to the default, and what each stage adds to the one before."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.results import Setting, markdown

DEFAULT = "default"
METRICS = {"psnr": ("PSNR", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS", 3)}

# Of every setting: variant → scores of each seed, in the order of the seeds that are there.
Scores = dict[Setting, dict[str, dict[int, dict[str, Any]]]]


def tables(scores: Scores) -> str:
    """Tables in Markdown: each variant's means, its difference to the default on every setting, and where stage 3 was run what the stages gain."""
    parts = [mean_table(scores), paired_table(scores)]
    for title, chain in CHAINS.items():
        if any(chain(run) for run in all_runs(scores)):
            parts += [title, chain_table(scores, chain)]
    return "\n\n".join(parts) + "\n"


def all_runs(scores: Scores) -> list[dict[str, Any]]:
    return [
        run for variants in scores.values() for seeds in variants.values() for run in seeds.values()
    ]


def final_chain(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Scores of a run at the test views, stage 1 first; nothing if stage 3 was not run."""
    return [run["stage1"], run] if "stage1" in run else []


def novel_chain(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Scores of what stages 1, 2 and 3 show at the novel views; nothing where no photo shows the truth."""
    return list(run.get("novel", {}).values())


CHAINS = {
    "Stage 1 → final scene, PSNR in dB / LPIPS; last row: gain, and on how many settings.": final_chain,
    "Novel views: stage 1's renders → fixed views → stage 3's renders; last row: gain of the fixed views.": novel_chain,
}


def chain_table(scores: Scores, chain: Callable[[Mapping[str, Any]], Sequence]) -> str:
    """How each variant's scores develop on every setting, means over seeds; then the mean gain of the second part of the chain over the first, LPIPS as a ratio."""
    names = list(dict.fromkeys(name for runs in scores.values() for name in runs))
    rows: list[list[str]] = []
    gains: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for setting, runs in scores.items():
        row = [str(setting)]
        for name in names:
            seeds = [parts for run in runs.get(name, {}).values() if (parts := chain(run))]
            cells = []
            for metric in ("psnr", "lpips"):
                if not seeds or any(part[metric] is None for part in seeds[0]):
                    continue
                means = [
                    statistics.fmean(part[metric] for part in step)
                    for step in zip(*seeds, strict=True)
                ]
                cells.append(" → ".join(f"{mean:.{METRICS[metric][1]}f}" for mean in means))
                if metric == "psnr":
                    gains[name].append(means[1] - means[0])
                else:
                    ratios[name].append(means[1] / means[0])
            row.append(" / ".join(cells) or "–")
        rows.append(row)
    last = []
    for name in names:
        better = f"{sum(gain > 0 for gain in gains[name])} of {len(gains[name])}"
        cell = f"{difference_cell(gains[name], 2)}, {better}"
        if ratios[name]:
            cell += f" / {statistics.geometric_mean(ratios[name]) - 1:+.1%}"
        last.append(cell)
    return table_text(["setting", *names], [*rows, ["gain", *last]])


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
