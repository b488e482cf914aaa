"""The unit of a model's depth: from the Sim(3) between its cameras and the scene's, and from sparse points.

Notation: w is inverse depth; a photo's factor takes the model's depth to the scene's.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.alignment import Alignment, align_cameras
from s2d.cameras import Cameras
from s2d.geometry import project
from s2d.guidance.matches import SparsePoints
from s2d.guidance.providers.interface import Geometry
from s2d.log import logger

MIN_POINTS = 12  # sparse points from which a photo's own scale (and shift) is fitted
MAX_OWN_FACTOR = 1.5  # a photo's own factor beyond this is a misfit, not a correction
BAD_ROTATION = 5.0  # degrees between the model's and the scene's cameras: worth a warning
BAD_CENTER = 15.0  # % of the rig


class Seen(NamedTuple):
    """What the model says at the sparse points that one photo sees. [M, ...]"""

    depths: Tensor  # of the model
    points: Tensor  # [M, 3] of the model
    true_depths: Tensor  # in the scene's unit
    true_points: Tensor  # [M, 3] world


def scene_depths(geometry: Geometry, cameras: Cameras, sparse: SparsePoints | None) -> list[Tensor]:
    """A model's depth maps in the scene's unit. [h, w] each, 0 = none

    Args:
        geometry: Of the photos of `cameras`, in the same order.
        cameras: The scene's; `geometry.cameras` itself where the scene has no others.
        sparse: Points of the scene and which two cameras saw each.

    Raises:
        ValueError: the model's depth has no scale of its own and there are too few sparse points.
    """
    if geometry.freedom == "similarity" and geometry.cameras is cameras:
        return list(geometry.depths)
    seen = [look_up(geometry, cameras, sparse, row) for row in range(len(cameras))]
    if geometry.freedom == "similarity":
        return _scaled_depths(geometry, cameras, seen)
    return _fitted_depths(geometry, cameras, seen)


def look_up(geometry: Geometry, cameras: Cameras, sparse: SparsePoints | None, row: int) -> Seen:
    """Read a photo's maps where its sparse points are, between pixels without error on planes (w and w · point are linear there)."""
    empty = torch.empty(0)
    if sparse is None:
        return Seen(empty, empty.reshape(0, 3), empty, empty.reshape(0, 3))
    points = torch.from_numpy(np.asarray(sparse.points)[(sparse.pairs == row).any(1)])
    camera, depth = cameras[row], geometry.depths[row].double()
    xy, z = project(points, camera.Ks[0].double(), camera.viewmats[0].double())
    has = (depth > 0) & depth.isfinite()
    w = torch.where(has, 1 / depth.clamp(min=1e-12), 0.0)
    maps = torch.cat([geometry.points[row].double() * w[..., None], w[..., None]], -1)
    maps = torch.cat([maps, (has & (geometry.confidence[row] > 0)).double()[..., None]], -1)
    maps = torch.where(has[..., None], maps, 0.0)
    size = torch.tensor(camera.sizes[0], dtype=torch.float64)
    at = (2 * xy / size - 1)[None, None]
    read = F.grid_sample(
        maps.permute(2, 0, 1)[None], at, padding_mode="border", align_corners=False
    )[0, :, 0].T
    inside = (z > 0) & (xy > 0).all(1) & (xy < size).all(1) & (read[:, 4] > 0.999)
    read = read[inside]
    return Seen(
        1 / read[:, 3], read[:, :3] / read[:, 3:4], z[inside].double(), points[inside].double()
    )


def _scaled_depths(geometry: Geometry, cameras: Cameras, seen: Sequence[Seen]) -> list[Tensor]:
    """Depths of a model that is right up to a Sim(3)."""
    alignment = align_cameras(
        geometry.cameras,
        cameras,
        torch.cat([one.points for one in seen]),
        torch.cat([one.true_points for one in seen]),
    )
    _report(alignment)
    ratios = [(one.true_depths / one.depths).log() for one in seen]
    log_scale = _common_scale(alignment, torch.cat(ratios))
    own = _own_scales(cameras.names, [ratio - log_scale for ratio in ratios])
    return [
        depth * math.exp(log_scale + extra)
        for depth, extra in zip(geometry.depths, own, strict=True)
    ]


def _median(values: Tensor) -> tuple[float, float]:
    """Median and its standard error, from the median deviation. [M]"""
    middle = values.median()
    deviation = float((values - middle).abs().median())
    return float(middle), 1.2533 * 1.4826 * deviation / math.sqrt(len(values))


def _common_scale(alignment: Alignment, ratios: Tensor) -> float:
    """Logarithm of the scale of all photos: the cameras' and the points', each as far as it can be trusted.

    The distances between the model's cameras tell the scale as well as they agree with the scene's, which two cameras always do.
    """
    of_cameras = math.log(alignment.sim3.scale)
    if len(ratios) < MIN_POINTS:
        return of_cameras
    doubt = 0.5
    if alignment.scale_from == "centres" and int(alignment.inliers.sum()) >= 3:
        doubt = max(float(alignment.center_errors.median()) / 100, 1e-3)
    of_points, error = _median(ratios)
    return of_cameras + (of_points - of_cameras) * doubt**2 / (doubt**2 + error**2)


