"""Provider `mvs`: dense multi-view stereo from photos with known cameras, on the CPU.

Sparse matches bound the depth; PatchMatch finds a plane per pixel of every photo, from coarse to fine, first from the photos alone,
then also by agreement with the other photos' depth; what several photos agree on is fused into one cloud.

Notation: w is inverse depth (1 / world units); a level is one resolution of all photos.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch

from s2d.guidance.cloud import DepthMap, Reconstruction, SurfaceCloud
from s2d.guidance.depth_filter import MAX_PIXELS, MAX_RELATIVE, believe
from s2d.guidance.kernels import View, fuse, patchmatch, smooth_planes
from s2d.guidance.matches import SparsePoints, match_sparse
from s2d.log import logger, progress
from s2d.scene import Scene

WORKING_SIDE = 640  # longest side of the photos as matched, pixels: depth needs no more, time grows with its square
MAX_SOURCES = 6  # source photos per photo
GEOMETRIC_WEIGHT = 0.15  # cost per pixel of round trip: at most 0.45, so that a good match can overrule the neighbours
SMALLEST_SIDE = 48  # of a coarse level, pixels
# Where texture is weak, the best of many poor matches is chance, and neighbours on one surface disagree: in the end their median counts.
SMOOTH_REACH, SMOOTH_SPACING = 4, 2  # pixels: 25 neighbours
SMOOTH_COLOUR = 0.04  # mean over the channels; more is another surface, mostly
MIN_DENSE_POINTS = 2000  # fewer is a failure of dense matching: the sparse points join in
SPARSE_PIXELS = 2.0  # size of a sparse point
SPARSE_CONFIDENCE = 0.3


class Run(NamedTuple):
    """One call of PatchMatch for every photo."""

    scale: float
    geometric_weight: float
    num_random: int
    num_passes: int
    shrink: float = 1.0
    fine_texture: float = math.inf


# Perturbations shrink from level to level: a plane from below is nearly right, and large steps would only find chance matches. The last run has the
# small patch: it tells where an edge is.
SCHEDULE = (
    Run(0.25, 0.0, 32, 6),
    Run(0.25, GEOMETRIC_WEIGHT, 0, 2, shrink=0.5),
    Run(0.5, GEOMETRIC_WEIGHT, 2, 3, shrink=0.7),
    Run(0.5, GEOMETRIC_WEIGHT, 0, 2, shrink=0.35),
    Run(1.0, GEOMETRIC_WEIGHT, 0, 1, shrink=0.35),
    Run(1.0, GEOMETRIC_WEIGHT, 0, 1, shrink=0.2, fine_texture=0.0),
)


def reconstruct(kept: Scene, seed: int = 0) -> Reconstruction:
    """Make a surface cloud and depth maps from the photos of a scene.

    Args:
        kept: The kept views alone (`scene.subset(kept)`), two or more.
        seed: Same seed, same result, at any number of threads.

    Raises:
        ValueError: nothing could be reconstructed.
    """
    views, costs, matches = match_photos(kept, seed)
    sparse = matches.points
    believe(views, costs)
    arrays = (torch.from_numpy(array) for array in fuse(views, MAX_PIXELS, MAX_RELATIVE))
    cloud = SurfaceCloud(*arrays)
    if len(cloud) < MIN_DENSE_POINTS:
        cloud = SurfaceCloud.cat([cloud, sparse_cloud(views, matches)])
        if len(cloud) == 0:
            raise ValueError(
                f"{kept.name}: no two of the {len(kept)} kept photos show the same surface, so there is nothing to triangulate. Keep more "
                "photos or photos that overlap (--keep-count, --keep-indices), or bring a cloud (--provider points)."
            )
        logger.warning(
            "stage0: the kept photos hardly overlap: %d points, %d of them sparse. Keep more photos (--keep-count) for usable guidance.",
            len(cloud),
            len(sparse),
        )
    depth_maps = {
        name: _at_size(view, size)
        for name, view, size in zip(kept.names, views, kept.cameras.sizes, strict=True)
    }
    return Reconstruction(cloud, depth_maps)


def match_photos(
    kept: Scene, seed: int = 0, side: int = WORKING_SIDE
) -> tuple[list[View], list[np.ndarray], SparsePoints]:
    """Find a plane for every pixel of every photo, right or wrong: what `reconstruct` makes its choice from.

    Args:
        kept: Two views or more.
        seed: As in `reconstruct`.
        side: Longest side of the photos as matched, pixels.

    Returns:
        - views with rgb, grey and planes
        - matching costs, [H, W] each
        - sparse matches
    """
    views = [_load_view(kept, row, side) for row in range(len(kept))]
    matches = match_sparse(views)
    sparse = matches.points
    logger.info("stage0: %d sparse points matched in %d photos", len(sparse), len(views))
    ranges = [inverse_depth_range(view, sparse, views) for view in views]
    sources = [choose_sources(views, row, sparse) for row in range(len(views))]
    return views, estimate_planes(views, ranges, sources, seed), matches


def sparse_cloud(views: Sequence[View], matches: SparsePoints) -> SurfaceCloud:
    """The sparse points as discs of SPARSE_PIXELS in the first view that saw them: what there is where dense matching fails."""
    rgbs, sizes = np.zeros_like(matches.points), np.zeros(len(matches.points))
    for row, view in enumerate(views):
        chosen = matches.pairs[:, 0] == row
        z, xy, _ = _project(view, matches.points[chosen])
        column, line = np.clip(xy.astype(int), 0, [view.width - 1, view.height - 1]).T
        rgbs[chosen] = view.rgb[line, column]
        sizes[chosen] = SPARSE_PIXELS * z / view.K[0, 0]
    confidence = torch.full((len(sizes),), SPARSE_CONFIDENCE)
    arrays = (torch.from_numpy(array).float() for array in (matches.points, rgbs, sizes))
    return SurfaceCloud.without_orientation(*arrays, confidence)


def _load_view(scene: Scene, row: int, side: int) -> View:
    width, height = scene.cameras.sizes[row]
    rgb = scene.image(scene.names[row]).numpy()
    K = scene.cameras.Ks[row].double().numpy()
    scale = min(1.0, side / max(width, height))
    if scale < 1.0:
        rgb = cv2.resize(
            rgb,
            (max(1, round(width * scale)), max(1, round(height * scale))),
            interpolation=cv2.INTER_AREA,
        )
        K = _scale_K(K, rgb.shape[1] / width, rgb.shape[0] / height)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    viewmat = scene.cameras.viewmats[row].double().numpy()
    return View(
        rgb.shape[1],
        rgb.shape[0],
        K,
        viewmat,
        np.ascontiguousarray(rgb),
        np.ascontiguousarray(grey),
    )


def inverse_depth_range(
    view: View, sparse: np.ndarray, views: Sequence[View]
) -> tuple[float, float]:
    """Bounds of w for one view, generous beyond the sparse points that it sees."""
    z, _, seen = _project(view, sparse)
    z = z[seen]
    if (
        len(z) < 8
    ):  # too few to trust a percentile: all points in front of the camera, wherever they project
        z = _project(view, sparse)[0]
        z = z[z > 0]
    if len(z) >= 8:
        near, far = np.percentile(z, [2, 98])
        return 0.1 / far, 2.0 / near
    # No points at all. Depth only has a meaning in units of the baseline.
    centers = np.stack([np.linalg.inv(other.viewmat)[:3, 3] for other in views])
    baseline = np.median(np.linalg.norm(centers - centers.mean(0), axis=1))
    return 0.0, 2.0 / max(baseline, 1e-9)


def choose_sources(views: Sequence[View], row: int, sparse: np.ndarray) -> list[int]:
    """The views that see most of what a view sees, from a different place; best first."""
    others = [other for other in range(len(views)) if other != row]
    if len(others) <= MAX_SOURCES:
        return others
    _, _, seen = _project(views[row], sparse)
    points = sparse[seen]
    center = np.linalg.inv(views[row].viewmat)[:3, 3]
    scores = []
    for other in others:
        rays, other_rays = points - center, points - np.linalg.inv(views[other].viewmat)[:3, 3]
        cosine = (rays * other_rays).sum(1) / np.maximum(
            np.linalg.norm(rays, axis=1) * np.linalg.norm(other_rays, axis=1), 1e-12
        )
        angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        # Below 5 degrees depth is uncertain; beyond 45 photos stop looking alike.
        quality = np.minimum(angle / 5, 1) * np.minimum(45 / np.maximum(angle, 1), 1)
        scores.append((quality * _project(views[other], points)[2]).sum())
    order = np.argsort(-np.array(scores), kind="stable")[:MAX_SOURCES]
    return sorted(others[k] for k in order)


def estimate_planes(
    views: Sequence[View],
    ranges: Sequence[tuple[float, float]],
    sources: Sequence[Sequence[int]],
    seed: int,
) -> list[np.ndarray]:
    """Fill `planes` of every view; returns the matching costs, [H, W] each."""
    smallest = min(min(view.width, view.height) for view in views)
    schedule = [
        run for run in SCHEDULE if run.scale == 1.0 or run.scale * smallest >= SMALLEST_SIDE
    ]
    if schedule[0].geometric_weight > 0:  # tiny photos: everything happens at full size
        schedule = [SCHEDULE[0]._replace(scale=1.0), *schedule]
    levels: list[View] = []
    costs: list[np.ndarray] = []
    with progress(len(schedule) * len(views), "stereo") as bar:
        for number, run in enumerate(schedule):
            if number == 0 or run.scale != schedule[number - 1].scale:
                levels = [
                    _at_scale(view, run.scale, levels[row] if levels else None)
                    for row, view in enumerate(views)
                ]
            # All views read what the others had before this run: their order must not matter.
            frozen = [View(**{**vars(level), "planes": level.planes.copy()}) for level in levels]
            costs = []
            for row, level in enumerate(levels):
                cost, _ = patchmatch(
                    level,
                    [frozen[source] for source in sources[row]],
                    ranges[row],
                    geometric_weight=run.geometric_weight,
                    num_random=run.num_random,
                    num_passes=run.num_passes,
                    seed=(seed * 1000 + number) * 1000 + row,
                    shrink=run.shrink,
                    fine_texture=run.fine_texture,
                )
                costs.append(cost)
                bar.update(number * len(views) + row + 1, cost=float(np.median(cost)))
    for view, level in zip(views, levels, strict=True):
        view.planes = level.planes
        view.planes = smooth_planes(view, SMOOTH_REACH, SMOOTH_SPACING, SMOOTH_COLOUR)
    return costs


def _at_scale(view: View, scale: float, coarser: View | None) -> View:
    """The view at another resolution, its planes taken over from a coarser level (or unknown)."""
    width, height = max(1, round(view.width * scale)), max(1, round(view.height * scale))
    grey = (
        view.grey
        if scale == 1.0
        else cv2.resize(view.grey, (width, height), interpolation=cv2.INTER_AREA)
    )
    K = _scale_K(view.K, width / view.width, height / view.height)
    planes = (
        np.zeros((height, width, 3), np.float32)
        if coarser is None
        else upsample_planes(coarser.planes, width, height)
    )
    return View(width, height, K, view.viewmat, grey=grey, planes=planes)


def upsample_planes(planes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Continue every coarse pixel's plane to the finer pixels inside it. [height, width, 3]"""
    scale_x, scale_y = planes.shape[1] / width, planes.shape[0] / height
    x, y = (np.arange(width) + 0.5) * scale_x, (np.arange(height) + 0.5) * scale_y
    column, row = (
        np.minimum(x.astype(int), planes.shape[1] - 1),
        np.minimum(y.astype(int), planes.shape[0] - 1),
    )
    fine = planes[row][:, column]
    fine[..., 0] += fine[..., 1] * (x - column - 0.5) + fine[..., 2] * (y - row - 0.5)[:, None]
    fine[..., 1] *= scale_x
    fine[..., 2] *= scale_y
    return np.ascontiguousarray(fine, np.float32)


def _at_size(view: View, size: tuple[int, int]) -> DepthMap:
    """Depth and confidence at the camera's own resolution."""
    depth, confidence = view.depth, view.confidence
    if (view.width, view.height) != size:
        depth, confidence = (
            cv2.resize(array, size, interpolation=cv2.INTER_NEAREST_EXACT)
            for array in (depth, confidence)
        )
    return DepthMap(depth, confidence)


def _scale_K(K: np.ndarray, scale_x: float, scale_y: float) -> np.ndarray:
    return np.diag([scale_x, scale_y, 1.0]) @ K


def _project(view: View, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth [P], pixel position [P, 2] and whether the view can see the point [P]."""
    in_camera = points @ view.viewmat[:3, :3].T + view.viewmat[:3, 3]
    z = in_camera[:, 2]
    xy = (in_camera @ view.K.T)[:, :2] / np.where(np.abs(z) > 1e-12, z, 1e-12)[:, None]
    return z, xy, (z > 0) & (xy > 0).all(1) & (xy < [view.width, view.height]).all(1)
