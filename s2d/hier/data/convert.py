"""Other data sets as chunks: DTU, Replica, and any posed scene. The photos' files are taken as they are, nothing is encoded anew.

Our chunks have `near` and `far` for each scene, so that reading them needs no flag. What a scene is called is what the published evaluation
indices call it: `scan1_train`, `office_0-Sequence_2`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from s2d.files import atomic_torch_save, atomic_write_json
from s2d.geometry import invert_rigid
from s2d.hier.data.chunks import INDEX, load_chunk, read_chunk_index
from s2d.hier.data.posed import PosedCapture
from s2d.images import image_info
from s2d.log import logger

CHUNK_BYTES = 100_000_000  # of photos: the size of the published chunks

# DTU as MVSNet rectified it: 49 photos a scan by 640×512, cameras by a quarter of that in millimetres.
DTU_TEST = (1, 8, 21, 30, 31, 34, 38, 40, 41, 45, 55, 63, 82, 103, 110, 114)
DTU_VIEWS, DTU_LIGHT, DTU_CAMERA_SCALE, DTU_UNIT = 49, 3, 4.0, 1 / 200
DTU_NEAR, DTU_FAR = 425 * DTU_UNIT, 905 * DTU_UNIT
# Replica as Semantic-NeRF rendered it: 640×480 with one lens.
REPLICA_FOCAL, REPLICA_CENTRE, REPLICA_NEAR, REPLICA_FAR = 320.0, (319.5, 239.5), 0.5, 15.0


class Recording(NamedTuple):
    """A scene to be written."""

    key: str
    photos: list[Path]
    viewmats: Tensor  # [N, 4, 4]
    Ks: Tensor  # [N, 3, 3] pixels of the photos
    sizes: list[tuple[int, int]]
    near: Tensor  # [N]
    far: Tensor  # [N]


def write_chunks(
    recordings: Iterable[Recording], folder: Path, chunk_bytes: int = CHUNK_BYTES
) -> int:
    """Write scenes into `folder/*.torch` and index.json, after those that are there; a scene that is in the index is left out.

    The index is written anew after each chunk, so an interrupted run goes on where it was.

    Returns:
        Number of scenes written.
    """
    index = read_chunk_index(folder) if (folder / INDEX).is_file() else {}
    pending: list[dict[str, Any]] = []
    size, written = 0, 0

    def flush() -> None:
        nonlocal pending, size
        taken = {int(Path(file).stem) for file in index.values() if Path(file).stem.isdigit()}
        file = f"{max(taken, default=-1) + 1:06d}.torch"
        atomic_torch_save(folder / file, pending)
        index.update({scene["key"]: file for scene in pending})
        atomic_write_json(folder / INDEX, index)
        logger.info("%s: %d scenes, %.0f MB", folder / file, len(pending), size / 1e6)
        pending, size = [], 0

    for recording in recordings:
        if recording.key in index:
            continue
        pending.append(chunk_scene(recording))
        size += sum(image.numel() for image in pending[-1]["images"])
        written += 1
        if size >= chunk_bytes:
            flush()
    if pending:
        flush()
    return written


def chunk_scene(recording: Recording) -> dict[str, Any]:
    """One entry of a chunk."""
    sizes = torch.tensor(recording.sizes, dtype=torch.float64)
    Ks = recording.Ks.double()
    lens = torch.stack(
        [
            Ks[:, 0, 0] / sizes[:, 0],
            Ks[:, 1, 1] / sizes[:, 1],
            Ks[:, 0, 2] / sizes[:, 0],
            Ks[:, 1, 2] / sizes[:, 1],
        ],
        1,
    )
    num = len(recording.photos)
    pose = recording.viewmats.double()[:, :3].reshape(num, 12)
    return {
        "key": recording.key,
        "url": "",
        "timestamps": torch.arange(num),
        "cameras": torch.cat([lens, torch.zeros(num, 2).double(), pose], 1).float(),
        "images": [torch.from_numpy(np.fromfile(path, np.uint8)) for path in recording.photos],
        "near": recording.near.float(),
        "far": recording.far.float(),
    }


def write_index(folder: Path) -> int:
    """Write index.json for the chunks of a folder; returns the number of scenes.

    Raises:
        FileNotFoundError: no chunk.
        ValueError: a damaged chunk, or a scene that is in two.
    """
    paths = sorted(folder.glob("*.torch"))
    if not paths:
        raise FileNotFoundError(
            f"No chunks (*.torch) in {folder}. Expected ROOT/train or ROOT/test."
        )
    index: dict[str, str] = {}
    for path in paths:
        for scene in load_chunk(path):
            if scene["key"] in index:
                raise ValueError(
                    f"Scene {scene['key']} is in {index[scene['key']]} and in {path.name}. Remove one of them."
                )
            index[scene["key"]] = path.name
    atomic_write_json(folder / INDEX, index)
    return len(index)


def posed_recording(capture: PosedCapture) -> Recording:
    """A posed scene, with the depth ranges that its points give."""
    return Recording(
        capture.key,
        list(capture.image_paths),
        capture.viewmats,
        capture.cameras.Ks,
        list(capture.cameras.sizes),
        capture.near,
        capture.far,
    )


def dtu_recordings(root: Path, split: str) -> Iterator[Recording]:
    """The scans of DTU in MVSNet's training layout.

    Args:
        root: `Rectified/scan<N>_train/rect_<view>_3_r5000.png` and `Cameras/train/<view>_cam.txt`.
        split: "test": the 16 scans of the published index; "train": all others.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not of that form.
    """
    scans = {}
    for folder in (root / "Rectified").glob("scan*_train"):
        number = folder.name.removeprefix("scan").removesuffix("_train")
        if number.isdigit() and (int(number) in DTU_TEST) == (split == "test"):
            scans[int(number)] = folder
    if not scans:
        raise FileNotFoundError(
            f"No {split} scans in {root / 'Rectified'}. Expected folders scan<N>_train of the rectified photos that MVSNet is trained on."
        )
    cameras = [
        read_mvsnet_camera(root / "Cameras" / "train" / f"{view:08d}_cam.txt")
        for view in range(DTU_VIEWS)
    ]
    viewmats = torch.stack([viewmat for viewmat, _ in cameras])
    viewmats[:, :3, 3] *= DTU_UNIT
    Ks = torch.stack([K for _, K in cameras])
    Ks[:, :2] *= DTU_CAMERA_SCALE
    for number, folder in sorted(scans.items()):
        photos = [
            folder / f"rect_{view + 1:03d}_{DTU_LIGHT}_r5000.png" for view in range(DTU_VIEWS)
        ]
        near, far = torch.full((2, DTU_VIEWS), 1.0) * torch.tensor([[DTU_NEAR], [DTU_FAR]])
        yield Recording(f"scan{number}_train", photos, viewmats, Ks, _sizes(photos), near, far)


def read_mvsnet_camera(path: Path) -> tuple[Tensor, Tensor]:
    """Read `extrinsic` (world to camera), `intrinsic` from a camera file of MVSNet. [4, 4], [3, 3] float64

    Raises:
        FileNotFoundError: no such file.
        ValueError: another form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No camera file {path}. Expected MVSNet's Cameras/train folder.")
    words = path.read_text().split()
    try:
        start = words.index("extrinsic") + 1
        viewmat = torch.tensor([float(word) for word in words[start : start + 16]]).double()
        start = words.index("intrinsic") + 1
        K = torch.tensor([float(word) for word in words[start : start + 9]]).double()
        return viewmat.reshape(4, 4), K.reshape(3, 3)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: expected `extrinsic`, 16 numbers, `intrinsic`, 9 numbers ({error})."
        ) from error


