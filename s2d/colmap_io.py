"""COLMAP's files: the only place that knows their layout, quaternion order and camera models.

A scene is `images/` and a model in `sparse/0` (or `sparse/`, or several models `sparse/0`, `sparse/1`, …): cameras, images and points3D as
.bin or .txt, with rigs and frames since COLMAP 4. Pixel centres are at +0.5 in COLMAP as in S2D, so nothing is shifted. COLMAP's
files have quaternions wxyz, pycolmap's objects xyzw; both stay in here: rotations leave as matrices.
"""

import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pycolmap

from s2d.lenses import Lens, img_from_cam, lens_from_pycolmap, lens_to_pycolmap

logger = logging.getLogger("s2d.colmap_io")


class ColmapModel(NamedTuple):
    """A sparse model, images in name order."""

    names: list[str]
    lenses: list[Lens]
    viewmats: np.ndarray  # [V, 4, 4] float64, world to camera
    points: np.ndarray  # [P, 3] float64, world
    rgbs: np.ndarray  # [P, 3] in [0, 1]
    point_ids: np.ndarray  # [M] int64: which point (row of `points`) an observation is of
    view_ids: np.ndarray  # [M] int64: in which image (row of `names`)
    xys: np.ndarray  # [M, 2] float64, pixels of the image as the lens made it


def find_model(scene_dir: Path) -> Path:
    """Find the sparse model of a scene: `sparse/0`, `sparse` or the largest of several.

    Raises:
        FileNotFoundError: there is none, or a file of it is missing.
    """
    scene_dir = Path(scene_dir)
    sparse = scene_dir / "sparse"
    candidates = [sparse, *sorted(path for path in sparse.glob("*") if path.is_dir())]
    complete = [path for path in candidates if _suffix(path)]
    if not complete:
        started = [
            path for path in candidates if any(path.glob("*.bin")) or any(path.glob("*.txt"))
        ]
        if started:
            have = {path.name for path in started[0].iterdir()}
            lacking = next(
                name
                for name in ("cameras", "images", "points3D")
                if not have & {f"{name}.bin", f"{name}.txt"}
            )
            raise FileNotFoundError(
                f"{started[0]} is not a complete COLMAP model: there is no {lacking}.bin or {lacking}.txt. "
                "Copy all files of the model, or run COLMAP's mapper again."
            )
        raise FileNotFoundError(
            f"No COLMAP model in {scene_dir}: expected cameras, images and points3D (.bin or .txt) in {sparse / '0'}."
        )
    if len(complete) == 1:
        return complete[0]
    sizes = [_num_images(path) for path in complete]
    best = complete[int(np.argmax(sizes))]
    logger.info(
        "%s: %d models (%s); using %s, the one with most images",
        sparse,
        len(complete),
        ", ".join(
            f"{path.relative_to(scene_dir)}: {size}"
            for path, size in zip(complete, sizes, strict=True)
        ),
        best.relative_to(scene_dir),
    )
    return best


