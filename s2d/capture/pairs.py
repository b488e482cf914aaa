"""What two photos have in common: verified matches, parallax, and the difference in exposure and white balance.

Notation: photos a and b, M matches that fit one rigid scene.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import pycolmap

from s2d.capture.photos import Photo

MAX_RATIO = 0.8  # of the best to the second best descriptor distance (Lowe)
# Two photos of different places have at most 12 matches that seem to fit (540 pairs of ten scenes); COLMAP asks for as many.
MIN_MATCHES = 15
MAX_ERROR = 2.0  # working pixels
# As a share of the longer side. Wide enough to catch any lens whose EXIF is missing.
FOCALS = (0.6, 0.75, 0.95, 1.2, 1.5, 1.9, 2.4)


@dataclass(frozen=True)
class Pair:
    """What two photos that see the same place have in common."""

    a: int  # rows of the photos; a < b
    b: int
    num_matches: int  # M
    shift: float  # median distance that matches move, as a share of the longer side
    angle: float  # median angle between the rays of a match, degrees; by the guessed focal length
    rotation_share: float  # of the matches that a mere turn of the camera explains
    plane_share: float  # of the matches that a homography explains
    stops: np.ndarray  # [3] log2 of b's light over a's, per channel; NaN where colours are cut off


def compare(a: int, b: int, photos: list[Photo]) -> Pair | None:
    """Compare two photos; None where they have nothing in common that could be verified."""
    first, second = photos[a], photos[b]
    matches = match(first.descriptors, second.descriptors)
    if len(matches) < MIN_MATCHES:
        return None
    options = pycolmap.TwoViewGeometryOptions(
        min_num_inliers=MIN_MATCHES, compute_relative_pose=True, detect_watermark=False
    )
    options.ransac.max_error = MAX_ERROR
    options.ransac.random_seed = 0
    geometry = pycolmap.estimate_calibrated_two_view_geometry(
        _camera(first), first.xys, _camera(second), second.xys, matches, options
    )
    matches = geometry.inlier_matches.astype(int)
    if len(matches) < MIN_MATCHES:
        return None
    xys_a, xys_b = first.xys[matches[:, 0]], second.xys[matches[:, 1]]
    shifts = xys_a / max(first.working_size) - xys_b / max(second.working_size)
    return Pair(
        a=a,
        b=b,
        num_matches=len(matches),
        shift=float(np.median(np.linalg.norm(shifts, axis=1))),
        angle=float(np.degrees(geometry.tri_angle)),
        rotation_share=rotation_share(first, second, xys_a, xys_b),
        plane_share=_plane_share(xys_a, xys_b),
        stops=_stops(first.colours[matches[:, 0]], second.colours[matches[:, 1]]),
    )


def match(
    a: np.ndarray,  # [F, 128] unit length
    b: np.ndarray,  # [F', 128] unit length
) -> np.ndarray:
    """Match descriptors that are each other's nearest, and much nearer than the next. [M, 2] uint32 rows"""
    if min(len(a), len(b)) < 2:
        return np.zeros((0, 2), np.uint32)
    similarity = a @ b.T
    rows = np.arange(len(a))
    nearest = similarity.argmax(1)
    mutual = similarity.argmax(0)[nearest] == rows
    best = similarity[rows, nearest]
    similarity[rows, nearest] = -1
    second = similarity.max(1)
    # Distances of unit vectors: d² = 2 - 2 cos.
    good = mutual & (1 - best < MAX_RATIO**2 * (1 - second))
    return np.stack([rows[good], nearest[good]], 1).astype(np.uint32)


def rotation_share(
    first: Photo,
    second: Photo,
    xys_a: np.ndarray,  # [M, 2]
    xys_b: np.ndarray,  # [M, 2]
) -> float:
    """Find the share of matches that a camera which turned on the spot explains, for the focal length that explains most.

    Photos taken from one spot have no depth in them, however much they overlap.
    """
    focals = {focal * max(first.working_size) for focal in FOCALS} | {first.focal}
    ratio = max(second.working_size) / max(first.working_size)
    if first.focal_35mm and second.focal_35mm:
        ratio *= second.focal_35mm / first.focal_35mm
    return max(_turned(first, second, xys_a, xys_b, focal, focal * ratio) for focal in focals)


def _turned(first, second, xys_a, xys_b, focal_a: float, focal_b: float) -> float:
    rays_a, rays_b = _rays(first, xys_a, focal_a), _rays(second, xys_b, focal_b)
    weights = np.ones(len(rays_a))
    # Kabsch, reweighted (Geman-McClure) from a scale at which everything counts down to the tolerance.
    for scale in (64, 32, 16, 8, 4, 2, 2, 2):
        U, _, Vt = np.linalg.svd((rays_b * weights[:, None]).T @ rays_a)
        rotation = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
        cosines = np.clip(((rays_a @ rotation.T) * rays_b).sum(1), -1, 1)
        errors = np.arccos(cosines) * focal_b
        weights = 1 / (1 + (errors / (scale / 2 * MAX_ERROR)) ** 2) ** 2
    return float((errors < MAX_ERROR).mean())


def _rays(photo: Photo, xys: np.ndarray, focal: float) -> np.ndarray:
    centred = (xys - np.array(photo.working_size) / 2) / focal
    rays = np.concatenate([centred, np.ones((len(xys), 1))], 1)
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _plane_share(xys_a: np.ndarray, xys_b: np.ndarray) -> float:
    _, explained = cv2.findHomography(xys_a, xys_b, cv2.RANSAC, MAX_ERROR)
    return 0.0 if explained is None else float(explained.mean())


def _stops(
    colours_a: np.ndarray,  # [M, 3]
    colours_b: np.ndarray,  # [M, 3]
) -> np.ndarray:
    usable = np.isfinite(colours_a + colours_b).all(1)
    if usable.sum() < MIN_MATCHES // 2:
        return np.full(3, np.nan)
    return np.median(np.log2(colours_b[usable] / colours_a[usable]), axis=0)


def _camera(photo: Photo) -> pycolmap.Camera:
    width, height = photo.working_size
    return pycolmap.Camera(
        model="SIMPLE_PINHOLE",
        width=width,
        height=height,
        params=[photo.focal, width / 2, height / 2],
    )
