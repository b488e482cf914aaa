"""A scene: posed photos, and points with the observations they were made from.

`load_scene` takes what is ready to use: pinhole cameras, photos of the cameras' size. `prepare_scene` takes everything else and writes
a plain scene first: lenses undistorted, sizes matched and limited, photos turned upright. Source formats: docs/data_formats.md.

Notation: V views, P points, M observations ("view v saw point p at pixel xy").
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.cameras import Cameras
from s2d.colmap_io import (
    ColmapModel,
    find_model,
    match_observations,
    read_model,
    write_model,
)
from s2d.images import list_images, read_image, write_image
from s2d.lenses import pinhole_matrix
from s2d.plain_photos import (
    PhotoPlan,
    plain_image,
    plain_lens,
    plain_points,
    plain_viewmat,
    plan_photo,
)
from s2d.ply_io import read_points_ply
from s2d.transforms_io import find_transforms, read_transforms
from s2d.triangulation import triangulate

logger = logging.getLogger("s2d.scene")


@dataclass(frozen=True)
class SfmPoints:
    """Sparse points with their observations. All tensors on the CPU.

    In a `Scene.subset` points and rgbs are NaN, because they were made with photos that the subset must not see; `retriangulate`
    makes them anew from the observations.
    """

    points: Tensor  # [P, 3] float32 world
    rgbs: Tensor  # [P, 3] float32 in [0, 1]
    point_ids: Tensor  # [M] int64, row of `points`
    view_ids: Tensor  # [M] int64, row of the scene's views
    xys: Tensor  # [M, 2] float32 pixels


@dataclass(frozen=True, eq=False)
class Scene:
    """Every view that has a photo and a camera, in name order."""

    name: str
    cameras: Cameras
    image_paths: tuple[Path, ...]
    sfm: SfmPoints | None
    _cache: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return self.cameras.names

    def __len__(self) -> int:
        return len(self.image_paths)

    def image(self, name: str) -> Tensor:
        """Read a view's photo, once; do not write into it. [H, W, 3] float32 in [0, 1]

        Raises:
            KeyError: this scene has no such view.
            ValueError: the photo is damaged or has not the camera's size.
        """
        if name not in self._cache:
            if name not in self.names:
                raise KeyError(f"{self.name}: no view called {name!r} among {len(self)} views.")
            row = self.names.index(name)
            # `load_scene` has made sure that the stored pixels are the camera's.
            image = read_image(self.image_paths[row], oriented=False)
            size = (image.shape[1], image.shape[0])
            if size != self.cameras.sizes[row]:
                expected = self.cameras.sizes[row]
                raise ValueError(
                    f"{self.image_paths[row]} is {size[0]} x {size[1]} pixels, its camera {expected[0]} x {expected[1]}. "
                    "The photo has changed since the scene was loaded; run stage 0 again."
                )
            self._cache[name] = image
        return self._cache[name]

    def subset(self, names: Sequence[str]) -> "Scene":
        """Make a scene that knows nothing but these views: their cameras, photos and observations.

        Points with fewer than two of these views are dropped; what is left has NaN positions and colours (see `SfmPoints`).

        Raises:
            ValueError: a name that is not a view of this scene.
        """
        names = sorted(names)
        cameras = self.cameras.select(names)
        rows = [self.names.index(name) for name in names]
        return Scene(
            name=self.name,
            cameras=cameras,
            image_paths=tuple(self.image_paths[row] for row in rows),
            sfm=None if self.sfm is None else _restrict(self.sfm, rows, len(self)),
        )


def load_scene(source: Path) -> Scene:
    """Load a scene that needs no preparation.

    Args:
        source: A COLMAP scene folder (`images/`, `sparse/`), a folder with transforms.json, or such a JSON file.

    Raises:
        FileNotFoundError: no such folder, or no cameras in it.
        ValueError: damaged files, photos missing, or a scene that needs `prepare_scene`.
    """
    raw = _read_source(Path(source))
    plans = _plans(raw, max_side=0)
    unready = [plan for plan in plans if plan.needed]
    if unready:
        raise ValueError(
            f"{len(unready)} of {len(plans)} photos in {raw.root} need preparation (first: {unready[0].path.name} {unready[0].reasons[0]}). "
            "Use prepare_scene, as stage 0 does."
        )
    return _to_scene(raw)


def prepare_scene(source: Path, prepared_dir: Path, max_side: int = 0) -> Scene:
    """Load any scene; where it isn't plain, write a plain COLMAP scene to `prepared_dir` and load that.

    Plain: pinhole cameras, photos of the camera's size and stored upright, no side longer than `max_side`. Otherwise photos are
    undistorted (COLMAP's rule: as much of the picture as leaves no blank pixels), turned, and averaged down; observations and
    intrinsics move with the pixels, and views become `<name>.png`. Grey, RGBA and 16-bit photos are read as they are and need no
    preparation.

    Args:
        source: See `load_scene`.
        prepared_dir: Folder to write `images/` and `sparse/0/` into; not touched where the source is plain.
        max_side: Longest side in pixels; 0: as large as the photos are.

    Returns:
        The scene, named after the source.

    Raises:
        FileNotFoundError, ValueError: as `load_scene`, except for the last case.
    """
    if max_side < 0:
        raise ValueError(
            f"prepare_scene: max_side must be 0 (keep the size) or more, got {max_side}."
        )
    raw = _read_source(Path(source))
    plans = _plans(raw, max_side)
    unready = [plan for plan in plans if plan.needed]
    if not unready:
        return _to_scene(raw)
    logger.info(
        "preparing %d photos in %s (%d need it; first: %s %s)",
        len(plans),
        prepared_dir,
        len(unready),
        unready[0].path.name,
        unready[0].reasons[0],
    )
    return replace(_write_prepared(raw, plans, Path(prepared_dir)), name=raw.name)


def retriangulate(
    scene: Scene,
    max_error: float = 2.0,
    min_angle: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the sparse points anew from this scene's own photos and observations alone.

    Args:
        scene: Usually `scene.subset(kept)`.
        max_error: Largest reprojection error of a used observation, pixels.
        min_angle: Smallest angle between the two most different rays of a point, degrees.

    Returns:
        - points, float32, world [P, 3]; only good ones, in the order of the observations' ids
        - rgbs, mean of the photos at the used observations, in [0, 1] [P, 3]
        - errors, root mean squared reprojection error in pixels [P]

        P is 0 for a scene without observations.
    """
    sfm = scene.sfm
    if sfm is None or len(sfm.view_ids) == 0:
        return torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0)
    num = len(sfm.points)
    found = triangulate(
        sfm.xys,
        sfm.point_ids,
        sfm.view_ids,
        scene.cameras.viewmats,
        scene.cameras.Ks,
        num,
        max_error=max_error,
        min_angle=min_angle,
    )
    total, count = torch.zeros(num, 3), torch.zeros(num)
    for view, name in enumerate(scene.names):
        rows = torch.nonzero(found.used & (sfm.view_ids == view))[:, 0]
        colours = _sample(scene.image(name), sfm.xys[rows])
        total.index_add_(0, sfm.point_ids[rows], colours)
        count.index_add_(0, sfm.point_ids[rows], torch.ones(len(rows)))
    good = found.good
    logger.info(
        "re-triangulated %d of %d points from %d photos (median error %.2f px)",
        int(good.sum()),
        num,
        len(scene),
        float(found.errors[good].median()) if bool(good.any()) else 0.0,
    )
    return (
        found.points[good].float(),
        (total[good] / count[good][:, None]),
        found.errors[good].float(),
    )


class _RawScene(NamedTuple):
    """A scene as its files describe it, views in name order."""

    name: str
    root: Path
    image_paths: list[Path]
    model: ColmapModel

    @property
    def names(self) -> list[str]:
        return self.model.names


def _read_source(source: Path) -> _RawScene:
    if not source.exists():
        raise FileNotFoundError(
            f"No such scene: {source}. Expected a folder with images/ and sparse/0, or a transforms.json."
        )
    transforms = find_transforms(source)
    if source.is_dir() and (source / "sparse").is_dir():
        raw = _read_colmap(source)
    elif transforms is not None:
        raw = _read_transforms(transforms)
    else:
        raise _no_cameras(source)
    stems = [Path(name).with_suffix("").as_posix() for name in raw.names]
    if len(set(stems)) != len(stems):
        twice = next(
            name for name, stem in zip(raw.names, stems, strict=True) if stems.count(stem) > 1
        )
        raise ValueError(
            f"{raw.root}: two photos differ in their suffix only ({twice}). Every stage writes <name>.png, so rename one of them."
        )
    return raw


def _read_colmap(source: Path) -> _RawScene:
    model_dir = find_model(source)
    model = match_observations(read_model(model_dir), str(model_dir))
    images = source / "images"
    if not images.is_dir():
        raise FileNotFoundError(
            f"There is no images/ folder in {source}. Copy the photos that {model_dir} was made from there."
        )
    missing = [name for name in model.names if not (images / name).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(model.names)} images in {model_dir.relative_to(source).as_posix()}/ are missing from images/ "
            f"(first: {missing[0]}). Names must match exactly. Copy the photos to {images}."
        )
    extra = len(set(list_images(images)) - set(model.names))
    if extra:
        logger.info("%s: ignoring %d photos without a camera", images, extra)
    return _RawScene(source.resolve().name, source, [images / name for name in model.names], model)


