"""Camera paths for fly-throughs: smooth, at constant speed, all frames with one lens and one size.

`s2d.trajectories` places pseudo views, which keep off the photos and vary in height; a film goes through the photos and does not jerk.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.cameras import Cameras
from s2d.geometry import look_at, look_at_point, up_axis
from s2d.trajectories import path_cameras, short_tour

PathKind = Literal["interpolate", "orbit", "spiral"]


def fly_through(
    kind: PathKind,
    kept: Cameras,
    num: int,
    means: Tensor | None = None,  # [N, 3]
    width: int | None = None,
) -> Cameras:
    """Lay a path near the kept cameras.

    Args:
        kind: `interpolate`: through all kept cameras along a short tour. `orbit`: around the point that they look at; a full circle where
            they surround it, else there and back over the arc that they span. `spiral`: two turns of a small ellipse around the mean
            camera, which looks at that point.
        kept: The kept cameras.
        num: Number of frames.
        means: Centres of the Gaussians, to know how far away the scene is where the cameras do not tell. [N, 3]
        width: Width of the frames, pixels; None: that of the first camera. Sizes are even, as video needs.

    Returns:
        Cameras with the first kept camera's lens, called `frame_00000`, …

    Raises:
        ValueError: no camera, a path through one camera, no frame, unknown kind.
    """
    if len(kept) == 0 or num < 1:
        raise ValueError(
            f"A fly-through needs a camera and a frame, got {len(kept)} cameras and {num} frames."
        )
    if kind == "interpolate":
        viewmats = _through_all(kept, num)
    elif kind in ("orbit", "spiral"):
        target = look_at_point(kept.viewmats.double(), fallback_depth=_depth(kept, means))
        viewmats = (_around if kind == "orbit" else _spiral)(kept, num, target)
    else:
        raise ValueError(f"Unknown path {kind!r}. Expected interpolate, orbit or spiral.")
    lens = kept[0]
    old_width, old_height = lens.sizes[0]
    width = width or old_width
    size = (_even(width), _even(width * old_height / old_width))
    return Cameras(
        viewmats=viewmats.float(),
        Ks=lens.scaled(size).Ks.expand(num, 3, 3),
        sizes=(size,) * num,
        names=tuple(f"frame_{i:05d}" for i in range(num)),
    )


def _even(pixels: float) -> int:
    return max(2, 2 * round(pixels / 2))


def _through_all(kept: Cameras, num: int) -> Tensor:
    if len(kept) < 2:
        raise ValueError(
            "A path through the kept cameras needs two of them, got 1. Use the orbit or the spiral."
        )
    tour = short_tour(kept)
    distances = kept.pose_distances(kept)
    lengths = torch.stack([distances[a, b] for a, b in pairwise(tour)])
    ends = torch.cat([torch.zeros(1, dtype=lengths.dtype), lengths.cumsum(0)])
    at = torch.linspace(0, 1, num, dtype=lengths.dtype) * ends[-1]
    segment = (torch.searchsorted(ends, at, right=True) - 1).clamp(0, len(lengths) - 1)
    t = ((at - ends[segment]) / lengths[segment].clamp(min=1e-12)).clamp(0, 1)
    return path_cameras(kept, tour, segment, t).viewmats


def _around(kept: Cameras, num: int, target: Tensor) -> Tensor:
    up, side, axis, offsets = _frame(kept, target)
    height = (offsets @ up).mean()
    flat = offsets - (offsets @ up)[:, None] * up
    radius = flat.norm(dim=-1).mean()
    turn = torch.arange(num, dtype=torch.float64) / num * 2 * math.pi
    if flat.mean(0).norm() < 0.3 * radius:  # photos from all sides
        angles = turn
    else:
        azimuths = torch.atan2(flat @ side, flat @ axis)
        low, high = azimuths.min(), azimuths.max()
        half = ((high - low) / 2).clamp(min=math.radians(5))
        angles = (low + high) / 2 + half * torch.sin(turn)
    circle = torch.cos(angles)[:, None] * axis + torch.sin(angles)[:, None] * side
    return look_at(target + radius * circle + height * up, target.expand(num, 3), up)


def _spiral(kept: Cameras, num: int, target: Tensor) -> Tensor:
    up, side, axis, offsets = _frame(kept, target)
    middle = offsets.mean(0)
    if middle.norm() < 0.3 * offsets.norm(dim=-1).mean():
        middle = offsets[0]  # photos from all sides have no mean camera
    # The 90th percentile of the cameras' own offsets, or a twentieth of the distance, so that one camera gives a path too.
    spread = (offsets - offsets.mean(0)).abs()
    least = 0.05 * middle.norm()
    radii = [torch.quantile((spread @ d).abs(), 0.9).clamp(least, 4 * least) for d in (side, up)]
    turn = torch.arange(num, dtype=torch.float64) / num * 4 * math.pi
    centers = (
        target
        + middle
        + radii[0] * torch.cos(turn)[:, None] * side
        + radii[1] * torch.sin(turn)[:, None] * up
        + 0.5 * least * torch.sin(turn / 2)[:, None] * axis
    )
    return look_at(centers, target.expand(num, 3), up)


def _frame(kept: Cameras, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Up, sideways, from the target towards the cameras (unit, orthogonal) [3]; the cameras seen from the target [C, 3]."""
    up = up_axis(kept.viewmats.double())
    offsets = kept.centers.double() - target
    mean = offsets.mean(0)
    axis = mean - (mean @ up) * up
    if (
        axis.norm() < 0.1 * offsets.norm(dim=-1).mean()
    ):  # photos from all sides: any of them will do
        axis = offsets[0] - (offsets[0] @ up) * up
    axis = F.normalize(axis, dim=0)
    return up, torch.linalg.cross(up, axis), axis, offsets


def _depth(kept: Cameras, means: Tensor | None) -> float | None:
    """Median depth of the Gaussians in front of the cameras."""
    if means is None:
        return None
    viewmats = kept.viewmats.double()
    depths = means.detach().double().cpu() @ viewmats[:, 2, :3].T + viewmats[:, 2, 3]
    in_front = depths[depths > 0]
    return float(in_front.median()) if len(in_front) else None
