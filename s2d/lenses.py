"""Lenses: how a camera without its pose maps directions to pixels, distortion included. The maths is pycolmap's.

Pixels have a corner origin (the first centre is (0.5, 0.5)), in COLMAP as in S2D.
"""

from typing import NamedTuple

import numpy as np
import pycolmap


class Lens(NamedTuple):
    """A camera as scene files describe it, without its pose: any model, distortion included."""

    model: str  # COLMAP's names: PINHOLE, OPENCV, OPENCV_FISHEYE, …
    width: int
    height: int
    params: tuple[float, ...]  # in COLMAP's order for the model, pixels


def lens_from_pycolmap(camera: pycolmap.Camera) -> Lens:
    """Copy a pycolmap camera into a Lens."""
    return Lens(
        camera.model_name,
        camera.width,
        camera.height,
        tuple(float(value) for value in camera.params),
    )


def lens_to_pycolmap(lens: Lens, camera_id: int = 1) -> pycolmap.Camera:
    """Make the pycolmap camera that does the lens's maths."""
    return pycolmap.Camera(
        camera_id=camera_id,
        model=lens.model,
        width=lens.width,
        height=lens.height,
        params=list(lens.params),
    )


def img_from_cam(
    lens: Lens,
    points: np.ndarray,  # [M, 3]
) -> np.ndarray:
    """Project points in the camera's frame to pixels; NaN behind the camera. [M, 2]"""
    if len(points) == 0:
        return np.zeros((0, 2))
    return np.asarray(lens_to_pycolmap(lens).img_from_cam(np.ascontiguousarray(points, np.float64)))


def cam_from_img(
    lens: Lens,
    xys: np.ndarray,  # [M, 2]
) -> np.ndarray:
    """Lift pixels to the rays (x, y, 1) through them, in the camera's frame. [M, 3]"""
    if len(xys) == 0:
        return np.zeros((0, 3))
    flat = lens_to_pycolmap(lens).cam_from_img(np.ascontiguousarray(xys, np.float64))
    return np.concatenate([flat, np.ones((len(flat), 1))], 1)


def pinhole_matrix(lens: Lens) -> np.ndarray | None:
    """Intrinsics K [3, 3] of a lens without distortion, else None."""
    camera = lens_to_pycolmap(lens)
    flat = camera.is_perspective() and not camera.is_perspective_fisheye()
    if not flat or not camera.is_undistorted():
        return None
    return np.asarray(camera.calibration_matrix())


def undistorted_lens(lens: Lens) -> Lens:
    """Choose the pinhole lens that shows as much of a distorted picture as leaves no blank pixels (COLMAP's rule).

    Raises:
        ValueError: the lens sees more than a flat picture can show (spherical panoramas).
    """
    try:
        options = pycolmap.UndistortCameraOptions()
        return lens_from_pycolmap(pycolmap.undistort_camera(options, lens_to_pycolmap(lens)))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"A {lens.model} camera of {lens.width} x {lens.height} cannot be made a pinhole camera ({str(error).strip()}). "
            "Cut the panorama into perspective views first."
        ) from error


def undistort_map(lens: Lens, pinhole: Lens) -> np.ndarray:
    """Tell for each pixel of the pinhole picture where it is in the distorted one (corner-origin pixels). [H, W, 2] float64"""
    x, y = np.meshgrid(np.arange(pinhole.width) + 0.5, np.arange(pinhole.height) + 0.5)
    rays = cam_from_img(pinhole, np.stack([x, y], -1).reshape(-1, 2))
    return img_from_cam(lens, rays).reshape(pinhole.height, pinhole.width, 2)


def undistort_points(lens: Lens, pinhole: Lens, xys: np.ndarray) -> np.ndarray:
    """Move pixel positions [M, 2] from the distorted to the pinhole picture."""
    return img_from_cam(pinhole, cam_from_img(lens, xys))


def rescaled_lens(lens: Lens, size: tuple[int, int]) -> Lens:
    """Change a lens's resolution to (width, height). Distortion acts on the normalised picture plane, so its coefficients stay."""
    if size == (lens.width, lens.height):
        return lens
    camera = lens_to_pycolmap(lens)
    camera.rescale(*size)
    return lens_from_pycolmap(camera)
