"""Make random 3D scenes with photos and exact cameras, for tools/make_fixer_pairs.py to make training pairs of.

Rooms, streets and things in front of cameras, textured with pieces of given photos; ray-cast, exact to the pixel convention.

Reads   folders of photos (--textures, repeated); none: patterns
Writes  OUT/synthetic-<seed>-<number>/{images/*.jpg,transforms.json}, OUT/preview.png, OUT/settings.json

Example
    python tools/make_synthetic_scenes.py -o out/synthetic --count 40 --textures photos/holiday --textures photos/town
    python tools/make_fixer_pairs.py -s out/synthetic -s data/scenes -o data/pairs --test-scenes fern,fox
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import numpy as np
import torch
from tyro.conf import UseAppendAction, arg

from s2d.checks import check_range
from s2d.config import no_effect, run_script
from s2d.files import atomic_write_json, content_hash, locked
from s2d.images import image_info, list_images, read_image, resize_image, write_image
from s2d.log import logger, progress
from s2d.pairs.dataset import read_json
from s2d.pairs.synthetic.files import SceneSettings, is_finished, make_scene, scene_name

SETTINGS, PREVIEW = "settings.json", "preview.png"
SMALLEST_TEXTURE = 128  # pixels: icons make no surfaces
TILE = 168  # width of a photo on the preview sheet
SHOWN = 64  # scenes on it


@dataclass(frozen=True)
class Config:
    """Make random 3D scenes with photos and exact cameras."""

    output_dir: Annotated[Path, arg(aliases=["-o"])] = no_effect(Path("out/synthetic"))
    """Folder of the scenes, made if missing; finished scenes are kept."""
    count: int = no_effect(40)
    """Number of scenes. More of them later add to the first ones."""
    seed: int = no_effect(0)
    """Other seeds make other scenes, in the same folder if wanted."""
    textures: Annotated[tuple[Path, ...], UseAppendAction] = no_effect(())
    """Folder of photos, or a photo, to cut textures from. Repeat the flag for more. Without: patterns only."""
    width: int = 504
    """Width of the photos, pixels."""
    height: int = 378
    """Height of the photos, pixels."""
    overwrite: bool = no_effect(False)
    """Make all scenes anew."""


def main(cfg: Config) -> Path:
    """Make the scenes; returns their folder."""
    check_range("count", cfg.count, 1)
    check_range("seed", cfg.seed, 0)
    check_range("width", cfg.width, 32)
    check_range("height", cfg.height, 32)
    photos = find_photos(cfg.textures)
    settings = SceneSettings(cfg.seed, photos, cfg.width, cfg.height)
    with locked(cfg.output_dir, "--output-dir"):
        begin(cfg, photos)
        folders = [cfg.output_dir / scene_name(cfg.seed, index) for index in range(cfg.count)]
        todo = [k for k in range(cfg.count) if cfg.overwrite or not is_finished(folders[k])]
        logger.info("%d scenes to make, %d are there; %d photos for textures", len(todo), cfg.count - len(todo), len(photos))  # fmt: skip
        with progress(len(todo), "scenes") as bar:
            for done, index in enumerate(todo):
                bar.update(done, scene=folders[index].name)
                make_scene(settings, index, folders[index])
                bar.update(done + 1, scene=folders[index].name)
        write_preview(folders[:SHOWN], cfg.output_dir / PREVIEW)
    logger.info("%d scenes in %s; look at %s", cfg.count, cfg.output_dir, PREVIEW)
    return cfg.output_dir


def find_photos(sources: Sequence[Path]) -> tuple[Path, ...]:
    """All photos of the folders, large enough to be textures.

    Raises:
        FileNotFoundError: a folder is missing or has no photos.
    """
    found: list[Path] = []
    for source in sources:
        photos = [source / name for name in list_images(source)] if source.is_dir() else [source]
        photos = [path for path in photos if min(image_info(path).stored_size) >= SMALLEST_TEXTURE]
        if not photos:
            raise FileNotFoundError(
                f"{source} has no photos of {SMALLEST_TEXTURE} pixels or more. Expected a folder of PNG, JPEG, WebP, TIFF or BMP files."
            )
        found += photos
    return tuple(found)


def begin(cfg: Config, photos: Sequence[Path]) -> None:
    """Note what the scenes are made with; refuse to mix them with scenes that were made with something else."""
    path = cfg.output_dir / SETTINGS
    state = {
        "size": [cfg.width, cfg.height],
        "textures": [content_hash(photo) for photo in photos],
    }
    if path.is_file() and not cfg.overwrite and read_json(path) != state:
        raise ValueError(
            f"The scenes in {cfg.output_dir} were made with other textures or another size. "
            "Pass the same ones, --overwrite to make all anew, or choose another --output-dir."
        )
    atomic_write_json(path, state)


def write_preview(folders: Sequence[Path], path: Path) -> Path:
    """A contact sheet: the first, middle and last photo of each scene, two scenes a row."""
    strips = []
    for folder in folders:
        names = list_images(folder / "images")
        photos = [read_image(folder / "images" / names[k]) for k in (0, len(names) // 2, -1)]
        height = round(photos[0].shape[0] * TILE / photos[0].shape[1])
        tiles = [resize_image(photo, TILE, height).numpy() for photo in photos]
        strips.append(np.pad(np.concatenate(tiles, 1), ((3, 3), (3, 3), (0, 0)), constant_values=1.0))  # fmt: skip
    if len(strips) % 2:
        strips.append(np.ones_like(strips[0]))
    rows = [np.concatenate(strips[k : k + 2], 1) for k in range(0, len(strips), 2)]
    return write_image(path, torch.from_numpy(np.concatenate(rows)))


if __name__ == "__main__":
    run_script(main, Config, "make_synthetic_scenes")
