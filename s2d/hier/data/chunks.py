"""Chunks: the format of pixelSplat's RealEstate10K and ACID, many encoded video frames in a few large files.

    ROOT/{train,test}/index.json      {scene: chunk file}
    ROOT/{train,test}/NNNNNN.torch    list of scenes: key, url, timestamps [N], cameras [N, 18], images (N encoded files, uint8)

A row of `cameras` is fx fy cx cy by width and height, 0 0, then the rows of the 3×4 world-to-camera matrix (OpenCV axes). Our own chunks
also have `near` and `far` [N] for each scene, which other readers ignore.
"""

import json
import pickle
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from s2d.hier.data.framing import CENTRE, Framing
from s2d.hier.data.samplers import Sampler

SPLITS = ("train", "test")
INDEX = "index.json"
REQUIRED = ("key", "cameras", "images")
# Chunks held open by one reading process: mapped, not read, so this costs address space and little memory.
OPEN_CHUNKS = 8
# Wider views are fisheyes or wrong intrinsics; RealEstate10K has a few.
MAX_FIELD_OF_VIEW = 100.0  # degrees


@dataclass(frozen=True, eq=False)
class ChunkCapture:
    """One scene of a chunk: a `Capture`."""

    key: str
    viewmats: Tensor  # [N, 4, 4]
    lenses: Tensor  # [N, 4] fx fy cx cy, by width and height
    near: Tensor  # [N]
    far: Tensor  # [N]
    images: list[Tensor]  # N encoded files
    path: Path

    def __len__(self) -> int:
        return len(self.images)

    @property
    def field_of_view(self) -> float:
        """The widest view's, across or down, in degrees."""
        return float(torch.rad2deg(2 * torch.atan(0.5 / self.lenses[:, :2])).max())

    def picture(
        self, row: int, size: tuple[int, int], place: tuple[float, float] = CENTRE
    ) -> tuple[Tensor, Tensor]:
        """See `Capture`.

        Raises:
            ValueError: the frame cannot be decoded.
        """
        encoded = self.images[row].numpy()
        pixels = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size else None
        if pixels is None:
            raise ValueError(
                f"{self.path}: frame {row} of scene {self.key} is not an image, or is cut off ({encoded.size} bytes). "
                "Expected JPEG or PNG. Fetch or convert the chunk again, or take the scene out of index.json."
            )
        height, width = pixels.shape[:2]
        framing = Framing.cover((width, height), size, place)
        fx, fy, cx, cy = self.lenses[row].double().tolist()
        K = torch.tensor([[fx * width, 0, cx * width], [0, fy * height, cy * height], [0, 0, 1]])
        return framing.crop(framing.scale(pixels[..., ::-1])), framing.intrinsics(K)

    def seen_points(self, row: int) -> Tensor:
        return torch.zeros(0, 3)


@dataclass
class ChunkFolder:
    """A split of a chunk data set, as a source of training samples (`samples.Source`).

    Args:
        root: Folder with train/ and test/.
        split: Which of them.
        sampler: Which frames make a sample.
        near, far: Depth range of scenes that do not bring their own: RealEstate10K and ACID 1 to 100 (their poses have that unit).
    """

    root: Path
    split: str
    sampler: Sampler
    near: float = 1.0
    far: float = 100.0
    _open: OrderedDict[str, dict[str, dict]] = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        self.folder = self.root / self.split
        self.index = read_chunk_index(self.folder)
        self.keys = tuple(self.index)

    @property
    def name(self) -> str:
        return self.root.name

    def __len__(self) -> int:
        return len(self.keys)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A shuffled order of the scenes that stays within a few chunks at a time."""
        rows_of: dict[str, list[int]] = {}
        for row, key in enumerate(self.keys):
            rows_of.setdefault(self.index[key], []).append(row)
        files = list(rows_of)
        rng.shuffle(files)
        groups = [
            [row for file in files[start : start + OPEN_CHUNKS] for row in rows_of[file]]
            for start in range(0, len(files), OPEN_CHUNKS)
        ]
        return np.concatenate([rng.permutation(group) for group in groups])

    def capture(self, row: int) -> ChunkCapture:
        """Open the scene of a row.

        Raises:
            FileNotFoundError, ValueError: the chunk is missing or damaged, or does not hold the scene.
        """
        return self.find(self.keys[row])

    def find(self, key: str) -> ChunkCapture:
        """Open a scene by name."""
        file = self.index[key]
        if file not in self._open:
            self._open[file] = _load_chunk(self.folder / file)
            while len(self._open) > OPEN_CHUNKS:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        scenes = self._open[file]
        if key not in scenes:
            raise ValueError(
                f"{self.folder / file} has no scene {key}, though index.json says so. Write the index anew "
                "(tools/convert_hier_data.py index), or fetch the chunk again."
            )
        return _capture(scenes[key], self.folder / file, self.near, self.far)

    def is_usable(self, capture: ChunkCapture) -> bool:
        """Whether to train on it."""
        return capture.field_of_view <= MAX_FIELD_OF_VIEW

    def fingerprint(self) -> str:
        """What the samples depend on, for a training's description."""
        return f"{len(self)} scenes of {self.split} in {len(set(self.index.values()))} chunks"


