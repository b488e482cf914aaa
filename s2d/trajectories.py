"""Plain camera paths: through the kept cameras, around what they look at, beside them. `s2d.novel` chooses among them.

All paths keep to the neighbourhood of the kept cameras: a pseudo view far from every photo has nothing to be repaired from. Intrinsics
and picture size come from the nearest kept camera.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.cameras import Cameras
from s2d.geometry import (
    invert_rigid,
    look_at,
    look_at_point,
    quat_to_rotation,
    rigid,
    rotation_to_quat,
    slerp,
    up_axis,
)


def interpolate_cameras(kept: Cameras, num: int) -> Cameras:
    """Lay a smooth path through the kept cameras and put `num` cameras on it.

    The order is a short tour (nearest neighbour from the most remote camera, then 2-opt), positions follow a Catmull-Rom curve, rotations turn
    at constant speed between neighbours (slerp), and cameras are spread evenly over the length of the tour. The path goes exactly
    through every kept camera; novel cameras stay off the kept ones themselves, where there is a photo already.

    Raises:
        ValueError: fewer than two kept cameras.
    """
    if len(kept) < 2:
        raise ValueError(
            f"A path needs at least 2 kept cameras, got {len(kept)}. Use --novel orbit or perturb."
        )
    tour = short_tour(kept)
    distances = kept.pose_distances(kept)
    lengths = torch.stack([distances[a, b] for a, b in pairwise(tour)])
    ends = torch.cat([torch.zeros(1, dtype=lengths.dtype), lengths.cumsum(0)])
    # Midpoints of num equal pieces: never on the ends of the tour.
    at = (torch.arange(num, dtype=lengths.dtype) + 0.5) / num * ends[-1]
    segment = (torch.searchsorted(ends, at, right=True) - 1).clamp(0, len(lengths) - 1)
    t = (at - ends[segment]) / lengths[segment].clamp(min=1e-12)
    # Within a segment stay a tenth away from its two photos.
    return path_cameras(kept, tour, segment, t.clamp(0.1, 0.9))


def path_cameras(
    kept: Cameras,
    tour: list[int],
    segment: Tensor,  # [num]
    t: Tensor,  # [num]
) -> Cameras:
    """Evaluate the path through `kept[tour]` in a segment (from tour[k] to tour[k + 1]) at t in [0, 1]."""
    ordered = kept[tour]
    c2w = invert_rigid(ordered.viewmats.double())
    centers, quats = c2w[:, :3, 3], rotation_to_quat(c2w[:, :3, :3])
    last = len(tour) - 1
    rows = [(segment + offset).clamp(0, last) for offset in (-1, 0, 1, 2)]
    positions = _catmull_rom(*(centers[row] for row in rows), t.double())
    rotations = quat_to_rotation(slerp(quats[rows[1]], quats[rows[2]], t.double()))
    nearest = torch.where(t < 0.5, rows[1], rows[2]).tolist()
    return with_lens_of(invert_rigid(rigid(rotations, positions)), ordered, nearest)


def orbit_cameras(kept: Cameras, num: int, points: Tensor | None = None) -> Cameras:
    """Circle around the point that the kept cameras look at, at their mean distance and height, looking at it.

    Cameras that surround the point get a full circle; else the arc that they span, widened by a fifth (10 degrees at least), and slightly
    raised and lowered along the way, so that the path shows what lies beside the photos.
    """
    viewmats = kept.viewmats.double()
    target = look_target(kept, points)
    up = up_axis(viewmats)
    offsets = kept.centers.double() - target
    height = offsets @ up
    flat = offsets - height[:, None] * up
    radius = flat.norm(dim=-1).mean().clamp(min=1e-6)
    mean_flat = flat.mean(0)
    surrounds = bool(mean_flat.norm() < 0.3 * radius)
    axis = F.normalize(flat[0] if surrounds else mean_flat, dim=0)
    if axis.norm() < 0.5:  # all cameras above or below the point: any direction across `up` will do
        axis = invert_rigid(viewmats)[0, :3, 0]
        axis = F.normalize(axis - (axis @ up) * up, dim=0)
    side = torch.linalg.cross(up, axis)
    if surrounds:
        angles = torch.arange(num, dtype=torch.float64) / num * 2 * math.pi
    else:
        azimuths = torch.atan2(flat @ side, flat @ axis)
        low, high = float(azimuths.min()), float(azimuths.max())
        margin = max(0.1 * (high - low), math.radians(5))
        angles = torch.linspace(low - margin, high + margin, num, dtype=torch.float64)
    swing = max(float(height.std(correction=0)), 0.05 * float(radius))
    heights = height.mean() + swing * torch.sin(torch.arange(num, dtype=torch.float64) * 2.4)
    centers = (
        target
        + radius * (torch.cos(angles)[:, None] * axis + torch.sin(angles)[:, None] * side)
        + heights[:, None] * up
    )
    return _with_nearest_lens(look_at(centers, target.expand_as(centers), up), kept)


def perturb_cameras(
    kept: Cameras, num: int, points: Tensor | None = None, seed: int = 0
) -> Cameras:
    """Move kept cameras, taken in turn, by about 5 % of the distance to the scene and turn them by about 2 degrees (Gaussian)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [i % len(kept) for i in range(num)]
    viewmats = kept.viewmats.double()[rows]
    distance = (kept.centers.double() - look_target(kept, points)).norm(dim=-1).mean()
    shift = (
        torch.randn(num, 3, generator=generator, dtype=torch.float64)
        * 0.05
        * distance
        / math.sqrt(3)
    )
    angles = (
        torch.randn(num, 3, generator=generator, dtype=torch.float64)
        * math.radians(2)
        / math.sqrt(3)
    )
    turn = quat_to_rotation(torch.cat([torch.ones(num, 1, dtype=torch.float64), angles / 2], 1))
    return with_lens_of(rigid(turn, shift) @ viewmats, kept, rows)


