"""Look at a model in a browser, while it is trained and afterwards. Over SSH: ssh -L 8080:127.0.0.1:8080 MACHINE, then open the address here.

Reads   OUT of a run, finished or not (checkpoints, Gaussians, layers, cameras, the stages' pictures; photos from SCENE)
Writes  nothing

Example
    python tools/view.py -m out/demo
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

from tyro.conf import arg

from s2d.config import no_effect, run_script
from s2d.log import logger
from s2d.model_folder import kept_views
from s2d.scene import Scene
from s2d.split import Split
from s2d.stage_io import require_stage
from s2d.viewer import ModelFolder, Viewer

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Config:
    """Look at a model in a browser, while it is trained and afterwards."""

    model_dir: Annotated[Path, arg(aliases=["-m"])] = no_effect()
    """Output folder OUT of a run, a folder of layers, or a .ply file."""
    host: str = no_effect("127.0.0.1")
    """Address to listen on; 0.0.0.0 lets the whole network look."""
    port: int = no_effect(8080)
    """Port; if it is taken, the next free one."""


def main(cfg: Config) -> Path:
    """Show the model until Ctrl-C."""
    folder = ModelFolder(cfg.model_dir)
    viewer = Viewer(folder, cfg.host, cfg.port, find_photos(cfg.model_dir))
    logger.info("http://%s:%d/ (Ctrl-C ends it)", cfg.host, viewer.server.get_port())
    while True:
        viewer.refresh()
        time.sleep(POLL_SECONDS)


def find_photos(model_dir: Path) -> Scene | None:
    """The kept photos; None where the scene has moved, or where there is none."""
    try:
        stage0 = require_stage(model_dir, "stage0")
        split = Split.load(stage0.dir / "split.json")
        return kept_views(Path(stage0.config["source"]), stage0.dir, split)
    except (ValueError, OSError) as error:
        logger.warning("Cameras are shown without photos: %s", error)
        return None


if __name__ == "__main__":
    run_script(main, Config, "view")
