"""How soon a model can be seen over a slow link: layers against one PLY, and against the same rows without layers.

A server on this machine, slowed down to the given rates; our client. Times are from the request to the Gaussians in memory, not to pixels, which depend on
the viewer. PSNR is that of a picture of what is there, against one of the finest level; levels are shown as viewers show them (s2d/layers/show.py).

Reads   OUT of a run with layers (-m), or a folder of layers
Writes  a Markdown table to stdout (docs/viewing.md)

Example
    python benchmarks/streaming.py -m out/fern --rates 1,5,20
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from torch import Tensor
from tyro.conf import arg

from s2d.config import no_effect, run_script
from s2d.gaussians import Gaussians
from s2d.layers.convert import pack
from s2d.layers.levels import gaussians_of_level, write_levels
from s2d.layers.manifest import layers_folder, load_levels
from s2d.layers.records import Encoding
from s2d.layers.rows import pick_rows
from s2d.layers.serve import build_app, find_cameras
from s2d.layers.show import draw_level, shown_rescale
from s2d.layers.stream import LayerStream
from s2d.log import logger
from s2d.metrics import psnr
from tests.layer_server import running

PIECE_SECONDS = 0.02  # of the link between two waits
CATCH_UP_SECONDS = (
    0.1  # what a busy machine was late is sent at once; a real link's buffer does the same
)
MARKS = (20.0, 25.0, 30.0)  # dB


@dataclass(frozen=True)
class Config:
    """Measure how soon a model can be seen over a slow link."""

    model: Annotated[Path, arg(aliases=["-m"])] = no_effect()
    """OUT of a run with layers, or a folder of layers."""
    rates: tuple[float, ...] = (1.0, 5.0, 20.0)
    """Mbit/s."""
    width: int = 320
    """Width of the renders that are compared."""


@dataclass
class Progress:
    """What was there when."""

    seconds: float
    gaussians: Gaussians
    rescale: float | None
    """Share of the full resolution at which to draw them; None: the finest level's."""
    is_image: bool
    """A complete level, or the whole model."""


class SlowLink:
    """An ASGI application behind a link of so many bits per second, shared by all its answers."""

    def __init__(self, app, bits_per_second: float) -> None:
        self.app, self.rate, self.free_at = app, bits_per_second / 8, 0.0

    async def __call__(self, scope, receive, send) -> None:
        async def slowly(message) -> None:
            body = message.get("body", b"")
            step = max(1, round(PIECE_SECONDS * self.rate))
            for at in range(0, len(body), step):
                piece = body[at : at + step]
                earliest = time.monotonic() - CATCH_UP_SECONDS
                self.free_at = max(self.free_at, earliest) + len(piece) / self.rate
                await asyncio.sleep(self.free_at - time.monotonic())
                more = message.get("more_body", False) or at + step < len(body)
                await send({**message, "body": piece, "more_body": more})
            if not body:
                await send(message)

        await self.app(scope, receive, slowly)


def main(cfg: Config) -> Path:
    """Print the table; returns the model's path."""
    source = layers_folder(cfg.model)
    levels, cameras = load_levels(source), find_cameras(source)
    if cameras is None:
        raise ValueError(f"No cameras beside {source}. Give OUT of a run.")
    camera = cameras[[len(cameras) // 2]]
    finest = gaussians_of_level(levels, len(levels) - 1)
    rescale = levels.levels[-1].rescale

    def picture(gaussians: Gaussians, own_rescale: float) -> Tensor:
        return draw_level(gaussians, camera, own_rescale, cfg.width / camera.width)

    truth = picture(finest, rescale)
    with tempfile.TemporaryDirectory(prefix="s2d-streaming-") as name:
        folder = Path(name)
        best = Encoding("quantised", "uint8", "zstd")
        pack(levels, folder / "layers", best)
        sorted_rows = finest.opacity_logits.argsort(descending=True)
        write_levels(folder / "flat", [pick_rows(finest, sorted_rows)], [None], [rescale], best)
        finest.save_ply(folder / "ply" / "scene.ply")
        print("| link | what | MB | first image | its PSNR | 20 dB | 25 dB | 30 dB | all |")
        print("|---|---|---|---|---|---|---|---|---|")
        for rate in cfg.rates:
            for what, fetch in (
                ("layers", layered),
                ("packed, no layers", layered),
                ("PLY", plain),
            ):
                part = {"layers": "layers", "packed, no layers": "flat", "PLY": "ply"}[what]
                logger.info("%s at %g Mbit/s ...", what, rate)
                cache = folder / f"cache-{part}-{rate}"
                size, seen = fetch(folder / part, rate * 1e6, cache)
                scores = [psnr(picture(p.gaussians, p.rescale or rescale), truth) for p in seen]
                print(row(f"{rate:g} Mbit/s", what, size, seen, scores), flush=True)
    return cfg.model


def layered(folder: Path, bits: float, cache: Path) -> tuple[int, list[Progress]]:
    with running(SlowLink(build_app(folder), bits)) as url:
        stream = LayerStream(url + "layers", cache, refresh_seconds=0.25)
        seen = [
            Progress(
                shown.seconds,
                shown.gaussians,
                shown_rescale(stream.levels, shown.level, shown.share),
                shown.share == 0,
            )
            for shown in stream.updates()
            if shown.gaussians.num
        ]
    return stream.num_bytes, seen


def plain(folder: Path, bits: float, cache: Path) -> tuple[int, list[Progress]]:
    app = Starlette(routes=[Mount("/", StaticFiles(directory=folder))])
    with running(SlowLink(app, bits)) as url:
        start = time.monotonic()
        content = urllib.request.urlopen(url + "scene.ply").read()
        cache.with_suffix(".ply").write_bytes(content)
        gaussians = Gaussians.load_ply(cache.with_suffix(".ply"))
        return len(content), [Progress(time.monotonic() - start, gaussians, None, True)]


def row(link: str, what: str, size: int, seen: list[Progress], scores: list[float]) -> str:
    first = next(i for i, progress in enumerate(seen) if progress.is_image)
    reached: Iterator[str] = (
        next((f"{p.seconds:.1f} s" for p, s in zip(seen, scores, strict=True) if s >= mark), "–")
        for mark in MARKS
    )
    cells = [link, what, f"{size / 1e6:.2f}", f"{seen[first].seconds:.1f} s", f"{scores[first]:.1f} dB"]  # fmt: skip
    return "| " + " | ".join([*cells, *reached, f"{seen[-1].seconds:.1f} s"]) + " |"


if __name__ == "__main__":
    run_script(main, Config, "streaming")
