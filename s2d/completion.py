"""Depth where stereo knows none: a smooth continuation, and points on it for Gaussians to start from.

What only one photo sees can't be triangulated, and a third to a half of the picture is like that with three photos. Without points there the optimisation covers
it with a few large Gaussians at depths of their neighbours' choosing. The continuation w (inverse depth) minimises

    Σ_i c_i (w_i - ŵ_i)² + Σ_ij g_ij (w_i - w_j)²,   g_ij = exp(-β |I_i - I_j|) + ε

with stereo's ŵ and its confidence c, over neighbouring pixels (weighted least squares, Levin et al. 2004 for colours): smooth within a surface, free to
step where the photo I does. It is a guess, and serves as a start alone: no loss holds anything there.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import thin_points
from s2d.geometry import in_picture, project, unproject
from s2d.scene import Scene

FILL_SHARE = 0.1  # of the points that a scene starts with
WORKING_SIDE = 320  # longest side of what is completed, pixels: the continuation is smooth
MIN_KNOWN = 100  # pixels with depth: fewer say nothing about the rest
MIN_CONFIDENCE = 0.05  # of a pixel with depth: even a doubtful one beats a guess
EDGE = 30.0  # β: per difference of colour in [0, 1], mean over the channels
EDGE_FLOOR = 1e-3  # ε
# Filled depth is at most this many times that of the first percentile of inverse depth.
FARTHEST = 2.0
STRIDE = 4  # pixels between two points
SEE_THROUGH = 0.05  # relative depth: a point farther in front of a surface contradicts its photo
COARSEST = 16  # pixels: smaller pictures need no coarser start
MAX_ITERATIONS = 300
RESIDUAL = 1e-5  # relative L2


def starting_points(
    cloud: tuple[Tensor, Tensor, Tensor | None],
    guessed: tuple[Tensor, Tensor],
    most: int,
    share: float,
) -> tuple[Tensor, Tensor, int]:
    """Choose where Gaussians start: on the cloud of stage 0, and some where it has holes.

    Args:
        cloud: Positions [P, 3], colours [P, 3] and confidence [P] of stage 0's points.
        guessed: `hole_points`: positions [G, 3] and colours [G, 3], perhaps none.
        most: Number of points, at most.
        share: Of those, how many may fill holes.

    Returns:
        - positions, world [M, 3]: first the cloud's, then the guesses
        - colours [M, 3]
        - how many are guesses
    """
    points, rgbs, confidence = cloud
    rows = thin_points(guessed[0], round(share * most))
    chosen = thin_points(points, most - len(rows), confidence)
    return (
        torch.cat([points[chosen], guessed[0][rows]]),
        torch.cat([rgbs[chosen], guessed[1][rows]]),
        len(rows),
    )


def hole_points(kept: Scene, depths: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Place points where the kept photos have no depth, on its smooth continuation, unless another photo sees through them.

    Args:
        kept: The kept views alone.
        depths: Depth [H, W] (camera z, <= 0: none) and its confidence [H, W] in [0, 1], by name of the view; empty where stage 0 made none.

    Returns:
        - positions, world [P, 3]
        - colours in [0, 1] [P, 3]
    """
    points, colours = [torch.zeros(0, 3)], [torch.zeros(0, 3)]
    for camera in kept.cameras if depths else ():
        name = camera.names[0]
        depth, confidence = depths[name]
        photo = kept.image(name)
        if int((depth > 0).sum()) < MIN_KNOWN:
            continue
        filled = complete_depth(depth, confidence, photo)
        holes = (depth <= 0) & _every(STRIDE, depth.shape)
        found = unproject(filled, camera.Ks[0], camera.viewmats[0])[holes]
        others = [other for other in kept.cameras if other.names[0] != name]
        open_there = ~seen_through(found, others, depths)
        points.append(found[open_there])
        colours.append(photo[holes][open_there])
    return torch.cat(points), torch.cat(colours)


