"""A backdrop: a far sphere of Gaussians behind the scene, so that what no kept photo shows is not black.

The scene is trained in front of black at first, so pixels that stay open (transparency t = 1 - α) are open because the photo is dark there, or because nothing
else could be fitted. The sphere should not change them: its colour in a direction is first what the kept photos leave open there, Σ t b / Σ t with
t b = photo - render. Directions that the photos cover, or never look at, take over from their neighbours, and the photos' mean pulls a little:

    c_j = (Σ residual + p · photo + s · (mean of the neighbours + m · mean colour)) / (Σ t + p + s (1 + m))

which is solved by repetition. What stands in those directions is unknown; a smooth guess looks better than a hole and costs less in every score.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.geometry import fibonacci_sphere, in_picture, project
from s2d.rasterize import rasterize
from s2d.sh import rgb_to_sh0

NUM = 6000  # Gaussians: 2.6 degrees from one to the next
# Radius, in distances to what is far in the scene: a viewer who walks about stays inside.
DISTANCE = 5.0
FAR = 0.98  # quantile of the Gaussians' distances that counts as far
# Standard deviation, in steps between neighbours: closes the sphere, and hardly blurs it.
SPREAD = 0.6
OPACITY = 0.99
NEIGHBOURS = 6
PHOTO = 0.001  # p: transparency that a pixel counts with at least
SMOOTH = 0.1  # s
MEAN = 0.003  # m
MAX_ROUNDS = 3000
TOLERANCE = 1e-5  # change of a colour in a round


@torch.no_grad()
def backdrop(
    gaussians: Gaussians,
    cameras: Cameras,
    photos: Sequence[Tensor],  # [H, W, 3] each
) -> Gaussians:
    """Make the sphere for a scene.

    Args:
        gaussians: The scene.
        cameras: The kept views, as the scene is trained with them.
        photos: Theirs, in the scene's exposure. [H, W, 3] each, on the CPU

    Returns:
        NUM Gaussians of the same colour degree, to be drawn together with the scene. On the device of `gaussians`.
    """
    centres = cameras.centers.cpu().double()
    middle = centres.mean(0)
    distances = (gaussians.means.detach().cpu().double() - middle).norm(dim=1)
    reach = max(
        float(np.quantile(distances.numpy(), FAR)), float((centres - middle).norm(dim=1).max())
    )
    radius = DISTANCE * reach
    directions = fibonacci_sphere(NUM)
    means = middle + radius * directions
    step = math.sqrt(4 * math.pi / NUM)  # radians
    colours = _colours(gaussians, cameras.to("cpu"), photos, means, directions, step)
    device = gaussians.means.device
    result = Gaussians(
        means=means.float(),
        log_scales=torch.full((NUM, 3), math.log(SPREAD * step * radius)),
        quats=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(NUM, 1),
        opacity_logits=torch.full((NUM,), math.log(OPACITY / (1 - OPACITY))),
        sh0=rgb_to_sh0(colours.float())[:, None],
        shN=torch.zeros(NUM, gaussians.shN.shape[1], 3),
    )
    return result.to(device)


def _colours(
    gaussians: Gaussians,
    cameras: Cameras,
    photos: Sequence[Tensor],
    means: Tensor,  # [J, 3]
    directions: Tensor,  # [J, 3]
    step: float,
) -> Tensor:
    """Colour of every direction. [J, 3] float64 in [0, 1]"""
    open_light = torch.zeros(NUM, 3, dtype=torch.float64)
    openness = torch.zeros(NUM, 1, dtype=torch.float64)
    for camera, picture in zip(cameras, photos, strict=True):
        photo = picture.numpy()
        render = rasterize(gaussians, camera.to(gaussians.means.device))
        alpha = render.alpha[0].cpu().numpy()
        transparency = 1 - alpha
        residual = np.clip(photo - render.rgb[0].cpu().numpy(), 0, transparency)
        # One cell of the sphere in pixels, and its surroundings for the colour of covered pixels.
        cell = max(3, round(step * float(camera.Ks[0, 0, 0])))
        around = (3 * cell, 3 * cell)
        light = cv2.blur(residual, (cell, cell)) + PHOTO * cv2.blur(photo, around)
        weight = cv2.blur(transparency, (cell, cell)) + PHOTO
        xy, z = project(means, camera.Ks[0].double(), camera.viewmats[0].double())
        inside = in_picture(xy, z, camera.sizes[0])
        column, row = xy[inside].long().numpy().T
        open_light[inside] += torch.from_numpy(light[row, column]).double()
        openness[inside] += torch.from_numpy(weight[row, column]).double()[:, None]
    mean = torch.stack([photo.mean((0, 1)) for photo in photos]).mean(0).double()
    # In parts: all distances at once would take 0.3 GB.
    nearest = torch.cat(
        [
            torch.cdist(part, directions).topk(NEIGHBOURS + 1, largest=False).indices[:, 1:]
            for part in directions.split(500)
        ]
    )
    colours = mean.repeat(NUM, 1)
    for _ in range(MAX_ROUNDS):
        pull = colours[nearest].mean(1) + MEAN * mean
        new = (open_light + SMOOTH * pull) / (openness + SMOOTH * (1 + MEAN))
        change = float((new - colours).abs().max())
        colours = new
        if change < TOLERANCE:
            break
    return colours.clamp(0, 1)
