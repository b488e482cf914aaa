"""Contact sheets: all views of a run in one picture, for looking at many runs quickly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from s2d.images import read_image, write_image
from s2d.report.content import COLUMN_TITLES, ViewRecord

TILE_WIDTH = 300
MARGIN, LINE = 6, 22  # pixels between tiles, and for a line of text
HOLE = (0.45, 0.45, 0.45)  # uncovered guidance: a grey that no photo is mistaken for


def write_sheet(path: Path, views: Sequence[ViewRecord]) -> Path:
    """Write a PNG with one row per view: truth, stage 1, guidance, fixed, final, and the PSNR under each.

    Columns that no view has are left out; a picture that a view lacks stays empty.
    """
    columns = [column for column in COLUMN_TITLES if any(column in view.images for view in views)]
    width = len(columns) * (TILE_WIDTH + MARGIN) + MARGIN
    header = np.full((LINE + MARGIN, width, 3), 255, np.uint8)
    for index, column in enumerate(columns):
        _write(header, COLUMN_TITLES[column], index)
    sheet = np.concatenate([header, *(_row(view, columns, width) for view in views)])
    return write_image(path, torch.from_numpy(sheet).float() / 255)


def _row(view: ViewRecord, columns: Sequence[str], width: int) -> np.ndarray:
    tiles = {column: _tile(view, column) for column in columns if column in view.images}
    height = max(tile.shape[0] for tile in tiles.values())
    row = np.full((height + LINE + MARGIN, width, 3), 255, np.uint8)
    for index, column in enumerate(columns):
        if column in tiles:
            left = MARGIN + index * (TILE_WIDTH + MARGIN)
            row[: tiles[column].shape[0], left : left + TILE_WIDTH] = tiles[column]
        label = f"{view.name} ({' + '.join(view.roles)}) " if index == 0 else ""
        _write(row, label + _score(view, column), index)
    return row


def _tile(view: ViewRecord, column: str) -> np.ndarray:  # [h, TILE_WIDTH, 3] uint8
    image = read_image(view.images[column], oriented=False).numpy()
    if column == "guidance" and view.coverage is not None:
        covered = read_image(view.coverage)[..., :1].numpy() > 0.5
        image = np.where(covered, image, np.float32(HOLE))
    height = round(image.shape[0] * TILE_WIDTH / image.shape[1])
    small = cv2.resize(
        np.ascontiguousarray(image), (TILE_WIDTH, height), interpolation=cv2.INTER_AREA
    )
    return np.rint(small * 255).astype(np.uint8)


def _score(view: ViewRecord, column: str) -> str:
    metrics = view.metrics.get(column, {})
    if metrics.get("psnr") is not None:
        return f"{metrics['psnr']:.2f} dB"
    if metrics.get("psnr_covered") is not None:
        return f"{metrics['psnr_covered']:.2f} dB on {metrics['coverage']:.0%}"
    return ""


def _write(canvas: np.ndarray, text: str, column: int) -> None:
    """Write at the bottom of a row, under the column's picture."""
    ascii_text = text.encode("ascii", "replace").decode()  # OpenCV's font knows no others
    at = (MARGIN + column * (TILE_WIDTH + MARGIN), canvas.shape[0] - MARGIN - 4)
    cv2.putText(
        canvas, ascii_text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (26, 26, 26), 1, cv2.LINE_AA
    )