def complete_depth(
    depth: Tensor,  # [H, W]
    confidence: Tensor,  # [H, W]
    photo: Tensor,  # [H, W, 3]
) -> Tensor:
    """Continue depth (camera z, <= 0: none) smoothly over a photo; also where it is known, as far as the confidence does not hold it. [H, W], positive

    Raises:
        ValueError: no pixel has a depth.
    """
    known = (depth > 0).numpy()
    if not known.any():
        raise ValueError(
            f"complete_depth: none of the {known.size} pixels has a depth, so there is nothing to continue. Leave this view out."
        )
    height, width = known.shape
    inverse = np.where(known, 1 / depth.clamp(min=1e-12).numpy().astype(np.float64), 0)
    middle, smallest = np.median(inverse[known]), np.percentile(inverse[known], 1)
    weight = np.where(known, confidence.numpy().astype(np.float64).clip(MIN_CONFIDENCE), 0)
    image = photo.numpy().astype(np.float64)
    scale = min(1.0, WORKING_SIDE / max(height, width))
    small = max(1, round(width * scale)), max(1, round(height * scale))
    found = _continue(*_resized(inverse / middle, weight, image, small))
    found = cv2.resize(found, (width, height), interpolation=cv2.INTER_LINEAR) * middle
    return torch.from_numpy(1 / np.maximum(found, smallest / FARTHEST)).float()


def seen_through(
    points: Tensor,  # [P, 3]
    cameras: Sequence[Cameras],
    depths: Mapping[str, tuple[Tensor, Tensor]],
) -> Tensor:
    """Whether a point stands in front of a surface that one of the views has depth of. [P] bool"""
    result = torch.zeros(len(points), dtype=torch.bool)
    for camera in cameras:
        xy, z = project(points, camera.Ks[0], camera.viewmats[0])
        inside = in_picture(xy, z, camera.sizes[0])
        column, row = xy[inside].long().unbind(1)
        surface = depths[camera.names[0]][0][row, column]
        result[inside] |= z[inside] < (1 - SEE_THROUGH) * surface
    return result


# ---------------------------------------------------------------------------------------------------------------- solver


def _continue(
    values: np.ndarray,  # [H, W]
    weight: np.ndarray,  # [H, W]
    image: np.ndarray,  # [H, W, 3]
) -> np.ndarray:
    """Minimise Σ weight (w - values)² + Σ g (w_i - w_j)² by conjugate gradients, started from the solution at half the size. [H, W]"""
    height, width = values.shape
    right, below = (
        np.exp(-EDGE * np.abs(np.diff(image, axis=axis)).mean(-1)) + EDGE_FLOOR for axis in (1, 0)
    )
    diagonal = weight.copy()
    diagonal[:, :-1] += right
    diagonal[:, 1:] += right
    diagonal[:-1] += below
    diagonal[1:] += below

    def matrix(w: np.ndarray) -> np.ndarray:
        result = diagonal * w
        result[:, :-1] -= right * w[:, 1:]
        result[:, 1:] -= right * w[:, :-1]
        result[:-1] -= below * w[1:]
        result[1:] -= below * w[:-1]
        return result

    if min(height, width) > COARSEST:
        half = (width + 1) // 2, (height + 1) // 2
        coarse = _continue(*_resized(values, weight, image, half))
        found = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    else:
        found = np.full_like(values, (weight * values).sum() / weight.sum())
    target = weight * values
    residual = target - matrix(found)
    scaled = residual / diagonal
    direction, product = scaled, (residual * scaled).sum()
    enough = RESIDUAL**2 * (target**2).sum()
    for _ in range(MAX_ITERATIONS):
        if (residual**2).sum() <= enough:
            break
        image_of = matrix(direction)
        step = product / (direction * image_of).sum()
        found = found + step * direction
        residual = residual - step * image_of
        scaled = residual / diagonal
        product, before = (residual * scaled).sum(), product
        direction = scaled + product / before * direction
    return found


def _resized(
    values: np.ndarray, weight: np.ndarray, image: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, weights and image at another size (width, height): weighted means of values, sums of weights."""
    if size == values.shape[::-1]:
        return values, weight, image
    smaller = [
        cv2.resize(array, size, interpolation=cv2.INTER_AREA)
        for array in (weight, weight * values, image)
    ]
    mean = np.divide(smaller[1], smaller[0], out=np.zeros_like(smaller[0]), where=smaller[0] > 0)
    return mean, smaller[0] * (values.size / smaller[0].size), smaller[2]


def _every(stride: int, shape: Sequence[int]) -> Tensor:
    chosen = torch.zeros(tuple(shape), dtype=torch.bool)
    chosen[::stride, ::stride] = True
    return chosen
