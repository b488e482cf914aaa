"""How well a level shows photos, at its own resolution and at full size."""

from pathlib import Path
from statistics import fmean

import torch

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.images import image_writer
from s2d.layers.pyramid import reduced
from s2d.layers.show import draw_level
from s2d.metrics import Lpips, Metrics, psnr, score
from s2d.model_folder import render_name
from s2d.rasterize import rasterize
from s2d.refinement import Refinement
from s2d.scene import Scene
from s2d.views import View, ViewSource


@torch.no_grad()
def score_views(
    gaussians: Gaussians,
    cameras: Cameras,
    photos: Scene,
    rescale: float,
    lpips: Lpips | None = None,
    folder: Path | None = None,
    own_rescale: float = 1.0,
) -> Metrics:
    """Render views at a share of their resolution and compare them with the area-filtered photos, both rounded to 8 bits.

    Args:
        gaussians: Of a level.
        cameras: The views, where the model has them; names of `photos`.
        photos: Full resolution.
        rescale: Share of the full resolution, at most 1.
        lpips: Also measure LPIPS with this network; None where a picture is too small for it.
        folder: Also write the renders here.
        own_rescale: The share that they were trained for; above it, their own picture is enlarged (`draw_level`).

    Returns:
        Means over the views of `psnr` in dB and `ssim`; `lpips` where asked for.
    """
    rows = []
    with image_writer() as write:
        for camera in cameras:
            name = camera.names[0]
            view = reduced(View(camera, photos.image(name), None), 1 / rescale)
            rgb = draw_level(gaussians, camera, own_rescale, rescale)
            image, target = (_eight_bits(picture) for picture in (rgb, view.target))
            rows.append(score(image, target, {} if lpips is None else {"lpips": lpips}))
            if folder is not None:
                write(folder / render_name(name), image)
    return {key: _mean([row[key] for row in rows]) for key in rows[0]}


@torch.no_grad()
def view_psnr(
    gaussians: Gaussians,
    refinement: Refinement | None,
    kept: Cameras,
    views: ViewSource,
    factor: float,
) -> float:
    """Mean PSNR in dB of the kept views at a layer's resolution, from their learned cameras where there are any."""
    scores = []
    for name in kept.names:
        view = reduced(views(True, name), factor)
        refined = None if refinement is None else refinement.view_of(view.camera)
        camera = view.camera
        if refined is not None:
            camera = Cameras(refined.viewmat[None], refined.K[None], camera.sizes, camera.names)
        rgb = rasterize(gaussians, camera).rgb[0]
        rgb = rgb if refined is None or refined.gain is None else rgb * refined.gain
        scores.append(psnr(rgb.clamp(0, 1).cpu(), view.target))
    return fmean(scores)


def _eight_bits(image: torch.Tensor) -> torch.Tensor:
    return (image * 255).round() / 255


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
