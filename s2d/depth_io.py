"""Stage 0's depth maps on disk, OUT/stage0/depth/<view>.npz: the only file that knows how they are written (docs/data_formats.md)."""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s2d.files import atomic_write_bytes

FOLDER = "depth"


def depth_path(stage0_dir: Path, name: str) -> Path:
    """The file of a kept view."""
    return stage0_dir / FOLDER / Path(name).with_suffix(".npz")


def write_depth(
    path: Path,
    depth: np.ndarray,  # [H, W] float32
    confidence: np.ndarray,  # [H, W]
) -> None:
    """Write one, all or nothing. float16 holds confidence; depth needs float32 (a relative step of 1e-3 would show as terraces)."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, depth=depth, confidence=confidence.astype(np.float16))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, buffer.getvalue())


def read_depth(stage0_dir: Path, name: str) -> tuple[Tensor, Tensor]:
    """Read the depth of a kept view (camera z, world units, <= 0: none) and its confidence in [0, 1]. [H, W], [H, W]

    Raises:
        FileNotFoundError: Stage 0 made none, as with points from elsewhere.
        ValueError: The file is damaged.
    """
    path = depth_path(stage0_dir, name)
    if not path.is_file():
        raise FileNotFoundError(
            f"Stage 0 has no depth of {name}: no file {path}. Run stage 0 again with --overwrite and a provider that makes depth (mvs), or leave out the flags "
            "that ask for depth (--layer-depth-weight, --depth-weight, --normal-weight, --prune-floaters)."
        )
    try:
        with np.load(path) as arrays:
            depth, confidence = (
                torch.from_numpy(arrays[key].astype(np.float32)) for key in ("depth", "confidence")
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a depth map of stage 0 ({error!r}). Run stage 0 again with --overwrite."
        ) from error
    return depth, confidence


def known_depths(stage0_dir: Path, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the depth of those kept views that stage 0 made one of, by name; see `read_depth`."""
    return {
        name: read_depth(stage0_dir, name)
        for name in names
        if depth_path(stage0_dir, name).is_file()
    }
