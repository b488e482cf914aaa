"""What is known of the depth of a scene, to measure stage 0 against: stereo on many photos, and the scene's sparse points.

The first is dense, but the same method with more photos, so it may share a mistake; only what many photos agree on counts. The second is another
program's work on other evidence (features matched over all photos), but it knows corners and textures alone. Both read photos that stage 0 never sees.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from s2d.files import atomic_write_bytes
from s2d.geometry import project
from s2d.guidance.depth_filter import MAX_PIXELS, MAX_RELATIVE, without_speckles
from s2d.guidance.kernels import View, check_consistency
from s2d.guidance.mvs import match_photos
from s2d.log import logger
from s2d.scene import Scene

MAX_PHOTOS = 12  # of a scene: the time grows with their number, and four must agree
MIN_AGREE = 4  # photos beside the pixel's own
MAX_COST = 0.5
MIN_ANGLE = np.radians(2.0)  # below, two percent of depth is less than the photos can tell
MAX_COLOUR_ERROR = 0.1
MIN_TRACK = 4  # photos in which a sparse point was found
MAX_SPARSE_ERROR = 1.0  # pixels between it and where it was found in this photo


class SparseDepth(NamedTuple):
    """Sparse points in one view."""

    xy: np.ndarray  # [P, 2] pixels
    depth: np.ndarray  # [P] camera z


@dataclass
class Reference:
    """Planes of many photos of a scene, and what they think of each other's."""

    names: tuple[str, ...]
    views: list[View]  # with planes
    costs: list[np.ndarray]  # [H, W] each
    agree: list[np.ndarray]
    through: list[np.ndarray]
    angle: list[np.ndarray]
    colour_error: list[np.ndarray]

    @cached_property
    def sure(self) -> list[np.ndarray]:
        """Where the depth of each photo may count as true. [H, W] bool each"""
        result = []
        for row, view in enumerate(self.views):
            good = (self.agree[row] >= MIN_AGREE) & (self.through[row] == 0)
            good &= (self.costs[row] < MAX_COST) & (self.angle[row] > MIN_ANGLE)
            good &= self.colour_error[row] < MAX_COLOUR_ERROR
            result.append(without_speckles(view.depth, good))
        return result


def photos_of(names: Sequence[str], kept: Sequence[str]) -> list[str]:
    """The kept photos and, up to MAX_PHOTOS, others spread evenly between them."""
    others = [name for name in names if name not in kept]
    room = max(MAX_PHOTOS - len(kept), 0)
    if len(others) > room:
        rows = np.linspace(0, len(others) - 1, room).round().astype(int)
        others = [others[row] for row in rows]
    return sorted([*kept, *others])


def reference_of(scene: Scene, kept: Sequence[str], side: int, cache: Path) -> Reference:
    """Read the reference of a scene from `cache`, or make it and put it there.

    Args:
        scene: With all photos.
        kept: The photos whose depth will be measured.
        side: Longest side of the photos as matched.
        cache: A folder.
    """
    names = photos_of(scene.names, kept)
    path = cache / f"{scene.name}_{side}_{len(names)}.npz"
    if not path.is_file():
        logger.warning("%s: stereo on %d photos, once, kept in %s", scene.name, len(names), path)
        atomic_write_bytes(path, _make(scene, names, side))
    with np.load(path) as arrays:
        stored = {key: arrays[key] for key in arrays.files}
    if stored["names"].tolist() != names:
        raise ValueError(f"{path} was made for other photos. Delete it, or choose another --cache.")
    views = [
        View(int(width), int(height), K, viewmat, rgb=rgb.astype(np.float32) / 255, planes=planes)
        for width, height, K, viewmat, rgb, planes in zip(
            *(stored[key] for key in ("width", "height", "K", "viewmat", "rgb", "planes")),
            strict=True,
        )
    ]
    fields = ("costs", "agree", "through", "angle", "colour_error")
    return Reference(tuple(names), views, *(list(stored[key]) for key in fields))


def _make(scene: Scene, names: Sequence[str], side: int) -> bytes:
    views, costs, _ = match_photos(scene.subset(names), side=side)
    found = []
    for row in range(len(views)):
        gains = check_consistency(views, row, MAX_PIXELS, MAX_RELATIVE).gains
        found.append(check_consistency(views, row, MAX_PIXELS, MAX_RELATIVE, gains))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=np.array(names),
        width=[view.width for view in views],
        height=[view.height for view in views],
        K=[view.K for view in views],
        viewmat=[view.viewmat for view in views],
        rgb=[np.rint(view.rgb * 255).astype(np.uint8) for view in views],
        planes=[view.planes for view in views],
        costs=costs,
        agree=[one.agree for one in found],
        through=[one.through for one in found],
        angle=[one.angle for one in found],
        colour_error=[one.colour_error for one in found],
    )
    return buffer.getvalue()


def sparse_depth(scene: Scene, name: str, view: View) -> SparseDepth:
    """Sparse points that one photo has seen, with a long track and a small error, in pixels of `view`. Empty where the scene has none."""
    if scene.sfm is None:
        return SparseDepth(np.zeros((0, 2)), np.zeros(0))
    row = scene.names.index(name)
    tracks = scene.sfm.point_ids.bincount(minlength=len(scene.sfm.points))
    chosen = (scene.sfm.view_ids == row) & (tracks[scene.sfm.point_ids] >= MIN_TRACK)
    points = scene.sfm.points[scene.sfm.point_ids[chosen]]
    xy, depth = project(points, scene.cameras.Ks[row], scene.cameras.viewmats[row])
    good = (depth > 0) & ((xy - scene.sfm.xys[chosen]).norm(dim=1) < MAX_SPARSE_ERROR)
    width, height = scene.cameras.sizes[row]
    scale = np.array([view.width / width, view.height / height])
    return SparseDepth(
        scene.sfm.xys[chosen][good].double().numpy() * scale, depth[good].double().numpy()
    )
