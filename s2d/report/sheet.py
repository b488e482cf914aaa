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
    rows = [_row(view, columns) for view in views]
    width = len(columns) * (TILE_WIDTH + MARGIN) + MARGIN
    sheet = np.concatenate([_header(columns, width), *rows]) if rows else _header(columns, width)
    return write_image(path, torch.from_numpy(sheet))


def _row(view: ViewRecord, columns: Sequence[str]) -> np.ndarray:
    tiles = {column: _tile(view, column) for column in columns if column in view.images}
    height = max(tile.shape[0] for tile in tiles.values())
    row = np.ones(
        (height + LINE + MARGIN, len(columns) * (TILE_WIDTH + MARGIN) + MARGIN, 3), np.float32
    )
    for index, column in enumerate(columns):
        x = MARGIN + index * (TILE_WIDTH + MARGIN)
        if column in tiles:
            tile = tiles[column]
            row[: tile.shape[0], x : x + TILE_WIDTH] = tile
        _write(row, _caption(view, column), x, height + LINE - 6)
    return row


def _tile(view: ViewRecord, column: str) -> np.ndarray:
    image = read_image(view.images[column], oriented=False).numpy()
    if column == "guidance" and view.coverage is not None:
        covered = read_image(view.coverage)[..., :1].numpy() > 0.5
        image = np.where(covered, image, np.float32(HOLE))
    height = round(image.shape[0] * TILE_WIDTH / image.shape[1])
    return cv2.resize(
        np.ascontiguousarray(image), (TILE_WIDTH, height), interpolation=cv2.INTER_AREA
    )


def _caption(view: ViewRecord, column: str) -> str:
    if column == "truth":
        return f"{view.name} ({' + '.join(view.roles)})"
    metrics = view.metrics.get(column, {})
    if metrics.get("psnr") is not None:
        return f"{metrics['psnr']:.2f} dB"
    if metrics.get("psnr_covered") is not None:
        return f"{metrics['psnr_covered']:.2f} dB on {metrics['coverage']:.0%}"
    return ""


def _header(columns: Sequence[str], width: int) -> np.ndarray:
    header = np.ones((LINE + MARGIN, width, 3), np.float32)
    for index, column in enumerate(columns):
        _write(header, COLUMN_TITLES[column], MARGIN + index * (TILE_WIDTH + MARGIN), LINE - 4)
    return header


def _write(canvas: np.ndarray, text: str, x: int, y: int) -> None:
    ascii_text = text.encode("ascii", "replace").decode()  # OpenCV's font knows no others
    cv2.putText(
        canvas, ascii_text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0.1, 0.1, 0.1), 1, cv2.LINE_AA
    )
