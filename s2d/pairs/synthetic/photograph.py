"""Photos of shapes: the nearest surface along the ray through the middle of every sample, its texture and its light.

A pixel is the mean of SAMPLES x SAMPLES rays that are spread evenly over it, in linear light; sRGB's curve is taken to be a square.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from s2d.pairs.synthetic.layouts import Light
from s2d.pairs.synthetic.shapes import Shape, Triple
from s2d.pairs.synthetic.textures import look_up

SAMPLES = 2  # rays along each edge of a pixel
CLOSEST = 0.01  # shapes with a corner nearer than this (or behind) may be anywhere in the picture
MAX_STRETCH = (
    8.0  # of a pixel's footprint on a slanted surface: beyond, textures would be blurred across too
)


class Photo(NamedTuple):
    """What one camera sees."""

    linear: np.ndarray  # [H, W, 3] float32
    depth: np.ndarray  # [H, W] float32 camera z, mean of a pixel's nearest and farthest sample


def photograph(
    shapes: Sequence[Shape],
    light: Light,
    light_maps: Sequence[np.ndarray],
    K: np.ndarray,
    viewmat: np.ndarray,
    width: int,
    height: int,
) -> Photo:
    """Take a photo.

    Args:
        shapes: The scene; something must be behind every pixel.
        light, light_maps: See `bake`.
        K: Pixels. [3, 3]
        viewmat: World to camera. [4, 4] float64
        width, height: Pixels.

    Raises:
        ValueError: the scene is not closed.
    """
    fine_K = np.diag([SAMPLES, SAMPLES, 1.0]) @ K
    size = (width * SAMPLES, height * SAMPLES)
    turn = viewmat[:3, :3]
    eye = -turn.T @ viewmat[:3, 3]
    rays = turn.T @ np.linalg.inv(
        fine_K
    )  # world direction of (x, y, 1), with camera z = 1: t is depth
    depth, owner = _visible(shapes, fine_K, viewmat, eye, rays, size)
    if (owner < 0).any():
        raise ValueError(
            f"photograph: {int((owner < 0).sum())} of {owner.size} rays hit nothing. Expected a closed scene. Put a room or a sky around it."
        )
    colour = np.empty((owner.size, 3), np.float32)
    order = np.argsort(owner.ravel(), kind="stable")
    edges = np.searchsorted(owner.ravel()[order], np.arange(len(shapes) + 1))
    for index, shape in enumerate(shapes):
        rows = order[edges[index] : edges[index + 1]]
        if len(rows):
            y, x = np.divmod(rows, size[0])
            pixels = np.stack([x + 0.5, y + 0.5, np.ones(len(rows))], 1)
            directions = pixels.astype(np.float32) @ rays.T.astype(np.float32)
            z = depth.ravel()[rows].astype(np.float32)
            colour[rows] = _shade(shape, light, light_maps[index], eye, directions, z, fine_K[0, 0])
    linear = cv2.resize(colour.reshape(size[1], size[0], 3), (width, height), interpolation=cv2.INTER_AREA)  # fmt: skip
    samples = depth.reshape(height, SAMPLES, width, SAMPLES)
    return Photo(linear, ((samples.min((1, 3)) + samples.max((1, 3))) / 2).astype(np.float32))


def _visible(shapes, K, viewmat, eye, rays, size) -> tuple[np.ndarray, np.ndarray]:
    """Depth and index of the nearest shape at every sample; inf and -1 where there is none. [h, w] each"""
    depth = np.full(size[::-1], np.inf)
    owner = np.full(size[::-1], -1, np.int16)
    for index, shape in enumerate(shapes):
        box = _bounding_box(shape, K, viewmat, size)
        if box is None:
            continue
        columns, lines = box
        origin = shape.to_local(eye - shape.center)
        steps = shape.inverse @ rays
        x, y = np.arange(columns.start, columns.stop) + 0.5, np.arange(lines.start, lines.stop) + 0.5  # fmt: skip
        direction: Triple = tuple(
            (row[0] * x)[None] + (row[1] * y + row[2])[:, None] for row in steps
        )
        t = shape.hit(tuple(np.asarray(value) for value in origin), direction)
        closer = t < depth[lines, columns]
        np.copyto(depth[lines, columns], t, where=closer)
        np.copyto(owner[lines, columns], index, where=closer)
    return depth, owner


def _bounding_box(shape, K, viewmat, size) -> tuple[slice, slice] | None:
    """Columns and lines of the samples that may see the shape, None where there are none."""
    points = shape.corners @ viewmat[:3, :3].T + viewmat[:3, 3]
    if points[:, 2].max() < CLOSEST:
        return None
    if points[:, 2].min() < CLOSEST:
        return slice(0, size[0]), slice(0, size[1])
    xy = (points @ K.T)[:, :2] / points[:, 2:]
    low = np.maximum(np.floor(xy.min(0)), 0).astype(int)
    high = np.minimum(np.ceil(xy.max(0)), size).astype(int)
    if (low >= high).any():
        return None
    return slice(low[0], high[0]), slice(low[1], high[1])


def _shade(shape, light, light_map, eye, directions, z, focal) -> np.ndarray:
    """Linear colours of a shape's visible samples. [N, 3] float32"""
    material = shape.material
    # In float32: two digits more than a texture needs, and twice as fast. From the shape's centre, so that nothing cancels.
    offsets = (eye - shape.center).astype(np.float32) + z[:, None] * directions
    local = offsets @ shape.inverse.T.astype(np.float32)
    uv = shape.uv(local)
    lengths = _length(directions)
    views = directions / -lengths[:, None]  # towards the camera
    normals = shape.normals(local).astype(np.float32)
    cosine = np.einsum("ni,ni->n", normals, views)
    normals *= np.where(cosine < 0, np.float32(-1), np.float32(1))[:, None]
    cosine = np.abs(cosine)

    texture = material.texture
    density = np.sqrt(
        texture.width * material.repeat[0] / shape.size_uv[0]
        * texture.height * material.repeat[1] / shape.size_uv[1]
    )  # fmt: skip
    stretch = np.sqrt(1 / np.maximum(cosine, 1 / MAX_STRETCH))
    where = np.float32(material.offset) + uv.astype(np.float32) * np.float32(material.repeat)
    albedo = texture.sample(where, density * z * lengths / focal * stretch) ** 2
    if not material.is_lit:
        return albedo

    seen = look_up(light_map, uv)
    lamp, ambient = light.lamp.astype(np.float32), light.ambient.astype(np.float32)
    to_lamp = (light.position - shape.center).astype(np.float32) - offsets
    to_lamp /= _length(to_lamp)[:, None]
    lambert = np.einsum("ni,ni->n", normals, to_lamp)
    lit = np.maximum(lambert, 0) + material.translucency * np.maximum(-lambert, 0)
    open_sky = seen[:, 1] * (0.75 + 0.25 * normals[:, 2])
    shading = open_sky[:, None] * ambient + (seen[:, 0] * lit)[:, None] * lamp
    colour = albedo * shading
    if material.gloss:
        half = to_lamp + views
        half /= _length(half)[:, None]
        highlight = np.maximum(np.einsum("ni,ni->n", normals, half), 0) ** material.shininess
        highlight *= seen[:, 0] * (lambert > 0)
        mirrored = 0.3 * seen[:, 1] * (1 - cosine) ** 4  # surfaces shine at grazing angles
        colour += material.gloss * (highlight[:, None] * lamp + mirrored[:, None] * ambient)  # fmt: skip
    return colour.astype(np.float32)


def _length(vectors: np.ndarray) -> np.ndarray:
    """[N, 3] to [N]"""
    return np.sqrt(np.einsum("ni,ni->n", vectors, vectors))
