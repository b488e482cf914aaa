"""How good are cameras from photos alone? Structure from motion on a few photos, against the cameras that the scenes come with.

The scenes' cameras were made from all photos. They are aligned by a Sim(3) (`s2d.alignment`) found from the kept cameras alone; rotations are in
degrees, centres in % of the kept rig's extent. Held-out photos are placed afterwards and compared under the same Sim(3).

Reads   $S2D_DATA/photos/sceaux (EXIF, distortion), $S2D_DATA/scenes/<scene>/images (neither)
Writes  a Markdown table (--table FILE)

Example
    S2D_DATA=../shared python benchmarks/poses.py --sets sceaux:3 sceaux:6 fern:3
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from s2d.alignment import align_cameras
from s2d.cameras import Cameras
from s2d.geometry import rotation_angle
from s2d.log import setup_logging
from s2d.poses.photos import find_photos
from s2d.poses.place import place_photos, write_photo_scene
from s2d.scene import load_scene
from s2d.split import make_split

HEADER = (
    "| photos | placed | rotation, mean / max (°) | centres, mean / max (%) | focal length | points | error (px) | features, mapper | held out: placed | rotation, median (°) | centres, median (%) |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)
ALL = (
    "sceaux:11",
    "sceaux:6",
    "sceaux:3",
    "fern:20",
    "fern:6",
    "fern:3",
    "fox:25",
    "fox:6",
    "fox:3",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="*", default=ALL, help="SCENE:NUMBER OF KEPT PHOTOS")
    parser.add_argument("--held-out", action="store_true", help="place the other photos, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    if "S2D_DATA" not in os.environ:
        parser.exit(2, "S2D_DATA is not set: it names the folder that holds scenes/ and photos/.\n")
    setup_logging(logging.WARNING)
    rows = list(HEADER)
    print("\n".join(HEADER), flush=True)
    for chosen in args.sets:
        scene, count = chosen.split(":")
        rows.append(
            measure(Path(os.environ["S2D_DATA"]), scene, int(count), args.held_out, args.seed)
        )
        print(rows[-1], flush=True)
    if args.table:
        args.table.write_text("\n".join(rows) + "\n")


def measure(data: Path, scene: str, count: int, held_out: bool, seed: int) -> str:
    """One row of the table."""
    folder = data / "photos" / scene
    folder = folder if folder.is_dir() else data / "scenes" / scene / "images"
    photos = find_photos(folder)
    split = make_split([photo.name for photo in photos], keep_count=count)
    kept = [photo for photo in photos if photo.name in split.kept]
    others = [photo for photo in photos if photo.name in split.test] if held_out else []
    with tempfile.TemporaryDirectory() as scratch:
        placement = place_photos(kept, others, Path(scratch), seed)
        found = write_photo_scene(
            placement, folder, scene, Path(scratch) / "scene", Path(scratch), 0
        ).cameras
    found = by_stem(found)
    truth = by_stem(load_scene(data / "scenes" / scene).cameras)
    names = [name for name in found.names if name in {Path(name).stem for name in split.kept}]
    fit = align_cameras(found.select(names), truth.select(names))
    turned, moved = fit.rotation_errors, fit.center_errors
    best = placement.record["best"]
    cells = [
        f"{scene}, {count}",
        len(names),
        f"{turned.mean():.3f} / {turned.max():.3f}",
        f"{moved.mean():.3f} / {moved.max():.3f}",
        f"{focal_ratio(found.select(names), truth.select(names)):.4f}",
        best["quality"]["num_points"],
        f"{best['quality']['error']:.2f}",
        f"{best['features']}, {best['mapper']}",
        *held_out_cells(found, truth, names, fit.sim3.cameras(found), len(others)),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def by_stem(cameras: Cameras) -> Cameras:
    return cameras.renamed([Path(name).stem for name in cameras.names])


def focal_ratio(found: Cameras, truth: Cameras) -> float:
    """Median of found over true focal length, each relative to its picture's width."""
    relative = [
        cameras.Ks[:, 0, 0] / torch.tensor([width for width, _ in cameras.sizes])
        for cameras in (found, truth)
    ]
    return float((relative[0] / relative[1]).median())


def held_out_cells(
    found: Cameras, truth: Cameras, kept: list[str], aligned: Cameras, num_others: int
) -> list[str]:
    names = [name for name in found.names if name not in kept]
    if not names:
        return [f"0 of {num_others}", "–", "–"]
    here, there = aligned.select(names), truth.select(names)
    turned = rotation_angle(here.viewmats[:, :3, :3], there.viewmats[:, :3, :3]).rad2deg()
    moved = (here.centers - there.centers).norm(dim=-1) / truth.select(kept).extent * 100
    return [
        f"{len(names)} of {num_others}",
        f"{turned.median():.3f}",
        f"{moved.median():.3f}",
    ]


if __name__ == "__main__":
    main()
