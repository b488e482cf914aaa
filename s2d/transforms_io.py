"""`transforms.json` of nerfstudio, instant-ngp and the NeRF synthetic scenes: the only place that knows their axes and keys.

Poses there are camera to world with OpenGL axes (x right, y up, z backward); they leave as world to camera with OpenCV axes.
Intrinsics and distortion stand at the top level or in a frame (the frame's win). The world is taken as the file has it: a PLY named by
`ply_file_path` is in that same world, and `applied_transform` only tells how the world came about.
"""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from s2d.images import IMAGE_SUFFIXES, image_info
from s2d.lenses import Lens

logger = logging.getLogger("s2d.transforms_io")

FILE_NAMES = ("transforms.json", "transforms_train.json")  # the second: NeRF synthetic

_GL_FROM_CV = np.diag([1.0, -1.0, -1.0, 1.0])
_PERSPECTIVE = (
    "PINHOLE",
    "SIMPLE_PINHOLE",
    "OPENCV",
    "SIMPLE_RADIAL",
    "RADIAL",
    "PERSPECTIVE",
    "FULL_OPENCV",
)


class TransformsScene(NamedTuple):
    """What a transforms.json says, views in name order."""

    names: list[str]  # file names below the folder that all photos share
    image_paths: list[Path]
    lenses: list[Lens]
    viewmats: np.ndarray  # [V, 4, 4] float64, world to camera, OpenCV axes
    points_path: Path | None  # PLY with points, same world


def find_transforms(source: Path) -> Path | None:
    """Find the JSON file of a scene folder, or take `source` if it is one; None where there is none."""
    source = Path(source)
    if source.is_file():
        return source if source.suffix.lower() == ".json" else None
    return next((source / name for name in FILE_NAMES if (source / name).is_file()), None)


def read_transforms(path: Path) -> TransformsScene:
    """Read a transforms.json.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: not JSON, no frames, photos missing, a pose that is not rigid, missing intrinsics, or an unknown camera model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}). Export the cameras again."
        ) from error
    frames = content.get("frames") if isinstance(content, dict) else None
    if not frames:
        raise ValueError(
            f"{path} has no frames. Expected a nerfstudio or instant-ngp transforms.json."
        )
    image_paths = _image_paths(path, frames)
    common = Path(os.path.commonpath([image_path.parent for image_path in image_paths]))
    names = [image_path.relative_to(common).as_posix() for image_path in image_paths]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{path}: {twice} stands in more than one frame. Remove the doubled frames."
        )
    order = sorted(range(len(names)), key=lambda row: names[row])
    points_path = path.parent / content["ply_file_path"] if content.get("ply_file_path") else None
    if points_path is not None and not points_path.is_file():
        logger.info(
            "%s: %s is not there; going on without points", path.name, content["ply_file_path"]
        )
        points_path = None
    return TransformsScene(
        names=[names[row] for row in order],
        image_paths=[image_paths[row] for row in order],
        lenses=[_lens({**content, **frames[row]}, image_paths[row], path) for row in order],
        viewmats=np.stack([_viewmat(frames[row], path) for row in order]),
        points_path=points_path,
    )


def _image_paths(path: Path, frames: list[dict[str, Any]]) -> list[Path]:
    found, missing = [], []
    for row, frame in enumerate(frames):
        if not isinstance(frame, dict) or "file_path" not in frame:
            raise ValueError(f"{path}: frame {row} has no file_path.")
        target = Path(os.path.normpath(path.parent.absolute() / frame["file_path"]))
        candidates = [
            target,
            *(target.with_name(target.name + suffix) for suffix in IMAGE_SUFFIXES),
        ]
        existing = next((candidate for candidate in candidates if candidate.is_file()), None)
        found.append(existing)
        if existing is None:
            missing.append(frame["file_path"])
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(frames)} photos in {path.name} are missing (first: {missing[0]}). "
            f"Paths are relative to {path.parent}. Copy the photos there or remove their frames."
        )
    return found


def _viewmat(frame: dict[str, Any], path: Path) -> np.ndarray:
    try:
        c2w = np.array(frame["transform_matrix"], np.float64)
    except (KeyError, ValueError, TypeError):
        c2w = np.empty(0)
    if c2w.shape == (3, 4):
        c2w = np.vstack([c2w, [0, 0, 0, 1]])
    where = f"{path}: {frame['file_path']}"
    if c2w.shape != (4, 4) or not np.isfinite(c2w).all():
        raise ValueError(f"{where} needs a transform_matrix of 4 x 4 finite numbers.")
    rotation = c2w[:3, :3]
    # 1e-3: room for matrices written with few digits; a matrix with a scale in it is off by far more.
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise ValueError(
            f"{where}: transform_matrix[:3, :3] is not a rotation (row lengths {np.linalg.norm(rotation, axis=1).round(4).tolist()}). "
            "Expected a rigid camera-to-world matrix; remove scale and mirroring from it."
        )
    left, _, right = np.linalg.svd(
        rotation
    )  # exactly orthonormal, for matrices written with few digits
    c2w[:3, :3] = left @ right
    return np.linalg.inv(c2w @ _GL_FROM_CV)


def _lens(values: dict[str, Any], image_path: Path, path: Path) -> Lens:
    """Build the lens of one frame from the merged global and per-frame values."""
    width, height = values.get("w"), values.get("h")
    if width is None or height is None:
        width, height = image_info(image_path).oriented_size
    width, height = int(width), int(height)
    focal_x = _focal(values, "x", width)
    focal_y = _focal(values, "y", height)
    if focal_x is None and focal_y is None:
        raise ValueError(
            f"{path}: {values['file_path']} has no focal length. Expected fl_x (pixels) or camera_angle_x (radians)."
        )
    focal = (focal_x or focal_y, focal_y or focal_x)
    center = (float(values.get("cx", width / 2)), float(values.get("cy", height / 2)))
    k1, k2, k3, k4, p1, p2 = (
        float(values.get(key) or 0.0) for key in ("k1", "k2", "k3", "k4", "p1", "p2")
    )
    model = (
        "OPENCV_FISHEYE"
        if values.get("is_fisheye")
        else str(values.get("camera_model", "OPENCV")).upper()
    )
    if model == "OPENCV_FISHEYE":
        return Lens(model, width, height, (*focal, *center, k1, k2, k3, k4))
    if model not in _PERSPECTIVE:
        raise ValueError(
            f"{path}: camera_model {model} cannot be used. Expected OPENCV, OPENCV_FISHEYE or PINHOLE. Undistort the photos first."
        )
    if k4:
        raise ValueError(
            f"{path}: {values['file_path']} has k4 = {k4} with a {model} camera; no camera model here has an r⁸ term. "
            "Undistort the photos first (cv2.undistort) and set k1 … k4 to 0."
        )
    if k3:
        return Lens(
            "FULL_OPENCV", width, height, (*focal, *center, k1, k2, p1, p2, k3, 0.0, 0.0, 0.0)
        )
    if any((k1, k2, p1, p2)):
        return Lens("OPENCV", width, height, (*focal, *center, k1, k2, p1, p2))
    return Lens("PINHOLE", width, height, (*focal, *center))


def _focal(values: dict[str, Any], axis: str, size: int) -> float | None:
    """Focal length in pixels from fl_x, or from the full angle of view camera_angle_x."""
    if values.get(f"fl_{axis}"):
        return float(values[f"fl_{axis}"])
    if values.get(f"camera_angle_{axis}"):
        return size / (2 * math.tan(float(values[f"camera_angle_{axis}"]) / 2))
    return None
