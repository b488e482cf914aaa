"""How good is the point guidance? Stage 0's cloud from the kept photos, drawn at the test views.

Protocol --eval: every 8th photo is a test view, kept views are evenly spaced among the rest. CPU seconds are those of all threads together, so
that other work on the machine does not count: on two idle cores the clock shows a little more than half.

Reads   $S2D_DATA/scenes/<scene>
Writes  a Markdown table (--table FILE) and pictures of test photo and guidance (--pictures DIR)

Example
    S2D_DATA=../shared python benchmarks/guidance.py --scenes fern fox --counts 3 6 --table table.md
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from s2d.guidance.mvs import reconstruct
from s2d.guidance.render import render_cloud
from s2d.images import write_image
from s2d.log import logger, setup_logging
from s2d.scene import load_scene
from s2d.split import make_split

HEADER = (
    "| scene | kept | coverage min–max | mean | PSNR on covered, min–max (dB) | mean | CPU seconds | points |",
    "|---|---|---|---|---|---|---|---|",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", nargs="*", default=["fern", "fox", "kitchen", "sceaux"])
    parser.add_argument(
        "--counts", nargs="*", type=int, default=[3, 6], help="numbers of kept photos"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="write the table to this file too")
    parser.add_argument(
        "--pictures", type=Path, help="folder for pictures: test photos above, guidance below"
    )
    args = parser.parse_args()
    if "S2D_DATA" not in os.environ:
        parser.exit(2, "S2D_DATA is not set: it names the folder that holds scenes/.\n")
    setup_logging(logging.WARNING)
    rows = list(HEADER)
    print("\n".join(HEADER), flush=True)
    for name in args.scenes:
        for count in args.counts:
            rows.append(
                measure(
                    Path(os.environ["S2D_DATA"]) / "scenes" / name, count, args.seed, args.pictures
                )
            )
            print(rows[-1], flush=True)
    if args.table:
        args.table.write_text("\n".join(rows) + "\n")


def measure(source: Path, count: int, seed: int, pictures: Path | None) -> str:
    """One row of the table: LLFF protocol, every 8th photo is a test view."""
    scene = load_scene(source)
    split = make_split(scene.names, keep_count=count, eval=True)
    start = time.process_time()
    try:
        cloud = reconstruct(scene.subset(split.kept), seed).cloud
    except ValueError as error:
        logger.warning("%s", error)
        return f"| {source.name} | {len(split.kept)} | – | – | – | – | {time.process_time() - start:.0f} | 0 |"
    seconds = time.process_time() - start
    coverages, psnrs, columns = [], [], []
    for name in split.test:
        truth = scene.image(name)
        guidance = render_cloud(cloud, scene.cameras.select([name]))
        shown = (guidance.rgb.clamp(0, 1) * 255).round() / 255
        error = (shown - truth)[guidance.coverage].square().mean()
        coverages.append(float(guidance.coverage.float().mean()))
        psnrs.append(float(-10 * torch.log10(error.clamp(min=1e-10))))
        columns.append(torch.cat([truth, shown]))
    if pictures:
        write_image(pictures / f"{source.name}_{count}.png", torch.cat(columns, 1))
    return (
        f"| {source.name} | {len(split.kept)} | {min(coverages):.2f}–{max(coverages):.2f} | {sum(coverages) / len(coverages):.3f} "
        f"| {min(psnrs):.1f}–{max(psnrs):.1f} | {sum(psnrs) / len(psnrs):.2f} | {seconds:.0f} | {len(cloud):,} |"
    )


if __name__ == "__main__":
    main()
