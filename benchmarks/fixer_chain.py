"""What the fixer is worth to the final scene: stage 3 without it, with it, and with parts of it, from the same stages 0 and 1.

    photos      stage 3 goes on with the kept photos alone
    renders     pseudo views as stage 1 renders them, nothing fixed
    analytic    the analytic mix, tried and calibrated
    compact     the network, tried and calibrated: what users get
    unchecked   the network as it is, without trials
    adapted     the network, adapted to the scene on its trials

The network's weights must not have seen the scenes: give --weights for each group of scenes that was left out of a training. What is
finished is not run again. Scores are of test views, which nothing but the evaluation reads.

Reads   SCENES/<scene> (-s)
Writes  OUT/<scene>_<kept>_s<seed>[_<variant>]/ (-m), a model folder each; a Markdown table (--table FILE)

Example
    python benchmarks/fixer_chain.py -s $S2D_DATA/scenes -m out/chain --weights out/without_fern_fox.safetensors:fern,fox --preset fast
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fixer import parse_weights
from benchmarks.results import ROOT, run

STAGE2 = {
    "photos": ("--fixer", "analytic", "--trial-views", "0"),  # stage 3 wants fixed views even where it draws none
    "renders": ("--fixer", "analytic", "--guidance-share", "0", "--trial-views", "0"),
    "analytic": ("--fixer", "analytic"),
    "compact": (),
    "unchecked": ("--trial-views", "0"),
    "adapted": ("--adapt-steps", "300"),
}  # fmt: skip
STAGE3 = {"photos": ("--alpha", "1")}
WITH_NETWORK = ("compact", "unchecked", "adapted")


class Setting(NamedTuple):
    """What stages 0 and 1 are run on."""

    scene: str
    kept: int
    seed: int

    def folder(self, out: Path, variant: str = "") -> Path:
        return out / "_".join(
            [self.scene, str(self.kept), f"s{self.seed}", *filter(None, [variant])]
        )


def main() -> None:
    """Run what is missing, setting by setting, and write the table after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-s", "--scenes", type=Path, required=True, help="folder of scenes")
    parser.add_argument("-m", "--model-dir", type=Path, required=True)
    parser.add_argument(
        "--weights", action="append", required=True, metavar="FILE:SCENE,SCENE", help="compact weights, and what they never saw"
    )  # fmt: skip
    parser.add_argument("--kept", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=STAGE2, default=list(STAGE2))
    parser.add_argument("--preset", help="of stages 1 and 3")
    parser.add_argument("--max-side", default="640", help="as in stage 0")
    parser.add_argument("--lpips", default="alex", help="as in tools/evaluate.py")
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    weights = {
        scene: file for file, names in parse_weights(args.weights).items() for scene in names
    }
    settings = [
        Setting(scene, kept, seed) for seed in args.seeds for scene in weights for kept in args.kept
    ]
    for setting in settings:
        run_setting(args, setting, weights[setting.scene])
        text = table(args.model_dir, settings, args.variants)
        if args.table:
            args.table.write_text(text, encoding="utf-8")
    print(table(args.model_dir, settings, args.variants))


def run_setting(args: argparse.Namespace, setting: Setting, weights: Path) -> None:
    """Stages 0 and 1 once, then stages 2 and 3 and the evaluation of each variant."""
    base = setting.folder(args.model_dir)
    scene = args.scenes / setting.scene
    preset = ["--preset", args.preset] if args.preset else []
    seed = ["--seed", setting.seed]
    held_out = ["--eval", "--keep-count", setting.kept]
    run(
        ROOT / "stage0_point_guidance.py",
        "-s",
        scene,
        "-m",
        base,
        *held_out,
        "--max-side",
        args.max_side,
    )
    run(ROOT / "stage1_3dgs_init.py", "-s", scene, "-m", base, *preset, *seed)
    for variant in args.variants:
        folder = setting.folder(args.model_dir, variant)
        if (folder / "results.json").is_file():
            continue
        if not folder.is_dir():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            # Stages replace files as a whole, so that links are as good as copies.
            shutil.copytree(base, partial, copy_function=os.link)
            partial.rename(folder)
        network = ["--weights", weights, "--precision", "bf16"] if variant in WITH_NETWORK else []
        run(ROOT / "stage2_artifact_fix.py", "-m", folder, *STAGE2[variant], *network)
        run(ROOT / "stage3_3dgs_mixed_opt.py", "-s", scene, "-m", folder, *preset, *seed, *STAGE3.get(variant, ()))  # fmt: skip
        run(ROOT / "tools/evaluate.py", "-m", folder, "--lpips", args.lpips)


def table(out: Path, settings: Sequence[Setting], variants: Sequence[str]) -> str:
    """PSNR and LPIPS of the test views after stage 1 and after stage 3 with each variant; means over the rows that have all."""
    titles = [
        f"{state} {metric}" for metric in ("psnr", "lpips") for state in ("stage 1", *variants)
    ]
    lines = ["| scene | kept | seed | " + " | ".join(titles) + " |", "|---|--:|--:|" + "--:|" * len(titles)]  # fmt: skip
    complete = []
    for setting in settings:
        scores = [read_scores(setting.folder(out, variant)) for variant in variants]
        if None in scores:
            continue
        row = [
            values[metric] for metric in (0, 1) for values in (scores[0][:2], *(found[2:] for found in scores))
        ]  # fmt: skip
        complete.append(row)
        lines.append(f"| {setting.scene} | {setting.kept} | {setting.seed} | {show(row)} |")
    if complete:
        means = [statistics.fmean(column) for column in zip(*complete, strict=True)]
        lines.append(f"| **mean** | | | {show(means)} |")
    return "\n".join(lines) + "\n"


def read_scores(folder: Path) -> tuple[float, ...] | None:
    """PSNR and LPIPS of the test views after stage 1, and after stage 3; None where the run has not ended."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    stages = json.loads(path.read_text("utf-8"))["stages"]
    found = []
    for stage in ("stage1", "stage3"):
        scores = stages[stage]["test"]
        lpips = scores["lpips_vgg"] if scores.get("lpips_alex") is None else scores["lpips_alex"]
        found += [scores["psnr"], lpips]
    return tuple(found)


def show(row: Sequence[float]) -> str:
    """PSNRs with two digits, then as many LPIPS with three."""
    half = len(row) // 2
    return " | ".join([f"{v:.2f}" for v in row[:half]] + [f"{v:.3f}" for v in row[half:]])


if __name__ == "__main__":
    main()
