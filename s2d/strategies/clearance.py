"""Clearance: nothing stands where people look from.

The background of a photo may be explained by Gaussians anywhere along its rays. Some end up in the open between the cameras, where no other photo looks at them, and
hide the scene from every view that is taken there: haze or a black curtain. Nobody stands inside of things, so the ways from each kept camera to its
neighbours are kept clear, as far as a share of the distance to the nearest surface. (Floaters in front of the kept cameras alone: Warburg et al., Nerfbusters, 2023.)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from s2d.gaussians import Gaussians
from s2d.geometry import quat_to_rotation

NEIGHBOURS = 2  # nearest kept cameras that a way leads to from each
BETWEEN = 7  # places on each way, beside its ends
NEAREST = 0.01  # quantile of the distances to stage 0's points that counts as the nearest surface: some points are wrong
# Standard deviations up to which a place is inside of a Gaussian, wherever its centre is.
INSIDE = 2.0


class Ways(NamedTuple):
    """Where people look from."""

    places: Tensor  # [P, 3] world
    radii: Tensor  # [P] kept clear around each, world units


def clear_ways(
    centers: Tensor,  # [V, 3]
    points: Tensor,  # [M, 3]
    share: float,
) -> Ways:
    """Choose places at the kept cameras and on straight ways between neighbours.

    Args:
        centers: Of the kept cameras, world. [V, 3]
        points: Of the surfaces, world. [M, 3]
        share: Of the distance to the nearest surface that is kept clear.
    """
    centers, points = centers.double(), points.to(centers.device).double()
    distances = torch.cdist(centers, centers).fill_diagonal_(torch.inf)
    near = distances.topk(min(NEIGHBOURS, len(centers) - 1), largest=False).indices
    steps = torch.arange(1, BETWEEN + 1, dtype=torch.float64, device=centers.device) / (BETWEEN + 1)
    ways = torch.lerp(centers[:, None, None], centers[near][:, :, None], steps[:, None])
    places = torch.cat([centers, ways.flatten(0, 2)])
    nearest = [torch.quantile((points - place).norm(dim=1), NEAREST) for place in places]
    return Ways(places.float(), share * torch.stack(nearest).float())


@torch.no_grad()
def in_the_way(gaussians: Gaussians, ways: Ways) -> Tensor:
    """Find the Gaussians whose centre is in the clear, or that a place is inside of. [N] bool"""
    scales, rotations = gaussians.log_scales.exp(), quat_to_rotation(gaussians.quats)
    reach = INSIDE * scales.amax(1)
    found = torch.zeros_like(reach, dtype=torch.bool)
    for place, radius in zip(
        ways.places.to(reach.device), ways.radii.to(reach.device), strict=True
    ):
        offset = place - gaussians.means
        distance = offset.norm(dim=1)
        close = (distance < torch.maximum(reach, radius)).nonzero()[:, 0]
        along = torch.einsum("nij,ni->nj", rotations[close], offset[close]) / scales[close]
        found[close] |= (distance[close] < radius) | (along.norm(dim=1) < INSIDE)
    return found
