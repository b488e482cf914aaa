"""Draw a `SurfaceCloud` at a camera: the point guidance."""

from typing import NamedTuple

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.guidance.cloud import SurfaceCloud
from s2d.guidance.kernels import View, splat

DEPTH_TOLERANCE = 0.01  # relative: patches this close behind the nearest one are the same surface


class Guidance(NamedTuple):
    """One picture of a cloud."""

    rgb: Tensor  # [H, W, 3] in [0, 1]; black where nothing is known
    coverage: Tensor  # [H, W] bool: where the cloud is seen
    depth: Tensor  # [H, W] camera z, 0 where nothing is known


def render_cloud(cloud: SurfaceCloud, camera: Cameras) -> Guidance:
    """Draw a cloud as small surface patches; nearer ones hide what is behind them.

    Args:
        cloud: World.
        camera: One camera.

    Returns:
        See `Guidance`. Equal at any number of threads.
    """
    if len(camera) != 1:
        raise ValueError(f"render_cloud: expected one camera, got {len(camera)}.")
    view = View(
        camera.width,
        camera.height,
        camera.Ks[0].double().numpy(),
        camera.viewmats[0].double().numpy(),
    )
    arrays = [array.numpy() for array in (cloud.points, cloud.rgbs, cloud.confidence, cloud.steps)]
    image, coverage, depth = splat(view, *arrays, near=1e-6, tolerance=DEPTH_TOLERANCE)
    return Guidance(
        torch.from_numpy(image), torch.from_numpy(coverage).bool(), torch.from_numpy(depth)
    )
