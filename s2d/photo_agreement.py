"""Where a model already shows what the kept photos show: surfaces that several of them see, at one depth and in one colour.

A fixed view has nothing to say there that photos do not say better, and a repaired render is never as sharp as they are.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.geometry import in_picture, project, unproject
from s2d.rasterize import rasterize

DEPTH_TOLERANCE = 0.03  # relative: rendered depth of few photos is a percent or two off
COLOUR_TOLERANCE = 0.1  # mean absolute difference over a window, R, G, B in [0, 1]
# Shares of the picture's longer side.
COLOUR_WINDOW = 0.015
SMOOTHING_WINDOW = 0.03
ENOUGH_PHOTOS = 2  # one photo alone is reproduced by surfaces at any depth


class PhotoAgreement:
    """Compares what a model shows in other views with the kept photos."""

    @torch.no_grad()
    def __init__(self, model: Gaussians, photos: Iterable[tuple[Cameras, Tensor]]) -> None:
        """Render the model's depth in the kept views.

        Args:
            model: Fitted to the photos, with its backdrop.
            photos: One camera and its photo [H, W, 3] each.
        """
        self.model = model
        self.views = []
        for camera, photo in photos:
            there = camera.to(model.means.device)
            depth = rasterize(model, there).depth[0, :, :, 0]
            self.views.append((there, photo.to(depth.device), depth))

    @torch.no_grad()
    def share(self, camera: Cameras) -> Tensor:
        """How surely two photos or more show each pixel's surface as the model does.

        Args:
            camera: One camera.

        Returns:
            In [0, 1], smooth; on the CPU. [H, W]
        """
        there = camera.to(self.model.means.device)
        render = rasterize(self.model, there)
        rgb, depth = render.rgb[0].clamp(0, 1), render.depth[0, :, :, 0]
        surface = unproject(depth, there.Ks[0], there.viewmats[0])
        num_photos = torch.zeros_like(depth)
        for kept, photo, kept_depth in self.views:
            xy, z = project(surface, kept.Ks[0], kept.viewmats[0])
            inside = in_picture(xy, z, kept.sizes[0]) & (depth > 0)
            column = xy[..., 0].nan_to_num().long().clamp(0, kept.width - 1)
            line = xy[..., 1].nan_to_num().long().clamp(0, kept.height - 1)
            is_there = (kept_depth[line, column] - z).abs() < DEPTH_TOLERANCE * z
            difference = _blurred((photo[line, column] - rgb).abs().mean(-1), COLOUR_WINDOW)
            num_photos += inside & is_there & (difference < COLOUR_TOLERANCE)
        return _blurred((num_photos >= ENOUGH_PHOTOS).float(), SMOOTHING_WINDOW).cpu()


def _blurred(
    picture: Tensor,  # [H, W]
    window: float,
) -> Tensor:
    """Mean over a square window, a share of the longer side; at the edge over what is inside. [H, W]"""
    reach = int(0.5 * window * max(picture.shape))
    return F.avg_pool2d(
        picture[None], 2 * reach + 1, stride=1, padding=reach, count_include_pad=False
    )[0]
