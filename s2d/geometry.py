"""Rigid transforms, quaternions, the pinhole camera, and points from several views.

Notation
    cam_from_world  [..., 4, 4]  x_cam = R x_world + t; a batch of them is called `viewmats`
    c2w             [..., 4, 4]  its inverse; the camera's centre is c2w[..., :3, 3]
    K               [..., 3, 3]  pixels, corner origin: the first pixel's centre is (0.5, 0.5)
    quats           [..., 4]     wxyz, any norm > 0
Camera axes are OpenCV's: x right, y down, z forward. Depth is z, not the length of the ray.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def invert_rigid(
    transforms: Tensor,  # [..., 4, 4]
) -> Tensor:
    """Invert rigid transforms exactly (transposed rotation, no matrix inverse). Differentiable. [..., 4, 4]"""
    rotation = transforms[..., :3, :3].mT
    translation = -rotation @ transforms[..., :3, 3:]
    return torch.cat([torch.cat([rotation, translation], -1), transforms[..., 3:, :]], -2)


def rigid(
    rotation: Tensor,  # [..., 3, 3]
    translation: Tensor,  # [..., 3]
) -> Tensor:
    """Assemble 4 x 4 transforms x -> R x + t. [..., 4, 4]"""
    top = torch.cat([rotation, translation[..., None]], -1)
    bottom = torch.eye(4, dtype=top.dtype, device=top.device)[3]
    return torch.cat([top, bottom.expand(*top.shape[:-2], 1, 4)], -2)


def quat_to_rotation(
    quats: Tensor,  # [..., 4]
) -> Tensor:
    """Turn quaternions (wxyz, any norm > 0) into rotation matrices. Differentiable. [..., 3, 3]"""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def rotation_to_quat(
    rotation: Tensor,  # [..., 3, 3]
) -> Tensor:
    """Turn rotation matrices into unit quaternions wxyz with w >= 0. [..., 4]

    Takes the largest of the four components first, so it is accurate at every angle, half turns included.
    """
    m = rotation
    m00, m11, m22 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    # Row k is 4 q_k (w, x, y, z): each is exact where its own component is not small.
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    d, e, f = m[..., 1, 0] + m[..., 0, 1], m[..., 2, 0] + m[..., 0, 2], m[..., 2, 1] + m[..., 1, 2]
    candidates = torch.stack(
        [
            torch.stack([1 + m00 + m11 + m22, a, b, c], -1),
            torch.stack([a, 1 + m00 - m11 - m22, d, e], -1),
            torch.stack([b, d, 1 - m00 + m11 - m22, f], -1),
            torch.stack([c, e, f, 1 - m00 - m11 + m22], -1),
        ],
        -2,
    )  # [..., 4, 4]
    best = torch.diagonal(candidates, dim1=-2, dim2=-1).argmax(-1)
    quats = torch.take_along_dim(candidates, best[..., None, None], -2).squeeze(-2)
    quats = F.normalize(quats, dim=-1)
    return torch.where(quats[..., :1] < 0, -quats, quats)


def slerp(
    quats0: Tensor,  # [..., 4]
    quats1: Tensor,  # [..., 4]
    t: Tensor,  # [...] in [0, 1]
) -> Tensor:
    """Interpolate rotations at constant speed along the shorter way. Unit wxyz. [..., 4]"""
    quats0, quats1 = F.normalize(quats0, dim=-1), F.normalize(quats1, dim=-1)
    dot = (quats0 * quats1).sum(-1, keepdim=True)
    quats1 = torch.where(dot < 0, -quats1, quats1)
    angle = torch.acos(dot.abs().clamp(max=1.0))
    t = t[..., None]
    # sin(a t)/sin(a) -> t as a -> 0: below 1e-4 rad the straight line differs by less than 1e-9.
    small = angle < 1e-4
    safe = torch.where(small, torch.ones_like(angle), angle)
    weight0 = torch.where(small, 1 - t, torch.sin((1 - t) * safe) / torch.sin(safe))
    weight1 = torch.where(small, t, torch.sin(t * safe) / torch.sin(safe))
    return F.normalize(weight0 * quats0 + weight1 * quats1, dim=-1)


def rotation_angle(
    rotation0: Tensor,  # [..., 3, 3]
    rotation1: Tensor,  # [..., 3, 3]
) -> Tensor:
    """Measure the angle between two rotations in radians, 0 to pi. [...]

    Through atan2, which unlike arccos of the trace is accurate near 0 and pi and cannot give NaN.
    """
    relative = rotation0 @ rotation1.mT
    trace = relative.diagonal(dim1=-2, dim2=-1).sum(-1)
    skew = relative - relative.mT
    sine = torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1).norm(dim=-1)
    return torch.atan2(sine, trace - 1)


def pixel_grid(
    width: int,
    height: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """List the pixel centres, (0.5, 0.5) first. [height, width, 2]"""
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=dtype) + 0.5,
        torch.arange(width, device=device, dtype=dtype) + 0.5,
        indexing="ij",
    )
    return torch.stack([x, y], -1)


def project(
    points: Tensor,  # [..., 3]
    K: Tensor,  # [3, 3]
    viewmat: Tensor,  # [4, 4]
) -> tuple[Tensor, Tensor]:
    """Project world points into one camera.

    Points behind the camera (depth <= 0) get a mirrored pixel position: mask with the depth.

    Args:
        points: World. [..., 3]
        K: Pixels. [3, 3]
        viewmat: World to camera. [4, 4]

    Returns:
        - pixel positions [..., 2]
        - depths, camera z [...]

    Differentiable in all three.
    """
    in_camera = points @ viewmat[:3, :3].mT + viewmat[:3, 3]
    depths = in_camera[..., 2]
    homogeneous = in_camera @ K.mT
    return homogeneous[..., :2] / depths[..., None], depths


def in_picture(
    xy: Tensor,  # [..., 2]
    z: Tensor,  # [...]
    size: tuple[int, int],
) -> Tensor:
    """Whether what `project` returned is in front of the camera and within a picture of `size` (width, height). [...] bool"""
    width, height = size
    x, y = xy.unbind(-1)
    return (z > 0) & (x >= 0) & (y >= 0) & (x < width) & (y < height)


def fibonacci_sphere(
    num: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Spread unit vectors evenly: equal heights, turned by the golden angle from one to the next. [num, 3] float64"""
    k = torch.arange(num, dtype=torch.float64, device=device) + 0.5
    height, angle = 1 - 2 * k / num, k * math.pi * (3 - math.sqrt(5))
    radius = (1 - height**2).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], -1)


