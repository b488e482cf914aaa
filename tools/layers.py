"""Levels of detail: train them, look at them, take them apart, pack them for sending, serve them. docs/layers.md has the whole story.

Reads   a scene (train); OUT of a run, or a folder with levels.json; cumulative PLYs (extract)
Writes  OUT/stage0, OUT/stage3/layers (train); pictures and quality.json (render); PLYs (merge); a folder of levels (extract, pack)

Example
    python tools/layers.py train -s data/truck -m out/truck --layers 8,4,2,1
    python tools/layers.py render -m out/truck --rescale 0.25
    python tools/layers.py pack -m out/truck -o out/truck_packed
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from s2d.cameras import Cameras
from s2d.config import describe_error
from s2d.files import atomic_write_json
from s2d.images import image_writer
from s2d.layers.convert import extract, merge, pack
from s2d.layers.levels import check_levels, gaussians_of_level
from s2d.layers.manifest import Levels, layers_folder, load_levels
from s2d.layers.options import LayerFlags
from s2d.layers.records import Codec, Encoding, OpacityFormat, RowFormat
from s2d.layers.score import score_views
from s2d.layers.serve import serve
from s2d.layers.show import draw_level
from s2d.log import logger, progress, setup_logging
from s2d.model_folder import render_name
from s2d.scene import load_scene
from s2d.scored_cameras import carried_cameras
from s2d.split import Split
from s2d.stage_io import require_stage

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Train(LayerFlags):
    """Stage 0 and the layers of a scene, from the kept photos alone; what is finished is not done again."""

    source: Annotated[Path, arg(aliases=["-s"])]
    """The scene."""
    model_dir: Annotated[Path, arg(aliases=["-m"])]
    """Output folder OUT."""
    layers: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0)
    """How many times smaller the photos are for each layer, coarse to fine."""
    keep_count: int | None = None
    """Keep this many photos, evenly spaced. Without: as stage 0 chooses."""
    eval: bool = False
    """Hold every 8th photo out."""
    max_gaussians: int | None = None
    """All layers together never have more Gaussians. Without: stage 3's."""
    optim_pose: bool = False
    """Also learn the cameras of the kept photos."""
    preset: str | None = None
    """Preset of stage 3."""
    seed: int = 0
    """Seed of stage 3."""
    overwrite: bool = False
    """Rebuild what is finished."""


@dataclass(frozen=True)
class Render:
    """Render levels, each at its own resolution or at the one that is given."""

    model: Annotated[Path, arg(aliases=["-m"])]
    """Folder OUT of a run with layers."""
    level: int | None = None
    """Level to render; all if not given."""
    rescale: float | None = None
    """Share of the full resolution, such as 0.25. Without: what the level was trained for; above that, its own picture is enlarged."""
    views: Literal["kept", "novel", "test"] = "kept"
    """Whose cameras. kept and test are also compared with their photos."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Folder for the pictures. Without: OUT/levels."""


@dataclass(frozen=True)
class Extract:
    """Make layers from cumulative PLYs, each of which continues the one before."""

    plys: Positional[tuple[Path, ...]]
    """PLY files, coarse to fine."""
    output: Annotated[Path, arg(aliases=["-o"])]
    """Folder of layers to write."""
    rescales: tuple[float, ...] = ()
    """Share of the full resolution of each. Without: each half of the next, the last 1."""


@dataclass(frozen=True)
class Merge:
    """Write every level as a PLY of its own with all that it shows: the inverse of extract."""

    model: Annotated[Path, arg(aliases=["-m"])]
    """Folder OUT of a run, or of layers."""
    output: Annotated[Path, arg(aliases=["-o"])]
    """Folder for level_0.ply, level_1.ply, …"""


@dataclass(frozen=True)
class Pack:
    """Store layers in fewer bytes, the rows that show most first."""

    model: Annotated[Path, arg(aliases=["-m"])]
    """Folder OUT of a run, or of layers."""
    output: Annotated[Path, arg(aliases=["-o"])]
    """Folder of layers to write."""
    rows: RowFormat = "quantised"
    """float32 is exact; float16 is for editing; quantised is for sending."""
    opacity: OpacityFormat = "uint8"
    """Of rows and opacity lists."""
    codec: Codec = "zstd"
    """none for readers without zstd."""
    sort: bool = True
    """Put the rows of a level in falling order of opacity."""


@dataclass(frozen=True)
class Info:
    """Check every file and print what the levels hold."""

    model: Annotated[Path, arg(aliases=["-m"])]
    """Folder OUT of a run, or of layers."""


@dataclass(frozen=True)
class Serve:
    """Serve layers, and the page that shows them, until Ctrl-C."""

    model: Annotated[Path, arg(aliases=["-m"])]
    """Folder OUT of a run, or of layers."""
    host: str = "127.0.0.1"
    """Address to listen on; by default nobody but this machine can connect."""
    port: int = 8080
    """0 takes a free one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command; returns the exit code."""
    commands = {
        "train": (Train, train),
        "render": (Render, render),
        "extract": (Extract, run_extract),
        "merge": (Merge, run_merge),
        "pack": (Pack, run_pack),
        "info": (Info, info),
        "serve": (Serve, run_serve),
    }
    numbers = re.compile(
        r"[\d.]+(,[\d.]+)+"
    )  # 8,4,2,1 is four values, as on the stages' command lines
    argv = [
        part
        for word in (sys.argv[1:] if argv is None else argv)
        for part in (word.split(",") if numbers.fullmatch(word) else [word])
    ]
    cfg = tyro.extras.subcommand_cli_from_dict(
        {name: cls for name, (cls, _) in commands.items()},
        prog="layers.py",
        description=__doc__,
        args=argv,
    )
    setup_logging()
    if threading.current_thread() is threading.main_thread():
        # As in s2d.config.run_script: a plain kill is another Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        dict(commands.values())[type(cfg)](cfg)
    except (ValueError, OSError) as error:  # what a user can cause, as in s2d.config.run_script
        logger.error("%s", describe_error(error))
        return 2
    except subprocess.CalledProcessError as error:  # the stage has said why
        return error.returncode
    except KeyboardInterrupt:
        logger.error("Stopped. Run the same command again to go on from where it was.")
        return 130
    return 0


