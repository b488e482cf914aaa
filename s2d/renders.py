"""A scene seen from many cameras, as PNGs."""

from collections.abc import Iterator
from pathlib import Path

from s2d.cameras import Cameras
from s2d.device import on_gpu
from s2d.gaussians import Gaussians
from s2d.images import image_writer
from s2d.log import progress
from s2d.model_folder import render_name
from s2d.rasterize import rasterize

# Views drawn at once on a GPU, which one small view does not fill, as long as they have no more Gaussians in all.
BATCH_VIEWS, BATCH_GAUSSIANS = 8, 4_000_000


def render_views(gaussians: Gaussians, cameras: Cameras, folder: Path) -> None:
    """Render the cameras, one PNG per view, named after it; they are encoded while the next are drawn."""
    gaussians, done = gaussians.detached(), 0
    with image_writer() as write, progress(len(cameras), "novel renders") as bar:
        for batch in render_batches(gaussians, cameras):
            images = rasterize(gaussians, batch).rgb.cpu()
            for name, image in zip(batch.names, images, strict=True):
                write(folder / render_name(name), image)
            done += len(batch)
            bar.update(done)


def render_batches(gaussians: Gaussians, cameras: Cameras) -> Iterator[Cameras]:
    """Divide cameras into what is drawn at once, in order: one on the CPU; some of one size on a GPU."""
    most = 1
    if on_gpu(gaussians.means):
        most = max(1, min(BATCH_VIEWS, BATCH_GAUSSIANS // max(gaussians.num, 1)))
    first = 0
    while first < len(cameras):
        sizes = cameras.sizes[first : first + most]
        count = next((k for k, size in enumerate(sizes) if size != sizes[0]), len(sizes))
        yield cameras[first : first + count]
        first += count
