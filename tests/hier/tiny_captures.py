"""Captures small enough for tests: chunks in the published layout, made of the tiny scene's textured room."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from tiny_scene import render

from s2d.geometry import look_at
from s2d.lenses import Lens

WIDTH, HEIGHT = 40, 30
# By width and height, with the principal point off the middle.
LENS = (0.95, 0.95 * WIDTH / HEIGHT, 0.52, 0.47)


def video_viewmats(num: int) -> torch.Tensor:
    """A camera that moves sideways past the box. [N, 4, 4] float64"""
    x = torch.linspace(-0.6, 0.6, num, dtype=torch.float64)
    centers = torch.stack([x, torch.full_like(x, -3.0), torch.full_like(x, 1.6)], -1)
    target = torch.tensor([0.0, 0.0, 0.6], dtype=torch.float64)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    return look_at(centers, target.expand_as(centers), up)


def encoded(image: torch.Tensor) -> torch.Tensor:
    """A picture [H, W, 3] as the bytes of a PNG file."""
    pixels = (image.numpy()[..., ::-1] * 255).round().astype(np.uint8)
    return torch.from_numpy(cv2.imencode(".png", pixels)[1].reshape(-1).copy())


def chunk_entry(key: str, num: int = 12, lens: tuple = LENS) -> dict:
    """A scene as the published chunks have it, written out field by field."""
    viewmats = video_viewmats(num)
    pixels = (lens[0] * WIDTH, lens[1] * HEIGHT, lens[2] * WIDTH, lens[3] * HEIGHT)
    cameras = [[*lens, 0.0, 0.0, *viewmat[:3].flatten().tolist()] for viewmat in viewmats]
    return {
        "key": key,
        "url": "",
        "timestamps": torch.arange(num),
        "cameras": torch.tensor(cameras, dtype=torch.float32),
        "images": [
            encoded(render(viewmat, Lens("PINHOLE", WIDTH, HEIGHT, pixels), 1))
            for viewmat in viewmats
        ],
    }


def write_chunks(root: Path, split: str = "train", num_frames: int = 12) -> Path:
    """Three scenes in two chunks."""
    folder = root / split
    folder.mkdir(parents=True)
    torch.save(
        [chunk_entry("aa", num_frames), chunk_entry("bb", num_frames)], folder / "000000.torch"
    )
    torch.save([chunk_entry("cc", num_frames)], folder / "000001.torch")
    index = {"aa": "000000.torch", "bb": "000000.torch", "cc": "000001.torch"}
    (folder / "index.json").write_text(json.dumps(index))
    return root
