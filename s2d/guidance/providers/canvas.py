"""Photos at a network's resolution and back, without losing a pixel.

Networks want one size for all photos, a multiple of their patch. Each photo is resized as a whole (both sides rounded to the patch, so
nothing is cropped and the change of intrinsics is a scale per axis) and, where photos have different shapes, laid in the middle of a
common white canvas. Everything is in corner-origin pixels: the first pixel's centre is (0.5, 0.5).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.checks import check_shape
from s2d.images import resize_image

BACKGROUND = 1.0  # white, as VGGT pads


class Region(NamedTuple):
    """Where a photo lies on the canvas, whole pixels."""

    left: int
    top: int
    width: int
    height: int


class Canvas(NamedTuple):
    """N photos at one size."""

    images: Tensor  # [N, 3, H, W] in [0, 1]
    regions: tuple[Region, ...]
    sizes: tuple[tuple[int, int], ...]  # of the photos, (width, height)

    @property
    def width(self) -> int:
        return self.images.shape[-1]

    @property
    def height(self) -> int:
        return self.images.shape[-2]

    def intrinsics(self, cameras: Cameras) -> Tensor:
        """The cameras' K on the canvas. [N, 3, 3]"""
        return torch.linalg.solve(self._photo_from_canvas(), cameras.Ks.double()).float()

    def photo_intrinsics(self, Ks: Tensor) -> Tensor:
        """The photos' K of cameras whose K is given on the canvas. [N, 3, 3]"""
        return (self._photo_from_canvas() @ Ks.double().cpu()).float()

    def cut(self, maps: Tensor) -> tuple[Tensor, ...]:
        """Each photo's part of maps [N, H, W, ...]."""
        maps = maps.detach().float().cpu()
        return tuple(
            one[region.top : region.top + region.height, region.left : region.left + region.width]
            for one, region in zip(maps, self.regions, strict=True)
        )

    def rgbs(self) -> tuple[Tensor, ...]:
        """The photos as the network sees them. [h, w, 3] each"""
        return self.cut(self.images.permute(0, 2, 3, 1))

    def _photo_from_canvas(self) -> Tensor:
        matrices = []
        for (width, height), region in zip(self.sizes, self.regions, strict=True):
            x, y = width / region.width, height / region.height
            matrices.append([[x, 0, -x * region.left], [0, y, -y * region.top], [0, 0, 1]])
        return torch.tensor(matrices, dtype=torch.float64)


def fit_canvas(
    photos: Sequence[Tensor],
    multiple: int,
    max_side: int | None = None,
    max_pixels: int | None = None,
) -> Canvas:
    """Resize photos [H, W, 3] to a network's size.

    Args:
        photos: In [0, 1].
        multiple: Both sides are rounded to multiples of it.
        max_side: The longest side becomes this (a multiple of `multiple`).
        max_pixels: Instead: as large as stays within so many pixels.
    """
    if not photos:
        raise ValueError("predict: expected at least one photo, got none.")
    resized, sizes = [], []
    for photo in photos:
        check_shape("photos", photo, (None, None, 3))
        height, width = photo.shape[:2]
        sizes.append((width, height))
        scale = (
            max_side / max(width, height)
            if max_side is not None
            else math.sqrt(max_pixels / (width * height))
        )
        columns, rows = (max(1, round(side * scale / multiple)) for side in (width, height))
        while max_pixels is not None and columns * rows * multiple**2 > max_pixels:
            # The side that was rounded up further gives way.
            if columns / rows > width / height:
                columns -= 1
            else:
                rows -= 1
        resized.append(resize_image(photo.cpu(), columns * multiple, rows * multiple))
    width, height = (max(photo.shape[axis] for photo in resized) for axis in (1, 0))
    images = torch.full((len(photos), 3, height, width), BACKGROUND)
    regions = []
    for image, photo in zip(images, resized, strict=True):
        rows, columns = photo.shape[:2]
        region = Region((width - columns) // 2, (height - rows) // 2, columns, rows)
        image[:, region.top : region.top + rows, region.left : region.left + columns] = (
            photo.permute(2, 0, 1)
        )
        regions.append(region)
    return Canvas(images, tuple(regions), tuple(sizes))