def train(cfg: Train) -> None:
    """Run stage 0, then stage 3 with layers and without pseudo views."""
    common = ["-s", cfg.source, "-m", cfg.model_dir, *(["--overwrite"] if cfg.overwrite else [])]
    keep = [] if cfg.keep_count is None else ["--keep-count", cfg.keep_count]
    run_stage("stage0_point_guidance", *common, *keep, *(["--eval"] if cfg.eval else []))
    arguments = [*common, "--no-pseudo-views", "--seed", cfg.seed]
    arguments += ["--optim-pose"] if cfg.optim_pose else []
    arguments += ["--max-gaussians", cfg.max_gaussians] if cfg.max_gaussians else []
    arguments += ["--preset", cfg.preset] if cfg.preset else []
    for field in fields(LayerFlags):
        value = getattr(cfg, field.name)
        if value != field.default:
            arguments += flag(field.name, value)
    run_stage("stage3_3dgs_mixed_opt", *arguments)


def flag(name: str, value: object) -> list[object]:
    """A field's value as a stage's command line has it."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", *(value if isinstance(value, tuple) else (value,))]


def run_stage(name: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)]
    subprocess.run(command, check=True)


def render(cfg: Render) -> None:
    """Render the views of one level or all, and measure them where they have photos."""
    levels = load_levels(layers_folder(cfg.model))
    chosen = range(len(levels)) if cfg.level is None else [cfg.level]
    cameras, photos = views_of(cfg.model, cfg.views)
    output = cfg.output or cfg.model / "levels"
    quality = {}
    for k in chosen:
        gaussians = gaussians_of_level(levels, k, visible_only=True)
        own = levels.levels[k].rescale
        rescale = cfg.rescale or own
        folder = output / f"level_{k}_rescale_{rescale:g}"
        if photos is not None:
            quality[k] = score_views(
                gaussians, cameras, photos, rescale, folder=folder, own_rescale=own
            )
            logger.info(
                "level %d at %g: %d Gaussians, PSNR %.2f dB, SSIM %.3f",
                *(k, rescale, gaussians.num, quality[k]["psnr"], quality[k]["ssim"]),
            )
            continue
        with image_writer() as write, progress(len(cameras), f"level {k}") as bar:
            for done, camera in enumerate(cameras, start=1):
                write(
                    folder / render_name(camera.names[0]),
                    draw_level(gaussians, camera, own, rescale),
                )
                bar.update(done)
    if quality:
        atomic_write_json(output / "quality.json", quality)
    logger.info("pictures: %s", output)


def views_of(model_dir: Path, views: str):
    """Cameras of a run's views in the frame of its layers, and the photos, if there are any."""
    stage0 = require_stage(model_dir, "stage0")
    kept = Cameras.from_json(require_stage(model_dir, "stage3").dir / "kept_cameras.json")
    if views == "novel":
        return Cameras.from_json(stage0.dir / "novel_cameras.json"), None
    prepared = stage0.dir / "scene"
    scene = load_scene(prepared if prepared.is_dir() else Path(stage0.config["source"]))
    if views == "kept":
        return kept, scene
    test = Split.load(stage0.dir / "split.json").test
    if not test:
        raise ValueError(f"{model_dir} has no test views. Pass --views kept or novel.")
    return carried_cameras(scene.cameras.select(test), scene.cameras, kept)[0], scene


def run_extract(cfg: Extract) -> None:
    print_levels(extract(cfg.plys, cfg.output, cfg.rescales))


def run_merge(cfg: Merge) -> None:
    for path in merge(load_levels(layers_folder(cfg.model)), cfg.output):
        logger.info("%s", path)


def run_pack(cfg: Pack) -> None:
    source = load_levels(layers_folder(cfg.model))
    encoding = Encoding(cfg.rows, cfg.opacity, cfg.codec)
    print_levels(pack(source, cfg.output, encoding, cfg.sort))


def info(cfg: Info) -> None:
    levels = load_levels(layers_folder(cfg.model))
    check_levels(levels)
    print_levels(levels)


def print_levels(levels: Levels) -> None:
    """A table of the levels on stdout."""
    encoding = levels.encoding
    table = Table(
        title=f"{levels.dir}: SH degree {levels.sh_degree}, rows {encoding.rows}, opacities {encoding.opacity}, codec {encoding.codec}"
    )
    for title in ("level", "rescale", "adds", "Gaussians", "drawn", "transparent", "kB new", "kB"):
        table.add_column(title, justify="right")
    for k, level in enumerate(levels.levels):
        new = sum(levels.files[name].bytes for name in levels.new_files(k))
        table.add_row(
            str(k),
            f"{level.rescale:g}",
            f"{level.stop - level.start:,}",
            f"{level.stop:,}",
            f"{level.visible:,}",
            f"{level.transparent / max(level.stop, 1):.1%}",
            f"{new / 1000:,.0f}",
            f"{levels.num_bytes(k) / 1000:,.0f}",
        )
    Console().print(table)


def run_serve(cfg: Serve) -> None:
    serve(cfg.model, cfg.host, cfg.port)


if __name__ == "__main__":
    sys.exit(main())
