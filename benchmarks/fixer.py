"""How much better are fixed views than stage 1's renders, on scenes that the weights never saw?

Scores the pairs of kind `sparse` of a data set made by tools/make_fixer_pairs.py: the render, the analytic mix, and the network's result
against the photo, each as an 8-bit picture. Every scene is fixed with the weights that name it, which must have been trained with that scene left out.

Reads   PAIRS/{train,test}_{A,B,P,M}/<scene>_sparse-k<kept>-s<seed>_<frame>.png; $S2D_WEIGHTS for LPIPS
Writes  a Markdown table (--table FILE), all scores (--json FILE), pictures render | fixed | photo (--pictures DIR)

Example
    python tools/make_fixer_pairs.py -s data/scenes -o out/pairs --seeds 0,1 --test-every 0 --min-coverage 0
    python train_artifact_fixer.py --preset compact --dataset-folder out/pairs --test-scenes fern,fox --output-dir out/without_fern_fox
    python benchmarks/fixer.py --pairs out/pairs --weights out/without_fern_fox/model_final.safetensors:fern,fox
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from s2d.fixer.analytic import AnalyticFixer
from s2d.fixer.choice import SHIPPED_EXPECTATION
from s2d.fixer.diffusion import load_compact_fixer
from s2d.fixer.interface import Fixer
from s2d.fixer.training.pairs import Pair, load_pairs
from s2d.images import read_image, write_image
from s2d.log import progress, setup_logging
from s2d.metrics import Lpips, find_lpips, psnr, ssim
from s2d.sampling import spread

# Flags of stage 2 by which weights of the same training, with scenes left out, are tried as those that come with S2D are.
AS_SHIPPED = {
    "expected_gain": SHIPPED_EXPECTATION.gain,
    "expected_spread": SHIPPED_EXPECTATION.spread,
}
SPARSE = re.compile(r".+_sparse-k(?P<kept>\d+)-s(?P<seed>\d+)_\d+\.png")
STATES = ("render", "analytic", "fixed")


@dataclass(frozen=True)
class Group:
    """The pairs of one sparse model."""

    scene: str
    kept: int
    seed: int


def parse_weights(texts: Sequence[str]) -> dict[Path, tuple[str, ...]]:
    """Read FILE:SCENE,SCENE: compact weights, and the scenes they never saw. A command line may have cut it at the commas.

    Raises:
        ValueError: A scene without a file.
    """
    found: dict[Path, tuple[str, ...]] = {}
    file = None
    for part in ",".join(texts).split(","):
        path, colon, scene = part.rpartition(":")
        if colon:
            file = Path(path)
        elif file is None:
            raise ValueError(f"--weights: expected FILE:SCENE,SCENE, got {part}.")
        found[file] = (*found.get(file, ()), scene)
    return found


def weights_for(texts: Sequence[str], scene: str) -> Path | None:
    """The compact weights among FILE:SCENE,SCENE that have not seen a scene; None if there are no weights at all.

    Raises:
        ValueError: There are weights, but none for this scene.
    """
    if not texts:
        return None
    files = [file for file, scenes in parse_weights(texts).items() if scene in scenes]
    if not files:
        raise ValueError(f"--weights names none for {scene}. Add FILE:{scene}.")
    return files[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, required=True, help="the data set")
    parser.add_argument(
        "--weights",
        action="append",
        required=True,
        metavar="FILE:SCENE,SCENE",
        help="compact weights, and the scenes they never saw",
    )
    parser.add_argument(
        "--views", type=int, default=5, help="views per model, evenly spread; 0 all"
    )
    parser.add_argument("--lpips", nargs="*", default=["alex"], choices=["alex", "vgg"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument(
        "--without",
        choices=["reference", "guidance"],
        help="ablation: the render in place of the reference photo, or no point guidance",
    )
    parser.add_argument("--table", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="the middle view of each model")
    args = parser.parse_args()
    setup_logging(logging.WARNING)

    models = [find_lpips(net, download=False) for net in args.lpips]
    if None in models:
        parser.exit(
            2, "LPIPS weights are not here: set S2D_WEIGHTS, or pass --lpips without a name.\n"
        )
    lpips = dict(zip(args.lpips, models, strict=True))
    groups = sparse_groups(args.pairs)
    work = []
    for path, scenes in parse_weights(args.weights).items():
        fixer = load_compact_fixer(path, precision=args.precision)
        for scene in scenes:
            found = [(fixer, group, rows) for group, rows in groups.items() if group.scene == scene]
            if not found:
                parser.exit(2, f"{args.pairs} has no sparse pair of {scene}.\n")
            work += found
    rows = []
    with progress(len(work), "models") as bar:
        for done, (fixer, group, pairs) in enumerate(work, start=1):
            chosen = [pairs[k] for k in spread(len(pairs), args.views or len(pairs))]
            for place, pair in enumerate(chosen):
                pictures, scores = judge(fixer, pair, lpips, args.without)
                rows.append({**vars(group), "name": pair.name, **scores})
                if args.pictures and place == len(chosen) // 2:
                    write_image(args.pictures / pair.name, torch.cat(pictures, dim=1))
            bar.update(done)
    lines = table(rows, args.lpips)
    print("\n".join(lines))
    if args.table:
        args.table.write_text("\n".join(lines) + "\n")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def sparse_groups(folder: Path) -> dict[Group, list[Pair]]:
    """The pairs of each sparse model, in name order."""
    groups: dict[Group, list[Pair]] = defaultdict(list)
    for split in ("train", "test"):
        if any((folder / f"{split}_A").glob("*_sparse-*")):
            for pair in load_pairs(folder, split, window=0):
                if match := SPARSE.match(pair.name):
                    group = Group(pair.scene, int(match["kept"]), int(match["seed"]))
                    groups[group].append(pair)
    return groups


def judge(
    fixer: Fixer, pair: Pair, lpips: dict[str, Lpips], without: str | None
) -> tuple[list[Tensor], dict[str, float]]:
    """Fix one view. Returns render, fixed view and photo, and the scores of each state."""
    rendered, guidance, photo = map(read_image, (pair.rendered, pair.guidance, pair.target))
    coverage = (read_image(pair.coverage)[..., :1] > 0.5).float()
    reference = read_image(pair.references[0])
    if without == "guidance":
        guidance, coverage = torch.zeros_like(guidance), torch.zeros_like(coverage)
    elif without == "reference":
        reference = rendered
    views = {"render": rendered}
    for state, method in (("analytic", AnalyticFixer()), ("fixed", fixer)):
        fixed = method.fix(rendered, guidance, coverage, reference).fixed
        views[state] = (fixed * 255).round() / 255
    scores = {}
    for state, view in views.items():
        scores[f"psnr_{state}"] = float(psnr(view, photo))
        scores[f"ssim_{state}"] = float(ssim(view, photo))
        for net, distance in lpips.items():
            scores[f"lpips_{net}_{state}"] = float(distance(view, photo))
    return [rendered, views["fixed"], photo], scores


def table(rows: Sequence[dict], nets: Sequence[str]) -> list[str]:
    """Markdown: a row per scene and number of kept views (mean over views, then seeds), and the means over scenes."""
    metrics = ["psnr", "ssim", *(f"lpips_{net}" for net in nets)]
    head = [f"{name} {state}" for name in metrics for state in STATES]
    lines = [
        f"| scene | kept | views | {' | '.join(head)} |",
        f"|---|{'--:|' * (2 + len(head))}",
    ]
    means = []
    for scene, kept in sorted({(row["scene"], row["kept"]) for row in rows}):
        mine = [row for row in rows if (row["scene"], row["kept"]) == (scene, kept)]
        means.append(mean_of_seeds(mine, metrics))
        lines.append(
            f"| {scene} | {kept} | {len(mine)} | {' | '.join(cells(means[-1], metrics))} |"
        )
    overall = {key: sum(row[key] for row in means) / len(means) for key in means[0]}
    lines.append(f"| **mean** | | {len(rows)} | {' | '.join(cells(overall, metrics))} |")
    return lines


def mean_of_seeds(rows: Sequence[dict], metrics: Sequence[str]) -> dict[str, float]:
    """Mean over the views of each seed, then over seeds."""
    keys = [f"{metric}_{state}" for metric in metrics for state in STATES]
    seeds = sorted({row["seed"] for row in rows})
    per_seed = [[row for row in rows if row["seed"] == seed] for seed in seeds]
    return {
        key: sum(sum(row[key] for row in part) / len(part) for part in per_seed) / len(per_seed)
        for key in keys
    }


def cells(scores: dict[str, float], metrics: Sequence[str]) -> Iterator[str]:
    for metric in metrics:
        for state in STATES:
            yield f"{scores[f'{metric}_{state}']:.{2 if metric == 'psnr' else 3}f}"


if __name__ == "__main__":
    main()
