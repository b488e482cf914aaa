"""How good the fixer is by now: scores over a fixed part of the test pairs, and a sheet to look at."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from s2d.fixer.diffusion import from_network
from s2d.fixer.tiles import pad_to_multiple
from s2d.fixer.training.samples import PairSamples
from s2d.images import resize_image, write_image
from s2d.metrics import Lpips, psnr, ssim

if TYPE_CHECKING:  # diffusers takes seconds to import
    from s2d.fixer.network.model import FixerModel

CELL_WIDTH = 320  # pixels of the sheet's pictures: four fit on a screen
TITLE_HEIGHT = 22
# What is scored: the render as it came, the network's input (the mix with the guidance) and its result.
STATES = ("rendered", "mixed", "fixed")

# Of the sheet.
COLUMNS = {"rendered": "A render", "guidance": "P guidance", "fixed": "fixed", "target": "B truth"}

Picture = dict[str, Tensor]  # [H, W, 3] each


@torch.no_grad()
def repair_samples(
    model: "FixerModel",
    samples: PairSamples,
    positions: list[int],
    autocast: Callable[[], AbstractContextManager],
) -> list[Picture]:
    """Fix test samples. One dict per position: `rendered`, `guidance`, `mixed`, `fixed`, `target`, as 8-bit files hold them."""
    device = next(model.parameters()).device
    pictures = []
    model.eval()
    for position in positions:
        sample = samples.fixed_sample(position)
        height, width = sample["rendered"].shape[-2:]
        rendered, guidance, mask, reference = (
            pad_to_multiple(sample[key][None], model.multiple).to(device)
            for key in ("rendered", "guidance", "coverage_mask", "reference")
        )
        with autocast():
            shown = model.show(rendered, guidance, mask)
            fixed = model.repair(shown, model.encode_photos(reference)[:, None])
        found = {"rendered": rendered, "guidance": guidance, "mixed": shown[:, :3], "fixed": fixed}
        found["target"] = sample["target"][None]
        pictures.append(
            {
                key: (from_network(image[..., :height, :width].float().cpu()) * 255).round() / 255
                for key, image in found.items()
            }
        )
    model.train()
    return pictures


def score(pictures: list[Picture], lpips: Lpips | None) -> dict[str, float]:
    """Mean PSNR, SSIM and, where its weights are there, LPIPS: `psnr_fixed`, `psnr_mixed`, `psnr_rendered`, …"""
    scores: dict[str, float] = {}
    for state in STATES:
        pairs = [(picture[state], picture["target"]) for picture in pictures]
        scores[f"psnr_{state}"] = float(np.mean([psnr(*pair) for pair in pairs]))
        scores[f"ssim_{state}"] = float(np.mean([ssim(*pair) for pair in pairs]))
        if lpips is not None:
            scores[f"lpips_{state}"] = float(np.mean([lpips(*pair) for pair in pairs]))
    return scores


def describe(row: dict[str, float]) -> str:
    """A line for the log: each metric after, before, and of the network's input."""
    return ", ".join(
        f"{metric} {row[f'{metric}_fixed']:.4g} (render {row[f'{metric}_rendered']:.4g}, mix {row[f'{metric}_mixed']:.4g})"
        for metric in ("psnr", "ssim", "lpips")
        if f"{metric}_fixed" in row
    )


def write_sheet(path: Path, pictures: list[Picture]) -> Path:
    """Write one row per sample: render, guidance, fixed view and truth, with the PSNR of the first and the third."""
    rows = []
    for picture in pictures:
        cells = []
        for key, label in COLUMNS.items():
            image = picture[key]
            height = round(image.shape[0] * CELL_WIDTH / image.shape[1])
            score = f"  {psnr(image, picture['target']):.2f} dB" if key in STATES else ""
            title = np.zeros((TITLE_HEIGHT, CELL_WIDTH, 3), np.uint8)
            cv2.putText(title, label + score, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255,) * 3)
            cells.append(
                torch.cat([torch.from_numpy(title) / 255, resize_image(image, CELL_WIDTH, height)])
            )
        rows.append(torch.cat(cells, dim=1))
    return write_image(path, torch.cat(rows))
