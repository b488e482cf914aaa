"""A synthetic scene as files: photos and transforms.json, complete or not there at all."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from s2d.files import atomic_write_json, fsync_dir
from s2d.images import write_image
from s2d.pairs.synthetic.layouts import random_layout
from s2d.pairs.synthetic.light import bake
from s2d.pairs.synthetic.photograph import photograph

BRIGHTNESS = 0.44  # mean of what the first photo shows nearer than SKY, sRGB
SKY = 40.0  # metres
QUALITY = 95  # JPEG


@dataclass(frozen=True)
class SceneSettings:
    """What shapes the scenes, apart from their numbers."""

    seed: int
    photos: tuple[Path, ...]  # that textures are cut from
    width: int
    height: int


def scene_name(seed: int, index: int) -> str:
    return f"synthetic-{seed}-{index:04d}"


def make_scene(settings: SceneSettings, index: int, folder: Path) -> Path:
    """Make a scene up, take its photos, and write it.

    Args:
        settings: The same settings and index give the same files.
        index: Number of the scene, from 0.
        folder: The scene's folder; a hidden one beside it is used on the way.

    Returns:
        The folder.
    """
    rng = np.random.default_rng([settings.seed, index])
    width, height = settings.width, settings.height
    layout = random_layout(rng, settings.photos, width, height)
    maps = bake(rng, layout.shapes, layout.light, layout.rig.centers.mean(0))
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    exposures, blur, grain = _camera(rng, len(layout.rig.viewmats))
    gain = None
    for view, viewmat in enumerate(layout.rig.viewmats):
        photo = photograph(layout.shapes, layout.light, maps, layout.rig.K, viewmat, width, height)
        if gain is None:
            shown = photo.linear[photo.depth < SKY]
            gain = (
                (BRIGHTNESS / max(float(np.sqrt(shown).mean()), 0.05)) ** 2 if len(shown) else 1.0
            )
        picture = develop(rng, photo.linear * (gain * exposures[view]), blur, grain)
        write_image(unfinished / "images" / f"{view:03d}.jpg", torch.from_numpy(picture), QUALITY)
    atomic_write_json(unfinished / "transforms.json", transforms(layout.rig.K, layout.rig.viewmats, width, height))  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    fsync_dir(folder.parent)
    return folder


def _camera(rng: np.random.Generator, num_views: int) -> tuple[np.ndarray, float, float]:
    """How bright each photo comes out [V, 3], its blur in pixels, and its grain. Half of the cameras meter each photo anew."""
    exposures = np.ones((num_views, 3))
    if rng.random() < 0.5:
        exposures = np.exp(rng.normal(0, 0.04, (num_views, 1)) + rng.normal(0, 0.01, (num_views, 3)))  # fmt: skip
    return exposures.astype(np.float32), rng.uniform(0, 0.6), rng.uniform(0.001, 0.008)


def develop(rng: np.random.Generator, linear: np.ndarray, blur: float, grain: float) -> np.ndarray:
    """Turn linear light [H, W, 3] into an sRGB picture: highlights roll off, then the lens's blur and the sensor's grain."""
    soft = np.where(linear < 0.7, linear, 1 - 0.3 * np.exp(-(linear - 0.7) / 0.3))
    if blur > 0.25:  # less changes nothing at this size
        soft = cv2.GaussianBlur(soft, (0, 0), blur)
    picture = np.sqrt(np.maximum(soft, 0)) + rng.normal(0, grain, linear.shape)
    return np.clip(picture, 0, 1).astype(np.float32)


def transforms(K: np.ndarray, viewmats: Sequence[np.ndarray], width: int, height: int) -> dict:
    """The cameras as nerfstudio's file has them: camera to world, OpenGL axes."""
    frames = []
    for view, viewmat in enumerate(viewmats):
        pose = np.linalg.inv(viewmat) @ np.diag([1.0, -1.0, -1.0, 1.0])
        frames.append({"file_path": f"images/{view:03d}.jpg", "transform_matrix": pose.tolist()})
    return {
        "camera_model": "PINHOLE",
        "w": width,
        "h": height,
        "fl_x": K[0, 0],
        "fl_y": K[1, 1],
        "cx": K[0, 2],
        "cy": K[1, 2],
        "frames": frames,
    }


def is_finished(folder: Path) -> bool:
    """Whether a scene's folder holds a whole scene: it gets its name only then."""
    return (folder / "transforms.json").is_file()
