"""How much of a fixer's change to keep: sums over classes of pixels, and the shares that they teach.

Notation, all [H,W,·] in [0,1]: A render, F fixed view, P point guidance, M coverage, T truth; d = F - A is the fixer's change,
e = T - A what it should have been, s the share of d that is kept: the result is A + s·d.

Pixels fall into classes: a *region* (how far render and guidance agree, or that there is no guidance) by the size of the change.
For any s the squared error of a class is Σe² - 2sΣde + s²Σd², so three sums per class say all; the best s is Σde / Σd². Sums are taken
per trial and quarter of the image: how unlike the quarters are is the standard error of s.

Few trials must not be overfitted. A share is believed as far as it stands out of its standard error: one share for all pixels is
shrunk towards what is expected of the fixer, a region's towards that one, a class's towards its region's (positive-part James-Stein,
v → p + (v-p)·max(0, 1 - SE²/(v-p)²)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Mean absolute difference of render and guidance, up to which they agree, and from which on they contradict each other.
AGREE, CONTRADICT = 0.04, 0.12
REGIONS = ("agree", "differ", "contradict", "unseen")
# The bins of the change end at these quantiles over all trials: most of a change's effect is in its largest tenth.
QUANTILES = (0.5, 0.8, 0.95)
NUM_BINS = len(QUANTILES) + 1
NUM_CLASSES = len(REGIONS) * NUM_BINS
# A change below this is none: half a step of 8 bits.
NO_CHANGE = 0.5 / 255
# Neighbours share their class, and shares fade into each other: standard deviation in pixels.
SMOOTH = 2.0

Level = Literal["off", "global", "regions", "classes"]
LEVELS: tuple[Level, ...] = ("global", "regions", "classes")


@dataclass(frozen=True)
class Trial:
    """One view with known truth, before and after the fixer."""

    rendered: Tensor  # [H, W, 3]
    fixed: Tensor  # [H, W, 3]
    guidance: Tensor  # [H, W, 3]
    coverage_mask: Tensor  # [H, W, 1]
    truth: Tensor  # [H, W, 3]


def classify(
    rendered: Tensor,  # [H, W, 3]
    fixed: Tensor,  # [H, W, 3]
    guidance: Tensor,  # [H, W, 3]
    coverage_mask: Tensor,  # [H, W, 1]
    edges: Sequence[float],
) -> Tensor:
    """The class of each pixel, of its neighbourhood rather: single pixels of guidance come and go. [H, W] int64"""
    covered = (coverage_mask[..., 0] > 0.5).float()
    near = smooth(covered)
    difference = smooth((rendered - guidance).abs().mean(-1) * covered) / near.clamp_min(1e-6)
    region = torch.bucketize(difference, torch.tensor([AGREE, CONTRADICT]), right=True)
    region = torch.where(near > 0.5, region, REGIONS.index("unseen"))
    size = torch.bucketize(change_size(rendered, fixed), torch.tensor(edges), right=True)
    return region * NUM_BINS + size


def change_size(
    rendered: Tensor,  # [H, W, 3]
    fixed: Tensor,  # [H, W, 3]
) -> Tensor:
    """Mean absolute change of a pixel's neighbourhood. [H, W]"""
    return smooth((fixed - rendered).abs().mean(-1))


def change_edges(trials: Sequence[Trial]) -> tuple[float, ...]:
    """Sizes of the change at `QUANTILES` of the pixels that are changed at all."""
    sizes = torch.cat([change_size(trial.rendered, trial.fixed).flatten() for trial in trials])
    sizes = sizes[sizes > NO_CHANGE].double().sort().values
    if not len(sizes):
        return (NO_CHANGE,) * len(QUANTILES)
    # torch.quantile refuses more than 16 million values.
    return tuple(float(sizes[int(quantile * (len(sizes) - 1))]) for quantile in QUANTILES)


def smooth(
    image: Tensor,  # [H, W]
) -> Tensor:
    """Gaussian blur whose border repeats: constants stay as they are. [H, W]"""
    radius = math.ceil(3 * SMOOTH)
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offsets / SMOOTH) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(image[None, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])[
        0, 0
    ]


def trial_sums(trial: Trial, edges: Sequence[float]) -> Tensor:
    """Per quarter of the image and class: number of values, Σd², Σde, Σe². [4, 16, 4] float64"""
    classes = classify(trial.rendered, trial.fixed, trial.guidance, trial.coverage_mask, edges)
    height, width = classes.shape
    rows = (torch.arange(height) >= height / 2).long()[:, None]
    columns = (torch.arange(width) >= width / 2).long()
    places = ((2 * rows + columns) * NUM_CLASSES + classes).flatten()
    d = (trial.fixed - trial.rendered).double()
    e = (trial.truth - trial.rendered).double()
    values = [torch.full_like(d[..., 0], 3.0), (d * d).sum(-1), (d * e).sum(-1), (e * e).sum(-1)]
    sums = [torch.bincount(places, value.flatten(), 4 * NUM_CLASSES) for value in values]
    return torch.stack(sums, -1).view(4, NUM_CLASSES, 4)


def squared_errors(
    sums: Tensor,  # [..., 16, 4]
    shares: Tensor,  # [..., 16]
) -> Tensor:
    """Sum of squared errors of each class with these shares. [..., 16]"""
    _, dd, de, ee = sums.unbind(-1)
    return (ee - 2 * shares * de + shares**2 * dd).clamp_min(0)


def learn_shares(
    sums: Tensor,  # [B, 16, 4]
    level: Level,
    expected: float = 0.0,
) -> Tensor:
    """The share of every class, learned from B blocks and shrunk, in the end towards the `expected` one; see the module's docstring. [16]"""
    regions = torch.arange(NUM_CLASSES) // NUM_BINS
    share = shrunk(sums.sum(1, keepdim=True), torch.full((1,), expected, dtype=sums.dtype))
    shares = share.expand(NUM_CLASSES)
    if level in ("regions", "classes"):
        by_region = torch.stack([sums[:, regions == r].sum(1) for r in range(len(REGIONS))], 1)
        shares = shrunk(by_region, share.expand(len(REGIONS)))[regions]
    if level == "classes":
        shares = shrunk(sums, shares)
    return shares


def shrunk(
    sums: Tensor,  # [B, K, 4]
    prior: Tensor,  # [K]
) -> Tensor:
    """Least-squares share of K groups from B blocks, as far as it stands out of its standard error. [K] in [0, 1]"""
    dd, de = sums[..., 1], sums[..., 2]
    total = dd.sum(0).clamp_min(1e-12)
    share = de.sum(0) / total
    # A ratio estimate over blocks that count by Σd²; one block alone says nothing of its error.
    num = total**2 / dd.square().sum(0).clamp_min(1e-24)
    spread = (de - share * dd).square().sum(0) / total**2
    variance = spread * num / (num - 1).clamp_min(1e-12)
    distance = (share - prior).square()
    believed = (1 - variance / distance.clamp_min(1e-12)).clamp(0, 1)
    believed = torch.where((num > 1 + 1e-6) & (dd.sum(0) > 0), believed, 0.0)
    return (prior + (share - prior) * believed).clamp(0, 1)
