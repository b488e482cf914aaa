"""Make the picture on top of the README from a finished run of the demo scene.

Reads   OUT of `bash run_pipeline.sh`: stages 0-3 and per_view.json
Writes  docs/demo.jpg: two views as truth, stage 1, guidance, fixed, final

Example
    bash run_pipeline.sh && python benchmarks/demo_picture.py
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

from tyro.conf import arg

from s2d.config import no_effect, run_script
from s2d.report import write_sheet
from tools import evaluate

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    """Make the README's picture from a finished run."""

    model_dir: Annotated[Path, arg(aliases=["-m"])] = no_effect(ROOT / "out" / "demo")
    """Output folder of the run."""
    views: tuple[str, ...] = ()
    """Views to show; the middle one and the worst by final PSNR if not given."""
    picture: Path = no_effect(ROOT / "docs" / "demo.jpg")
    """The picture to write."""


def main(cfg: Config) -> Path:
    """Write the picture; returns its path."""
    run = evaluate.open_run(evaluate.Config(cfg.model_dir))
    evaluate.collect_novel_views(run)
    per_view = json.loads((cfg.model_dir / "per_view.json").read_text("utf-8"))
    ranked = sorted(run.novel, key=lambda name: per_view["stage3"]["novel"][name]["psnr"])
    names = cfg.views or (ranked[len(ranked) // 2], ranked[0])
    return write_sheet(cfg.picture, [evaluate.view_record(run, per_view, name) for name in names])


if __name__ == "__main__":
    run_script(main, Config, "demo_picture")
