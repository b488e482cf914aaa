"""A world that people can use, for a reconstruction that stands anywhere, tilted, in any size.

Structure from motion leaves position, orientation and scale open. Here: y down and level, as COLMAP scenes usually come and splat viewers
expect them, z the way the cameras look; the origin in the middle of the points; and the scene four units away, because the things that
people photograph from a few sides are a few metres away. It is not metric.
"""

from typing import NamedTuple

import numpy as np

TYPICAL_DISTANCE = 4.0  # units from the cameras to the points, median
ROLL_WEIGHT = (
    0.05  # of the mean up against level horizons: decides where all cameras look the same way
)


class WorldTransform(NamedTuple):
    """x_new = scale · rotation · (x_old - center)."""

    scale: float
    rotation: np.ndarray  # [3, 3]
    center: np.ndarray  # [3]

    def points(self, points: np.ndarray) -> np.ndarray:
        """Move points. [P, 3]"""
        return self.scale * (points - self.center) @ self.rotation.T

    def viewmats(self, viewmats: np.ndarray) -> np.ndarray:
        """Move cameras with the points: they see the same pixels. [V, 4, 4]"""
        moved = viewmats.copy()
        moved[:, :3, :3] = viewmats[:, :3, :3] @ self.rotation.T
        moved[:, :3, 3] = self.scale * (viewmats[:, :3, :3] @ self.center + viewmats[:, :3, 3])
        return moved


def level_world(
    viewmats: np.ndarray,  # [V, 4, 4]
    points: np.ndarray,  # [P, 3]
) -> WorldTransform:
    """Find the transform to a level, centred world of usual size.

    Args:
        viewmats: World to camera of cameras that stand upright: turned with their pictures, where those were turned.
        points: Sparse points; at least one.
    """
    down = -up_direction(viewmats)
    ahead = viewmats[:, 2, :3].mean(0)
    ahead = ahead - down * (down @ ahead)
    if np.linalg.norm(ahead) < 1e-3:  # straight down, or all around: any horizontal direction does
        ahead = viewmats[0, 1, :3] - down * (down @ viewmats[0, 1, :3])
    if np.linalg.norm(ahead) < 1e-3:
        ahead = viewmats[0, 2, :3] - down * (down @ viewmats[0, 2, :3])
    ahead = ahead / np.linalg.norm(ahead)
    rotation = np.stack([np.cross(down, ahead), down, ahead])
    center = np.median(points, axis=0)
    centers = -np.einsum("vij,vi->vj", viewmats[:, :3, :3], viewmats[:, :3, 3])
    distance = float(np.median(np.linalg.norm(centers[:, None] - points[None], axis=-1)))
    return WorldTransform(TYPICAL_DISTANCE / distance, rotation, center)


def up_direction(
    viewmats: np.ndarray,  # [V, 4, 4]
) -> np.ndarray:
    """Estimate which way is up. Unit. [3]

    People hold cameras level but tilt them up and down: the x axes are horizontal, so up is the direction across all of them. Where
    the cameras look the same way, that is a plane of directions, and the mean of the cameras' own ups decides within it.
    """
    right, mean = viewmats[:, 0, :3], -viewmats[:, 1, :3].mean(0)
    if np.linalg.norm(mean) < 1e-3:  # cameras that are turned over cancel out
        mean = -viewmats[0, 1, :3]
    mean = mean / np.linalg.norm(mean)
    tilted = right.T @ right / len(right) - ROLL_WEIGHT * np.outer(mean, mean)
    up = np.linalg.eigh(tilted)[1][:, 0]
    return up * np.sign(up @ mean) if abs(up @ mean) > 0.5 else mean
