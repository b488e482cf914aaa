"""Renders along a path: as frames, as a film, as depth maps."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.files import atomic_write_bytes
from s2d.gaussians import Gaussians
from s2d.log import progress
from s2d.rasterize import Render, rasterize

# OpenCV's wheels bring VP9, which every browser plays in an MP4; H.264 they do not bring.
CODEC = "vp09"


def render_frames(
    gaussians: Gaussians, cameras: Cameras, background: Tensor | None = None
) -> Iterator[tuple[str, Render]]:
    """Render camera after camera, with a progress bar; yields (name, render of one camera)."""
    gaussians = gaussians.detached()
    with progress(len(cameras), "render") as bar:
        for index, camera in enumerate(cameras):
            with torch.no_grad():
                yield camera.names[0], rasterize(gaussians, camera, background=background)
            bar.update(index + 1)


def write_video(path: Path, frames: Iterator[Tensor], fps: float) -> Path:
    """Write frames as an MP4 (VP9) that appears when it is complete.

    Args:
        path: Target, ends in .mp4.
        frames: sRGB in [0, 1], all of one even size. [H, W, 3]
        fps: Frames per second.

    Raises:
        ValueError: another suffix, no frame, or OpenCV was built without the encoder.
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"write_video: {path} should end in .mp4.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
    writer = None
    try:
        for frame in frames:
            pixels = (frame.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            if writer is None:
                height, width = pixels.shape[:2]
                fourcc = cv2.VideoWriter_fourcc(*CODEC)
                writer = cv2.VideoWriter(str(partial), fourcc, fps, (width, height))
                if not writer.isOpened():
                    raise ValueError(
                        f"This OpenCV cannot write {CODEC} video: {path}. Install opencv-python-headless from "
                        "requirements.txt, or export frames and encode them yourself."
                    )
            writer.write(np.ascontiguousarray(pixels[..., ::-1]))
        if writer is None:
            raise ValueError(f"write_video: no frame for {path}.")
        writer.release()
        os.replace(partial, path)
    finally:
        if writer is not None:
            writer.release()
        partial.unlink(missing_ok=True)
    return path


def write_depth(path: Path, render: Render) -> Path:
    """Write the depth of one camera like stage 0's: npz with `depth` float32 and `confidence` (here alpha) float16, both [H, W]."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        depth=render.depth[0, ..., 0].cpu().numpy().astype(np.float32),
        confidence=render.alpha[0, ..., 0].cpu().numpy().astype(np.float16),
    )
    atomic_write_bytes(path, buffer.getvalue())
    return path