def replica_recordings(root: Path) -> Iterator[Recording]:
    """The sequences of Replica as rendered for Semantic-NeRF.

    Args:
        root: `<room>/Sequence_<k>/rgb/rgb_<frame>.png` and `traj_w_c.txt`, camera to world by rows.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not of that form.
    """
    paths = sorted(root.glob("*/Sequence_*/traj_w_c.txt"))
    if not paths:
        raise FileNotFoundError(
            f"No <room>/Sequence_<k>/traj_w_c.txt in {root}. Expected Replica as rendered for Semantic-NeRF."
        )
    for path in paths:
        try:
            c2w = torch.from_numpy(np.loadtxt(path).reshape(-1, 4, 4))
        except ValueError as error:
            raise ValueError(f"{path}: expected 16 numbers per frame ({error}).") from error
        num = len(c2w)
        photos = [path.parent / "rgb" / f"rgb_{frame}.png" for frame in range(num)]
        # Their first pixel's centre is (0, 0).
        cx, cy = (centre + 0.5 for centre in REPLICA_CENTRE)
        K = torch.tensor([[REPLICA_FOCAL, 0, cx], [0, REPLICA_FOCAL, cy], [0, 0, 1]]).double()
        yield Recording(
            f"{path.parent.parent.name}-{path.parent.name}",
            photos,
            invert_rigid(c2w),
            K.repeat(num, 1, 1),
            _sizes(photos),
            torch.full((num,), REPLICA_NEAR),
            torch.full((num,), REPLICA_FAR),
        )


def _sizes(photos: list[Path]) -> list[tuple[int, int]]:
    return [image_info(path).stored_size for path in photos]
