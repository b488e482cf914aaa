"""Light baked into the surfaces: how much of the lamp each place sees, and how open it is to the light from everywhere.

Few rays from a coarse grid on each surface, then blurred: shadows with soft borders, which is all that these scenes need.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from s2d.pairs.synthetic.layouts import Light
from s2d.pairs.synthetic.shapes import Shape

LAMP_RAYS = 3
OPEN_RAYS = 3
FINEST = 0.08  # distance of grid points, world units
GRID_SIZES = (3, 40)  # fewest and most points along an edge
CHUNK = 8192  # rays at a time: bounds the memory


def bake(
    rng: np.random.Generator, shapes: Sequence[Shape], light: Light, viewpoint: np.ndarray
) -> list[np.ndarray]:
    """Cast the shadows of all shapes on all shapes.

    Args:
        rng: Where on the lamp and to which sides rays go.
        shapes: The scene.
        light: Its light.
        viewpoint: Where about the cameras are, world. [3]

    Returns:
        Per shape, over uv: share of the lamp and share of the surroundings that is seen. [n, m, 2] float32 in [0, 1]
    """
    sizes = [_grid_size(shape) for shape in shapes]
    points, normals, owners = [], [], []
    for index, (shape, (columns, rows)) in enumerate(zip(shapes, sizes, strict=True)):
        u, v = np.meshgrid((np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows)
        local = shape.from_uv(np.stack([u.ravel(), v.ravel()], 1))
        points.append(shape.center + local @ shape.axes.T)
        normals.append(shape.normals(local))
        owners.append(np.full(rows * columns, index))
    points, normals, owner = np.concatenate(points), np.concatenate(normals), np.concatenate(owners)
    # Flat shapes have two sides, and one map: of the side that is seen.
    facing = np.einsum("pi,pi->p", normals, viewpoint - points)
    is_flat = np.array([shape.kind == "quad" for shape in shapes])[owner]
    normals = np.where((is_flat & (facing < 0))[:, None], -normals, normals)
    casters = [index for index, shape in enumerate(shapes) if shape.casts]

    seen = np.zeros((len(points), 2), np.float32)
    for _ in range(LAMP_RAYS):
        aim = light.position + light.radius * _directions(rng, len(points))
        seen[:, 0] += ~_blocked(shapes, casters, owner, points, aim - points) / LAMP_RAYS
    for _ in range(OPEN_RAYS):
        aim = normals + 0.98 * _directions(rng, len(points))
        aim *= light.reach / np.linalg.norm(aim, axis=1, keepdims=True)
        seen[:, 1] += ~_blocked(shapes, casters, owner, points, aim) / OPEN_RAYS
    maps, start = [], 0
    for columns, rows in sizes:
        grid = seen[start : start + rows * columns].reshape(rows, columns, 2)
        maps.append(cv2.GaussianBlur(grid, (0, 0), 0.9, borderType=cv2.BORDER_REPLICATE))
        start += rows * columns
    return maps


def _grid_size(shape: Shape) -> tuple[int, int]:
    """Points along u and v."""
    return tuple(int(np.clip(length / FINEST, *GRID_SIZES)) for length in shape.size_uv)


def _directions(rng: np.random.Generator, num: int) -> np.ndarray:
    """Random unit vectors. [num, 3]"""
    vectors = rng.normal(size=(num, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _blocked(
    shapes: Sequence[Shape],
    casters: Sequence[int],
    owner: np.ndarray,
    points: np.ndarray,
    aims: np.ndarray,
) -> np.ndarray:
    """Which rays from points [P, 3] along aims [P, 3] hit a shape other than their own before t = 1. [P]"""
    centers = np.stack([shapes[index].center for index in casters])
    radii = [np.linalg.norm(shapes[index].corners - shapes[index].center, axis=1).max() for index in casters]  # fmt: skip
    blocked = np.zeros(len(points), bool)
    for start in range(0, len(points), CHUNK):
        p, a = points[start : start + CHUNK], aims[start : start + CHUNK]
        # Squared distances between the rays and the shapes' centres: beyond the radius a shape needs no closer look. [CHUNK, casters]
        lengths = np.einsum("pi,pi->p", a, a)[:, None]
        dots = a @ centers.T - np.einsum("pi,pi->p", a, p)[:, None]
        along = np.clip(dots / lengths, 0, 1)
        away = ((p * p).sum(1)[:, None] - 2 * p @ centers.T + (centers * centers).sum(1)) + along * (along * lengths - 2 * dots)  # fmt: skip
        near = (away <= np.square(radii)) & (owner[start : start + CHUNK, None] != casters)
        for column in np.flatnonzero(near.any(0)):
            shape = shapes[casters[column]]
            rows = np.flatnonzero(near[:, column] & ~blocked[start : start + CHUNK])
            if len(rows):
                origin = tuple(shape.to_local(p[rows] - shape.center).T)
                hits = shape.hit(origin, tuple(shape.to_local(a[rows]).T)) < 1
                blocked[start + rows[hits]] = True
    return blocked
