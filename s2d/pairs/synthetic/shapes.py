"""Flat, round and tubular surfaces that rays hit in closed form: no tessellation, so a photo is exact at any size.

A shape is a piece of a quadric in its own frame, placed by `world = center + axes @ local`:

quad        z = 0, |x| <= 1, |y| <= 1; a mask cuts an outline out of it
ellipsoid   x² + y² + z² = 1
tube        x² + y² = (1 - taper (z + 1) / 2)², |z| <= 1, |angle about z| <= span; open at both ends, seen from both sides

Rays are origin + t * direction, in the shape's frame as tuples of three arrays that broadcast. `uv` runs from 0 to 1 over the surface.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from s2d.pairs.synthetic.textures import Texture

NEAR = 1e-3  # smallest t: whatever starts on a surface does not hit it

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Material:
    """What light does at a surface."""

    texture: Texture
    offset: tuple[float, float] = (0.0, 0.0)  # of the texture at uv (0, 0), in pictures
    repeat: tuple[float, float] = (
        1.0,
        1.0,
    )  # pictures along u and v; every second one is mirrored
    mask: np.ndarray | None = None  # [n, n] bool over uv: where the surface is; quads only
    gloss: float = 0.0  # strength of the highlight
    shininess: float = 30.0  # its exponent
    translucency: float = 0.0  # share of the light from behind
    is_lit: bool = True  # False: the sky, which gives its own light


@dataclass(frozen=True, eq=False)
class Shape:
    """One surface."""

    kind: Literal["quad", "ellipsoid", "tube"]
    center: np.ndarray  # [3] world
    axes: np.ndarray  # [3, 3] columns: the local axes in the world, with the lengths that make the surface unit size
    material: Material
    taper: float = 0.0
    span: float = np.pi
    casts: bool = True  # shadows

    @cached_property
    def inverse(self) -> np.ndarray:
        """Local from world, without the shift. [3, 3]"""
        return np.linalg.inv(self.axes)

    @cached_property
    def corners(self) -> np.ndarray:
        """Points whose hull holds the surface, world. [4 or 8, 3]"""
        flat = [(x, y) for x in (-1.0, 1.0) for y in (-1.0, 1.0)]
        if self.kind == "quad":
            local = np.array([(x, y, 0.0) for x, y in flat])
        else:
            wide = max(1.0, abs(1 - self.taper)) if self.kind == "tube" else 1.0
            local = np.array([(wide * x, wide * y, z) for z in (-1.0, 1.0) for x, y in flat])
        return self.center + local @ self.axes.T

    @cached_property
    def size_uv(self) -> tuple[float, float]:
        """Lengths that u and v run over, world units; of curved surfaces about the largest."""
        x, y, z = np.linalg.norm(self.axes, axis=0)
        if self.kind == "quad":
            return 2 * x, 2 * y
        if self.kind == "tube":
            return self.span * (x + y), 2 * z
        return np.pi * (x + y), np.pi * (x + y + z) / 3

    def to_local(self, vectors: np.ndarray) -> np.ndarray:
        """Turn directions into the shape's frame; subtract the centre first from points. [..., 3]"""
        return vectors @ self.inverse.T

    def hit(self, origin: Triple, direction: Triple) -> np.ndarray:
        """Find the first t > NEAR at which each ray hits, inf where it does not."""
        if self.kind == "quad":
            return self._hit_quad(origin, direction)
        return self._hit_quadric(origin, direction)

    def _hit_quad(self, origin: Triple, direction: Triple) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):  # rays along the plane miss
            t = -origin[2] / direction[2]
            x, y = origin[0] + t * direction[0], origin[1] + t * direction[1]
            good = (t > NEAR) & (np.abs(x) <= 1) & (np.abs(y) <= 1)
        if self.material.mask is not None:
            size = len(self.material.mask)
            where = np.nonzero(good)
            column, row = (
                np.minimum(((values[where] + 1) * (size / 2)).astype(np.int64), size - 1)
                for values in (x, y)
            )
            good[where] = self.material.mask[row, column]
        return np.where(good, t, np.inf)

    def _hit_quadric(self, origin: Triple, direction: Triple) -> np.ndarray:
        (ox, oy, oz), (dx, dy, dz) = origin, direction
        if self.kind == "ellipsoid":
            a, b = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz
            c = ox * ox + oy * oy + oz * oz - 1
        else:
            radius, slope = (
                1 - self.taper * (oz + 1) / 2,
                -self.taper / 2,
            )  # r = radius + slope t dz
            a = dx * dx + dy * dy - (slope * dz) ** 2
            b = ox * dx + oy * dy - radius * slope * dz
            c = ox * ox + oy * oy - radius * radius
        inside = b * b - a * c
        nearest = np.full(np.shape(inside), np.inf)
        # Most rays of a bounding box miss round things: go on with the others.
        rows = np.nonzero(inside >= 0)
        a, b = (np.broadcast_to(values, inside.shape)[rows] for values in (a, b))
        o = [np.broadcast_to(values, inside.shape)[rows] for values in origin]
        d = [np.broadcast_to(values, inside.shape)[rows] for values in direction]
        root = np.sqrt(inside[rows])
        a = np.where(np.abs(a) < 1e-12, 1e-12, a)
        roots = np.stack([(-b - root) / a, (-b + root) / a])
        roots.sort(0)
        good = roots > NEAR
        if self.kind == "tube":
            x, y, z = (o[k] + roots * d[k] for k in range(3))
            good &= (np.abs(z) <= 1) & (1 - self.taper * (z + 1) / 2 >= 0)
            if self.span < np.pi:
                good &= np.abs(np.arctan2(y, x)) <= self.span
        nearest[rows] = np.where(good[0], roots[0], np.where(good[1], roots[1], np.inf))
        return nearest

    def uv(self, local: np.ndarray) -> np.ndarray:
        """Where on the surface its points [N, 3] in the local frame are. [N, 2] in [0, 1]"""
        x, y, z = local.T
        if self.kind == "quad":
            return np.stack([(x + 1) / 2, (y + 1) / 2], 1)
        if self.kind == "tube":
            return np.stack([np.arctan2(y, x) / (2 * self.span) + 0.5, (z + 1) / 2], 1)
        around = np.arctan2(y, x) / (2 * np.pi) + 0.5
        return np.stack([around, np.arccos(np.clip(z, -1, 1)) / np.pi], 1)

    def from_uv(self, uv: np.ndarray) -> np.ndarray:
        """Inverse of `uv`: points in the local frame. [N, 3]"""
        u, v = uv.T
        if self.kind == "quad":
            return np.stack([2 * u - 1, 2 * v - 1, np.zeros_like(u)], 1)
        if self.kind == "tube":
            angle, z = (u - 0.5) * 2 * self.span, 2 * v - 1
            radius = 1 - self.taper * (z + 1) / 2
            return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], 1)
        angle, polar = (u - 0.5) * 2 * np.pi, v * np.pi
        return np.stack(
            [np.sin(polar) * np.cos(angle), np.sin(polar) * np.sin(angle), np.cos(polar)], 1
        )

    def normals(self, local: np.ndarray) -> np.ndarray:
        """Unit normals at points of the surface, world; outward of round ones, local +z of quads. [N, 3]"""
        if self.kind == "quad":
            gradient = np.array([[0.0, 0.0, 1.0]])
        elif self.kind == "tube":
            x, y, z = local.T
            gradient = np.stack([x, y, self.taper / 2 * (1 - self.taper * (z + 1) / 2)], 1)
        else:
            gradient = local
        normals = gradient @ self.inverse.astype(local.dtype)
        normals /= np.maximum(np.sqrt((normals * normals).sum(1, keepdims=True)), 1e-12)
        return np.broadcast_to(normals, local.shape).astype(local.dtype)
