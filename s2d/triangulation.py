"""Points from their observations in several posed views: ray midpoints, then robust Gauss-Newton, all points at once.

Notation: P points, M observations ("view v saw point p at pixel xy"), C cameras; r a reprojection residual in pixels. Everything in float64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.geometry import invert_rigid


class Triangulation(NamedTuple):
    """Points from observations; rows of bad points are kept (`good` is False) so that indices stay valid."""

    points: Tensor  # [P, 3] float64 world
    errors: Tensor  # [P] root mean squared reprojection error, pixels
    angles: Tensor  # [P] largest angle between two rays, radians
    good: Tensor  # [P] bool
    used: Tensor  # [M] bool: observations that agree with their point


def triangulate(
    xys: Tensor,  # [M, 2]
    point_ids: Tensor,  # [M]
    view_ids: Tensor,  # [M]
    viewmats: Tensor,  # [C, 4, 4]
    Ks: Tensor,  # [C, 3, 3]
    num_points: int,
    max_error: float = 2.0,
    min_angle: float = 1.0,
) -> Triangulation:
    """Find points from their observations in two or more posed views.

    Midpoint of the rays first (least squares on the distances to them), then Gauss-Newton on the reprojection error in pixels with Cauchy
    weights, so that one wrong observation in a track bends the point little; observations that still miss by more than
    `max_error` or see the point from behind are dropped and the rest is solved once more. All points at once, in float64.

    Args:
        xys: Observed pixel positions. [M, 2]
        point_ids: Which point each observation is of, 0 to P - 1, any order. [M]
        view_ids: Which camera saw it. [M]
        viewmats: World to camera. [C, 4, 4]
        Ks: Pixels. [C, 3, 3]
        num_points: P.
        max_error: Largest reprojection error of a used observation, pixels.
        min_angle: Smallest angle between the two most different rays of a point, degrees: below, its depth is a guess.

    Returns:
        See `Triangulation`; a point is good if two or more observations are used and the angle is large enough.
    """
    xys, viewmats, Ks = xys.double(), viewmats.double(), Ks.double()
    obs = _Observations(
        xys,
        point_ids,
        viewmats[view_ids],
        Ks[view_ids],
        invert_rigid(viewmats)[view_ids, :3, 3],
        num_points,
    )
    used = torch.ones(len(xys), dtype=torch.bool)
    points = torch.zeros(num_points, 3, dtype=torch.float64)
    for _ in range(2):
        points = _refine(_midpoints(obs, used), obs, used)
        residuals, depths = _residuals(points, obs)
        used = used & (depths > 0) & (residuals.norm(dim=-1) <= max_error)
    points = _refine(points, obs, used)
    residuals, depths = _residuals(points, obs)
    squared = residuals.square().sum(-1)
    used = used & (depths > 0) & (squared <= max_error**2)
    counts = _sum_per_point(used.double(), obs)
    errors = (_sum_per_point(torch.where(used, squared, 0.0), obs) / counts.clamp(min=1)).sqrt()
    angles = _ray_angles(points, obs, used)
    good = (
        (counts >= 2)
        & (angles >= torch.deg2rad(torch.tensor(min_angle)))
        & points.isfinite().all(1)
    )
    return Triangulation(points, errors, angles, good, used)


class _Observations(NamedTuple):
    xys: Tensor  # [M, 2]
    point_ids: Tensor  # [M]
    viewmats: Tensor  # [M, 4, 4] of the camera of each observation
    Ks: Tensor  # [M, 3, 3]
    centers: Tensor  # [M, 3]
    num_points: int


def _sum_per_point(values: Tensor, obs: _Observations) -> Tensor:
    total = torch.zeros(obs.num_points, *values.shape[1:], dtype=values.dtype)
    return total.index_add_(0, obs.point_ids, values)


def _solve_per_point(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Solve [P, 3, 3] x = [P, 3]; a relative 1e-12 on the diagonal answers for points that nothing determines."""
    scale = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-300)
    damped = matrices + 1e-12 * scale[:, None, None] * torch.eye(3, dtype=matrices.dtype)
    return torch.linalg.solve_ex(damped, vectors[..., None])[0][..., 0]


