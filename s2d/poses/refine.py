"""From a first reconstruction to cameras as exact as the matches allow, and what these are worth.

SIFT's errors have long tails (matches along repeated structures, features that slid along an edge). A mapper's least squares lets them
pull at the focal length and the distortion; a Cauchy loss of half a pixel does not. On three photos this halves the errors of the
centres (docs/poses.md).

Notation: errors are in working pixels (`s2d.poses.features`).
"""

from typing import NamedTuple

import numpy as np
import pycolmap

CAUCHY_SCALE = 0.5  # pixels: about the median error of a good SIFT match
MAX_ERROR = 3.0  # pixels: an observation that misses by more is none
MIN_ANGLE = 1.0  # degrees between the two most different rays of a point
MIN_OBSERVATIONS = 12  # of a photo: with fewer its camera is a guess
MIN_SHARED = 8  # of these, of points that three photos see: they alone say how far a third photo stands from two
# Largest standard deviation of a focal length at which the photos are believed rather than EXIF or the usual focal length of a telephone.
MAX_FOCAL_SIGMA_EXIF = 0.03
MAX_FOCAL_SIGMA_GUESS = 0.15
MAX_DISTORTION_SIGMA = 0.05
MIN_SIGNIFICANCE = 2.0  # a distortion within so many standard deviations of zero is zero


class Quality(NamedTuple):
    """What a reconstruction is worth; more photos win, then more support."""

    num_placed: int
    support: float  # how much holds the cameras: constraints, each weighted by how well it is met, 0 to 1
    error: float  # median reprojection error, working pixels
    num_points: int
    track_length: float
    weakest: int  # of the photo that has fewest: observations of points that three photos see, or both of two


def polish(
    model: pycolmap.Reconstruction,
    priors: dict[int, tuple[float, bool]],
) -> list[str]:
    """Refine in place: robust bundle adjustment, bad observations out, intrinsics only as far as the photos determine them.

    Args:
        model: As a mapper left it; cameras are SIMPLE_RADIAL.
        priors: Camera id → focal length in working pixels before any refinement, and if it is from EXIF.

    Returns:
        What was decided about each camera, for the record.
    """
    for camera_id in model.cameras:
        model.cameras[camera_id].params[3] = np.clip(model.cameras[camera_id].params[3], -0.5, 0.5)
    _adjust(model, "SOFT_L1", 1.0)
    _filter(model)
    _adjust(model, "CAUCHY", CAUCHY_SCALE)
    _leave_out_weak(model)  # a photo that will not stay must not decide about the focal length
    if model.num_reg_images() < 2:
        return []
    notes, constant = [], set()
    for camera_id, sigmas in _intrinsics_sigmas(model).items():
        notes.append(_decide(model.cameras[camera_id], *priors[camera_id], sigmas, constant))
    # First to where the points agree with the intrinsics as decided: filtered before that, most would be lost.
    _adjust(model, "SOFT_L1", 1.0, constant)
    for _ in range(2):
        _adjust(model, "CAUCHY", CAUCHY_SCALE, constant)
        _filter(model)
    _leave_out_weak(model)
    return notes


def quality(model: pycolmap.Reconstruction) -> Quality:
    """Measure a reconstruction.

    A point with n observations is 2n equations for its own 3 unknowns, so it holds the cameras with 2n - 3. Counting observations
    alone would prefer long chains of pairs, whose lengths relative to each other nothing determines.
    """
    errors, lengths, weakest = observation_errors(model)
    constraints = (2 * lengths - 3) / np.maximum(lengths, 1)
    return Quality(
        num_placed=model.num_reg_images(),
        support=float((constraints / (1 + (errors / CAUCHY_SCALE) ** 2)).sum()),
        error=float(np.median(errors)) if len(errors) else 0.0,
        num_points=model.num_points3D(),
        track_length=float(len(errors) / max(model.num_points3D(), 1)),
        weakest=weakest,
    )


def observation_errors(model: pycolmap.Reconstruction) -> tuple[np.ndarray, np.ndarray, int]:
    """Compute the reprojection errors of all observations.

    Returns:
        - errors, working pixels; infinite behind a camera [M]
        - length of the track that an observation belongs to [M]
        - `Quality.weakest`
    """
    errors, lengths, shared = [], [], []
    enough = min(3, model.num_reg_images())
    for image_id in sorted(model.reg_image_ids()):
        length = _track_lengths(model, image_id)
        shared.append(int((length >= enough).sum()))
        if len(length) == 0:
            continue
        image = model.images[image_id]
        seen = [point for point in image.points2D if point.has_point3D()]
        points = np.stack([model.points3D[point.point3D_id].xyz for point in seen])
        matrix = image.cam_from_world().matrix()
        in_camera = points @ matrix[:, :3].T + matrix[:, 3]
        projected = model.cameras[image.camera_id].img_from_cam(in_camera)
        missed = np.linalg.norm(projected - np.stack([point.xy for point in seen]), axis=1)
        errors.append(np.where(np.isfinite(missed), missed, np.inf))
        lengths.append(length)
    if not errors:
        return np.zeros(0), np.zeros(0, np.int64), 0
    return np.concatenate(errors), np.concatenate(lengths), min(shared)


