"""Points of a guidance picture that are behind something which has no points of its own, and so is no obstacle to them.

A smooth or moving surface in front has no depth, and what stands behind it is drawn through it. A kept photo that looks at such a point from nearly the same direction
shows what is in front: another colour than the point's. That alone is no proof (from another place it may see past it), so the render must agree with that photo
besides. Where it does not, a wrong point is still better company than a wrong render (LOG.md).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.cameras import Cameras
from s2d.checks import check_shape
from s2d.geometry import in_picture, project, unproject
from s2d.guidance.render import Guidance
from s2d.scene import Scene

# Mean absolute difference of colour from which on a photo shows something else than the point. Exposure and gloss stay below it.
OTHER_COLOUR = 0.15
# The render agrees with the photo if it is nearer to its colour than this share of the point's difference.
AGREES = 0.5
# A photo that looks at the point from farther aside may see past what is before it, or be hidden from it itself.
MAX_ANGLE = math.radians(20)
# A photo whose own depth is nearer by this share sees a known surface there, and not the point: it is no witness.
IN_FRONT = 0.03


class Witness(NamedTuple):
    """A kept view that may look at points."""

    camera: Cameras  # one
    photo: Tensor  # [H, W, 3] in [0, 1]
    depth: Tensor  # [H, W] camera z, world units; <= 0: none


def witnesses_of(kept: Scene, depths: Mapping[str, tuple[Tensor, Tensor]]) -> list[Witness]:
    """The kept views of which there is depth; `depths` holds it [H, W] and its confidence [H, W], by name."""
    return [
        Witness(camera, kept.image(camera.names[0]), depths[camera.names[0]][0])
        for camera in kept.cameras
        if camera.names[0] in depths
    ]


def hidden_points(
    rendered: Tensor,  # [H, W, 3]
    guidance: Guidance,
    camera: Cameras,
    witnesses: Sequence[Witness],
) -> Tensor:
    """Find the pixels whose point the best placed kept photo does not show, while the render shows what that photo does.

    Args:
        rendered: The Gaussians at a novel camera, in [0, 1]. [H, W, 3]
        guidance: The cloud at the same camera.
        camera: That camera, one.
        witnesses: Kept views. The one that looks at a point from the direction nearest to the camera's decides, of those up to `MAX_ANGLE` aside that
            have it in their picture and no known surface before it.

    Returns:
        True where guidance is better left out. [H, W] bool
    """
    dims = check_shape("rendered", rendered, ("H", "W", 3))
    check_shape("guidance.rgb", guidance.rgb, ("H", "W", 3), dims)
    covered = guidance.coverage
    hidden = torch.zeros_like(covered)
    points = unproject(guidance.depth, camera.Ks[0], camera.viewmats[0])[covered]  # [P, 3]
    colours, shown = guidance.rgb[covered], rendered[covered]
    directions = F.normalize(points - camera.centers[0], dim=-1)
    # Cosine of the angle to the best witness yet.
    nearest = torch.full((len(points),), math.cos(MAX_ANGLE))
    result = torch.zeros(len(points), dtype=torch.bool)
    for witness in witnesses:
        seen_by = witness.camera
        xy, z = project(points, seen_by.Ks[0], seen_by.viewmats[0])
        rows = in_picture(xy, z, seen_by.sizes[0]).nonzero()[:, 0]
        column, row = xy[rows].long().unbind(1)
        surface = witness.depth[row, column]
        free = (surface <= 0) | (surface >= (1 - IN_FRONT) * z[rows])
        cosine = (directions[rows] * F.normalize(points[rows] - seen_by.centers[0], dim=-1)).sum(-1)
        better = free & (cosine > nearest[rows])
        rows = rows[better]
        photo = witness.photo[row[better], column[better]]
        difference = (photo - colours[rows]).abs().mean(-1)
        agreement = (photo - shown[rows]).abs().mean(-1)
        nearest[rows] = cosine[better]
        result[rows] = (difference > OTHER_COLOUR) & (agreement < AGREES * difference)
    hidden[covered] = result
    return hidden
