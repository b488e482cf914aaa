"""How good the model is by now, on views of scenes that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from s2d.hier.data.samples import as_batch, as_views, frame_sample
from s2d.hier.data.sources import Case
from s2d.hier.judging import Judged, fly, judge, mean_scores, score
from s2d.hier.model import HierModel
from s2d.metrics import Lpips
from s2d.sampling import spread


def choose_cases(cases: Sequence[Case], count: int) -> list[Case]:
    """At most `count` of them, evenly spread."""
    return [cases[position] for position in spread(len(cases), count)]


def judge_cases(
    model: HierModel,
    cases: Sequence[Case],
    size: tuple[int, int],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> list[Judged]:
    """Judge a model that is being trained."""
    model.eval()
    with autocast():
        found = [
            judge(capture.key, model, frame_sample(capture, pick, size), device)
            for capture, pick in cases
        ]
    model.train()
    return found


def scores_by_level(judgements: Sequence[Judged], lpips: Lpips | None) -> dict[str, float]:
    """Means over the cases: `psnr_0`, `ssim_0`, … for the set up to each level."""
    rows = [score(judged, lpips) for judged in judgements]
    return {
        f"{name}_{level}": value
        for level in range(len(rows[0]))
        for name, value in mean_scores([row[level] for row in rows]).items()
    }


def describe(scores: dict[str, float]) -> str:
    """A line for the log: what all levels together reach, and PSNR from level to level."""
    ladder = [value for name, value in scores.items() if name.startswith("psnr_")]
    last = len(ladder) - 1
    best = [
        f"{name.removesuffix(f'_{last}')} {value:.4g}"
        for name, value in scores.items()
        if name.endswith(f"_{last}")
    ]
    return f"{', '.join(best)} (PSNR by level {' → '.join(f'{value:.2f}' for value in ladder)})"


def film(case: Case, judged: Judged, size: tuple[int, int], num_frames: int) -> Iterator[Tensor]:
    """Frames of a flight between the context views of a case. [H, W, 3] each"""
    context = as_views(as_batch(frame_sample(*case, size)), "context")
    return fly(judged.levels[-1], context.to(judged.levels[-1].means.device), num_frames)
