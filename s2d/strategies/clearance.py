"""Clearance: nothing stands where people look from.

The background of a photo may be explained by Gaussians anywhere along its rays. Some end up in the open between the cameras, where no other photo looks at them, and
hide the scene from every view that is taken there: haze or a black curtain. Nobody stands inside of things, so the ways from each kept camera to its
neighbours, and the places of novel cameras, are kept clear, as far as a share of the distance to the nearest surface. (FreeNeRF, Yang et al. 2023,
penalises what is right in front of the kept cameras; most of what hides is between them.)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.geometry import quat_to_rotation
from s2d.trajectories import look_target

NEIGHBOURS = 2  # nearest kept cameras that a way leads to from each
BETWEEN = 7  # places on each way between its ends
NEAREST = 0.01  # quantile of the distances to stage 0's points that counts as the nearest surface: some points are wrong
# Standard deviations up to which a place is inside of a Gaussian, wherever its centre is.
INSIDE = 2.0
MOST_POINTS = 20_000  # that distances are measured to: each place has a quantile of them
PLACES_AT_ONCE = 200  # torch.quantile refuses more than 16 million numbers
ROWS_AT_ONCE = 100_000  # bounds the memory: a distance to every place


class Ways(NamedTuple):
    """Where people look from."""

    places: Tensor  # [P, 3] world
    radii: Tensor  # [P] kept clear around each, world units


def clear_ways(
    kept: Cameras,
    points: Tensor,  # [M, 3]
    share: float,
    novel: Cameras | None = None,
) -> Ways:
    """Choose places at the kept cameras, on ways between neighbours, and at novel cameras.

    There are two from each camera to each neighbour: straight, as one walks along a wall, and on an arc around what the cameras look at.

    Args:
        kept: The kept views.
        points: Of the surfaces, world. [M, 3]
        share: Of the distance to the nearest surface that is kept clear.
        novel: Where else pictures will be taken, if it is known; no ways lead there.
    """
    centers, points = kept.centers.cpu().double(), points.cpu().double()
    target = look_target(kept.to("cpu"), points)
    distances = torch.cdist(centers, centers).fill_diagonal_(torch.inf)
    near = distances.topk(min(NEIGHBOURS, len(centers) - 1), largest=False).indices
    start, end = centers[:, None] - target, centers[near] - target  # [V, 1, 3], [V, k, 3]
    steps = torch.arange(1, BETWEEN + 1).double() / (BETWEEN + 1)
    straight = torch.lerp(start[:, :, None], end[:, :, None], steps[:, None])
    ways = torch.stack([straight, _arc(start.expand_as(end), end, steps)]) + target
    places = torch.cat([centers, ways.flatten(0, 3)])
    if novel is not None:
        places = torch.cat([places, novel.centers.cpu().double()])
    some = points[:: -(-len(points) // MOST_POINTS)]
    nearest = [
        torch.quantile(torch.cdist(group, some), NEAREST, dim=1)
        for group in places.split(PLACES_AT_ONCE)
    ]
    return Ways(places.float(), share * torch.cat(nearest).float())


def _arc(
    start: Tensor,  # [..., 3]
    end: Tensor,  # [..., 3]
    steps: Tensor,  # [S] in (0, 1)
) -> Tensor:
    """Turn at constant speed from one vector to the other, lengths in proportion. [..., S, 3]"""
    lengths = torch.lerp(start.norm(dim=-1)[..., None], end.norm(dim=-1)[..., None], steps)
    first, last = F.normalize(start, dim=-1), F.normalize(end, dim=-1)
    angle = (first * last).sum(-1).clamp(-1, 1).acos()[..., None]  # [..., 1]
    # Relative weights are enough; for a small angle they are 1 - t and t.
    weights = [torch.sinc(angle * t / torch.pi) * t for t in (1 - steps, steps)]
    mixed = weights[0][..., None] * first[..., None, :] + weights[1][..., None] * last[..., None, :]
    return lengths[..., None] * F.normalize(mixed, dim=-1)


@torch.no_grad()
def in_the_way(gaussians: Gaussians, ways: Ways) -> Tensor:
    """Find the Gaussians whose centre is in the clear, or that a place is inside of. [N] bool"""
    places, radii = (tensor.to(gaussians.means.device) for tensor in ways)
    found = torch.zeros(gaussians.num, dtype=torch.bool, device=places.device)
    for rows in torch.arange(gaussians.num, device=places.device).split(ROWS_AT_ONCE):
        scales = gaussians.log_scales[rows].exp()
        distances = torch.cdist(
            gaussians.means[rows], places, compute_mode="donot_use_mm_for_euclid_dist"
        )
        reach = INSIDE * scales.amax(1, keepdim=True)
        row, place = (distances < torch.maximum(reach, radii)).nonzero().unbind(1)
        offset = places[place] - gaussians.means[rows[row]]
        rotations = quat_to_rotation(gaussians.quats[rows[row]])
        along = torch.einsum("nij,ni->nj", rotations, offset) / scales[row]
        hides = (distances[row, place] < radii[place]) | (along.norm(dim=1) < INSIDE)
        found[rows[row[hides]]] = True
    return found
