"""Can the network say what it sees? One real pair, fitted until its own pictures come out again.

    S2D_DATA=FOLDER python benchmarks/hier_overfit.py                    # `tiny`, 64 pixels, the pair of hisplat/demo_example.pt
    S2D_DATA=FOLDER python benchmarks/hier_overfit.py --size compact --side 128 --steps 300

Prints PSNR of the two context views per level; the number in docs/hier.md is that of the last level.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from s2d.hier.config import HierConfig
from s2d.hier.gaussians import render
from s2d.hier.model import HierModel
from s2d.hier.views import Views


def demo_pair(path: Path, side: int) -> Views:
    """Read the pair, shrunk to side x side pixels."""
    context = torch.load(path, map_location="cpu", weights_only=True)["context"]
    images = F.interpolate(context["image"][0].float(), (side, side), mode="area")[None]
    Ks = context["intrinsics"].float().clone()
    Ks[..., :2, :] *= side  # normalised in the file
    return Views(
        images=images,
        viewmats=torch.linalg.inv(context["extrinsics"].double()).float(),
        Ks=Ks,
        near=context["near"].float(),
        far=context["far"].float(),
    )


def fit(model: HierModel, views: Views, steps: int, rate: float) -> list[float]:
    """Fit the context views themselves; returns PSNR per level at the end."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    start, psnr = time.process_time(), []
    for step in range(steps):
        rendered = [render(level, views) for level in model(views)]
        errors = [(picture - views.images).square().mean() for picture in rendered]
        optimizer.zero_grad()
        sum(errors).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        psnr = [-10 * math.log10(error.item()) for error in errors]
        if step % 25 == 0 or step == steps - 1:
            seconds = (time.process_time() - start) / (step + 1)
            levels = "  ".join(f"{value:.2f}" for value in psnr)
            print(f"step {step}: {levels} dB, {seconds:.2f} s of CPU per step", flush=True)
    return psnr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=4e-3)
    arguments = parser.parse_args()
    path = Path(os.environ.get("S2D_DATA", "")) / "hisplat" / "demo_example.pt"
    if not path.is_file():
        raise SystemExit(f"No pair: {path} is missing. Set S2D_DATA to the folder with hisplat/.")
    torch.manual_seed(0)
    model = HierModel(HierConfig.named(arguments.size))
    fit(model, demo_pair(path, arguments.side), arguments.steps, arguments.rate)


if __name__ == "__main__":
    main()
