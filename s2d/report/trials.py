"""The report's block on stage 2's trials, as HTML: kept photos that a fit has not seen, before and after the fixer."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from s2d.report.content import TrialRecord, TrialsRecord
from s2d.report.summary import delta_html

TITLES = {"truth": "Truth", "render": "Render", "fixed": "Fixed", "calibrated": "Used"}


def trials_section(trials: TrialsRecord | None, encode: Callable[[Path], str]) -> str:
    """Show the decision, and a row of pictures per trial; nothing where there were no trials.

    Args:
        trials: What stage 2 wrote down.
        encode: Turns a picture's file into a data URI.
    """
    if trials is None:
        return ""
    lines = [f"<p><b>{escape(_sentence(trials.decision))}</b></p>"]
    if trials.adaptation is not None:
        lines.append(f"<p>{escape(_sentence(trials.adaptation))}</p>")
    if trials.failed:
        names = ", ".join(map(escape, trials.failed))
        lines.append(
            f'<p class="muted">No trial of {names}: the other photos share too little.</p>'
        )
    lines.append(
        '<p class="muted">Each of these kept photos was left out of a short fit to the others, which then showed its camera '
        "(render), and the fixer repaired that (fixed). What of its change came closer to the photo is kept (used), here and in the "
        "novel views. A fit with one photo less is worse than stage 1, so these views are worse than the novel ones.</p>"
    )
    rows = "".join(_row(trial, encode) for trial in trials.trials)
    return f'<h2>Trials: what the fixer is worth here</h2><div class="card">{"".join(lines)}{rows}</div>'


def _row(trial: TrialRecord, encode: Callable[[Path], str]) -> str:
    figures = []
    for picture, title in TITLES.items():
        numbers = ""
        if picture in trial.psnr:
            psnr, before = trial.psnr[picture], trial.psnr["render"]
            delta = "" if picture == "render" else f" {delta_html(psnr, before, 'dB')}"
            numbers = f"{psnr:.2f} dB{delta}"
        figures.append(
            f'<figure><img src="{encode(trial.images[picture])}" alt="{escape(trial.name)}: {title}">'
            f'<figcaption><b>{title}</b> <span class="num">{numbers}</span></figcaption></figure>'
        )
    return (
        f'<section class="trial"><h3>{escape(trial.name)}</h3>'
        f'<div class="row" style="--columns: {len(TITLES)}">{"".join(figures)}</div></section>'
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
