"""Rows of Gaussians across levels: picked, and with which opacities they are shown.

Two thresholds on opacity. Below INVISIBLE the rasteriser draws nothing at all, so leaving such rows out changes no bit of a picture; below
TRANSPARENT a row counts as unoccupied, as LapisGS's authors count.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2d.gaussians import Gaussians

# The rasteriser draws from 1/255 on; a logit that stands for exactly that may come back a rounding error below.
INVISIBLE = 0.999 / 255
TRANSPARENT = 0.005


def level_opacities(own: Sequence[Tensor], lists: Sequence[Tensor | None]) -> Tensor:
    """Opacity logits of the last level: its list for the rows below (those of the level before where it has none), then its own.

    Args:
        own: Per level, the logits of the rows that it adds; the last may be a part from the start.
        lists: Per level, the logits of the rows below at that level, or None.
    """
    shown = own[0]
    for below, new in zip(lists[1:], own[1:], strict=True):
        shown = torch.cat([shown if below is None else below, new])
    return shown


def pick_rows(gaussians: Gaussians, rows: Tensor | slice) -> Gaussians:
    """The Gaussians at some rows: a mask, indices or a slice."""
    return Gaussians(**{name: tensor[rows] for name, tensor in gaussians.tensors().items()})


def visible_rows(gaussians: Gaussians) -> Gaussians:
    """Leave out what is too faint to be drawn at all."""
    return pick_rows(gaussians, torch.sigmoid(gaussians.opacity_logits) >= INVISIBLE)
