"""Images of any size through a network that takes multiples of some number, and no more pixels than memory holds."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(
    images: Tensor,  # [B, C, H, W]
    multiple: int,
) -> Tensor:
    """Extend right and bottom to the next multiple by mirroring; crop with `[..., :H, :W]`. [B, C, H', W']"""
    height, width = images.shape[-2:]
    below, right = -height % multiple, -width % multiple
    if not below and not right:
        return images
    # A mirror has no more pixels than the image; tiny ones repeat their edge.
    mode = "reflect" if below < height and right < width else "replicate"
    return F.pad(images, (0, right, 0, below), mode=mode)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the fewest tiles that cover `length` and overlap by at least `overlap`, evenly spread."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(number * (length - tile) / (count - 1)) for number in range(count)]


def run_tiled(
    run: Callable[[slice, slice], Tensor],
    height: int,
    width: int,
    tile: int,
    overlap: int,
) -> Tensor:
    """Run `run(rows, columns)` on every tile and blend the results.

    Args:
        run: Returns the result of one tile. [B, C, rows, columns]
        height: Of the whole image.
        width: Of the whole image.
        tile: Longest side of a tile; an image that is not longer is one tile.
        overlap: Pixels that neighbours share at least; over them one fades linearly into the other.

    Returns:
        [B, C, height, width]
    """
    row_starts, column_starts = (tile_starts(length, tile, overlap) for length in (height, width))
    if len(row_starts) == len(column_starts) == 1:
        return run(slice(0, height), slice(0, width))
    total = weights = None
    for top in row_starts:
        for left in column_starts:
            bottom, right = min(top + tile, height), min(left + tile, width)
            rows, columns = slice(top, bottom), slice(left, right)
            result = run(rows, columns)
            weight = (
                _fade(top, bottom, height, overlap)[:, None]
                * _fade(left, right, width, overlap)[None]
            ).to(result)
            if total is None:
                total = result.new_zeros(*result.shape[:2], height, width)
                weights = result.new_zeros(height, width)
            total[..., rows, columns] += result * weight
            weights[rows, columns] += weight
    return total / weights


def _fade(start: int, stop: int, length: int, overlap: int) -> Tensor:
    """Weights along one axis of a tile: 1, falling towards those ends that are not the image's own. [stop - start]"""
    weight = torch.ones(stop - start)
    ramp = torch.arange(1, overlap + 1) / (overlap + 1)
    if start > 0 and overlap:
        weight[:overlap] = ramp
    if stop < length and overlap:
        weight[-overlap:] = torch.minimum(weight[-overlap:], ramp.flip(0))
    return weight