def _midpoints(obs: _Observations, used: Tensor) -> Tensor:
    rays = torch.linalg.solve(obs.Ks, F.pad(obs.xys, (0, 1), value=1.0)[..., None])
    rays = F.normalize((obs.viewmats[:, :3, :3].mT @ rays)[..., 0], dim=-1)
    across = torch.eye(3, dtype=torch.float64) - rays[:, :, None] * rays[:, None, :]
    across = across * used[:, None, None]
    return _solve_per_point(
        _sum_per_point(across, obs),
        _sum_per_point((across @ obs.centers[..., None])[..., 0], obs),
    )


def _residuals(points: Tensor, obs: _Observations) -> tuple[Tensor, Tensor]:
    in_camera = (obs.viewmats[:, :3, :3] @ points[obs.point_ids][..., None])[..., 0] + obs.viewmats[
        :, :3, 3
    ]
    depths = in_camera[:, 2]
    homogeneous = (obs.Ks @ in_camera[..., None])[..., 0]
    safe = torch.where(depths.abs() > 1e-12, depths, torch.full_like(depths, 1e-12))
    return homogeneous[:, :2] / safe[:, None] - obs.xys, depths


def _refine(points: Tensor, obs: _Observations, used: Tensor, num_steps: int = 8) -> Tensor:
    """Gauss-Newton with Cauchy weights 1 / (1 + r²), r in pixels: tracks are good to about one pixel. A step that makes a
    point worse is not taken.
    """
    projection = obs.Ks @ obs.viewmats[:, :3, :3]  # [M, 3, 3]

    def cost(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        residuals, depths = _residuals(points, obs)
        each = torch.log1p(residuals.square().sum(-1))
        behind = depths <= 0
        return _sum_per_point(torch.where(behind, 1e3, each) * used, obs), residuals, depths

    best, residuals, depths = cost(points)
    for _ in range(num_steps):
        pixels = residuals + obs.xys
        # d(u, v)/dX = (rows 0 and 1 of K R - (u, v) * row 2) / z
        jacobian = (projection[:, :2] - pixels[..., None] * projection[:, 2:]) / depths[
            :, None, None
        ]
        weights = used / (1 + residuals.square().sum(-1))
        weighted = jacobian.mT * weights[:, None, None]
        step = _solve_per_point(
            _sum_per_point(weighted @ jacobian, obs),
            _sum_per_point((weighted @ residuals[..., None])[..., 0], obs),
        )
        trial = points - torch.nan_to_num(step)
        trial_cost, trial_residuals, trial_depths = cost(trial)
        better = trial_cost < best
        points = torch.where(better[:, None], trial, points)
        best = torch.where(better, trial_cost, best)
        of_better = better[obs.point_ids]
        residuals = torch.where(of_better[:, None], trial_residuals, residuals)
        depths = torch.where(of_better, trial_depths, depths)
    return points


def _ray_angles(points: Tensor, obs: _Observations, used: Tensor) -> Tensor:
    """Largest angle between two rays of each point, by a double sweep: the ray farthest from the mean, then the one farthest from that.

    Never more than the true largest angle, and equal to it where the centres lie about on a line or the track has two rays.
    """
    rays = F.normalize(points[obs.point_ids] - obs.centers, dim=-1) * used[:, None]
    anchor = F.normalize(_sum_per_point(rays, obs), dim=-1)
    angles = torch.zeros(obs.num_points, dtype=torch.float64)
    for _ in range(2):
        from_anchor = torch.linalg.cross(rays, anchor[obs.point_ids]).norm(dim=-1)
        angle = torch.atan2(from_anchor, (rays * anchor[obs.point_ids]).sum(-1)) * used
        angles = torch.zeros_like(angles).scatter_reduce_(0, obs.point_ids, angle, "amax")
        farthest = (angle == angles[obs.point_ids]) & used
        anchor = anchor.clone()
        anchor[obs.point_ids[farthest]] = rays[farthest]
    return angles
