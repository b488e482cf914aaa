"""Kept and novel cameras over the cloud, seen from above: one picture to judge a camera plan by."""

import cv2
import numpy as np
import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.geometry import invert_rigid, up_axis
from s2d.guidance.cloud import SurfaceCloud

SIZE = 720  # pixels, longer side
MARGIN, LINE = 28, 24  # pixels around the drawing, for a line of text
# RGB; orange and blue as in scene.glb, told apart in grey as well.
KEPT, NOVEL, INK = (214, 102, 0), (46, 110, 214), (40, 40, 40)
# Quantiles of the points that set the frame: far ones would make the cameras small.
VISIBLE = (0.1, 0.9)


def draw_top_view(cloud: SurfaceCloud, kept: Cameras, novel: Cameras) -> Tensor:
    """Draw points and cameras without perspective, along the cameras' mean up direction; what is in front is up in the picture.

    Returns:
        sRGB. [H, W, 3] in [0, 1]
    """
    axes = _axes(kept)
    points = (cloud.points.double() @ axes.T).numpy()
    centers = [(cameras.centers.double() @ axes.T).numpy() for cameras in (kept, novel)]
    frame = np.concatenate([np.quantile(points, VISIBLE, axis=0), *centers])
    low, high = frame.min(0), frame.max(0)
    extent = np.maximum(high - low, 1e-9 * max(np.abs(frame).max(), 1e-12))
    scale = (SIZE - 2 * MARGIN) / extent.max()
    width, height = (np.ceil(extent * scale).astype(int) + 2 * MARGIN).tolist()
    canvas = np.full((height + LINE, width, 3), 255, np.uint8)

    def pixels(values: np.ndarray) -> np.ndarray:  # [..., 2] right, forward → column, row
        flat = (values - low) * scale + MARGIN
        return np.stack([flat[..., 0], height - flat[..., 1]], -1)

    at = np.floor(pixels(points)).astype(int)
    inside = ((at >= 0) & (at < (width, height))).all(1)
    colours = (cloud.rgbs.numpy() * 255).round().astype(np.uint8)
    canvas[at[inside, 1], at[inside, 0]] = colours[inside]
    canvas[:height] = 255 - (255 - canvas[:height]) // 2  # pale: the cameras stand out
    length = 0.05 * SIZE / scale
    for cameras, colour in ((novel, NOVEL), (kept, KEPT)):
        for camera in cameras:
            outline = np.rint(pixels(_triangle(camera, axes, length))).astype(np.int32)
            cv2.polylines(canvas, [outline], True, colour, 2 if colour == KEPT else 1, cv2.LINE_AA)
    for number, (text, colour) in enumerate(
        ((f"{len(kept)} kept", KEPT), (f"{len(novel)} novel", NOVEL), ("from above", INK))
    ):
        at_text = (MARGIN + 110 * number, height + LINE - 8)
        cv2.putText(canvas, text, at_text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)
    return torch.from_numpy(canvas).float() / 255


def _axes(kept: Cameras) -> Tensor:
    """Right and forward on the ground that the cameras' mean up is perpendicular to. [2, 3]"""
    viewmats = kept.viewmats.double()
    up = up_axis(viewmats)
    # Where the cameras look down, what is up in their pictures lies ahead.
    forward = viewmats[:, 2, :3].mean(0) - viewmats[:, 1, :3].mean(0) * 1e-3
    forward = forward - (forward @ up) * up
    if forward.norm() < 1e-6:  # they look all round
        forward = viewmats[0, 2, :3] - (viewmats[0, 2, :3] @ up) * up
    forward = torch.nn.functional.normalize(forward, dim=0)
    return torch.stack([torch.linalg.cross(forward, up), forward])


def _triangle(camera: Cameras, axes: Tensor, length: float) -> np.ndarray:
    """The camera's centre and the left and right ends of its picture at a depth of `length`, from above. [3, 2]"""
    K = camera.Ks[0].double()
    c2w = invert_rigid(camera.viewmats[0].double())
    ends = torch.tensor(
        [[0.0, 0, 0], *([(x - K[0, 2]) / K[0, 0], 0, 1] for x in (0, camera.width))],
        dtype=torch.float64,
    )
    world = (ends * length) @ c2w[:3, :3].T + c2w[:3, 3]
    return (world @ axes.T).numpy()
