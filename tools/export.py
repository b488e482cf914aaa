"""Take a model out of S2D: splats for other programs, fly-throughs, pictures, depth maps.

Reads   OUT of a run (-m), or a .ply of Gaussians
Writes  into OUT/export/ if no other place is named: scene.<suffix> or level_<k>.<suffix>; <path>.mp4; <path>/<frame>.png, .npz

Example
    python tools/export.py splats -m out/demo --format spz --format sog
    python tools/export.py splats -m out/demo --levels --format compressed-ply
    python tools/export.py video -m out/demo --path orbit --seconds 8
    python tools/export.py images -m out/demo --depth
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import tyro
from tyro.conf import UseAppendAction, arg

from s2d.cameras import Cameras
from s2d.checks import check_range
from s2d.config import describe_error
from s2d.export import (
    FORMATS,
    fly_through,
    kept_cameras,
    load_model,
    render_frames,
    write_depth,
    write_splats,
    write_video,
)
from s2d.export.paths import PathKind
from s2d.gaussians import Gaussians
from s2d.images import image_writer
from s2d.layers.levels import gaussians_of_level
from s2d.layers.manifest import layers_folder, load_levels
from s2d.layers.show import widened
from s2d.log import logger, setup_logging
from s2d.model_folder import render_name

Format = Literal["ply", "splat", "compressed-ply", "spz", "sog", "glb"]


@dataclass(frozen=True)
class Splats:
    """Gaussians in other programs' formats; compressed-ply, spz, sog and glb need node: bash tools/build_viewer.sh."""

    model: Annotated[Path, arg(aliases=["-m"])]
    """Folder OUT of a run, a folder of layers, or a .ply file."""
    format: UseAppendAction[tuple[Format, ...]] = ()
    """Format to write; repeat it for more. Without: ply."""
    level: int | None = None
    """Write this level of the layers. Without: the whole model."""
    levels: bool = False
    """Write every level of the layers, each to a file of its own."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Folder to write to. Without: OUT/export."""


@dataclass(frozen=True)
class Flight:
    """What video and images share."""

    model: Annotated[Path, arg(aliases=["-m"])]
    """Folder OUT of a run."""
    path: PathKind = "interpolate"
    """Through the kept cameras, around what they look at, or a small spiral in front of it."""
    seconds: float = 6.0
    """Length; with --fps it gives the number of frames."""
    fps: float = 30.0
    """Frames per second."""
    width: int | None = None
    """Width in pixels. Without: that of the photos."""
    level: int | None = None
    """Show this level of the layers. Without: the whole model."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """File or folder to write. Without: below OUT/export."""


@dataclass(frozen=True)
class Video(Flight):
    """A fly-through as MP4 (VP9)."""


@dataclass(frozen=True)
class Images(Flight):
    """The frames of a fly-through, or the views of the kept photos, as PNG."""

    kept: bool = False
    """The kept photos' cameras instead of a path."""
    depth: bool = False
    """Also write <frame>.npz: depth (camera z, world units) and alpha."""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, write; returns the exit code."""
    commands = {"splats": Splats, "video": Video, "images": Images}
    cfg = tyro.extras.subcommand_cli_from_dict(
        commands, prog="export.py", description=__doc__, args=argv
    )
    setup_logging()
    run = {Splats: export_splats, Video: export_video, Images: export_images}
    try:
        run[type(cfg)](cfg)
    except (ValueError, OSError) as error:  # what a user can cause, as in s2d.config.run_script
        logger.error("%s", describe_error(error))
        return 2
    except KeyboardInterrupt:
        logger.error("Stopped. What was finished is there.")
        return 130
    return 0


def export_splats(cfg: Splats) -> list[Path]:
    """Write every format of every level asked for; returns the files."""
    folder = cfg.output or default_folder(cfg.model)
    if cfg.levels and cfg.level is not None:
        raise ValueError("--level names one level and --levels all of them. Give one of the two.")
    wanted = [cfg.level]
    if cfg.levels:
        wanted = list(range(len(load_levels(layers_folder(cfg.model)))))
    written = []
    for level in wanted:
        gaussians = gaussians_of(cfg.model, level)
        stem = "scene" if level is None else f"level_{level}"
        for name in cfg.format or ("ply",):
            path = write_splats(gaussians, folder / f"{stem}{FORMATS[name][0]}", name)
            logger.info("%s: %d Gaussians, %.2f MB", path, gaussians.num, path.stat().st_size / 1e6)
            written.append(path)
    return written


def export_video(cfg: Video) -> Path:
    gaussians, cameras = flight(cfg)
    path = cfg.output or default_folder(cfg.model) / f"{cfg.path}.mp4"
    frames = (render.rgb[0] for _, render in render_frames(gaussians, cameras))
    write_video(path, frames, cfg.fps)
    logger.info("%s: %d frames, %.2f MB", path, len(cameras), path.stat().st_size / 1e6)
    return path


def export_images(cfg: Images) -> Path:
    if cfg.kept:
        gaussians, cameras = gaussians_to_draw(cfg.model, cfg.level), kept_cameras(cfg.model)
        if cfg.width is not None:
            cameras = cameras.scaled(cfg.width / cameras.sizes[0][0])
    else:
        gaussians, cameras = flight(cfg)
    folder = cfg.output or default_folder(cfg.model) / ("kept" if cfg.kept else cfg.path)
    with image_writer() as write:
        for name, render in render_frames(gaussians, cameras):
            path = folder / render_name(name)
            write(path, render.rgb[0])
            if cfg.depth:
                write_depth(path.with_suffix(".npz"), render)
    logger.info("%s: %d views", folder, len(cameras))
    return folder


def flight(cfg: Flight) -> tuple[Gaussians, Cameras]:
    """The Gaussians of a fly-through and its cameras."""
    check_range("fps", cfg.fps, 1.0, 240.0)
    gaussians = gaussians_to_draw(cfg.model, cfg.level)
    num = max(1, round(cfg.seconds * cfg.fps))
    kept = kept_cameras(cfg.model)
    return gaussians, fly_through(cfg.path, kept, num, gaussians.means, cfg.width)


def gaussians_to_draw(model: Path, level: int | None) -> Gaussians:
    """The whole model, or one level of its layers, widened so that it does not fall apart at full size."""
    gaussians = gaussians_of(model, level)
    if level is None:
        return gaussians
    rescale = load_levels(layers_folder(model)).levels[level].rescale
    return widened(gaussians, kept_cameras(model), rescale)


def gaussians_of(model: Path, level: int | None) -> Gaussians:
    """The whole model, or one level of its layers as it is shown."""
    folder = layers_folder(model)
    if level is not None:
        return gaussians_of_level(folder, level, visible_only=True)
    if folder == model and model.is_dir():  # a folder of layers alone
        return gaussians_of_level(folder, len(load_levels(folder)) - 1)
    return load_model(model)


def default_folder(model: Path) -> Path:
    return (model if model.is_dir() else model.parent) / "export"


if __name__ == "__main__":
    sys.exit(main())
