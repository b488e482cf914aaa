"""The kept photos of a scene as the model's input: one size for all, near and far from stage 0's points, who looks at the same things."""

import math
from pathlib import Path

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.depth_io import read_depth
from s2d.geometry import in_picture, project
from s2d.hier.views import Views
from s2d.images import resize_image
from s2d.scene import Scene

# The range of depth is that of the points between these shares, widened: stray points lie outside, surfaces without points too.
NEAREST_SHARE, FARTHEST_SHARE = 0.01, 0.99
WIDENED_NEAR, WIDENED_FAR = 0.8, 1.5
MIN_POINTS = 10  # fewer in a view say nothing about its range


def common_size(kept: Scene, max_pixels: float) -> tuple[int, int]:
    """Width and height that all photos are brought to: the first one's shape, at most `max_pixels`, not larger than it is."""
    width, height = kept.cameras.sizes[0]
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    return max(1, round(width * scale)), max(1, round(height * scale))


def kept_views(
    kept: Scene,
    points: Tensor,  # [P, 3]
    size: tuple[int, int],
) -> Views:
    """Read the kept photos as one scene of V views.

    Photos of other shapes are squeezed, and their intrinsics with them: the cameras stay exact.

    Args:
        kept: The kept views.
        points: Stage 0's, world. [P, 3]
        size: Width and height.
    """
    cameras = kept.cameras.scaled(size)
    images = [resize_image(kept.image(name), *size).permute(2, 0, 1) for name in kept.names]
    near, far = depth_ranges(kept, points)
    return Views(
        images=torch.stack(images)[None],
        viewmats=cameras.viewmats[None],
        Ks=cameras.Ks[None],
        near=near[None],
        far=far[None],
    )


def depth_ranges(
    kept: Scene,
    points: Tensor,  # [P, 3]
) -> tuple[Tensor, Tensor]:
    """Nearest and farthest camera z of what each view sees. [V], [V]

    Raises:
        ValueError: Fewer than ten points lie before a camera.
    """
    ranges = []
    for name, camera in zip(kept.names, kept.cameras, strict=True):
        inside, depth = _seen(points, camera)
        # The picture may be small: then all that is before the camera.
        found = depth_range(depth[inside]) or depth_range(depth)
        if found is None:
            raise ValueError(
                f"depth_ranges: {int((depth > 0).sum())} points of stage 0 lie before the camera of {name}. Expected at least {MIN_POINTS}. "
                "Keep more photos, or start stage 1 with --init points."
            )
        ranges.append(found)
    near, far = torch.tensor(ranges).T
    return near, far


def depth_range(
    depths: Tensor,  # [P] camera z
) -> tuple[float, float] | None:
    """Where the depth of a view is to be searched, from that of the points that it sees; None where these are too few."""
    depths = depths[depths > 0].double()
    if len(depths) < MIN_POINTS:
        return None
    shares = depths.new_tensor([NEAREST_SHARE, FARTHEST_SHARE])
    # quantile() refuses more than 16 million numbers; clouds here have less than one.
    near, far = torch.quantile(depths, shares).tolist()
    return WIDENED_NEAR * near, WIDENED_FAR * far


def _seen(points: Tensor, camera: Cameras) -> tuple[Tensor, Tensor]:
    """Whether points lie in a camera's picture, and their depth. [P], [P]"""
    xy, depth = project(points, camera.Ks[0], camera.viewmats[0])
    return in_picture(xy, depth, camera.sizes[0]), depth


def neighbours(
    kept: Scene,
    points: Tensor,  # [P, 3]
    num: int,
) -> list[list[int]]:
    """Choose for every view the views to compare it with: those that share most points with it, at most `num`."""
    seen = torch.stack([_seen(points, camera)[0] for camera in kept.cameras]).float()
    shared = seen @ seen.T
    # Where views share equally much, the nearer camera.
    shared = shared - 0.5 * torch.tanh(kept.cameras.pose_distances(kept.cameras)).float()
    shared.fill_diagonal_(-torch.inf)
    return shared.topk(min(num, len(kept) - 1), dim=1).indices.tolist()


def stage0_depths(stage0_dir: Path, kept: Scene, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Read stage 0's depth of the kept views at another size. [1, V, H, W] camera z (0: none), [1, V, H, W] confidence

    Raises:
        FileNotFoundError: Stage 0 made none.
    """
    depths, confidences = [], []
    for name in kept.names:
        depth, confidence = read_depth(stage0_dir, name)
        # Means of inverse depth over what is known; an unknown pixel has weight 0.
        weight = confidence.clamp(min=1e-3) * (depth > 0)
        inverse = torch.where(depth > 0, 1 / depth.clamp(min=1e-12), torch.zeros_like(depth))
        scale = float(inverse.max().clamp(min=1e-12))  # resize_image keeps to [0, 1]
        stacked = torch.stack([inverse * weight / scale, weight, confidence * (depth > 0)], -1)
        mean, weight, confidence = resize_image(stacked, *size).unbind(-1)
        known = weight > 1e-4
        inverse = mean / weight.clamp(min=1e-4) * scale
        depths.append(torch.where(known & (inverse > 0), 1 / inverse.clamp(min=1e-12), 0.0))
        confidences.append(confidence * known)
    return torch.stack(depths)[None], torch.stack(confidences)[None]
