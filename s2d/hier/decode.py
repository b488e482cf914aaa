"""From raw network output per grid cell to Gaussians in the world, and what is needed to turn spherical harmonics.

A level's grid has one cell per `stride` pixels; its intrinsics are the picture's, divided by the stride. z is camera depth. The footprint of a cell at
depth z is z times the sum of its two sides at depth 1, (1/fx + 1/fy): that is what makes coarse Gaussians large and fine ones small.

Raw channels: offset 2, scale 3, quaternion 4, SH 3 K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.geometry import fibonacci_sphere, invert_rigid, pixel_grid, rotation_to_quat
from s2d.hier.config import STRIDES
from s2d.hier.gaussians import HierGaussians
from s2d.sh import rgb_to_sh0, sh_basis

NUM_SHAPE = 2 + 3 + 4
# Standard deviation in tenths of a footprint, as published: from 0.5 to 15. A footprint is two cell sides, so 0.1 to 3 cells.
MIN_SIZE, SIZE_RANGE, SIZE_UNIT = 0.5, 14.5, 0.1
# Raw scale that each level starts from: 0.53, 0.47 and 0.25 cells. With the 0.3 square pixels that the rasteriser blurs by, that is a variance of 0.3
# square cells (0.36 at the finest level): neighbours just close the surface, and the picture stays sharp.
START_SCALE = (-1.75, -1.92, -2.91)
# View-dependent bands start small: degree l is damped by 0.1 · 0.25^l, as published.
BAND_DAMPING, BAND_FALL = 0.1, 0.25
# Values that spherical harmonics are turned by: twice the 16 functions of degree 3.
DIRECTIONS = 32


@dataclass(frozen=True)
class GaussianGrid:
    """One level's Gaussians of B scenes of V views, still on their pixel grid."""

    means: Tensor  # [B, V, h, w, 3] world
    log_scales: Tensor  # [B, V, h, w, 3]
    quats: Tensor  # [B, V, h, w, 4] wxyz world, unit
    opacities: Tensor  # [B, V, h, w] in (0, 1)
    sh: Tensor  # [B, V, h, w, K, 3] world
    level: int

    def cropped(self, height: int, width: int) -> GaussianGrid:
        """Return the cells whose centres lie in a picture of `height` x `width` pixels."""
        stride = STRIDES[self.level]
        rows, columns = (math.ceil(side / stride - 0.5) for side in (height, width))
        tensors = {
            field.name: getattr(self, field.name)[:, :, :rows, :columns]
            for field in fields(self)
            if field.name != "level"
        }
        return replace(self, **tensors)

    def faded(self, weights: Tensor) -> GaussianGrid:
        """Return the same with opacities multiplied by `weights` [B, V, h, w]."""
        return replace(self, opacities=self.opacities * weights)


def num_raw(sh_degree: int) -> int:
    """Raw channels per cell."""
    return NUM_SHAPE + 3 * (sh_degree + 1) ** 2


def cell_footprint(
    Ks: Tensor,  # [..., 3, 3]
) -> Tensor:
    """Sum of a cell's two sides at depth 1: 1/fx + 1/fy in the grid's intrinsics. [...]"""
    return 1 / Ks[..., 0, 0] + 1 / Ks[..., 1, 1]


def scaled_Ks(
    Ks: Tensor,  # [..., 3, 3]
    stride: int,
) -> Tensor:
    """Intrinsics of a grid with one cell per `stride` pixels. [..., 3, 3]"""
    return torch.cat([Ks[..., :2, :] / stride, Ks[..., 2:, :]], -2)


def lift(
    xy: Tensor,  # [B, V, h, w, 2]
    inverse_depth: Tensor,  # [B, V, h, w]
    viewmats: Tensor,  # [B, V, 4, 4]
    Ks: Tensor,  # [B, V, 3, 3]
) -> Tensor:
    """Place grid positions at a depth (camera z, not the length of the ray) in the world. Differentiable. [B, V, h, w, 3]"""
    rays = F.pad(xy, (0, 1), value=1.0) @ torch.linalg.inv(Ks).mT[:, :, None]
    world_from_cam = invert_rigid(viewmats)[:, :, None]
    in_camera = rays / inverse_depth[..., None]
    return in_camera @ world_from_cam[..., :3, :3].mT + world_from_cam[..., None, :3, 3]