def is_chunk_root(folder: Path) -> bool:
    """Whether a folder is a chunk data set."""
    return any((folder / split / INDEX).is_file() for split in SPLITS)


def read_chunk_index(folder: Path) -> dict[str, str]:
    """Read index.json: scene → chunk file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not of that form, or empty.
    """
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"No {path}. Expected ROOT/train and ROOT/test, each with index.json and chunks (*.torch); "
            "tools/convert_hier_data.py index writes a missing one."
        )
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Write it anew.") from error
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(value, str) for value in content.values())
    ):
        raise ValueError(f"{path}: expected at least one line `scene: chunk file`.")
    return content


def load_chunk(path: Path) -> list[dict[str, Any]]:
    """Read a chunk; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not a chunk.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No chunk {path}, though {INDEX} names it. Fetch it again.")
    try:
        try:
            # Mapped: a scene's frames are read when they are decoded, not the 100 MB of their chunk.
            chunk = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of torch's old format cannot be mapped
            chunk = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is damaged, or is no chunk ({reason[:120]}). Fetch or convert it again, or take its scenes out of {INDEX}."
        ) from error
    problem = _problem(chunk)
    if problem:
        raise ValueError(
            f"{path} is no chunk: {problem}. Expected a list of scenes with key, cameras [N, 18] and N encoded images."
        )
    return chunk


def _load_chunk(path: Path) -> dict[str, dict[str, Any]]:
    return {scene["key"]: scene for scene in load_chunk(path)}


def _problem(chunk: object) -> str | None:
    if not isinstance(chunk, list):
        return f"a {type(chunk).__name__}"
    for number, scene in enumerate(chunk):
        missing = [key for key in REQUIRED if not isinstance(scene, dict) or key not in scene]
        if missing:
            return f"entry {number} has no {missing[0]}"
        cameras = scene["cameras"]
        if not isinstance(cameras, Tensor) or cameras.ndim != 2 or cameras.shape[1] != 18:
            return f"the cameras of scene {scene['key']} are not [N, 18]"
        if len(scene["images"]) != len(cameras):
            return (
                f"scene {scene['key']} has {len(scene['images'])} images and {len(cameras)} cameras"
            )
        if not bool(torch.isfinite(cameras).all()) or not bool((cameras[:, :2] > 0).all()):
            return f"scene {scene['key']} has cameras that are not finite or without a focal length"
    return None


def _capture(scene: dict[str, Any], path: Path, near: float, far: float) -> ChunkCapture:
    cameras = scene["cameras"].float()
    viewmats = torch.eye(4).repeat(len(cameras), 1, 1)
    viewmats[:, :3] = cameras[:, 6:].reshape(-1, 3, 4)
    bounds = [
        scene[name].float() if name in scene else torch.full((len(cameras),), value)
        for name, value in (("near", near), ("far", far))
    ]
    return ChunkCapture(
        scene["key"], viewmats, cameras[:, :4], *bounds, list(scene["images"]), path
    )
