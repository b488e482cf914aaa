"""Cameras of further photos in a reconstruction that is finished: nothing of it moves, so nothing of these photos can leak into it."""

import logging
from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import pycolmap

from s2d.log import progress
from s2d.poses.features import Features, extract, max_features
from s2d.poses.mapping import FOCAL_GUESSES, Solution, start_camera
from s2d.poses.photos import Photo
from s2d.poses.refine import MIN_OBSERVATIONS

logger = logging.getLogger("s2d.poses")

MAX_FIRST_ERROR = 6.0  # of a match in RANSAC, working pixels
MAX_ERROR = 2.0  # of a match that counts when the camera stands
LOSS_SCALE = 0.5  # of the Cauchy loss, working pixels


class Registered(NamedTuple):
    """A photo's camera, in working pixels."""

    camera: pycolmap.Camera
    cam_from_world: np.ndarray  # [3, 4]
    num_inliers: int


def register(
    solution: Solution, placed: Sequence[Photo], others: Sequence[Photo], seed: int = 0
) -> dict[str, Registered]:
    """Place photos by the points of a solution, each by itself.

    Lenses that the solution knows are used as they are; of others the focal length is estimated unless EXIF gives it.

    Args:
        solution: Stays as it is.
        placed: The photos that the solution was made from, in its order.
        others: The photos to place.

    Returns:
        Those that could be placed, by name.
    """
    model = solution.model
    known = {
        placed[image_id - 1].lens_key: model.cameras[model.images[image_id].camera_id]
        for image_id in sorted(model.reg_image_ids())
    }
    limit = max_features(len(placed))
    matcher = _matcher()
    found = {}
    with progress(len(others), "place") as bar:
        for done, photo in enumerate(others, start=1):
            features = extract(photo, solution.settings, limit)
            xys, points = _matched_points(solution, features, matcher)
            registered = _pose(photo, known.get(photo.lens_key), xys, points, seed)
            if registered is not None:
                found[photo.name] = registered
            bar.update(done, inliers=registered.num_inliers if registered else 0)
    return found


def _matcher() -> pycolmap.FeatureMatcher:
    options = pycolmap.FeatureMatchingOptions()
    options.use_gpu, options.num_threads = False, 1
    return pycolmap.FeatureMatcher.create(options, pycolmap.Device.cpu)


def _matched_points(
    solution: Solution, features: Features, matcher: pycolmap.FeatureMatcher
) -> tuple[np.ndarray, np.ndarray]:
    """Match a photo's features to those with a point, photo by photo. xys [M, 2] in working pixels, points [M, 3] world."""
    keypoints = pycolmap.keypoints_from_matrix(features.keypoints)
    pairs: set[tuple[int, int]] = set()
    for image_id in sorted(solution.model.reg_image_ids()):
        seen = solution.model.images[image_id].points2D
        other = solution.features[image_id - 1]
        matches = matcher.match(
            keypoints,
            features.descriptors,
            pycolmap.keypoints_from_matrix(other.keypoints),
            other.descriptors,
        )
        pairs |= {
            (int(row), int(seen[int(at)].point3D_id))
            for row, at in matches
            if seen[int(at)].has_point3D()
        }
    if not pairs:
        return np.zeros((0, 2)), np.zeros((0, 3))
    rows, point_ids = zip(*sorted(pairs), strict=True)
    points = np.stack([solution.model.points3D[point_id].xyz for point_id in point_ids])
    return features.keypoints[list(rows), :2].astype(np.float64), points


def _pose(
    photo: Photo,
    lens: pycolmap.Camera | None,
    xys: np.ndarray,  # [M, 2]
    points: np.ndarray,  # [M, 3]
    seed: int,
) -> Registered | None:
    """Solve one camera; None where too few matches agree."""
    if len(xys) < MIN_OBSERVATIONS:
        return None
    camera = deepcopy(lens) if lens else start_camera(photo, FOCAL_GUESSES[0])
    unknown_focal = lens is None and photo.focal is None
    estimation = pycolmap.AbsolutePoseEstimationOptions()
    estimation.estimate_focal_length = unknown_focal
    estimation.ransac.max_error = MAX_FIRST_ERROR
    estimation.ransac.random_seed = seed
    refinement = pycolmap.AbsolutePoseRefinementOptions()
    refinement.refine_focal_length = unknown_focal
    refinement.loss_function_scale = LOSS_SCALE
    first = pycolmap.estimate_and_refine_absolute_pose(xys, points, camera, estimation, refinement)
    if first is None:
        return None
    pose = first["cam_from_world"]
    inliers = _inliers(camera, pose, xys, points)
    if inliers.sum() < MIN_OBSERVATIONS:
        return None
    # Once more with what agrees with the refined camera: RANSAC chose its inliers before it was refined.
    again = pycolmap.refine_absolute_pose(pose, xys, points, inliers, camera, refinement)
    if again is not None:
        pose = again["cam_from_world"]
    count = int(_inliers(camera, pose, xys, points).sum())
    return Registered(camera, pose.matrix(), count) if count >= MIN_OBSERVATIONS else None


def _inliers(
    camera: pycolmap.Camera, pose: pycolmap.Rigid3d, xys: np.ndarray, points: np.ndarray
) -> np.ndarray:
    matrix = pose.matrix()
    projected = camera.img_from_cam(points @ matrix[:, :3].T + matrix[:, 3])
    with np.errstate(invalid="ignore"):  # NaN behind the camera
        return np.linalg.norm(projected - xys, axis=1) < MAX_ERROR
