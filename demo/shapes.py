"""Meshes of the demo scene, made in code: numpy only. Metres, z up; texture v runs downwards, as image rows do."""

import itertools
from dataclasses import dataclass

import numpy as np

_SHARP_DEGREES = 35.0  # a profile that turns more than this gets an edge rather than smooth shading

_POLE = 1e-6  # metres: a surface never quite closes on its axis, or it would have no tangent, hence no normal, there


@dataclass(frozen=True)
class Mesh:
    """Triangles with one normal and one texture coordinate per vertex."""

    vertices: np.ndarray  # [V, 3] float32
    normals: np.ndarray  # [V, 3] float32, unit
    uvs: np.ndarray  # [V, 2] float32
    faces: np.ndarray  # [F, 3] int32

    def moved(self, translation=(0, 0, 0), yaw=0.0, pitch=0.0, roll=0.0, scale=1.0) -> "Mesh":
        """Scale, then turn about x (pitch), y (roll) and z (yaw), all in degrees, then translate."""
        turn = rotation("z", yaw) @ rotation("y", roll) @ rotation("x", pitch)
        vertices = self.vertices * scale @ turn.T + np.asarray(translation, np.float32)
        return Mesh(
            vertices.astype(np.float32),
            (self.normals @ turn.T).astype(np.float32),
            self.uvs,
            self.faces,
        )


def rotation(axis: str, degrees: float) -> np.ndarray:
    """Right-handed rotation about a coordinate axis. [3, 3]"""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def join(*meshes: Mesh) -> Mesh:
    """One mesh from several that share a material."""
    offsets = np.cumsum([0] + [len(m.vertices) for m in meshes[:-1]])
    return Mesh(
        np.concatenate([m.vertices for m in meshes]),
        np.concatenate([m.normals for m in meshes]),
        np.concatenate([m.uvs for m in meshes]),
        np.concatenate([m.faces + o for m, o in zip(meshes, offsets, strict=True)]),
    )


def _unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _slopes(points, axis, closed):
    """Central differences along one axis of a grid of points; closed: last and first point coincide."""
    if not closed:
        return np.gradient(points, axis=axis)
    body = np.take(points, range(points.shape[axis] - 1), axis=axis)
    slope = (np.roll(body, -1, axis) - np.roll(body, 1, axis)) / 2
    return np.concatenate([slope, np.take(slope, [0], axis=axis)], axis=axis)


def grid(points, u=(0.0, 1.0), v=(0.0, 1.0), closed=(False, False)) -> Mesh:
    """Smooth surface through points [R, C, 3]; u runs along the columns, v along the rows.

    The front is where the texture is seen the right way round: u to the right, v down.
    """
    points = np.asarray(points, np.float64)
    rows, cols = points.shape[:2]
    normals = _unit(np.cross(_slopes(points, 0, closed[0]), _slopes(points, 1, closed[1])))
    vv, uu = np.meshgrid(np.linspace(*v, rows), np.linspace(*u, cols), indexing="ij")
    index = np.arange(rows * cols).reshape(rows, cols)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
    faces = np.stack([np.stack([a, c, b], -1), np.stack([a, d, c], -1)], 2).reshape(-1, 3)
    return Mesh(
        points.reshape(-1, 3).astype(np.float32),
        normals.reshape(-1, 3).astype(np.float32),
        np.stack([uu, vv], -1).reshape(-1, 2).astype(np.float32),
        faces.astype(np.int32),
    )


def quad(top_left, top_right, bottom_left, u=(0.0, 1.0), v=(0.0, 1.0)) -> Mesh:
    """Flat rectangle from three corners; the texture's first row lies along top_left -> top_right."""
    tl, tr, bl = (np.asarray(p, np.float64) for p in (top_left, top_right, bottom_left))
    return grid(np.array([[tl, tr], [bl, bl + tr - tl]]), u, v)


def box_faces(low, high) -> dict[str, Mesh]:
    """The six sides of a box, seen from outside with the texture upright: left, right, front, back, top, bottom."""
    (x0, y0, z0), (x1, y1, z1) = low, high
    return {
        "front": quad((x0, y0, z1), (x1, y0, z1), (x0, y0, z0)),
        "back": quad((x1, y1, z1), (x0, y1, z1), (x1, y1, z0)),
        "left": quad((x0, y1, z1), (x0, y0, z1), (x0, y1, z0)),
        "right": quad((x1, y0, z1), (x1, y1, z1), (x1, y0, z0)),
        "top": quad((x0, y1, z1), (x1, y1, z1), (x0, y0, z1)),
        "bottom": quad((x0, y0, z0), (x1, y0, z0), (x0, y1, z0)),
    }


def box(low, high) -> Mesh:
    """A box; each side shows the whole texture."""
    return join(*box_faces(low, high).values())


