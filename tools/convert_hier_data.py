"""Make chunks, the format that the hierarchical model is trained from, of DTU, Replica or any posed scenes. See docs/hier_data.md.

Reads   the data set's own files
Writes  OUT/{train,test}/NNNNNN.torch, index.json; the same command again goes on where it was

Example
    python tools/convert_hier_data.py dtu -i data/mvsnet_training/dtu -o data/dtu_chunks
    python tools/convert_hier_data.py replica -i data/replica -o data/replica_chunks
    python tools/convert_hier_data.py scenes -i data/scenes -o data/scene_chunks --split train
    python tools/convert_hier_data.py index -i data/re10k/test          # index.json of chunks that came without
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
from tyro.conf import arg

from s2d.config import describe_error
from s2d.hier.data.convert import (
    dtu_recordings,
    posed_recording,
    replica_recordings,
    write_chunks,
    write_index,
)
from s2d.hier.data.posed import load_posed
from s2d.log import logger, setup_logging

Input = Annotated[Path, arg(aliases=["-i"])]
Output = Annotated[Path, arg(aliases=["-o"])]


@dataclass(frozen=True)
class Dtu:
    """DTU as MVSNet rectified it (Rectified/, Cameras/train/)."""

    input: Input
    """Folder of the data set."""
    output_dir: Output
    """Folder of the chunks."""
    split: Literal["test", "train"] = "test"
    """test: the 16 scans of the published index; train: the others."""


@dataclass(frozen=True)
class Replica:
    """Replica as rendered for Semantic-NeRF (<room>/Sequence_<k>/)."""

    input: Input
    """Folder of the data set."""
    output_dir: Output
    """Folder of the chunks."""


@dataclass(frozen=True)
class Scenes:
    """Any posed scenes: COLMAP, transforms.json."""

    input: Input
    """A scene or a folder of scenes."""
    output_dir: Output
    """Folder of the chunks."""
    split: Literal["test", "train"] = "train"
    """Which half they go into."""


@dataclass(frozen=True)
class Index:
    """index.json of chunks that have none."""

    input: Input
    """Folder of the chunks: ROOT/train or ROOT/test."""


COMMANDS = {"dtu": Dtu, "replica": Replica, "scenes": Scenes, "index": Index}


def main(cfg: Dtu | Replica | Scenes | Index) -> Path:
    """Convert; returns the folder of the chunks."""
    if isinstance(cfg, Index):
        logger.info("%s: %d scenes", cfg.input, write_index(cfg.input))
        return cfg.input
    folder = cfg.output_dir / ("test" if isinstance(cfg, Replica) else cfg.split)
    if isinstance(cfg, Dtu):
        recordings = dtu_recordings(cfg.input, cfg.split)
    elif isinstance(cfg, Replica):
        recordings = replica_recordings(cfg.input)
    else:
        captures = load_posed([cfg.input], cfg.output_dir / "cache")
        recordings = (posed_recording(capture) for capture in captures)
    logger.info("%d scenes written to %s", write_chunks(recordings, folder), folder)
    return folder


if __name__ == "__main__":
    setup_logging()
    try:
        main(tyro.extras.subcommand_cli_from_dict(COMMANDS))
    except KeyboardInterrupt:
        logger.error("Stopped. Run the same command again to go on from where it was.")
        sys.exit(130)
    except (ValueError, OSError) as error:
        logger.error("%s", describe_error(error))
        sys.exit(2)
