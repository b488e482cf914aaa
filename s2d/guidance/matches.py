"""Sparse points from the photos alone: SIFT features matched along epipolar lines, since the cameras are known.

A sparse model made from all photos leaves few points that two of three kept photos share; matching the kept photos anew finds
hundreds. They bound the depth and choose the source photos of the dense matching.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch

from s2d.guidance.kernels import View
from s2d.triangulation import triangulate

MAX_FEATURES = 4000  # per photo; a 500 px photo has 1000 to 3000
MAX_EPIPOLAR_PIXELS = 1.5
MAX_DISTANCE = 0.7  # between unit RootSIFT descriptors, of 1.41 possible
MAX_RATIO = (
    0.85  # to the second best on the same epipolar line, which is already a strong restriction
)
MIN_ANGLE = 0.5  # degrees


class SparsePoints(NamedTuple):
    """Triangulated matches."""

    points: np.ndarray  # [P, 3] float64 world
    pairs: np.ndarray  # [P, 2] which two views saw it


class _Features(NamedTuple):
    xys: np.ndarray  # [F, 2]
    descriptors: np.ndarray  # [F, 128] unit


def match_sparse(views: Sequence[View]) -> SparsePoints:
    """Match every two views (with grey) and triangulate. May find nothing: P = 0."""
    features = [_detect(view.grey) for view in views]
    xys, pairs = [], []
    for a in range(len(views)):
        for b in range(a + 1, len(views)):
            rows_a, rows_b = _match(features[a], features[b], fundamental(views[a], views[b]))
            xys.append(np.stack([features[a].xys[rows_a], features[b].xys[rows_b]], 1))
            pairs.append(np.broadcast_to([a, b], (len(rows_a), 2)))
    xys, pairs = np.concatenate(xys), np.concatenate(pairs)
    found = triangulate(
        torch.from_numpy(xys.reshape(-1, 2)),
        torch.arange(len(xys)).repeat_interleave(2),
        torch.from_numpy(np.ascontiguousarray(pairs).reshape(-1)),
        torch.from_numpy(np.stack([view.viewmat for view in views])),
        torch.from_numpy(np.stack([view.K for view in views])),
        len(xys),
        max_error=MAX_EPIPOLAR_PIXELS,
        min_angle=MIN_ANGLE,
    )
    good = found.good.numpy()
    return SparsePoints(found.points.numpy()[good], pairs[good])


def fundamental(a: View, b: View) -> np.ndarray:
    """Matrix F with x_b^T F x_a = 0 for pixels of the same point. [3, 3]"""
    b_from_a = b.viewmat @ np.linalg.inv(a.viewmat)
    x, y, z = b_from_a[:3, 3]
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.linalg.inv(b.K).T @ cross @ b_from_a[:3, :3] @ np.linalg.inv(a.K)


def _detect(grey: np.ndarray) -> _Features:
    # A low contrast threshold: dark and plain photos still give features, and the epipolar line weeds out the bad ones.
    detector = cv2.SIFT_create(MAX_FEATURES, contrastThreshold=0.01)
    keypoints, descriptors = detector.detectAndCompute(np.rint(grey * 255).astype(np.uint8), None)
    if not keypoints:
        return _Features(np.zeros((0, 2)), np.zeros((0, 128), np.float32))
    xys = (
        np.array([keypoint.pt for keypoint in keypoints]) + 0.5
    )  # OpenCV has the first pixel's centre at (0, 0)
    roots = np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-9))
    return _Features(xys, roots)


def _match(a: _Features, b: _Features, F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of mutual best matches among the features near each other's epipolar line."""
    if len(a.xys) == 0 or len(b.xys) < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    homogeneous_a, homogeneous_b = (
        np.concatenate([f.xys, np.ones((len(f.xys), 1))], 1) for f in (a, b)
    )
    lines_b, lines_a = homogeneous_a @ F.T, homogeneous_b @ F
    algebraic = np.abs(lines_b @ homogeneous_b.T)
    longest = 1.0 / np.maximum(
        np.minimum(
            np.linalg.norm(lines_b[:, :2], axis=1)[:, None], np.linalg.norm(lines_a[:, :2], axis=1)
        ),
        1e-12,
    )
    distances = np.sqrt(np.maximum(2 - 2 * (a.descriptors @ b.descriptors.T), 0))
    distances[algebraic * longest > MAX_EPIPOLAR_PIXELS] = np.inf
    rows = np.arange(len(a.xys))
    nearest = np.argpartition(distances, 1, axis=1)[:, :2]
    two = np.sort(distances[rows[:, None], nearest], axis=1)
    best = distances.argmin(1)
    good = (
        (two[:, 0] < MAX_DISTANCE)
        & (two[:, 0] < MAX_RATIO * np.minimum(two[:, 1], 1.0))
        & (distances.argmin(0)[best] == rows)
    )
    return rows[good], best[good]