def look_target(kept: Cameras, points: Tensor | None) -> Tensor:
    """The point that the cameras look at; forward-facing rigs have none, so then at the median depth of the points."""
    depth = None
    if points is not None and len(points):
        viewmats = kept.viewmats.double()
        depths = points.double() @ viewmats[:, 2, :3].T + viewmats[:, 2, 3]
        in_front = depths[depths > 0]
        depth = float(in_front.median()) if len(in_front) else None
    return look_at_point(kept.viewmats.double(), fallback_depth=depth)


def _catmull_rom(p0: Tensor, p1: Tensor, p2: Tensor, p3: Tensor, t: Tensor) -> Tensor:
    """Cubic through p1 (t = 0) and p2 (t = 1) with slopes (p2 - p0) / 2 and (p3 - p1) / 2. [num, 3]"""
    t = t[:, None]
    return p1 + t / 2 * (
        (p2 - p0) + t * ((2 * p0 - 5 * p1 + 4 * p2 - p3) + t * (3 * (p1 - p2) + p3 - p0))
    )


def short_tour(kept: Cameras) -> list[int]:
    """Order the cameras along a short open path: nearest neighbour from the most remote one, improved by 2-opt."""
    distances = kept.pose_distances(kept).tolist()
    everyone = range(len(kept))
    tour = [max(everyone, key=lambda row: sum(distances[row]))]
    rest = set(everyone) - set(tour)
    while rest:
        tour.append(min(rest, key=lambda row: (distances[tour[-1]][row], row)))
        rest.remove(tour[-1])

    def link(a: int, b: int) -> float:
        """Length between tour positions a and b; the ends are open."""
        return distances[tour[a]][tour[b]] if a >= 0 and b < len(tour) else 0.0

    improved = True
    while improved:
        improved = False
        for i in range(len(tour) - 1):
            for j in range(i + 1, len(tour)):
                # Turning tour[i..j] round replaces the links on its two ends.
                before = link(i - 1, i) + link(j, j + 1)
                after = link(i - 1, j) + link(i, j + 1)
                if after < before - 1e-9:
                    tour[i : j + 1] = tour[i : j + 1][::-1]
                    improved = True
    return tour


def _with_nearest_lens(viewmats: Tensor, kept: Cameras) -> Cameras:
    centers = invert_rigid(viewmats)[:, :3, 3]
    return with_lens_of(
        viewmats, kept, torch.cdist(centers, kept.centers.double()).argmin(1).tolist()
    )


def with_lens_of(viewmats: Tensor, kept: Cameras, rows: list[int]) -> Cameras:
    """Cameras with these transforms and the intrinsics and size of kept[row]; numbered names for the time being."""
    return Cameras(
        viewmats=viewmats.float(),
        Ks=kept.Ks[rows],
        sizes=tuple(kept.sizes[row] for row in rows),
        names=tuple(str(i) for i in range(len(rows))),
    )