def unproject(
    depth: Tensor,  # [H, W]
    K: Tensor,  # [3, 3]
    viewmat: Tensor,  # [4, 4]
) -> Tensor:
    """Lift a depth map to world points.

    Inverse of `project`: `project(unproject(d, K, V), K, V)` gives the pixel-centre grid and d.

    Args:
        depth: Camera z in world units; <= 0 means "no depth". [H, W]
        K: Pixels. [3, 3]
        viewmat: World to camera. [4, 4]

    Returns:
        World points; zero where there is no depth (mask with `depth > 0`). [H, W, 3]

    Differentiable in depth and viewmat.
    """
    height, width = depth.shape
    grid = pixel_grid(width, height, depth.device, depth.dtype)
    rays = F.pad(grid, (0, 1), value=1.0) @ torch.linalg.inv(K).mT  # [H, W, 3], z = 1
    c2w = invert_rigid(viewmat)
    points = (rays * depth[..., None]) @ c2w[:3, :3].mT + c2w[:3, 3]
    return torch.where((depth > 0)[..., None], points, torch.zeros_like(points))


def look_at(
    centers: Tensor,  # [..., 3]
    target: Tensor,  # [..., 3]
    up: Tensor,  # [3]
) -> Tensor:
    """Make world-to-camera transforms that look from a centre at a target.

    Where the view direction is parallel to `up`, another axis takes its place, so the result is always rigid.

    Args:
        centers: Camera centres, world. [..., 3]
        target: Looked at, world; not equal to the centre. [..., 3]
        up: World direction that should point up in the picture. [3]

    Returns:
        viewmats. [..., 4, 4]
    """
    forward = F.normalize(target - centers, dim=-1)
    up = F.normalize(up, dim=-1).expand_as(forward)
    spare = torch.roll(up, 1, -1) * torch.tensor([1.0, -1.0, 1.0], dtype=up.dtype, device=up.device)
    parallel = (forward * up).sum(-1, keepdim=True).abs() > 1 - 1e-6
    right = F.normalize(torch.cross(forward, torch.where(parallel, spare, up), dim=-1), dim=-1)
    down = torch.cross(forward, right, dim=-1)
    rotation = torch.stack([right, down, forward], -2)
    return rigid(rotation, -(rotation @ centers[..., None])[..., 0])


def up_axis(
    viewmats: Tensor,  # [C, 4, 4]
) -> Tensor:
    """Estimate the world direction that is up in the pictures: the mean of the cameras' -y axes. Unit. [3]

    Cameras whose ups cancel (a camera turned over) leave the first camera's up.
    """
    ups = -viewmats[:, 1, :3]
    mean = ups.mean(0)
    return F.normalize(mean if mean.norm() > 1e-3 else ups[0], dim=0)


def look_at_point(
    viewmats: Tensor,  # [C, 4, 4]
    fallback_depth: float | None = None,
) -> Tensor:
    """Find the point that the cameras look at: nearest to all optical axes, in front of the cameras. World. [3]

    Least squares on the distance to each axis, reweighted by 1/distance so that a camera that looks elsewhere has little say. Where
    the axes are parallel or meet behind the cameras (forward-facing captures) there is no such point; then it is the mean
    centre moved forward along the mean axis by `fallback_depth`.

    Args:
        viewmats: World to camera. [C, 4, 4]
        fallback_depth: World units; None: the largest distance of a centre from the mean centre, or 1.
    """
    dtype = viewmats.dtype
    viewmats = viewmats.double()
    c2w = invert_rigid(viewmats)
    centers, axes = c2w[:, :3, 3], viewmats[:, 2, :3]
    middle = centers.mean(0)
    extent = float((centers - middle).norm(dim=-1).max())
    mean_axis = axes.mean(0)
    mean_axis = F.normalize(mean_axis if mean_axis.norm() > 1e-3 else axes[0], dim=0)
    fallback = middle + mean_axis * (fallback_depth or extent or 1.0)
    # A tiny pull towards the mean centre (1e-6 of one camera's weight) keeps parallel axes solvable; the test below sees them.
    across = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]  # [C, 3, 3]
    weights = torch.ones(len(axes), dtype=torch.float64)
    point = fallback
    for _ in range(20):
        normal = (weights[:, None, None] * across).sum(0)
        spread = torch.linalg.eigvalsh(normal)[0] / weights.sum()
        if (
            spread < 1e-4
        ):  # axes within about 1 degree of each other: the depth of the point is not determined
            return fallback.to(dtype)
        point = torch.linalg.solve(
            normal, (weights[:, None] * (across @ centers[..., None])[..., 0]).sum(0)
        )
        distance = (across @ (point - centers)[..., None])[..., 0].norm(dim=-1)
        weights = 1.0 / distance.clamp(min=1e-3 * max(extent, 1e-12))
    in_front = ((point - centers) * axes).sum(-1) > 0
    return (point if in_front.double().mean() > 0.5 else fallback).to(dtype)