def decode(
    raw: Tensor,  # [B, V, R, h, w]
    opacities: Tensor,  # [B, V, h, w]
    inverse_depth: Tensor,  # [B, V, h, w]
    colours: Tensor,  # [B, V, 3, h, w]
    viewmats: Tensor,  # [B, V, 4, 4]
    Ks: Tensor,  # [B, V, 3, 3]
    level: int,
) -> GaussianGrid:
    """Turn raw channels into Gaussians, one per cell.

    Args:
        raw: Raw channels, R = 9 + 3 K. [B, V, R, h, w]
        opacities: In (0, 1). [B, V, h, w]
        inverse_depth: 1 / camera z, > 0. [B, V, h, w]
        colours: The picture on this grid; raw 0 is a Gaussian of this colour. [B, V, 3, h, w]
        viewmats: World to camera. [B, V, 4, 4]
        Ks: Of the grid. [B, V, 3, 3]
        level: Written on the result.

    Differentiable in all tensors but the cameras.
    """
    height, width = raw.shape[-2:]
    raw = raw.movedim(2, -1)  # [B, V, h, w, R]
    offset, scale, quats, sh = raw.split([2, 3, 4, raw.shape[-1] - NUM_SHAPE], -1)

    # A Gaussian stays within its cell: half a cell to each side of the centre at most.
    xy = pixel_grid(width, height, raw.device, raw.dtype) + offset.sigmoid() - 0.5
    means = lift(xy, inverse_depth, viewmats, Ks)

    size = (MIN_SIZE + SIZE_RANGE * scale.sigmoid()) * SIZE_UNIT
    footprint = cell_footprint(Ks)[..., None, None] / inverse_depth
    log_scales = (size * footprint[..., None]).log()

    c2w = invert_rigid(viewmats)[..., :3, :3]
    quats = F.normalize(
        quats + quats.new_tensor([1.0, 0.0, 0.0, 0.0]), dim=-1
    )  # raw 0 is no rotation
    quats = multiply_quats(rotation_to_quat(c2w)[:, :, None, None], quats)

    sh = sh.unflatten(-1, (-1, 3))  # [B, V, h, w, K, 3]
    degree = round(sh.shape[-2] ** 0.5) - 1
    bands = [1.0] + [
        BAND_DAMPING * BAND_FALL**band for band in range(1, degree + 1) for _ in range(2 * band + 1)
    ]
    sh = sh * sh.new_tensor(bands)[:, None]
    base = rgb_to_sh0(colours).movedim(2, -1)[..., None, :]
    sh = torch.cat([sh[..., :1, :] + base, sh[..., 1:, :]], -2)
    sh = rotate_sh(sh, c2w[:, :, None, None])
    return GaussianGrid(means, log_scales, quats, opacities, sh, level)


def flatten(grids: list[GaussianGrid], height: int, width: int) -> HierGaussians:
    """Join levels, as far as they lie in pictures of `height` x `width`: level-major, within a level view after view, row after row."""
    grids = [grid.cropped(height, width) for grid in grids]

    def rows(name: str, trailing: int) -> Tensor:
        parts = [getattr(grid, name) for grid in grids]
        return torch.cat([part.flatten(1, part.ndim - 1 - trailing) for part in parts], 1)

    counts = [grid.opacities[0].numel() for grid in grids]
    levels = torch.tensor([grid.level for grid in grids], device=grids[0].means.device)
    return HierGaussians(
        means=rows("means", 1),
        log_scales=rows("log_scales", 1),
        quats=rows("quats", 1),
        opacities=rows("opacities", 0),
        sh=rows("sh", 2),
        levels=levels.repeat_interleave(torch.tensor(counts, device=levels.device)),
    )


def multiply_quats(
    first: Tensor,  # [..., 4]
    second: Tensor,  # [..., 4]
) -> Tensor:
    """Compose rotations wxyz: the result turns by `second`, then by `first`. [..., 4]"""
    a, b, c, d = first.unbind(-1)
    e, f, g, h = second.unbind(-1)
    return torch.stack(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ],
        -1,
    )


def rotate_sh(
    sh: Tensor,  # [..., K, 3]
    rotation: Tensor,  # [..., 3, 3]
) -> Tensor:
    """Turn spherical harmonics along with the thing that they colour: new(d) = old(R⁻¹ d). Differentiable in `sh`. [..., K, 3]

    Each band turns by itself. Its matrix is found from the function's values at fixed directions, which determine a band exactly; no table of
    rotation formulas is needed.

    Args:
        sh: Coefficients, K = 1, 4, 9 or 16. [..., K, 3]
        rotation: From the old frame to the new one; leading axes broadcast with those of `sh`. [..., 3, 3]
    """
    degree = round(sh.shape[-2] ** 0.5) - 1
    if degree == 0:
        return sh
    rotation = rotation.double()
    directions = fibonacci_sphere(DIRECTIONS, rotation.device)
    new = torch.linalg.pinv(sh_basis(directions, degree))  # [K, S]
    old = sh_basis(directions @ rotation, degree)  # row d of d R is R⁻¹ d; [..., S, K]
    matrix = (new @ old).to(sh.dtype)  # block diagonal, [..., K, K]
    return matrix @ sh
