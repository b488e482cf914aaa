"""Artifacts without a fit: a random part of the Gaussians is turned, resized or left out before rendering. And the path beside a path.

The released S2D trainer comes with rotations alone and without magnitudes; the ranges here are ours.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians

TURNED_SHARE = (0.05, 0.3)
TURNED_DEGREES = (5.0, 20.0)  # standard deviation of the angle
RESIZED_SHARE = (0.05, 0.3)
RESIZED_LOG = (0.2, 0.7)  # standard deviation of log(size), each axis apart
DROPPED_SHARE = (0.03, 0.25)  # more looks pitted, as no sparse model does
SHIFT = (0.04, 0.12)  # sideways, in distances to the scene


def rotate(gaussians: Gaussians, generator: torch.Generator) -> tuple[Gaussians, float]:
    """Turn a random part about random axes; returns the share that was turned too."""
    share = uniform(TURNED_SHARE, generator)
    sigma = math.radians(uniform(TURNED_DEGREES, generator))
    rows = random_rows(gaussians.num, share, generator)
    axes = torch.nn.functional.normalize(torch.randn(len(rows), 3, generator=generator), dim=1)
    half = 0.5 * sigma * torch.randn(len(rows), 1, generator=generator)
    turn = torch.cat([half.cos(), half.sin() * axes], 1)
    quats = gaussians.quats.clone()
    quats[rows] = quat_product(turn, quats[rows])
    return replace(gaussians, quats=quats), share


def scale(gaussians: Gaussians, generator: torch.Generator) -> tuple[Gaussians, float]:
    """Stretch and shrink a random part, each axis by another factor; returns the share that was resized too."""
    share = uniform(RESIZED_SHARE, generator)
    sigma = uniform(RESIZED_LOG, generator)
    rows = random_rows(gaussians.num, share, generator)
    log_scales = gaussians.log_scales.clone()
    log_scales[rows] += sigma * torch.randn(len(rows), 3, generator=generator)
    return replace(gaussians, log_scales=log_scales), share


def drop(gaussians: Gaussians, generator: torch.Generator) -> tuple[Gaussians, float]:
    """Leave a random part out; returns its share too."""
    share = uniform(DROPPED_SHARE, generator)
    stays = torch.ones(gaussians.num, dtype=torch.bool)
    stays[random_rows(gaussians.num, share, generator)] = False
    return Gaussians(**{name: tensor[stays] for name, tensor in gaussians.tensors().items()}), share


CORRUPTIONS = {"rotate": rotate, "scale": scale, "drop": drop}


def shifted_cameras(
    cameras: Cameras,
    points: Tensor,  # [P, 3]
    generator: torch.Generator,
) -> Cameras:
    """Move a whole path sideways: what it sees stays in view, from where no photo was taken.

    Args:
        cameras: The path.
        points: World; how far away the scene is. [P, 3]
        generator: Chooses one direction across the line of sight, and 4 to 12 % of the median distance. Every camera moves
            so along its own axes: cameras that surround an object go on around it.

    Returns:
        The cameras, in the same order and with the same names, rotations and intrinsics.
    """
    depths = points @ cameras.viewmats[:, 2, :3].T + cameras.viewmats[:, 2, 3]  # [P, C]
    in_front = depths[depths > 0]
    distance = float(in_front.median()) if in_front.numel() else max(cameras.extent, 1e-6)
    angle = uniform((0.0, 2 * math.pi), generator)
    shift = uniform(SHIFT, generator) * distance
    viewmats = cameras.viewmats.clone()
    viewmats[:, 0, 3] -= shift * math.cos(angle)
    viewmats[:, 1, 3] -= shift * math.sin(angle)
    return replace(cameras, viewmats=viewmats)


def quat_product(
    a: Tensor,  # [N, 4] wxyz
    b: Tensor,  # [N, 4] wxyz
) -> Tensor:
    """The rotation b, then the rotation a; the length is the product of both lengths. [N, 4]"""
    scalar = a[:, :1] * b[:, :1] - (a[:, 1:] * b[:, 1:]).sum(1, keepdim=True)
    vector = a[:, :1] * b[:, 1:] + b[:, :1] * a[:, 1:] + torch.linalg.cross(a[:, 1:], b[:, 1:])
    return torch.cat([scalar, vector], 1)


def uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    """One number between the bounds."""
    low, high = bounds
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def random_rows(num: int, share: float, generator: torch.Generator) -> Tensor:
    """A random `share` of `num` rows, at least one. [M]"""
    return torch.randperm(num, generator=generator)[: max(1, round(share * num))]
