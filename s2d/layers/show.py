"""Pictures of a level at any size.

3DGS widens every Gaussian by 0.3 pixels² on the screen. A level is trained with that at its own resolution, so its Gaussians may be far thinner than
one of its pixels; drawn with more and smaller pixels, 0.3 of which are less, it falls apart into needles. A level is therefore never drawn with
more pixels than it was trained for: its own picture is enlarged. A renderer whose blur can be set does the same with
0.3 · (focal length on the screen / focal length of the level's pictures)² pixels²; so does web/view.html.
"""

from dataclasses import replace

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.images import resize_image
from s2d.layers.manifest import Levels
from s2d.rasterize import rasterize

BLUR = 0.3  # pixels², of the rasteriser and of 3DGS


@torch.no_grad()
def draw_level(
    gaussians: Gaussians,
    camera: Cameras,
    own_rescale: float,
    rescale: float = 1.0,
) -> Tensor:
    """Render one view of a level at a share of the full resolution.

    Args:
        gaussians: Of the level.
        camera: One, at full resolution.
        own_rescale: Share of the full resolution that the level was trained for. Above it the level's own picture is enlarged (bicubic), below it
            the picture is drawn as 3DGS draws.
        rescale: Share of the full resolution that is wanted; sizes are rounded to whole pixels.

    Returns:
        sRGB in [0, 1]. [H, W, 3]
    """
    wanted = camera.scaled(rescale)
    drawn = camera.scaled(min(own_rescale, rescale))
    rgb = rasterize(gaussians, drawn).rgb[0].clamp(0, 1)
    return resize_image(rgb, wanted.width, wanted.height)


def shown_rescale(levels: Levels, level: int, share: float) -> float:
    """Share of the full resolution at which to draw what has arrived (`own_rescale` of `draw_level`).

    While a level arrives, the resolution rises from that of the level before to its own in the first half of its rows: by then most of what is
    seen is new. docs/viewing.md has the pictures' PSNR for this and for other ways.

    Args:
        level, share: Of `s2d.layers.stream.Shown`: the last complete level (-1: none), and the share of the next one's rows that are there.
    """
    if level < 0:
        return levels.levels[0].rescale
    old = levels.levels[level].rescale
    if share == 0:
        return old
    return old + min(1.0, 2 * share) * (levels.levels[level + 1].rescale - old)


def widened(gaussians: Gaussians, kept: Cameras, rescale: float) -> Gaussians:
    """Make Gaussians of a level that show it at full size in a renderer whose 0.3 pixels² cannot be changed.

    What these lack of the level's own 0.3 pixels² is added to the Gaussians themselves, as a ball around each: right where its depth is the median
    of its depths from the kept cameras, and less so the nearer or farther one looks from.

    Args:
        gaussians: Of the level.
        kept: At full resolution; Gaussians in front of none of them stay as they are.
        rescale: Share of the full resolution that the level was trained for, at most 1.
    """
    depths = gaussians.means @ kept.viewmats[:, 2, :3].T + kept.viewmats[:, 2, 3]  # [N, C]
    depths = torch.where(depths > 0, depths, torch.nan).nanmedian(1).values.nan_to_num(0.0)
    per_pixel = depths / kept.Ks[:, 0, 0].median()  # [N] world units
    ball = BLUR * (rescale**-2 - 1) * per_pixel.square()
    log_scales = 0.5 * ((2 * gaussians.log_scales).exp() + ball[:, None]).log()
    return replace(gaussians, log_scales=log_scales)
