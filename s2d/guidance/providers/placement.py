"""A model's geometry as one cloud in the scene's frame.

Where the scene's cameras are known they are better than a network's, and a photo's pixels belong on their rays: only the depth is taken
from the network, and `scale` brings it to the scene's unit.
"""

import numpy as np
import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.guidance.cloud import DepthMap, Reconstruction, SurfaceCloud
from s2d.guidance.depth_filter import MAX_PIXELS, MAX_RELATIVE
from s2d.guidance.kernels import View, fuse
from s2d.guidance.matches import SparsePoints, match_sparse
from s2d.guidance.providers.filters import FilterSettings, believed_pixels
from s2d.guidance.providers.interface import Geometry, Provider
from s2d.guidance.providers.scale import scene_depths
from s2d.log import logger
from s2d.scene import Scene


def reconstruct_with(provider: Provider, kept: Scene, settings: FilterSettings) -> Reconstruction:
    """Point guidance from a scene with known cameras: what stage 0 calls.

    Raises:
        ValueError: the model saw nothing, or its scale cannot be found; says what to do.
    """
    photos = [kept.image(name) for name in kept.names]
    sparse = sparse_points(kept)
    logger.info("stage0: %d sparse points matched in %d photos", len(sparse.points), len(kept))
    geometry = provider.predict(photos, kept.cameras)
    return place(geometry, kept.cameras, sparse, settings)


def cloud_in_scene(
    geometry: Geometry,
    cameras: Cameras,
    sparse: SparsePoints | None,
    settings: FilterSettings,
) -> SurfaceCloud:
    """The cloud of `place` alone."""
    return place(geometry, cameras, sparse, settings).cloud


def place(
    geometry: Geometry,
    cameras: Cameras,
    sparse: SparsePoints | None,
    settings: FilterSettings,
) -> Reconstruction:
    """Bring a model's depths to the scene, drop what is not to be believed, and fuse them.

    Args:
        geometry: Of the photos of `cameras`, in the same order.
        cameras: The scene's, for photos of the same sizes; `geometry.cameras` itself where the scene has no others.
        sparse: Points of the scene and which two cameras saw each; None or none: cameras alone fix the scale.
        settings: Thresholds of the filters.

    Returns:
        One cloud, and each photo's depth at the photo's size.

    Raises:
        ValueError: numbers of photos differ, no photo has any depth, or a scale cannot be found.
    """
    if len(geometry.cameras) != len(cameras):
        raise ValueError(
            f"place: the model saw {len(geometry.cameras)} photos, the scene has {len(cameras)} cameras. Expected the same photos."
        )
    depths = scene_depths(geometry, cameras, sparse)
    views, kept_pixels, all_pixels = [], 0, 0
    for row, (camera, depth) in enumerate(zip(cameras, depths, strict=True)):
        confidence = geometry.confidence[row]
        chosen, gave_way = believed_pixels(depth, confidence, settings)
        if gave_way:
            logger.warning(
                "stage0: %s: little to believe, thresholds lowered (%s)",
                camera.names[0],
                gave_way,
            )
        kept_pixels, all_pixels = kept_pixels + int(chosen.sum()), all_pixels + depth.numel()
        views.append(_view(camera, depth, chosen, confidence.clamp(min=1e-3), geometry.rgbs[row]))
    if kept_pixels == 0:
        raise ValueError(
            f"The model found no depth in any of the {len(cameras)} photos. Check that the weights belong to the model (--weight-path), or use "
            "--provider mvs."
        )
    cloud = SurfaceCloud(
        *(torch.from_numpy(array) for array in fuse(views, MAX_PIXELS, MAX_RELATIVE))
    )
    logger.info(
        "stage0: %d points from %.0f %% of the pixels", len(cloud), 100 * kept_pixels / all_pixels
    )
    return Reconstruction(
        cloud,
        {
            camera.names[0]: _depth_map(view, camera)
            for camera, view in zip(cameras, views, strict=True)
        },
    )


def sparse_points(kept: Scene) -> SparsePoints:
    """Matches between the photos of a scene along epipolar lines, triangulated."""
    views = []
    for camera in kept.cameras:
        rgb = kept.image(camera.names[0])
        grey = (rgb @ torch.tensor([0.299, 0.587, 0.114])).numpy()
        view = _pinhole(camera)
        view.grey = np.ascontiguousarray(grey, np.float32)
        views.append(view)
    return match_sparse(views)


def _pinhole(camera: Cameras) -> View:
    return View(
        camera.width,
        camera.height,
        camera.Ks[0].double().numpy(),
        camera.viewmats[0].double().numpy(),
    )


def _view(camera: Cameras, depth: Tensor, chosen: Tensor, confidence: Tensor, rgb: Tensor) -> View:
    """A photo at the model's resolution with a plane per chosen pixel."""
    view = _pinhole(camera.scaled((depth.shape[1], depth.shape[0])))
    w = torch.where(chosen, 1 / depth.clamp(min=1e-12), torch.nan)
    slopes = [_slope(w, 1), _slope(w, 0)]
    planes = torch.stack([w.nan_to_num(0.0), *slopes], -1)
    view.planes = np.ascontiguousarray(planes.numpy(), np.float32)
    view.confidence = np.ascontiguousarray((confidence * chosen).numpy(), np.float32)
    view.rgb = np.ascontiguousarray(rgb.numpy(), np.float32)
    return view


def _slope(w: Tensor, axis: int) -> Tensor:
    """Change of w per pixel, from the side where w is straighter: on a crease that is the pixel's own surface. NaN: not chosen. [h, w]"""
    w = w.movedim(axis, 0)
    padded = torch.cat([torch.full_like(w[:2], torch.nan), w, torch.full_like(w[:2], torch.nan)])
    steps = padded.diff(dim=0)  # [n + 3, ...]: step k leads to pixel k - 1
    bends = steps.diff(dim=0).abs()  # [n + 2, ...]: bend k is that of pixel k - 1
    count = len(w)
    sides = torch.stack([steps[1 : count + 1], steps[2 : count + 2]])
    bend = torch.stack([bends[:count], bends[2:]])
    # A side that ends after one pixel cannot show how straight it is: it counts little beside one that can.
    weight = 1 / (bend.nan_to_num(torch.inf).clamp(max=1e3) / w.abs() + 1e-6).square()
    weight = torch.where(sides.isnan(), 0.0, weight)
    slope = (weight * sides.nan_to_num(0)).sum(0) / weight.sum(0).clamp(min=1e-30)
    return slope.nan_to_num(0.0).movedim(0, axis)


def _depth_map(view: View, camera: Cameras) -> DepthMap:
    """At the photo's own size: each of its pixels takes the nearest one of the model's."""
    rows = torch.div(
        (2 * torch.arange(camera.height) + 1) * view.height,
        2 * camera.height,
        rounding_mode="floor",
    )
    columns = torch.div(
        (2 * torch.arange(camera.width) + 1) * view.width, 2 * camera.width, rounding_mode="floor"
    )
    at = np.ix_(rows.numpy(), columns.numpy())
    return DepthMap(np.ascontiguousarray(view.depth[at]), np.ascontiguousarray(view.confidence[at]))
