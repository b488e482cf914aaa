"""Layers made of other files and into them: cumulative PLYs, as LapisGS writes them, and smaller encodings."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from s2d.gaussians import Gaussians
from s2d.layers.foundation import OPACITY
from s2d.layers.levels import gaussians_of_level, read_parts, write_levels
from s2d.layers.manifest import Levels
from s2d.layers.records import Encoding
from s2d.layers.rows import pick_rows


def extract(paths: Sequence[Path], folder: Path, rescales: Sequence[float] = ()) -> Levels:
    """Make a folder of levels from cumulative PLYs, coarsest first: level k is what file k adds to file k - 1.

    `merge` makes the same PLYs again, byte for byte where they are laid out as ours.

    Args:
        paths: Each holds the rows of the one before in front, with nothing changed but their opacities.
        folder: Made if missing.
        rescales: Share of the full resolution of each; empty: each half of the next, the last 1.

    Raises:
        FileNotFoundError, ValueError: A file is missing, no PLY of Gaussians, or no continuation of the one before; names it.
    """
    rescales = rescales or [0.5 ** (len(paths) - 1 - k) for k in range(len(paths))]
    if not paths or len(rescales) != len(paths):
        raise ValueError(
            f"extract: got {len(paths)} PLY files and {len(rescales)} rescales. Expected at least one file, and one rescale for each."
        )
    parts: list[Gaussians] = []
    lists: list[Tensor | None] = []
    before: Gaussians | None = None
    for path in paths:
        now = Gaussians.load_ply(path)
        start, below = 0, None
        if before is not None:
            _require_continuation(before, now, path)
            start = before.num
            below = now.opacity_logits[:start].clone()
            if _same_bits(below, before.opacity_logits):
                below = None
        parts.append(pick_rows(now, slice(start, None)))
        lists.append(below)
        before = now
    return write_levels(folder, parts, lists, rescales)


def merge(levels: Levels, folder: Path) -> list[Path]:
    """Write the cumulative PLY of every level: what a viewer shows as level k. The inverse of `extract`."""
    return [
        gaussians_of_level(levels, k).save_ply(Path(folder) / f"level_{k}.ply")
        for k in range(len(levels))
    ]


def pack(levels: Levels, folder: Path, encoding: Encoding, by_opacity: bool = True) -> Levels:
    """Store levels in another encoding.

    Args:
        levels: To be read.
        folder: To be written, another one.
        encoding: Ranges are filled in.
        by_opacity: Put the rows of each level in falling order of their opacity at that level, so that the first bytes show most.
    """
    folder = Path(folder)
    if folder.resolve() == levels.dir.resolve():
        raise ValueError(f"pack would overwrite {folder}, which it reads. Give another folder.")
    parts, lists = read_parts(levels, len(levels) - 1, all_lists=True)
    if by_opacity:
        orders = [
            part.opacity_logits.argsort(descending=True, stable=True) + level.start
            for part, level in zip(parts, levels.levels, strict=True)
        ]
        parts = [
            pick_rows(part, order - level.start)
            for part, order, level in zip(parts, orders, levels.levels, strict=True)
        ]
        lists = [
            None if below is None else below[torch.cat(orders[:k])] for k, below in enumerate(lists)
        ]
    return write_levels(
        folder,
        parts,
        lists,
        [level.rescale for level in levels.levels],
        encoding,
        [level.metrics for level in levels.levels],
    )


def _require_continuation(before: Gaussians, now: Gaussians, path: Path) -> None:
    if now.num < before.num or now.sh_degree != before.sh_degree:
        raise ValueError(
            f"{path} has {now.num} Gaussians of SH degree {now.sh_degree}. Expected at least the {before.num} of the level below, of degree "
            f"{before.sh_degree}. Give the files from coarse to fine."
        )
    for name, values in before.tensors().items():
        held = getattr(now, name)[: before.num]
        if name == OPACITY or _same_bits(held, values):
            continue
        moved = (held != values).reshape(before.num, -1).any(1)
        raise ValueError(
            f"{path}: {int(moved.sum())} of {before.num} Gaussians of the level below have other {name} than there (first: "
            f"{int(moved.nonzero()[0]) if bool(moved.any()) else 0}). Expected layers on a frozen foundation; these are not."
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
