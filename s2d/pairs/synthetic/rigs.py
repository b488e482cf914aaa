"""Ways of taking photos: where the cameras of a capture stand and look. World to camera, OpenCV axes; z is up in the world."""

from typing import Literal, NamedTuple

import numpy as np
import torch

from s2d.geometry import look_at

RigKind = Literal["grid", "arc", "walk"]


class Rig(NamedTuple):
    """The cameras of a scene, in the order of their names."""

    kind: RigKind
    K: np.ndarray  # [3, 3] pixels
    viewmats: np.ndarray  # [V, 4, 4] float64
    target: np.ndarray  # [3] about where they look
    distance: float  # from the middle of the cameras to it

    @property
    def centers(self) -> np.ndarray:
        """[V, 3] world"""
        return -np.einsum("vji,vj->vi", self.viewmats[:, :3, :3], self.viewmats[:, :3, 3])


def random_rig(rng: np.random.Generator, kind: RigKind, width: int, height: int) -> Rig:
    """Take 12 to 24 photos: of a subject from a grid of places before it, from an arc round it, or on a walk forward."""
    num_views = int(rng.integers(12, 25))
    distance = rng.uniform(1.8, 4.5)
    eye = rng.uniform(0.9, 1.7)  # height of the cameras
    is_wide = rng.random() < 0.3
    if kind == "grid":
        centers, targets = _grid(rng, num_views, distance, is_wide)
    elif kind == "arc":
        centers, targets = _arc(rng, num_views, distance, is_wide)
    else:
        distance *= 1.6
        centers, targets = _walk(rng, num_views, distance, is_wide)
    centers, targets = (points + np.array([0, 0, eye]) for points in (centers, targets))
    # A hand: it drifts, turns and rolls.
    centers = centers + rng.normal(0, 0.012 * distance, centers.shape)
    targets = targets + rng.normal(0, 0.02 * distance, targets.shape)
    centers[:, 2] = np.maximum(centers[:, 2], 0.25)
    viewmats = look_at(
        *map(torch.from_numpy, (centers, targets)), torch.tensor([0.0, 0, 1]).double()
    )
    rolled = np.stack([_roll(angle) for angle in rng.normal(0, 0.02, num_views)])
    focal = width / 2 / np.tan(np.radians(rng.uniform(40, 75)) / 2)
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Rig(kind, K, rolled @ viewmats.numpy(), np.array([0, 0, eye]), distance)


def _grid(rng, num_views, distance, is_wide):
    """Rows of places, each row walked back the way the last one came; parallel or a little converging."""
    rows = int(rng.integers(2, 5))
    columns = -(-num_views // rows)
    step = distance * (rng.uniform(0.1, 0.16) if is_wide else rng.uniform(0.04, 0.09))
    step = min(step, 0.6 * distance / (columns - 1))  # the outermost still see the subject
    row, column = np.divmod(np.arange(num_views), columns)
    column = np.where(row % 2, columns - 1 - column, column)
    x, z = (column - (columns - 1) / 2) * step, (row - (rows - 1) / 2) * step * 0.8
    centers = np.stack([x, np.full(num_views, -distance), z], 1)
    centers += rng.uniform(-0.25, 0.25, centers.shape) * step
    aside = centers * [1, 0, 1] * rng.uniform(0.2, 1.0)
    return centers, aside


def _arc(rng, num_views, distance, is_wide):
    """Round a subject, up and down a little."""
    sweep = np.radians(rng.uniform(120, 300) if is_wide else rng.uniform(50, 120))
    t = np.linspace(-0.5, 0.5, num_views)
    angle = sweep * t - np.pi / 2
    radius = distance * (1 + 0.08 * np.sin(2 * np.pi * (rng.uniform(0.5, 2) * t + rng.random())))
    height = rng.uniform(0, 0.35) * distance
    height = height * (1 + 0.5 * np.sin(2 * np.pi * (rng.uniform(0.5, 2) * t + rng.random())))
    centers = np.stack([radius * np.cos(angle), radius * np.sin(angle), height], 1)
    return centers, np.zeros((num_views, 3)) - [0, 0, 0.1 * distance]


def _walk(rng, num_views, distance, is_wide):
    """Along a street: ahead with every photo, from side to side a little, the eyes ahead or somewhat aside."""
    step = rng.uniform(0.3, 0.5) if is_wide else rng.uniform(0.08, 0.25)
    t = np.arange(num_views) - (num_views - 1) / 2
    sway = rng.uniform(0.1, 0.4) * np.sin(t * rng.uniform(0.4, 1.1) + rng.uniform(0, 6))
    centers = np.stack([sway, step * t - distance, 0.05 * np.sin(1.7 * t)], 1)
    yaw = np.radians(rng.uniform(-25, 25) + 8 * np.sin(t * rng.uniform(0.2, 0.8)))
    aim = np.stack([np.sin(yaw), np.cos(yaw), np.full(num_views, rng.uniform(-0.1, 0.08))], 1)
    return centers, centers + distance * aim


def _roll(angle: float) -> np.ndarray:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn
