"""Provider `points`: a cloud that the user has, in the same world frame as the cameras.

PLY (points or a mesh's vertices), LAS / LAZ (laser scans), GLB / OBJ and what else trimesh reads (point clouds as they are, meshes sampled on their
surface). A cloud without colours is coloured from the kept photos.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from s2d.gaussians import gaussians_from_points
from s2d.geometry import project
from s2d.guidance.cloud import DepthMap, Reconstruction, SurfaceCloud
from s2d.guidance.render import render_cloud
from s2d.log import logger
from s2d.ply_io import read_points_ply
from s2d.scene import Scene

MESH_SAMPLES = 400_000  # points on a mesh: about one per pixel of a few photos
MAX_SPACING = 4.0  # times the median: a lone point is not a large surface
MIN_SEEN = 0.01  # share of the points that some kept camera must see, else the frames differ


class _File(NamedTuple):
    points: Tensor  # [P, 3]
    rgbs: Tensor | None  # [P, 3], None: the file has no colours
    confidence: Tensor | None  # [P]


def load_points(path: Path, kept: Scene, seed: int = 0) -> Reconstruction:
    """Read a cloud and make it ready to be drawn; depth maps are its depth at the kept cameras.

    Args:
        path: .ply, .las, .laz, .glb, .gltf, .obj, .off or .stl.
        kept: The kept views, for the colours and as a check of the frame.
        seed: Of the points sampled on a mesh.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, has no points, or lies where no kept camera looks.
    """
    file = _read(Path(path), seed)
    if len(file.points) == 0:
        raise ValueError(f"{path} has no points. Expected a point cloud or a mesh.")
    if not bool(file.points.isfinite().all()):
        raise ValueError(f"{path} has points that are not finite. Clean the cloud first.")
    seen = torch.zeros(len(file.points), dtype=torch.bool)
    for camera in kept.cameras:
        xy, depth = project(file.points, camera.Ks[0], camera.viewmats[0])
        seen |= (
            (depth > 0)
            & (xy > 0).all(1)
            & (xy < torch.tensor([camera.width, camera.height])).all(1)
        )
    if seen.float().mean() < MIN_SEEN:
        raise ValueError(
            f"{path}: {int(seen.sum())} of {len(seen)} points are in view of a kept camera. Expected a cloud in the world frame of the "
            "cameras: same origin, axes and scale. Align it with the scene first."
        )
    spacing = _spacing(file.points)
    grey = torch.full_like(file.points, 0.5)
    cloud = SurfaceCloud.without_orientation(
        file.points, grey if file.rgbs is None else file.rgbs, spacing, file.confidence
    )
    pictures = {camera.names[0]: render_cloud(cloud, camera) for camera in kept.cameras}
    if file.rgbs is None:
        logger.info("stage0: %s has no colours: taking them from the kept photos", path)
        coloured, rgbs = colour_from_photos(
            cloud, kept, {name: picture.depth for name, picture in pictures.items()}
        )
        if not bool(coloured.any()):
            raise ValueError(
                f"{path} has no colours, and no point of it is visible in a kept photo. Give the points colours."
            )
        chosen = coloured.nonzero()[:, 0]
        cloud = SurfaceCloud.without_orientation(
            cloud.points[chosen], rgbs[chosen], spacing[chosen], cloud.confidence[chosen]
        )
    depth_maps = {
        name: DepthMap(picture.depth.numpy(), picture.coverage.float().numpy())
        for name, picture in pictures.items()
    }
    return Reconstruction(cloud, depth_maps)


def colour_from_photos(
    cloud: SurfaceCloud, kept: Scene, depths: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean colour of each point over the photos that see it.

    Args:
        cloud: World.
        kept: Photos and cameras.
        depths: The cloud's own depth at each kept camera, by name. [H, W]

    Returns:
        - which points are seen at all [P] bool
        - colours [P, 3]
    """
    total, count = torch.zeros_like(cloud.points), torch.zeros(len(cloud))
    for camera in kept.cameras:
        xy, z = project(cloud.points, camera.Ks[0], camera.viewmats[0])
        inside = (
            (z > 0) & (xy > 0).all(1) & (xy < torch.tensor([camera.width, camera.height])).all(1)
        )
        rows = inside.nonzero()[:, 0]
        column, line = xy[rows].long().unbind(1)
        in_front = z[rows] <= depths[camera.names[0]][line, column] * 1.02 + 2 * cloud.sizes[rows]
        rows, column, line = rows[in_front], column[in_front], line[in_front]
        total[rows] += kept.image(camera.names[0])[line, column]
        count[rows] += 1
    return count > 0, total / count.clamp(min=1)[:, None]


def _spacing(points: Tensor) -> Tensor:
    """Distance to the neighbours, without the outliers. [P]"""
    if len(points) < 2:
        return torch.full((len(points),), 1e-3)
    spacing = gaussians_from_points(points, torch.zeros_like(points), 0).log_scales[:, 0].exp()
    return spacing.clamp(max=MAX_SPACING * float(spacing.median()))


def _read(path: Path, seed: int) -> _File:
    if not path.is_file():
        raise FileNotFoundError(f"No such point cloud: {path}.")
    suffix = path.suffix.lower()
    if suffix == ".ply":
        cloud = read_points_ply(path)
        # A file without colours is read as one shade of grey.
        rgbs = None if bool((cloud.rgbs == 0.5).all()) else cloud.rgbs
        return _File(
            cloud.points, rgbs, None if cloud.confidence is None else cloud.confidence.clamp(0, 1)
        )
    if suffix in (".las", ".laz"):
        return _read_las(path)
    if suffix in (".glb", ".gltf", ".obj", ".off", ".stl"):
        return _read_trimesh(path, seed)
    raise ValueError(
        f"{path}: unknown kind of point cloud. Expected .ply, .las, .laz, .glb, .gltf, .obj, .off or .stl."
    )


def _read_las(path: Path) -> _File:
    import laspy  # slow to import, and rarely needed

    if path.suffix.lower() == ".laz" and not laspy.LazBackend.detect_available():
        raise ValueError(
            f"{path} is compressed, which needs one more package. Run: pip install lazrs"
        )
    try:
        las = laspy.read(path)
    except (laspy.LaspyException, ValueError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not a LAS file or is cut off ({error}). Make or download it again."
        ) from error
    points = torch.from_numpy(np.ascontiguousarray(las.xyz)).float()
    if not {"red", "green", "blue"} <= set(las.point_format.dimension_names):
        return _File(points, None, None)
    colours = np.stack([las.red, las.green, las.blue], 1).astype(np.float32)
    if colours.max(initial=0) == 0:  # the fields are there and were never filled
        return _File(points, None, None)
    # The format says 16 bits; many programs write 8.
    return _File(
        points, torch.from_numpy(colours / (65535.0 if colours.max() > 255 else 255.0)), None
    )


def _read_trimesh(path: Path, seed: int) -> _File:
    import trimesh  # slow to import, and rarely needed

    try:
        scene = trimesh.load_scene(path)
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OSError,
    ) as error:  # trimesh has no error class of its own
        raise ValueError(
            f"{path} cannot be read as a model ({error!r}). Make or export it again."
        ) from error
    parts = scene.dump() if len(scene.geometry) else []  # moved to where the scene graph has them
    clouds = [part for part in parts if isinstance(part, trimesh.PointCloud)]
    meshes = [part for part in parts if isinstance(part, trimesh.Trimesh)]
    points, rgbs = [np.zeros((0, 3))], [np.zeros((0, 3))]
    for cloud in clouds:
        points.append(cloud.vertices)
        has_colours = len(cloud.colors) == len(cloud.vertices)
        rgbs.append(
            cloud.colors[:, :3] / 255.0
            if has_colours
            else np.full((len(cloud.vertices), 3), np.nan)
        )
    area = sum(mesh.area for mesh in meshes)
    for mesh in meshes:
        count = round(MESH_SAMPLES * mesh.area / area) if area > 0 else 0
        if count == 0:
            continue
        if mesh.visual.kind is None:
            sampled, _ = trimesh.sample.sample_surface(mesh, count, seed=seed)
            colours = np.full((count, 3), np.nan)
        else:
            sampled, _, colours = trimesh.sample.sample_surface(
                mesh, count, sample_color=True, seed=seed
            )
            colours = np.asarray(colours)[:, :3] / 255.0
        points.append(sampled)
        rgbs.append(colours)
    points, rgbs = (torch.from_numpy(np.concatenate(arrays)).float() for arrays in (points, rgbs))
    # One part without colours: all colours come from the photos, so that no seam shows.
    return _File(points, None if bool(rgbs.isnan().any()) else rgbs, None)
