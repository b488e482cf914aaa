"""Floaters by multi-view visibility: what stands where photos see through it.

Stage 0's depth says where each kept photo's surface is. A Gaussian in front of it contradicts that photo, one at it is supported, one
behind it is hidden and that photo has no say. Weighed by the depth's confidence, those with more contradiction than support go. SparseGS (Xiong et
al. 2023) finds floaters from one view's own depth modes; depth that several photos agree on does not need the render to be right.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.geometry import in_picture, project

# Of the depth: stereo's own error is about 1 %, and a Gaussian of some size has its centre in front of or behind its surface.
TOLERANCE = 0.1


@torch.no_grad()
def floaters(
    gaussians: Gaussians,
    views: Iterable[tuple[Cameras, Tensor, Tensor]],
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Find the Gaussians that more photos see through than see.

    Args:
        gaussians: N Gaussians.
        views: Camera, depth [H, W] (<= 0: none) and its confidence [H, W] of each kept view.
        tolerance: Relative difference of depth up to which a Gaussian is at the surface; its own size (two standard deviations of its
            longest axis) counts as distance to the surface, too.

    Returns:
        True for floaters. [N] bool
    """
    reach = 2.0 * gaussians.log_scales.detach().amax(1).exp()
    means = gaussians.means.detach()
    balance = torch.zeros_like(reach)  # support minus contradiction
    for camera, depth, confidence in views:
        there = camera.to(means.device)
        xy, z = project(means, there.Ks[0], there.viewmats[0])
        inside = in_picture(xy, z, camera.sizes[0])
        rows = inside.nonzero()[:, 0]
        column, line = xy[rows].long().unbind(1)
        surface, weight = (
            picture.to(means.device)[line, column] for picture in (depth, confidence)
        )
        slack = tolerance * surface + reach[rows]
        at_surface = (z[rows] - surface).abs() <= slack
        in_front = z[rows] < surface - slack
        say = (surface > 0).float() * weight
        balance[rows] += say * (at_surface.float() - in_front.float())
    return balance < 0
