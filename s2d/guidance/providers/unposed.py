"""Cameras of photos from a visual geometry model, where structure from motion finds none or is not wanted."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from s2d.colmap_io import ColmapModel
from s2d.geometry import invert_rigid
from s2d.guidance.providers.filters import FilterSettings, believed_pixels
from s2d.guidance.providers.interface import Provider
from s2d.images import read_image, resize_image
from s2d.lenses import Lens
from s2d.plain_photos import plain_points, plain_viewmat, plan_photo
from s2d.poses.photos import Photo
from s2d.poses.place import Placement
from s2d.poses.world import level_world

logger = logging.getLogger("s2d.poses")

READ_SIDE = 1024  # pixels: more than any of the models looks at


def place_by_model(provider: Provider, photos: Sequence[Photo], name: str) -> Placement:
    """Take the cameras that a model sees in the photos; stands in for `place_photos`.

    Every photo gets a camera, so photos that are held out must not be among them: they would shape the cameras of the others.

    Args:
        provider: A model that needs no cameras.
        photos: In name order.
        name: Of the provider, for the record.

    Returns:
        Pinhole cameras of the stored pixels in a level world, without sparse points.

    Raises:
        ValueError: the model needs cameras, or saw no depth anywhere.
    """
    upright = [_read(photo) for photo in photos]
    geometry = provider.predict(upright)
    points = []
    for depth, lifted, confidence in zip(
        geometry.depths, geometry.points, geometry.confidence, strict=True
    ):
        chosen, _ = believed_pixels(depth, confidence, FilterSettings())
        points.append(lifted[chosen][::50])
    points = torch.cat(points).double()
    if len(points) == 0:
        raise ValueError(
            f"--provider {name}: no depth in any of the {len(photos)} photos. Check that the weights belong to the model (--weight-path)."
        )
    viewmats = geometry.cameras.viewmats.double()
    world = level_world(viewmats.numpy(), points.numpy())
    viewmats = world.viewmats(viewmats.numpy())
    lenses, stored = [], []
    for photo, camera, viewmat in zip(photos, geometry.cameras, viewmats, strict=True):
        K = camera.scaled(photo.info.oriented_size).Ks[0].double().numpy()
        lens, of_stored = _as_stored(photo, K, viewmat)
        lenses.append(lens)
        stored.append(of_stored)
    logger.warning(
        "cameras: from --provider %s, good to about a degree. Sharper ones: more photos, or --optim-pose in stages 1 and 3.",
        name,
    )
    none = np.zeros(0, np.int64)
    model = ColmapModel(
        names=[photo.name for photo in photos],
        lenses=lenses,
        viewmats=np.stack(stored),
        points=np.zeros((0, 3)),
        rgbs=np.zeros((0, 3)),
        point_ids=none,
        view_ids=none,
        xys=np.zeros((0, 2)),
    )
    record = {"method": f"provider {name}", "placed": model.names, "held_out": {}, "left_out": {}}
    return Placement(model, {}, record)


def _read(photo: Photo) -> torch.Tensor:
    """Upright and no larger than a model looks at. [H, W, 3]"""
    image = read_image(photo.path)
    height, width = image.shape[:2]
    scale = min(1.0, READ_SIDE / max(width, height))
    return resize_image(image, max(1, round(width * scale)), max(1, round(height * scale)))


def _as_stored(photo: Photo, K: np.ndarray, viewmat: np.ndarray) -> tuple[Lens, np.ndarray]:
    """The camera of the upright photo as that of the stored pixels, which COLMAP's files speak of."""
    width, height = photo.info.stored_size
    # What `plain_photos` would do to a camera of the stored pixels, undone.
    plan = plan_photo(photo.path, Lens("PINHOLE", width, height, (1.0, 1.0, width / 2, height / 2)))
    turned = plain_viewmat(plan, np.eye(4))
    origin, right, down = plain_points(plan, np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    to_upright = np.stack([right - origin, down - origin], 1)
    center = np.linalg.solve(to_upright, K[:2, 2] - origin)
    focal = np.abs(np.linalg.solve(to_upright, np.diag(K)[:2]))
    lens = Lens("PINHOLE", width, height, (*map(float, focal), *map(float, center)))
    return lens, invert_rigid(torch.from_numpy(turned)).numpy() @ viewmat