def _own_scales(names: Sequence[str], ratios: Sequence[Tensor]) -> list[float]:
    """Logarithm of each photo's factor beside the common one, shrunk where the photos differ no more than their points scatter.

    Args:
        names: Of the photos.
        ratios: Logarithms of true depth over depth in the common scale. [M] each
    """
    offsets: dict[int, tuple[float, float]] = {}
    for row, (name, ratio) in enumerate(zip(names, ratios, strict=True)):
        if len(ratio) < MIN_POINTS:
            continue
        middle, error = _median(ratio)
        if abs(middle) > math.log(MAX_OWN_FACTOR):
            logger.warning(
                "stage0: %s: its sparse points want %.2f times the depth of the other photos, which is no correction: not followed",
                name,
                math.exp(middle),
            )
            continue
        offsets[row] = (middle, error)
    if not offsets:
        return [0.0] * len(names)
    between = sum(offset**2 - error**2 for offset, error in offsets.values()) / len(offsets)
    between = max(between, 0.0) + 1e-12
    return [
        offset * between / (between + error**2)
        for offset, error in (offsets.get(row, (0.0, 0.0)) for row in range(len(names)))
    ]


def _report(alignment: Alignment) -> None:
    logger.info("stage0: the model's frame to the scene's: %s", alignment.summary())
    turned = float(alignment.rotation_errors.median())
    moved = float(alignment.center_errors.median())
    if alignment.scale_from == "nothing":
        logger.warning(
            "stage0: all cameras stand in one place and no sparse point was matched: the cloud's distance is a guess"
        )
    if turned > BAD_ROTATION or (alignment.scale_from == "centres" and moved > BAD_CENTER):
        logger.warning(
            "stage0: the model's cameras are not the scene's (median %.1f degrees, %.0f %% of the rig): its depth may be wrong too",
            turned,
            moved,
        )


def _fitted_depths(geometry: Geometry, cameras: Cameras, seen: Sequence[Seen]) -> list[Tensor]:
    """Depths of a model whose w is right up to a scale, or a scale and a shift, per photo."""
    with_shift = geometry.freedom == "scale and shift"
    count = sum(len(one.depths) for one in seen)
    if count < MIN_POINTS:
        raise ValueError(
            f"{count} sparse points were matched in the photos, and the model's depth has no scale without them. Expected {MIN_POINTS} or "
            "more. Keep photos that overlap (--keep-count), or use a provider that sees all photos at once (pi3, vggt, mapanything)."
        )
    common = fit_inverse_depth(
        torch.cat([one.depths for one in seen]),
        torch.cat([one.true_depths for one in seen]),
        with_shift,
    )
    result = []
    for name, depth, one in zip(cameras.names, geometry.depths, seen, strict=True):
        scale, shift = common
        if len(one.depths) >= MIN_POINTS:
            scale, shift = fit_inverse_depth(one.depths, one.true_depths, with_shift)
        else:
            logger.warning(
                "stage0: %s: %d sparse points, scaled like the other photos",
                name,
                len(one.depths),
            )
        w = scale / depth.clamp(min=1e-12) + shift
        result.append(torch.where((depth > 0) & (w > 0), 1 / w, 0.0).float())
    return result


def fit_inverse_depth(depths: Tensor, true_depths: Tensor, with_shift: bool) -> tuple[float, float]:
    """Robust a, b with 1 / true ≈ a / depth + b: errors count relative to the true inverse depth, Cauchy weights. [M], [M]

    The start is the median over pairs of points, which stands a third of wrong points.
    """
    x, y = 1 / depths.double(), 1 / true_depths.double()
    scale, shift = float((y / x).median()), 0.0
    if not with_shift:
        return scale, shift
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    apart = torch.cat([x - x.roll(k) for k in (1, 2)] + [x - x[order]])
    rise = torch.cat([y - y.roll(k) for k in (1, 2)] + [y - y[order]])
    slopes = (rise / apart)[apart.abs() > 1e-3 * float(x.abs().median())]
    if len(slopes) and float(slopes.median()) > 0:
        scale = float(slopes.median())
        shift = float((y - scale * x).median())
    for _ in range(20):
        error = (scale * x + shift) / y - 1
        width = (2 * 1.4826 * error.abs().median()).clamp(min=1e-9)
        root = (1 / (1 + (error / width).square())).sqrt() / y
        system = torch.stack([x, torch.ones_like(x)], 1) * root[:, None]
        solution = torch.linalg.lstsq(system, (root * y)[:, None], driver="gelsd").solution[:, 0]
        if not float(solution[0]) > 0:  # points at one depth say nothing of the shift
            break
        scale, shift = float(solution[0]), float(solution[1])
    return scale, shift