def _read_transforms(path: Path) -> _RawScene:
    scene = read_transforms(path)
    points = rgbs = np.zeros((0, 3))
    if scene.points_path is not None:
        cloud = read_points_ply(scene.points_path)
        points, rgbs = cloud.points.double().numpy(), cloud.rgbs.double().numpy()
    none = np.zeros(0, np.int64)
    model = ColmapModel(
        scene.names, scene.lenses, scene.viewmats, points, rgbs, none, none, np.zeros((0, 2))
    )
    return _RawScene(path.resolve().parent.name, path.parent, scene.image_paths, model)


def _no_cameras(source: Path) -> Exception:
    if source.is_file():
        return ValueError(f"{source} is not a scene. Expected a folder, or a transforms.json.")
    photos = list_images(source)
    if not photos:
        return FileNotFoundError(
            f"{source} has no photos. Expected a folder with images/ and sparse/0 (COLMAP), or with a transforms.json."
        )
    return ValueError(
        f"{source} has {len(photos)} photos but no cameras (no sparse/ and no transforms.json). Run stage0_point_guidance.py on it, "
        "which finds them, or give the scene that it wrote: OUT/stage0/scene."
    )


def _plans(raw: _RawScene, max_side: int) -> list[PhotoPlan]:
    return [
        plan_photo(path, lens, max_side)
        for path, lens in zip(raw.image_paths, raw.model.lenses, strict=True)
    ]


def _write_prepared(raw: _RawScene, plans: list[PhotoPlan], prepared_dir: Path) -> Scene:
    model = raw.model
    names = [Path(name).with_suffix(".png").as_posix() for name in model.names]
    lenses = [plain_lens(plan) for plan in plans]
    xys = model.xys.copy()
    inside = np.ones(len(xys), bool)
    for view, (name, plan, lens) in enumerate(zip(names, plans, lenses, strict=True)):
        write_image(prepared_dir / "images" / name, plain_image(plan))
        rows = model.view_ids == view
        xys[rows] = plain_points(plan, model.xys[rows])
        # Undistortion crops: observations may fall outside, or be where the lens model cannot be inverted (not finite).
        inside[rows] = ((xys[rows] >= 0) & (xys[rows] <= [lens.width, lens.height])).all(1)
    write_model(
        prepared_dir / "sparse" / "0",
        ColmapModel(
            names=names,
            lenses=lenses,
            viewmats=np.stack(
                [plain_viewmat(*pair) for pair in zip(plans, model.viewmats, strict=True)]
            ),
            points=model.points,
            rgbs=model.rgbs,
            point_ids=model.point_ids[inside],
            view_ids=model.view_ids[inside],
            xys=xys[inside],
        ),
    )
    return load_scene(prepared_dir)


def _to_scene(raw: _RawScene) -> Scene:
    model = raw.model
    cameras = Cameras(
        viewmats=torch.from_numpy(model.viewmats),
        Ks=torch.from_numpy(np.stack([pinhole_matrix(lens) for lens in model.lenses])),
        sizes=tuple((lens.width, lens.height) for lens in model.lenses),
        names=tuple(model.names),
    )
    sfm = SfmPoints(
        points=torch.from_numpy(model.points).float(),
        rgbs=torch.from_numpy(model.rgbs).float(),
        point_ids=torch.from_numpy(model.point_ids),
        view_ids=torch.from_numpy(model.view_ids),
        xys=torch.from_numpy(model.xys).float(),
    )
    return Scene(raw.name, cameras, tuple(raw.image_paths), sfm if len(model.points) else None)


def _restrict(sfm: SfmPoints, rows: list[int], num_views: int) -> SfmPoints:
    """Keep the observations by the views `rows`, and of these the points that two or more of the views see."""
    view_row = torch.full((num_views,), -1)
    view_row[rows] = torch.arange(len(rows))
    seen = view_row[sfm.view_ids] >= 0
    point_ids, view_ids, xys = sfm.point_ids[seen], view_row[sfm.view_ids[seen]], sfm.xys[seen]
    pairs = torch.unique(
        torch.stack([point_ids, view_ids], 1), dim=0
    )  # a track may see a point twice in one view
    num_views_of = torch.bincount(pairs[:, 0], minlength=len(sfm.points))
    kept = num_views_of >= 2
    point_row = torch.cumsum(kept, 0) - 1
    stays = kept[point_ids]
    unknown = torch.full((int(kept.sum()), 3), torch.nan)
    return SfmPoints(
        unknown, unknown.clone(), point_row[point_ids[stays]], view_ids[stays], xys[stays]
    )


def _sample(
    image: Tensor,  # [H, W, 3]
    xys: Tensor,  # [M, 2]
) -> Tensor:
    """Sample colours between pixel centres, bilinear; [M, 3]."""
    size = torch.tensor([image.shape[1], image.shape[0]])
    # With align_corners=False, -1 and 1 are the picture's outer edges: the corner-origin convention.
    grid = (xys / size * 2 - 1)[None, None]
    found = F.grid_sample(
        image.permute(2, 0, 1)[None], grid, padding_mode="border", align_corners=False
    )
    return found[0, :, 0].T
