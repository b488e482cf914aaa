"""From a folder of photos to a scene with cameras: solve the kept photos, place the others afterwards, write what every stage reads.

The photos that are not kept come last: the cameras, points and the frame of the world are made from the kept photos alone, and what is held
out is placed in them for the evaluation. Other pixels in a photo that is held out change nothing but its own camera.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycolmap

from s2d.colmap_io import ColmapModel, write_model
from s2d.images import read_image
from s2d.lenses import Lens
from s2d.plain_photos import plain_viewmat, plan_photo
from s2d.poses.features import working_scale
from s2d.poses.mapping import Solution, solve
from s2d.poses.photos import Photo, leave_out_copies
from s2d.poses.register import Registered, register
from s2d.poses.world import WorldTransform, level_world
from s2d.scene import Scene, load_scene, prepare_scene

logger = logging.getLogger("s2d.poses")

ADVICE = (
    "Take the photos again so that each shows at least two thirds of what the one before it shows: a step to the side between one and "
    "the next (not turning on the spot), everything sharp, nothing moving, enough texture, the same zoom; 6 to 12 are a good number."
)


class Placement(NamedTuple):
    """Cameras for photos, in a level world of usual size (`s2d.poses.world`)."""

    model: ColmapModel  # of all photos that were placed, stored pixels; points and observations are of the kept ones alone
    left_out: dict[str, str]  # name → why a photo has no camera
    record: dict[str, Any]  # JSON: what was tried


def place_photos(
    kept: Sequence[Photo], held_out: Sequence[Photo], scratch: Path, seed: int = 0
) -> Placement:
    """Find the cameras of photos.

    Args:
        kept: What the scene is made from.
        held_out: Photos that get a camera and give nothing.
        scratch: Folder for what an interrupted run goes on from.
        seed: The same photos and seed give the same bits.

    Raises:
        ValueError: fewer than two kept photos could be placed.
    """
    kept, left_out = leave_out_copies(list(kept))
    if len(kept) < 2:
        raise ValueError(
            f"All {len(left_out) + 1} photos are copies of {kept[0].name}. Expected at least 2 photos from different places. {ADVICE}"
        )
    with _quiet_colmap():
        solution = solve(kept, scratch, seed)
        if solution is None:
            raise ValueError(_nothing_placed(kept))
        placed = {kept[image_id - 1].name for image_id in solution.model.reg_image_ids()}
        others = register(solution, kept, held_out, seed) if held_out else {}
    for photo in kept:
        if photo.name not in placed:
            left_out[photo.name] = "has too little in common with the other photos"
    for photo in held_out:
        if photo.name not in others:
            left_out[photo.name] = "has too little in common with the kept photos"
    for name, reason in left_out.items():
        logger.warning("cameras: leaving out %s: it %s", name, reason)
    photos = {photo.name: photo for photo in (*kept, *held_out)}
    model = _to_model(solution, kept)
    world = _world_of(model, photos)  # from the kept photos alone
    model = _join(model, others, photos)
    model = model._replace(
        viewmats=world.viewmats(model.viewmats), points=world.points(model.points)
    )
    record = {
        "method": "pycolmap " + pycolmap.__version__,
        "placed": sorted(placed),
        "held_out": {name: found.num_inliers for name, found in sorted(others.items())},
        "left_out": left_out,
        "best": solution.attempt.record(),
        "attempts": [attempt.record() for attempt in solution.attempts],
        "lenses": {
            f"{lens.model} {lens.width} x {lens.height}": [round(value, 4) for value in lens.params]
            for lens in dict.fromkeys(model.lenses)
        },
    }
    return Placement(model, left_out, record)


def write_photo_scene(
    placement: Placement, root: Path, name: str, scene_dir: Path, scratch: Path, max_side: int
) -> Scene:
    """Write the placed photos as a plain COLMAP scene: undistorted, upright, no side longer than `max_side`.

    Args:
        placement: The cameras.
        root: Folder that photos are named below.
        name: Of the scene.
        scene_dir: Folder to write `images/` and `sparse/0/` into.
        scratch: Folder for a scene of the photos as they are.
        max_side: As for `prepare_scene`.

    Returns:
        The scene. Views of photos that had to change are called `<name>.png`.
    """
    raw = scratch / "photos_with_cameras"
    shutil.rmtree(raw, ignore_errors=True)
    for photo in placement.model.names:
        (raw / "images" / photo).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / photo, raw / "images" / photo)
    write_model(raw / "sparse" / "0", placement.model)
    scene = prepare_scene(raw, scene_dir, max_side)
    if not scene_dir.is_dir():  # plain already: the copies are the scene
        raw.rename(scene_dir)
        scene = load_scene(scene_dir)
    return replace(scene, name=name)


@contextmanager
def _quiet_colmap() -> Iterator[None]:
    """Silence COLMAP's log: it reports every registration, and calls an attempt that fails an error."""
    level = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = int(pycolmap.logging.FATAL)
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = level


