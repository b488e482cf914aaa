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
ROWS_AT_ONCE = 32  # of the table of all pairs: this much of it stays in the cache


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
    rows, columns = _near_epipolar_lines(a.xys, b.xys, F)
    if len(rows) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    cosines = np.einsum("nd,nd->n", a.descriptors[rows], b.descriptors[columns])
    distances = np.sqrt(np.maximum(2 - 2 * cosines, 0))
    # By row and then by distance: the first of each row is its best, and what follows is its second best.
    order = np.lexsort((distances, rows))
    starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
    best = order[starts]
    followed = np.diff(starts, append=len(order)) > 1
    second = np.where(followed, distances[order[np.minimum(starts + 1, len(order) - 1)]], np.inf)
    nearest_of_column = np.full(len(b.xys), np.inf, distances.dtype)
    np.minimum.at(nearest_of_column, columns, distances)
    good = (
        (distances[best] < MAX_DISTANCE)
        & (distances[best] < MAX_RATIO * np.minimum(second, 1.0))
        & (distances[best] == nearest_of_column[columns[best]])
    )
    return rows[best[good]], columns[best[good]]


def _near_epipolar_lines(
    xys_a: np.ndarray, xys_b: np.ndarray, F: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all pairs of features that lie within MAX_EPIPOLAR_PIXELS of each other's line: about one in a hundred."""
    homogeneous_a, homogeneous_b = (
        np.concatenate([xys, np.ones((len(xys), 1))], 1) for xys in (xys_a, xys_b)
    )
    lines_b, lines_a = homogeneous_a @ F.T, homogeneous_b @ F
    # Divided by the length of a line's normal, the algebraic error is the distance to that line.
    limit_b, limit_a = (
        MAX_EPIPOLAR_PIXELS * np.maximum(np.linalg.norm(lines[:, :2], axis=1), 1e-12)
        for lines in (lines_b, lines_a)
    )
    rows, columns = [], []
    for first in range(0, len(xys_a), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        error = np.abs(lines_b[part] @ homogeneous_b.T)
        row, column = np.nonzero(error <= np.minimum(limit_b[part, None], limit_a))
        rows.append(row + first)
        columns.append(column)
    return np.concatenate([*rows, np.zeros(0, np.int64)]), np.concatenate(
        [*columns, np.zeros(0, np.int64)]
    )
