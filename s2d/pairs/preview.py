"""The preview sheet: for every kind a row of pairs from bad to good, each as A | P | B. One look says whether the artifacts are real ones."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from s2d.images import read_image, resize_image, write_image
from s2d.pairs.dataset import Dataset
from s2d.pairs.plan import KINDS

QUANTILES = (0.1, 0.5, 0.9)  # of PSNR: which pairs of a kind are shown
BOX = (252, 190)  # largest tile, pixels
MARGIN, GAP, LINE = 4, 18, 20  # between tiles, between pairs, and for a line of text
CAPTION = 460  # narrowest pair: its caption must fit
HOLE = torch.tensor([0.45, 0.45, 0.45])  # uncovered guidance: a grey that no photo is mistaken for


def write_preview(dataset: Dataset, rows: Sequence[dict], path: Path) -> Path:
    """Write the sheet of these lines of pairs.jsonl; nothing but a note where there are none."""
    parts = [
        _line("rows: kinds; pairs from low to high PSNR, each: A render | P guidance | B photo")
    ]
    for kind in [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]:
        of_kind = sorted(
            (r for r in rows if r["kind"] == kind), key=lambda r: (r["psnr"], r["name"])
        )
        places = sorted({round(q * (len(of_kind) - 1)) for q in QUANTILES})
        parts.append(_beside([_pair(dataset, of_kind[place]) for place in places], GAP))
    return write_image(path, torch.from_numpy(_below(parts)).float() / 255)


def _pair(dataset: Dataset, row: dict) -> np.ndarray:
    """One pair with its caption. [h, w, 3] uint8"""
    pictures = {
        letter: read_image(dataset.dir / f"{row['split']}_{letter}" / row["name"])
        for letter in ("A", "P", "M", "B")
    }
    pictures["P"] = torch.where(pictures.pop("M")[..., :1] > 0.5, pictures["P"], HOLE)
    tiles = [_tile(pictures[letter]) for letter in ("A", "P", "B")]
    picture = _beside(tiles, MARGIN)
    picture = np.pad(
        picture, ((0, 0), (0, max(0, CAPTION - picture.shape[1])), (0, 0)), constant_values=255
    )
    strength = "" if row["strength"] is None else f", {row['strength']:.0%}"
    caption = f"{row['name'].removesuffix('.png')} ({row['split']}{strength}) {row['psnr']:.2f} dB"
    return np.concatenate([picture, _line(caption, picture.shape[1])])


def _tile(image: torch.Tensor) -> np.ndarray:
    scale = min(BOX[0] / image.shape[1], BOX[1] / image.shape[0])
    small = resize_image(image, round(image.shape[1] * scale), round(image.shape[0] * scale))
    return np.rint(small.numpy() * 255).astype(np.uint8)


def _beside(tiles: Sequence[np.ndarray], gap: int) -> np.ndarray:
    height = max(tile.shape[0] for tile in tiles)
    padded = [
        np.pad(tile, ((0, height - tile.shape[0]), (0, gap), (0, 0)), constant_values=255)
        for tile in tiles
    ]
    return np.concatenate(padded, 1)[:, :-gap]


def _below(parts: Sequence[np.ndarray]) -> np.ndarray:
    width = max(part.shape[1] for part in parts)
    padded = [
        np.pad(
            part,
            ((MARGIN, MARGIN), (MARGIN, MARGIN + width - part.shape[1]), (0, 0)),
            constant_values=255,
        )
        for part in parts
    ]
    return np.concatenate(padded)


def _line(text: str, width: int = 3 * BOX[0]) -> np.ndarray:
    canvas = np.full((LINE, width, 3), 255, np.uint8)
    ascii_text = text.encode("ascii", "replace").decode()  # OpenCV's font knows no others
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(canvas, ascii_text, (0, LINE - 6), font, 0.45, (26, 26, 26), 1, cv2.LINE_AA)
    return canvas
