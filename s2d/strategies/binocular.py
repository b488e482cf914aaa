"""Warped-photo consistency (Binocular3DGS, Han et al. 2024): the render of a camera beside a photo's must be that photo, shifted by depth.

Move the camera by t along its own x axis and render it: I'. A point that the photo shows at column u and depth D stands at u - f t / D there.
So the photo is compared with I'(u - f t / D): wrong depth and colours that fit one camera only cost, without any depth map. The gradient
goes into I' and into D. What only one of the two cameras sees is not treated, as in the paper: the shifts are small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.device import to_device
from s2d.geometry import pixel_grid

# Largest shift in the picture, as a share of its width, of a point at the median depth.
MAX_DISPARITY = 0.04


def draw_shift(
    depth: Tensor,  # [H, W]
    focal: Tensor,  # []
    generator: torch.Generator,
) -> Tensor:
    """Draw t, uniformly to both sides, so that the median depth moves by at most 4 % of the width.

    Args:
        depth: Of the first camera, <= 0 where there is none. [H, W]
        focal: fx in pixels. []
        generator: On the CPU; one number is drawn.

    Returns:
        World units, float64; 0 without depth. []
    """
    depth = depth.detach()
    median = torch.where(depth > 0, depth, torch.nan).nanmedian().nan_to_num(nan=0.0)
    largest = MAX_DISPARITY * depth.shape[1] * median.double() / focal.double()
    drawn = torch.rand((), generator=generator).double()
    return to_device(2 * drawn - 1, depth.device) * largest


def shifted(
    viewmats: Tensor,  # [C, 4, 4]
    shift: Tensor,  # []
) -> Tensor:
    """Move cameras along their own x axes, to the right if `shift` > 0. World units. [C, 4, 4]"""
    moved = viewmats.clone()
    moved[:, 0, 3] -= shift
    return moved


def warp_back(
    image: Tensor,  # [H, W, 3]
    depth: Tensor,  # [H, W]
    focal: Tensor,  # []
    shift: Tensor,  # []
) -> tuple[Tensor, Tensor]:
    """Fetch the shifted camera's colours to where the first camera sees the same points.

    Args:
        image: Render of the shifted camera. [H, W, 3]
        depth: Of the first camera, camera z in world units. [H, W]
        focal: fx in pixels. []
        shift: t, world units. []

    Returns:
        - colours at the first camera's pixels [H, W, 3]
        - where there is depth and the point lies inside the shifted picture [H, W] bool

    Differentiable in `image` and `depth`.
    """
    height, width = depth.shape
    xy = pixel_grid(width, height, depth.device, depth.dtype)
    columns = xy[..., 0] - depth.clamp(min=1e-6).reciprocal() * (focal.double() * shift)
    # grid_sample's -1 and 1 are the outer edges of the border pixels, as ours are 0 and the width.
    grid = torch.stack([2 * columns / width - 1, 2 * xy[..., 1] / height - 1], -1)
    warped = F.grid_sample(
        image.permute(2, 0, 1)[None], grid[None], padding_mode="border", align_corners=False
    )
    inside = (depth > 0) & (columns > 0) & (columns < width)
    return warped[0].permute(1, 2, 0), inside.detach()


def binocular_loss(
    image: Tensor,  # [H, W, 3]
    depth: Tensor,  # [H, W]
    photo: Tensor,  # [H, W, 3]
    focal: Tensor,  # []
    shift: Tensor,  # []
) -> Tensor:
    """Mean absolute difference between a photo and `warp_back` of the shifted camera's render; arguments as there."""
    warped, inside = warp_back(image, depth, focal, shift)
    return ((warped - photo).abs().mean(-1) * inside).mean()