def read_model(model_dir: Path) -> ColmapModel:
    """Read a sparse model, text or binary, of COLMAP 3 or 4, with any camera models.

    Images without a pose are left out. Binary files are measured before pycolmap reads them: it takes a cut-off file for a
    good one, asks for absurd amounts of memory, or reads for minutes.

    Raises:
        FileNotFoundError: a file of the model is missing.
        ValueError: a file is cut off or damaged, or the model has no images.
    """
    model_dir = Path(model_dir)
    suffix = _suffix(model_dir)
    if not suffix:
        raise FileNotFoundError(
            f"No complete COLMAP model in {model_dir}: expected cameras, images and points3D (.bin or .txt)."
        )
    if suffix == ".bin":
        for name, measure in _MEASURES.items():
            if (model_dir / f"{name}.bin").is_file():  # rigs and frames: since COLMAP 4
                _require_length(model_dir / f"{name}.bin", measure)
    model = pycolmap.Reconstruction()
    try:
        (model.read_binary if suffix == ".bin" else model.read_text)(str(model_dir))
    except (IndexError, KeyError, ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(
            f"{model_dir}: COLMAP's reader says the model is damaged ({str(error).strip()}). Copy it again or run COLMAP's mapper again."
        ) from error
    if model.num_reg_images() == 0:
        raise ValueError(
            f"{model_dir} is an empty model: no image has a pose. COLMAP found no matches; use more overlapping photos."
        )
    return _unpack(model)


def write_model(model_dir: Path, model: ColmapModel) -> Path:
    """Write a model in COLMAP's binary format, each image with a lens of its own unless they are equal. Returns the folder."""
    model_dir = Path(model_dir)
    out = pycolmap.Reconstruction()
    camera_ids: dict[Lens, int] = {}
    for lens in model.lenses:
        if lens not in camera_ids:
            camera_ids[lens] = len(camera_ids) + 1
            out.add_camera_with_trivial_rig(lens_to_pycolmap(lens, camera_ids[lens]))
    # An observation is addressed by its position in its image's list.
    slots = np.empty(len(model.view_ids), np.int64)
    for view, (name, lens) in enumerate(zip(model.names, model.lenses, strict=True)):
        rows = np.flatnonzero(model.view_ids == view)
        slots[rows] = np.arange(len(rows))
        image = pycolmap.Image(
            name=name, keypoints=model.xys[rows], camera_id=camera_ids[lens], image_id=view + 1
        )
        out.add_image_with_trivial_frame(image, pycolmap.Rigid3d(model.viewmats[view, :3]))
    order = np.argsort(model.point_ids, kind="stable")
    starts = np.searchsorted(model.point_ids[order], np.arange(len(model.points) + 1))
    colours = np.rint(np.clip(model.rgbs, 0, 1) * 255).astype(np.uint8)
    for point in range(len(model.points)):
        rows = order[starts[point] : starts[point + 1]]
        elements = [
            pycolmap.TrackElement(int(model.view_ids[row]) + 1, int(slots[row])) for row in rows
        ]
        out.add_point3D(model.points[point], pycolmap.Track(elements), colours[point])
    model_dir.mkdir(parents=True, exist_ok=True)
    out.write(str(model_dir))
    return model_dir


def match_observations(model: ColmapModel, where: str) -> ColmapModel:
    """Bring observations into the pixels of their cameras, where the model has them in others.

    Whoever resizes photos and cameras after the reconstruction easily leaves the observations in the old pixels (`Camera.rescale` does
    not touch them). Then every reprojection is off by one common factor. A factor is found per lens as the median of observed over
    reprojected positions, taken as a whole-pixel picture size, and used only if it explains the observations: the median error must
    fall below 2 px and to less than a quarter.

    Args:
        model: As read.
        where: What to call it in the log.
    """
    xys = model.xys.copy()
    for lens in dict.fromkeys(model.lenses):
        of_lens = np.array([other == lens for other in model.lenses])
        rows = np.flatnonzero(of_lens[model.view_ids])
        if len(rows) < 8:  # too few for a median that one wrong match cannot move
            continue
        transforms, points = (
            model.viewmats[model.view_ids[rows]],
            model.points[model.point_ids[rows]],
        )
        in_camera = (transforms[:, :3, :3] @ points[..., None])[..., 0] + transforms[:, :3, 3]
        projected = img_from_cam(lens, in_camera)
        rows, projected = (
            rows[np.isfinite(projected).all(1)],
            projected[np.isfinite(projected).all(1)],
        )
        before = _median_distance(model.xys[rows], projected)
        if len(rows) < 8 or before <= 2:
            continue
        size = np.array([lens.width, lens.height])
        with np.errstate(divide="ignore", invalid="ignore"):
            old_size = np.rint(np.nanmedian(model.xys[rows] / projected, axis=0) * size)
        if not (np.isfinite(old_size).all() and (old_size >= 1).all()):
            continue
        rescaled = model.xys[rows] * (size / old_size)
        after = _median_distance(rescaled, projected)
        if after < 2 and after < before / 4:
            logger.info(
                "%s: observations are in pixels of %d x %d pictures, the cameras are %d x %d; scaled them (error %.1f → %.2f px)",
                where,
                *old_size,
                *size,
                before,
                after,
            )
            xys[rows] = rescaled
            # Those whose points do not reproject (behind the camera) are in the same pixels.
            others = np.setdiff1d(np.flatnonzero(of_lens[model.view_ids]), rows)
            xys[others] = model.xys[others] * (size / old_size)
    return model._replace(xys=xys)


def _median_distance(xys: np.ndarray, others: np.ndarray) -> float:
    return float(np.median(np.linalg.norm(xys - others, axis=1))) if len(xys) else 0.0


def _unpack(model: pycolmap.Reconstruction) -> ColmapModel:
    images = sorted(
        (image for image in model.images.values() if image.has_pose), key=lambda image: image.name
    )
    row_of = {image.image_id: row for row, image in enumerate(images)}
    viewmats = np.tile(np.eye(4), (len(images), 1, 1))
    for row, image in enumerate(images):
        viewmats[row, :3] = image.cam_from_world().matrix()
    pixels = {image.image_id: [point.xy for point in image.points2D] for image in images}
    points3D = sorted(model.points3D.items())
    point_ids, view_ids, xys = [], [], []
    for point_row, (_, point) in enumerate(points3D):
        for element in point.track.elements:
            if element.image_id in row_of:
                point_ids.append(point_row)
                view_ids.append(row_of[element.image_id])
                xys.append(pixels[element.image_id][element.point2D_idx])
    return ColmapModel(
        names=[image.name for image in images],
        lenses=[lens_from_pycolmap(model.cameras[image.camera_id]) for image in images],
        viewmats=viewmats,
        points=np.array([point.xyz for _, point in points3D]).reshape(-1, 3),
        rgbs=np.array([point.color for _, point in points3D]).reshape(-1, 3) / 255.0,
        point_ids=np.array(point_ids, np.int64),
        view_ids=np.array(view_ids, np.int64),
        xys=np.array(xys, np.float64).reshape(-1, 2),
    )


def _suffix(model_dir: Path) -> str:
    """ ".bin" or ".txt" where all three files of a model are there (binary first), else ""."""
    for suffix in (".bin", ".txt"):
        if all(
            (model_dir / f"{name}{suffix}").is_file() for name in ("cameras", "images", "points3D")
        ):
            return suffix
    return ""


def _num_images(model_dir: Path) -> int:
    if _suffix(model_dir) == ".bin":
        head = (model_dir / "images.bin").read_bytes()[:8]
        return struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    lines = (model_dir / "images.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return sum(not line.startswith("#") for line in lines) // 2


def _require_length(path: Path, measure: Callable[[bytes], int]) -> None:
    content = path.read_bytes()
    try:
        end = measure(content)
    except (struct.error, ValueError, KeyError):
        end = None
    if end != len(content):
        problem = (
            "is cut off or damaged"
            if end is None or end > len(content)
            else "has bytes after its end"
        )
        raise ValueError(
            f"{path} {problem} ({len(content)} bytes). Copy the model again from where it was made, or run COLMAP's mapper again."
        )


def _measure_cameras(content: bytes) -> int:
    (count,) = struct.unpack_from("<Q", content)
    at = 8
    for _ in range(count):
        _, model_id = struct.unpack_from("<Ii", content, at)
        model = pycolmap.CameraModelId(model_id)
        num_params = len(pycolmap.Camera.create_from_model_id(1, model, 1.0, 1, 1).params)
        at += 24 + 8 * num_params  # id, model, width, height, then the parameters
    return at


def _measure_images(content: bytes) -> int:
    (count,) = struct.unpack_from("<Q", content)
    at = 8
    for _ in range(count):
        at = (
            content.index(b"\0", at + 64) + 1
        )  # id, quaternion, translation, camera id; then the name
        (num_points,) = struct.unpack_from("<Q", content, at)
        at += 8 + 24 * num_points  # x, y, point id
    return at


def _measure_points(content: bytes) -> int:
    (count,) = struct.unpack_from("<Q", content)
    at = 8
    for _ in range(count):
        (length,) = struct.unpack_from(
            "<Q", content, at + 43
        )  # id, position, colour, error; then the track
        at += 51 + 8 * length
    return at


def _measure_rigs(content: bytes) -> int:
    (count,) = struct.unpack_from("<Q", content)
    at = 8
    for _ in range(count):
        (num_sensors,) = struct.unpack_from("<I", content, at + 4)
        at += 8 + 8 * min(num_sensors, 1)  # id, count; the reference sensor's type and id
        for _ in range(1, num_sensors):
            (has_pose,) = struct.unpack_from("<B", content, at + 8)
            at += 9 + 56 * bool(has_pose)  # type, id, flag; quaternion and translation
    return at


def _measure_frames(content: bytes) -> int:
    (count,) = struct.unpack_from("<Q", content)
    at = 8
    for _ in range(count):
        (num_data,) = struct.unpack_from(
            "<I", content, at + 64
        )  # after id, rig, quaternion, translation
        at += 68 + 16 * num_data
    return at


_MEASURES = {
    "cameras": _measure_cameras,
    "images": _measure_images,
    "points3D": _measure_points,
    "rigs": _measure_rigs,
    "frames": _measure_frames,
}