def _nothing_placed(photos: Sequence[Photo]) -> str:
    sizes = {tuple(sorted(photo.info.stored_size)) for photo in photos}
    mixed = (
        f" They have {len(sizes)} different sizes; crops and screenshots have no usable lens."
        if len(sizes) > 1
        else ""
    )
    return (
        f"No two of the {len(photos)} photos could be placed (first: {photos[0].name}): too few points are seen from two different places."
        f"{mixed} {ADVICE} If you have cameras already, pass a COLMAP scene or a transforms.json."
    )


def _stored_lens(camera: pycolmap.Camera, photo: Photo) -> Lens:
    """A camera in working pixels as the lens of the stored picture."""
    lengths = camera.params[:3] / working_scale(photo)  # f, cx, cy; what follows has no unit
    return Lens(
        camera.model_name,
        *photo.info.stored_size,
        (*map(float, lengths), *map(float, camera.params[3:])),
    )


def _to_model(solution: Solution, photos: Sequence[Photo]) -> ColmapModel:
    """The solution in stored pixels; ids of images are in name order, as the photos are."""
    model = solution.model
    placed = [(image_id, photos[image_id - 1]) for image_id in sorted(model.reg_image_ids())]
    images = [model.images[image_id] for image_id, _ in placed]
    points3D = sorted(model.points3D)
    point_row = {point_id: row for row, point_id in enumerate(points3D)}
    view_ids, point_ids, xys = [], [], []
    for row, (image, (_, photo)) in enumerate(zip(images, placed, strict=True)):
        seen = [point for point in image.points2D if point.has_point3D()]
        view_ids += [row] * len(seen)
        point_ids += [point_row[point.point3D_id] for point in seen]
        xys += [point.xy / working_scale(photo) for point in seen]
    found = ColmapModel(
        names=[photo.name for _, photo in placed],
        lenses=[
            _stored_lens(model.cameras[image.camera_id], photo)
            for image, (_, photo) in zip(images, placed, strict=True)
        ],
        viewmats=np.stack(
            [np.vstack([image.cam_from_world().matrix(), [0.0, 0.0, 0.0, 1.0]]) for image in images]
        ),
        points=np.array([model.points3D[point_id].xyz for point_id in points3D]),
        rgbs=np.zeros((len(points3D), 3)),
        point_ids=np.array(point_ids, np.int64),
        view_ids=np.array(view_ids, np.int64),
        xys=np.array(xys, np.float64),
    )
    return found._replace(rgbs=_colours(found, [photo for _, photo in placed]))


def _colours(model: ColmapModel, photos: Sequence[Photo]) -> np.ndarray:
    """The mean colour of each point's pixels. [P, 3]"""
    total, count = np.zeros((len(model.points), 3)), np.zeros((len(model.points), 1))
    for row, photo in enumerate(photos):
        image = read_image(photo.path, oriented=False).numpy()
        at = model.view_ids == row
        x, y = np.clip(model.xys[at].astype(int), 0, [image.shape[1] - 1, image.shape[0] - 1]).T
        np.add.at(total, model.point_ids[at], image[y, x])
        np.add.at(count, model.point_ids[at], 1)
    return total / np.maximum(count, 1)


def _world_of(model: ColmapModel, photos: dict[str, Photo]) -> WorldTransform:
    """The level world, by cameras turned upright with their pictures."""
    plans = [
        plan_photo(photos[name].path, lens)
        for name, lens in zip(model.names, model.lenses, strict=True)
    ]
    upright = [plain_viewmat(*pair) for pair in zip(plans, model.viewmats, strict=True)]
    return level_world(np.stack(upright), model.points)


def _join(
    model: ColmapModel, others: dict[str, Registered], photos: dict[str, Photo]
) -> ColmapModel:
    """Add photos that see no points; all in name order."""
    names = [*model.names, *others]
    lenses = [
        *model.lenses,
        *(_stored_lens(found.camera, photos[name]) for name, found in others.items()),
    ]
    bottom = np.array([[0.0, 0.0, 0.0, 1.0]])
    viewmats = [
        *model.viewmats,
        *(np.vstack([found.cam_from_world, bottom]) for found in others.values()),
    ]
    order = sorted(range(len(names)), key=names.__getitem__)
    row_of = np.empty(len(names), np.int64)
    row_of[order] = np.arange(len(names))
    return model._replace(
        names=[names[row] for row in order],
        lenses=[lenses[row] for row in order],
        viewmats=np.stack([viewmats[row] for row in order]),
        view_ids=row_of[model.view_ids],
    )
