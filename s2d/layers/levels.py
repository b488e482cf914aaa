"""Folders of levels, written and read: each level is a prefix of the rows with opacities of its own. See `manifest` for what is beside them."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2d.checks import check_shape
from s2d.files import atomic_write_bytes
from s2d.gaussians import Gaussians, concatenate
from s2d.layers.manifest import (
    MANIFEST,
    DataFile,
    Level,
    Levels,
    check_structure,
    load_levels,
    manifest_text,
)
from s2d.layers.quantise import Ranges
from s2d.layers.records import Encoding, as_stored, encode_opacities, encode_rows
from s2d.layers.rows import INVISIBLE, TRANSPARENT, level_opacities, visible_rows


def write_levels(
    folder: Path,
    parts: Sequence[Gaussians],
    opacities: Sequence[Tensor | None],
    rescales: Sequence[float],
    encoding: Encoding | None = None,
    metrics: Sequence[dict[str, Any] | None] | None = None,
) -> Levels:
    """Write a folder of levels, levels.json last.

    Args:
        folder: Made if missing.
        parts: The rows that each level adds, with their opacities at that level.
        opacities: Per level, logits [start] of the rows below at that level; None: as at the level below, always for the first.
        rescales: Share of the full resolution of each level.
        encoding: Default: float32, bit for bit. Ranges are filled in.
        metrics: What is known of each level's quality.

    Raises:
        ValueError: Counts that disagree.
    """
    folder = Path(folder)
    encoding = encoding or Encoding()
    if encoding.rows == "quantised":
        encoding = replace(encoding, ranges=Ranges.of(concatenate(parts)))
    files: dict[str, DataFile] = {}

    def store(name: str, data: bytes) -> str:
        atomic_write_bytes(folder / name, data)
        files[name] = DataFile(len(data), hashlib.sha256(data).hexdigest())
        return name

    levels, start = [], 0
    for k, (part, below, rescale) in enumerate(zip(parts, opacities, rescales, strict=True)):
        if below is not None:
            check_shape(f"opacities[{k}]", below, (start,))
        own = level_opacities([p.opacity_logits for p in parts[: k + 1]], opacities[: k + 1])
        shown = torch.sigmoid(as_stored(own.detach(), encoding))
        stored = None if below is None else encode_opacities(below, encoding)
        levels.append(
            Level(
                id=k,
                start=start,
                stop=start + part.num,
                rescale=rescale,
                rows_file=store(f"rows_{k}.bin", encode_rows(part, encoding)),
                opacity_file=None if stored is None else store(f"opacity_{k}.bin", stored),
                visible=int((shown >= INVISIBLE).sum()),
                transparent=int((shown < TRANSPARENT).sum()),
                metrics=None if metrics is None else metrics[k],
            )
        )
        start += part.num
    result = Levels(folder, parts[0].sh_degree, encoding, tuple(levels), files)
    check_structure(result)
    atomic_write_bytes(folder / MANIFEST, manifest_text(result))
    return result


def check_levels(levels: Levels) -> None:
    """Read every file and raise ValueError or FileNotFoundError, naming it, where one is not what levels.json says."""
    for name in levels.files:
        levels.read(name)


def gaussians_of_level(source: Path | Levels, k: int, visible_only: bool = False) -> Gaussians:
    """Read the Gaussians that show level k: rows of all levels up to it, with the opacities of level k.

    Args:
        source: A folder, or its `load_levels`.
        k: Level, 0 is the coarsest.
        visible_only: Leave out what is never drawn at this level; pictures stay the same to the bit.

    Raises:
        FileNotFoundError, ValueError: A file that is needed is missing or damaged; names it.
    """
    levels = source if isinstance(source, Levels) else load_levels(source)
    if not 0 <= k < len(levels):
        raise ValueError(f"There is no level {k} in {levels.dir}. Expected 0 to {len(levels) - 1}.")
    parts, lists = read_parts(levels, k)
    gaussians = concatenate(parts)
    gaussians.opacity_logits = level_opacities([part.opacity_logits for part in parts], lists)
    return visible_rows(gaussians) if visible_only else gaussians


def read_parts(
    levels: Levels, k: int, all_lists: bool = False
) -> tuple[list[Gaussians], list[Tensor | None]]:
    """Read the rows of every level up to k, and their opacity lists: None where there is none.

    Args:
        all_lists: Also read the lists of lower levels that level k does without.
    """
    needed = levels.needed_files(k)
    parts, lists = [], []
    for row, level in enumerate(levels.levels[: k + 1]):
        part = levels.rows(row, levels.read(level.rows_file))
        _check_count(levels.dir / level.rows_file, part.num, level.stop - level.start)
        below = None
        if level.opacity_file is not None and (all_lists or level.opacity_file in needed):
            below = levels.opacities(row, levels.read(level.opacity_file))
            _check_count(levels.dir / level.opacity_file, len(below), level.start)
        parts.append(part)
        lists.append(below)
    return parts, lists


def _check_count(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"{path} has {found} records. Expected {expected} from {MANIFEST}. Fetch it again, or make it again with tools/layers.py."
        )