def curve(points, count=24) -> np.ndarray:
    """Catmull-Rom spline through points [K, D], sampled `count` times. [count, D]"""
    p = np.asarray(points, np.float64)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, len(p) - 3, count)
    k = np.minimum(t.astype(int), len(p) - 4)
    f = (t - k)[:, None]
    p0, p1, p2, p3 = p[k], p[k + 1], p[k + 2], p[k + 3]
    return 0.5 * (
        2 * p1
        + (p2 - p0) * f
        + (2 * p0 - 5 * p1 + 4 * p2 - p3) * f**2
        + (3 * p1 - p0 - 3 * p2 + p3) * f**3
    )


def lathe(profile, segments=64, wobble=None) -> Mesh:
    """Turn a profile [(radius, z), ...], given from top to bottom on the outside, about the z axis.

    wobble: optional function of (points [R, C, 3], angle [C]) -> radius factor [R, C], to make the shape uneven.
    """
    profile = np.maximum(np.asarray(profile, np.float64), (_POLE, -np.inf))
    step = _unit(np.diff(profile, axis=0))
    turn = np.degrees(np.arccos(np.clip(np.sum(step[:-1] * step[1:], -1), -1, 1)))
    cuts = [0, *(np.nonzero(turn > _SHARP_DEGREES)[0] + 1), len(profile) - 1]
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(profile, axis=0), axis=1))])
    length /= length[-1]
    angle = np.linspace(0, 2 * np.pi, segments + 1)
    parts = []
    for start, stop in itertools.pairwise(cuts):
        run = profile[start : stop + 1]
        points = np.stack(
            [
                run[:, None, 0] * np.cos(angle),
                run[:, None, 0] * np.sin(angle),
                np.repeat(run[:, None, 1], len(angle), 1),
            ],
            -1,
        )
        if wobble is not None:
            points[..., :2] *= wobble(points, angle)[..., None]
        parts.append(grid(points, v=(length[start], length[stop]), closed=(False, True)))
    return join(*parts)


def tube(path, radius, segments=12, caps=True) -> Mesh:
    """Round bar along a path [K, 3]; radius: a number or one per point. The frame is carried along without twist."""
    path = np.asarray(path, np.float64)
    radius = np.broadcast_to(np.asarray(radius, np.float64), len(path))
    closed = bool(np.allclose(path[0], path[-1]))
    tangent = _unit(_slopes(path, 0, closed))
    side = np.cross(tangent[0], (0, 0, 1) if abs(tangent[0, 2]) < 0.9 else (1, 0, 0))
    sides = []
    for direction in tangent:
        side = _unit(side - direction * (side @ direction))
        sides.append(side)
    sides = np.array(sides)
    ups = np.cross(tangent, sides)
    angle = np.linspace(0, 2 * np.pi, segments + 1)
    ring = (
        np.cos(angle)[None, :, None] * sides[:, None] + np.sin(angle)[None, :, None] * ups[:, None]
    )
    mesh = grid(path[:, None] + radius[:, None, None] * ring, closed=(False, True))
    if closed or not caps:
        return mesh
    ends = [
        grid(np.stack([path[[k]] + radius[k] * ring[k], path[[k]] + _POLE * ring[k]]))
        for k in (0, -1)
    ]
    return join(mesh, *ends)


def ring(radius, z, thickness, center=(0, 0), segments=64) -> Mesh:
    """Thin torus, lying flat."""
    angle = np.linspace(0, 2 * np.pi, segments + 1)
    path = np.stack(
        [
            center[0] + radius * np.cos(angle),
            center[1] + radius * np.sin(angle),
            np.full_like(angle, z),
        ],
        -1,
    )
    path[-1] = path[0]
    return tube(path, thickness, 8)


def ball(radius, wobble=None, rows=32, segments=48) -> Mesh:
    """Sphere about the origin; v = 0 at the top."""
    theta = np.linspace(1e-3, np.pi - 1e-3, rows)
    return lathe(np.stack([radius * np.sin(theta), radius * np.cos(theta)], -1), segments, wobble)


def leaf_blade(length, width, droop, fold=0.25, rows=9, cols=17) -> Mesh:
    """A leaf that starts at the origin, grows along +x, bends down by `droop` (radians over its length)."""
    s = np.linspace(0, 1, cols)
    outline = width / 2 * np.sin(np.pi * s**0.75) ** 0.9 + 0.0004
    bend = -droop * s
    step = length / (cols - 1)
    x = np.concatenate([[0], np.cumsum(np.cos(bend[:-1]) * step)])
    z = np.concatenate([[0], np.cumsum(np.sin(bend[:-1]) * step)])
    across = np.linspace(1, -1, rows)[:, None]
    y = across * outline
    lift = fold * np.abs(across) * outline
    points = np.stack(
        [
            x[None] - lift * np.sin(bend),
            np.broadcast_to(y, (rows, cols)),
            z[None] + lift * np.cos(bend),
        ],
        -1,
    )
    return grid(points)
