"""Does training with the kernels end where training with the float64 twin ends?

The same scene, initial Gaussians, order of views, loss and Adam; once float32 with the compiled rasteriser and SSIM, once float64 with
`diff_gaussian_rasterization.reference` and convolutions. Rounding makes the two paths part after some hundred steps; what must
be equal is the PSNR on views that were not trained on, next to how much it differs between seeds.

Example
    python benchmarks/twin_training.py --steps 1000 --seeds 3
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diff_gaussian_rasterization import rasterize_gaussians_raw
from diff_gaussian_rasterization.reference import rasterize_reference
from fused_ssim import fused_ssim

from s2d.geometry import look_at
from s2d.metrics import psnr
from s2d.optim import ADAM_EPS, LearningRates

WIDTH, HEIGHT = 40, 30
NUM_GAUSSIANS, NUM_TRUE = (
    250,
    350,
)  # fewer than the truth: the training has to compromise, as on photos
NUM_VIEWS, TEST_EVERY = 10, 5
RATES = LearningRates(means=4e-4)  # world units here; a short training needs larger steps


class Views(NamedTuple):
    """Cameras and what they see."""

    viewmats: Tensor  # [C, 4, 4]
    Ks: Tensor  # [C, 3, 3]
    images: Tensor  # [C, H, W, 3]


class Side(NamedTuple):
    """One of the two ways to do the arithmetic."""

    dtype: torch.dtype
    rasterize: Callable
    ssim: Callable  # two images [1, 3, H, W] -> mean similarity


def ssim_twin(image: Tensor, target: Tensor) -> Tensor:
    """Return the mean structural similarity by convolutions (window 11, sigma 1.5, zero padding), in the images' own dtype."""
    offsets = torch.arange(11, dtype=image.dtype) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (torch.outer(window, window) / window.sum() ** 2).expand(3, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, window, padding=5, groups=3)

    mx, my = blur(image), blur(target)
    vx, vy = blur(image * image) - mx**2, blur(target * target) - my**2
    cov = blur(image * target) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


KERNELS = Side(torch.float32, rasterize_gaussians_raw, fused_ssim)
TWIN = Side(torch.float64, rasterize_reference, ssim_twin)


def random_gaussians(count: int, seed: int) -> dict[str, Tensor]:
    """Make raw parameters of a ball of radius about 1, SH degree 1, float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "means": 0.6 * normal(count, 3),
        "log_scales": math.log(0.12) + 0.4 * normal(count, 3),
        "quats": normal(count, 4),
        "opacity_logits": 0.5 + normal(count),
        "sh0": normal(count, 1, 3),
        "shN": 0.2 * normal(count, 3, 3),
    }


def make_views() -> Views:
    """Render the truth with the twin, from cameras on an arc that look at the ball."""
    angle = torch.linspace(-0.6, 0.6, NUM_VIEWS, dtype=torch.float64)
    centers = torch.stack([4 * angle.sin(), 0.5 * (5 * angle).sin(), -4 * angle.cos()], dim=1)
    viewmats = look_at(centers, torch.zeros_like(centers), torch.tensor([0.0, -1.0, 0.0]).double())
    focal = 1.3 * WIDTH
    K = torch.tensor([[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]])
    Ks = K.double().repeat(NUM_VIEWS, 1, 1)
    truth = random_gaussians(NUM_TRUE, seed=1000)
    with torch.no_grad():
        images = rasterize_reference(**truth, viewmats=viewmats, Ks=Ks, width=WIDTH, height=HEIGHT)
    return Views(viewmats, Ks, images.rgb.clamp(0, 1))


def train(side: Side, views: Views, seed: int, steps: int) -> dict[str, Tensor]:
    """Fit random Gaussians to the views that are not test views.

    Args:
        side: KERNELS or TWIN.
        views: Cameras with images, float64.
        seed: Decides the initial Gaussians and the order of the views; the same numbers for either side.
        steps: Steps of Adam, one view each.

    Returns:
        Raw parameters in the side's dtype.
    """
    dtype = side.dtype
    initial = random_gaussians(NUM_GAUSSIANS, seed)
    gaussians = {name: x.to(dtype).requires_grad_() for name, x in initial.items()}
    groups = [{"params": [x], "lr": getattr(RATES, name)} for name, x in gaussians.items()]
    adam = torch.optim.Adam(groups, eps=ADAM_EPS)
    order = torch.Generator().manual_seed(seed)
    kept = [c for c in range(NUM_VIEWS) if c % TEST_EVERY]
    for _ in range(steps):
        c = kept[int(torch.randint(len(kept), (1,), generator=order))]
        camera = (views.viewmats[c : c + 1].to(dtype), views.Ks[c : c + 1].to(dtype))
        image = side.rasterize(*gaussians.values(), *camera, WIDTH, HEIGHT).rgb
        target = views.images[c : c + 1].to(dtype)
        similarity = side.ssim(image.permute(0, 3, 1, 2), target.permute(0, 3, 1, 2))
        loss = 0.8 * (image - target).abs().mean() + 0.2 * (1 - similarity)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
    return {name: x.detach() for name, x in gaussians.items()}


def held_out_psnr(gaussians: dict[str, Tensor], views: Views) -> float:
    """Score Gaussians on the views that were not trained on, with the twin. dB"""
    cameras = [c for c in range(NUM_VIEWS) if c % TEST_EVERY == 0]
    doubles = {name: x.double() for name, x in gaussians.items()}
    with torch.no_grad():
        images = rasterize_reference(
            **doubles,
            viewmats=views.viewmats[cameras],
            Ks=views.Ks[cameras],
            width=WIDTH,
            height=HEIGHT,
        )
    pairs = zip(images.rgb.clamp(0, 1), views.images[cameras], strict=True)
    return statistics.mean(psnr(image, target) for image, target in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3, help="how many; at least 2 for a spread")
    args = parser.parse_args()
    views = make_views()
    rows = []
    print("| seed | start (dB) | kernels (dB) | twin (dB) | difference | kernels (s) | twin (s) |")
    print("|---|---|---|---|---|---|---|")
    for seed in range(args.seeds):
        start = held_out_psnr(random_gaussians(NUM_GAUSSIANS, seed), views)
        scores, seconds = [], []
        for side in (KERNELS, TWIN):
            began = time.perf_counter()
            scores.append(held_out_psnr(train(side, views, seed, args.steps), views))
            seconds.append(time.perf_counter() - began)
        rows.append(scores)
        print(
            f"| {seed} | {start:.2f} | {scores[0]:.3f} | {scores[1]:.3f} | {scores[0] - scores[1]:+.3f}"
            f" | {seconds[0]:.1f} | {seconds[1]:.1f} |",
            flush=True,
        )
    kernels, twin = zip(*rows, strict=True)
    largest = max(abs(a - b) for a, b in rows)
    print(f"\nmean {statistics.mean(kernels):.3f} and {statistics.mean(twin):.3f} dB; ", end="")
    print(f"largest difference {largest:.3f} dB", end="")
    if args.seeds > 1:
        spread = max(twin) - min(twin)
        print(f"; spread of the twin over {args.seeds} seeds {spread:.3f} dB", end="")
    print()


if __name__ == "__main__":
    main()
