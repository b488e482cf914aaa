"""From a photo as it is to a plain one: pinhole, the camera's size, stored upright, not too large.

Photos whose EXIF says "turn me" are the trap. COLMAP ignores the flag, so its camera describes the stored, lying picture; other tools turn
first. The sizes decide: the camera's shape is that of the stored pixels, or else of the turned ones. Where both fit (a square, or upside
down) it is the stored ones, as in COLMAP. In the end every picture stands upright, and its camera is turned with it.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from s2d.images import ImageInfo, image_info, read_image, resize_image
from s2d.lenses import (
    Lens,
    pinhole_matrix,
    rescaled_lens,
    undistort_map,
    undistort_points,
    undistorted_lens,
)

# EXIF orientation -> A of uv_upright = A uv_stored + b, for quarter turns. Mirrored orientations are no rotation of a camera: such
# photos stay as they are stored.
_TURNS = {
    1: np.array([[1, 0], [0, 1]]),
    3: np.array([[-1, 0], [0, -1]]),
    6: np.array([[0, -1], [1, 0]]),
    8: np.array([[0, 1], [-1, 0]]),
}


class PhotoPlan(NamedTuple):
    """What one photo needs, in the order in which it is done."""

    path: Path
    camera_size: tuple[int, int]  # (width, height) that the scene's files give
    oriented: bool  # read upright, because that is what the camera describes
    lens: Lens  # of the pixels as read
    pinhole: Lens  # undistorted, same scale; the lens itself where it has no distortion
    size: tuple[int, int]  # after downscaling
    turn: int  # quarter turn at the end, by EXIF orientation; 1: none
    reasons: list[str]  # why the photo is not plain; empty: it is

    @property
    def needed(self) -> bool:
        return bool(self.reasons)


def plan_photo(path: Path, lens: Lens, max_side: int = 0) -> PhotoPlan:
    """Decide what a photo needs, from its header and its camera alone.

    Args:
        path: The photo.
        lens: Its camera; its size may be another than the photo's (`images_4` beside full-size cameras), its shape may not.
        max_side: Longest side in pixels; 0: no limit.

    Raises:
        FileNotFoundError: no such photo.
        ValueError: not an image, another shape than the camera's, or a lens that no flat picture can show.
    """
    info = image_info(path)
    camera_size = (lens.width, lens.height)
    reasons = []
    fits_stored = _same_shape(camera_size, info.stored_size)
    oriented = not fits_stored and _same_shape(camera_size, info.oriented_size)
    size = info.oriented_size if oriented else info.stored_size
    if not fits_stored and not oriented:
        raise ValueError(
            f"{path} is {size[0]} x {size[1]} pixels, but its camera is {lens.width} x {lens.height}: another shape, so it is cropped or "
            "another photo. Use the photos that the cameras were made from."
        )
    if size != camera_size:
        reasons.append(f"is {size[0]} x {size[1]} pixels, its camera {lens.width} x {lens.height}")
    lens = rescaled_lens(lens, size)
    pinhole = lens
    if pinhole_matrix(lens) is None:
        reasons.append(f"has a {lens.model} camera")
        pinhole = undistorted_lens(lens)
    turn = _quarter_turn(info, oriented)
    if oriented or turn != 1:
        reasons.append(f"has EXIF orientation {info.orientation}")
    longest = max(pinhole.width, pinhole.height)
    scale = min(1.0, max_side / longest) if max_side else 1.0
    final = (max(1, round(pinhole.width * scale)), max(1, round(pinhole.height * scale)))
    if scale < 1:
        reasons.append(f"is larger than {max_side} pixels")
    return PhotoPlan(path, camera_size, oriented, lens, pinhole, final, turn, reasons)


def plain_image(plan: PhotoPlan) -> Tensor:
    """Read a photo and make it plain. [H, W, 3] float32 in [0, 1]"""
    image = read_image(plan.path, oriented=plan.oriented)
    if plan.pinhole != plan.lens:
        at = _remap_table(plan.lens, plan.pinhole)
        pixels = cv2.remap(
            image.numpy(), at[..., 0], at[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        image = torch.from_numpy(pixels).clamp_(0, 1)
    image = resize_image(image, *plan.size)
    quarter_turns = {1: 0, 3: 2, 6: -1, 8: 1}[plan.turn]  # torch counts them anticlockwise
    return torch.rot90(image, quarter_turns, (0, 1)).contiguous()


def plain_lens(plan: PhotoPlan) -> Lens:
    """Intrinsics of the plain photo: a PINHOLE lens."""
    K = pinhole_matrix(plan.pinhole).astype(np.float64)
    K[0] *= plan.size[0] / plan.pinhole.width
    K[1] *= plan.size[1] / plan.pinhole.height
    A, b = _turn_transform(plan)
    focal = np.abs(A) @ [K[0, 0], K[1, 1]]
    center = A @ K[:2, 2] + b
    width, height = np.abs(A) @ plan.size
    return Lens("PINHOLE", int(width), int(height), (*map(float, focal), *map(float, center)))


def plain_viewmat(
    plan: PhotoPlan,
    viewmat: np.ndarray,  # [4, 4]
) -> np.ndarray:
    """Turn a camera with its picture: world to the camera of the plain photo. [4, 4]"""
    turned_from_camera = np.eye(4)
    turned_from_camera[:2, :2] = _TURNS[plan.turn]
    return turned_from_camera @ viewmat


def plain_points(
    plan: PhotoPlan,
    xys: np.ndarray,  # [M, 2]
) -> np.ndarray:
    """Move pixel positions from the scene's camera to the plain photo; some may end outside of it. [M, 2]"""
    xys = xys * (np.array([plan.lens.width, plan.lens.height]) / plan.camera_size)
    if plan.pinhole != plan.lens:
        xys = undistort_points(plan.lens, plan.pinhole, xys)
    xys = xys * (np.array(plan.size) / [plan.pinhole.width, plan.pinhole.height])
    A, b = _turn_transform(plan)
    return xys @ A.T + b


def _turn_transform(plan: PhotoPlan) -> tuple[np.ndarray, np.ndarray]:
    """A and b of uv_upright = A uv + b: b brings what turned to negative pixels back to the corner origin."""
    A = _TURNS[plan.turn]
    return A, -np.minimum(A @ np.array(plan.size), 0).astype(np.float64)


def _quarter_turn(info: ImageInfo, oriented: bool) -> int:
    return info.orientation if not oriented and info.orientation in _TURNS else 1


@lru_cache(maxsize=4)
def _remap_table(lens: Lens, pinhole: Lens) -> np.ndarray:
    """`undistort_map` for cv2.remap, whose pixel centres are whole numbers. [H, W, 2] float32"""
    return (undistort_map(lens, pinhole) - 0.5).astype(np.float32)


def _same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """True if one size is a scaled version of the other, give or take the rounding to whole pixels."""
    small, large = sorted((size, other))
    scale = max(large[0] / small[0], large[1] / small[1])
    return all(abs(large[i] - small[i] * scale) <= max(1.0, scale) + 1e-6 for i in (0, 1))