def _options(loss: str, scale: float) -> pycolmap.BundleAdjustmentOptions:
    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary = False
    options.ceres.loss_function_type = getattr(pycolmap.LossFunctionType, loss)
    options.ceres.loss_function_scale = scale
    # One thread: sums in another order would end in other bits.
    options.ceres.solver_options.num_threads = 1
    options.ceres.solver_options.max_num_iterations = 200
    options.ceres.solver_options.function_tolerance = 1e-8
    return options


def _config(
    model: pycolmap.Reconstruction, constant: frozenset[int] | set[int]
) -> pycolmap.BundleAdjustmentConfig:
    config = pycolmap.BundleAdjustmentConfig()
    for image_id in sorted(model.reg_image_ids()):
        config.add_image(image_id)
    for camera_id in constant:
        config.set_constant_cam_intrinsics(camera_id)
    config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    return config


def _adjust(
    model: pycolmap.Reconstruction,
    loss: str,
    scale: float,
    constant: frozenset[int] | set[int] = frozenset(),
) -> pycolmap.CeresBundleAdjuster:
    adjuster = pycolmap.create_default_ceres_bundle_adjuster(
        _options(loss, scale), _config(model, constant), model
    )
    adjuster.solve()
    return adjuster


def _filter(model: pycolmap.Reconstruction) -> None:
    pycolmap.ObservationManager(model).filter_all_points3D(MAX_ERROR, MIN_ANGLE)


def _intrinsics_sigmas(model: pycolmap.Reconstruction) -> dict[int, np.ndarray | None]:
    """Standard deviations of each used camera's parameters, for a noise of one pixel; None where they are not determined.

    The noise of SIFT is about a third of that, so this is on the safe side.
    """
    used = {model.images[image_id].camera_id for image_id in model.reg_image_ids()}
    if (
        model.num_reg_images() < 3
    ):  # two views of things that are nearly flat fit many focal lengths
        return dict.fromkeys(sorted(used))
    adjuster = _adjust(model, "CAUCHY", CAUCHY_SCALE)
    options = pycolmap.BACovarianceOptions()
    covariance = pycolmap.estimate_ba_covariance(options, model, adjuster)
    sigmas: dict[int, np.ndarray | None] = {}
    for camera_id in sorted(used):
        matrix = covariance and covariance.get_other_params_cov(model.cameras[camera_id].params)
        sigmas[camera_id] = None if matrix is None else np.sqrt(np.abs(np.diag(matrix)))
    return sigmas


def _decide(
    camera: pycolmap.Camera,
    prior: float,
    from_exif: bool,
    sigmas: np.ndarray | None,
    constant: set[int],
) -> str:
    """Keep or take back what was refined of a camera's focal length and distortion; returns what was decided, in words."""
    focal, distortion = camera.params[0], camera.params[3]
    limit = MAX_FOCAL_SIGMA_EXIF if from_exif else MAX_FOCAL_SIGMA_GUESS
    origin = "EXIF" if from_exif else "a guess"
    if sigmas is None or not np.isfinite(sigmas).all() or sigmas[0] > limit * focal:
        camera.model = pycolmap.CameraModelId.SIMPLE_PINHOLE
        camera.params = [prior, *camera.params[1:3]]
        constant.add(camera.camera_id)
        return f"focal length from {origin}, no distortion: the photos do not determine them"
    text = f"focal length refined: {focal / prior:.3f} of {origin}"
    at = -1  # the distortion is the last of the refined parameters
    if sigmas[at] > MAX_DISTORTION_SIGMA or abs(distortion) < MIN_SIGNIFICANCE * sigmas[at]:
        camera.model = pycolmap.CameraModelId.SIMPLE_PINHOLE
        camera.params = camera.params[:3]
        return text + ", no distortion"
    return text + f", distortion {distortion:.3f}"


def _leave_out_weak(model: pycolmap.Reconstruction) -> None:
    """Take photos that too little holds out again, weakest first: without it another may lose its own."""
    manager = pycolmap.ObservationManager(model)
    while model.num_reg_images():
        placed = sorted(model.reg_image_ids())
        lengths = {image_id: _track_lengths(model, image_id) for image_id in placed}
        enough = min(3, len(placed))
        worth = {
            image_id: (
                min(len(of_image) - MIN_OBSERVATIONS, (of_image >= enough).sum() - MIN_SHARED),
                len(of_image),
            )
            for image_id, of_image in lengths.items()
        }
        weakest = min(worth, key=worth.get)
        if worth[weakest][0] >= 0:
            return
        manager.deregister_frame(model.images[weakest].frame_id)


def _track_lengths(model: pycolmap.Reconstruction, image_id: int) -> np.ndarray:
    points = [point for point in model.images[image_id].points2D if point.has_point3D()]
    return np.array([model.points3D[point.point3D_id].track.length() for point in points], np.int64)
