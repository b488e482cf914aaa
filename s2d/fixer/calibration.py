"""How much of a fixer's change to keep, and how far to trust what comes out: learned from trials with known truth.

Notation, all [H,W,·] in [0,1]: A render, F fixed view, P point guidance, M coverage, T truth; d = F - A is the fixer's change,
e = T - A what it should have been, s the share of d that is kept: the result is A + s·d.

Pixels fall into classes: a *region* (how far render and guidance agree, or that there is no guidance) by the size of the change.
For any s the squared error of a class is Σe² - 2sΣde + s²Σd², so three sums per class say all; the best s is Σde / Σd². Sums are taken
per trial and quarter of the image: how unlike the quarters are is the standard error of s.

Few trials must not be overfitted. A share is believed as far as it stands out of its standard error: one share for all pixels is
shrunk towards 0, a region's towards that one, a class's towards its region's (positive-part James-Stein, v → p + (v-p)·max(0, 1 - SE²/(v-p)²)).
Which of the three levels is used, and whether the fixer is used at all, is decided on trials that the shares were not learned from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.checks import check_shape
from s2d.fixer.interface import Fixer, FixResult, as_photos

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
# Up to this root mean square error a pixel is as good as a photo's (26 dB); beyond, its weight falls as 1 / error.
TRUSTED_ERROR = 0.05
# A class with fewer pixels than this share of all is expected to be as wrong as its region.
SMALL_CLASS = 0.005
# A fixer must gain this many dB on trials that did not teach its shares; chance alone makes as much.
MIN_GAIN = 0.05
MIN_MSE = 1e-10  # as the PSNR that is reported

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


@dataclass(frozen=True)
class Calibration:
    """What was learned; see the module's docstring."""

    level: Level
    """What shares are told apart by; "off": the render is kept as it is."""
    edges: tuple[float, ...]
    """Sizes of the change at which a new bin begins. [3]"""
    shares: tuple[float, ...]
    """By class, region-major: agree, differ, contradict, unseen × bins. [16]"""
    errors: tuple[float, ...]
    """Expected root mean square error of the result, by class; at "off" the bins of a region have one. [16]"""
    num_trials: int
    psnr_rendered: float
    """Mean over the trials, dB."""
    psnr_fixed: float
    """The same of the fixer's own result."""
    psnr_kept: float
    """The same of the calibrated one, on trials that the shares were not learned from; at `off` of what was refused."""
    gain_error: float
    """Standard error of `psnr_kept - psnr_rendered`."""
    kept_share: float
    """Share of the squared change that is kept, over all trials: 1 is the fixer as it is."""

    @property
    def is_used(self) -> bool:
        return self.level != "off"

    def describe(self) -> str:
        """One line for people: what was decided and why."""
        trials = f"{self.num_trials} trial{'s' * (self.num_trials != 1)}"
        gain = self.psnr_kept - self.psnr_rendered
        if self.is_used:
            return (
                f"fixer on {trials}: {self.psnr_rendered:.2f} → {self.psnr_kept:.2f} dB, keeps {self.kept_share:.0%} of its change "
                f"(as it is: {self.psnr_fixed:.2f} dB)"
            )
        return (
            f"off: on {trials} the fixer turns {self.psnr_rendered:.2f} dB into {self.psnr_fixed:.2f}, and the best part of its change "
            f"gains {gain:+.2f} ± {self.gain_error:.2f} dB; the renders are kept as they are"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` reads."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        return cls(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
            }
        )

    def apply(
        self,
        rendered: Tensor,  # [H, W, 3]
        fixed: Tensor,  # [H, W, 3]
        guidance: Tensor,  # [H, W, 3]
        coverage_mask: Tensor,  # [H, W, 1]
    ) -> tuple[Tensor, Tensor]:
        """Keep the learned share of a change.

        Returns:
            The view [H, W, 3], bit for bit the render where the fixer is off, and its confidence [H, W, 1]: 1 up to an expected error of
            0.05, beyond that 0.05 / error. An absolute difference, which stage 3's loss mostly is, weighs a Laplacian error so.
        """
        classes = classify(rendered, fixed, guidance, coverage_mask, self.edges)
        trust = [min(1.0, TRUSTED_ERROR / max(error, 1e-6)) for error in self.errors]
        confidence = smooth(torch.tensor(trust)[classes])[..., None].clamp(0, 1)
        if not self.is_used:
            return rendered, confidence
        share = smooth(torch.tensor(self.shares)[classes])[..., None].clamp(0, 1)
        return torch.lerp(rendered, fixed, share), confidence


@dataclass(frozen=True)
class CalibratedFixer:
    """A fixer of which the learned share is kept; fulfils `interface.Fixer`."""

    fixer: Fixer | None
    """Not needed where the calibration says that it is off."""
    calibration: Calibration

    def fix(
        self,
        rendered: Tensor,  # [H, W, 3]
        guidance: Tensor,  # [H, W, 3]
        coverage_mask: Tensor,  # [H, W, 1]
        reference: Tensor | Sequence[Tensor],  # [H', W', 3] each
    ) -> FixResult:
        """Repair a view as far as the fixer has shown that it can. See `Fixer.fix`."""
        if self.calibration.is_used:
            result = self.fixer.fix(rendered, guidance, coverage_mask, as_photos(reference))
        else:
            as_it_is = (coverage_mask > 0.5).float()
            result = FixResult(rendered, as_it_is, as_it_is)
        fixed, confidence = self.calibration.apply(rendered, result.fixed, guidance, coverage_mask)
        return replace(result, fixed=fixed, confidence=confidence)


def calibrate(trials: Sequence[Trial]) -> Calibration:
    """Learn from trials, at least one.

    With one trial its quarters stand for trials: what it says is used with the same rules, and is worth less.
    """
    for trial in trials:
        dims = check_shape("rendered", trial.rendered, ("H", "W", 3))
        for name in ("fixed", "guidance", "truth"):
            check_shape(name, getattr(trial, name), ("H", "W", 3), dims)
        check_shape("coverage_mask", trial.coverage_mask, ("H", "W", 1), dims)
    edges = change_edges(trials)
    sums = torch.stack([trial_sums(trial, edges) for trial in trials])  # [T, 4, 16, 4]
    if len(trials) == 1:
        sums = sums.transpose(0, 1)
    held_out = {level: torch.stack(_held_out(sums, level)) for level in LEVELS}
    for level in LEVELS:
        held_out[level] = _without_losing_regions(sums, held_out[level])
    gains = {level: _gains(sums, shares) for level, shares in held_out.items()}
    level = max(LEVELS, key=lambda level: float(gains[level].mean()))  # of equals the simpler
    gain = float(gains[level].mean())
    gain_error = float(gains[level].std() / math.sqrt(len(gains[level])))
    used = gain > max(gain_error, MIN_GAIN)
    kept = held_out[level] if used else torch.zeros_like(held_out[level])
    shares = learn_shares(sums.flatten(0, 1), level) * (kept.amax(0) > 0) if used else kept[0]
    change = sums[..., 1].sum((0, 1))
    return Calibration(
        level=level if used else "off",
        edges=edges,
        shares=tuple(shares.tolist()),
        errors=tuple(_expected_errors(sums, kept).tolist()),
        num_trials=len(trials),
        psnr_rendered=_mean_psnr(sums, torch.zeros_like(kept)),
        psnr_fixed=_mean_psnr(sums, torch.ones_like(kept)),
        psnr_kept=_mean_psnr(sums, held_out[level]),
        gain_error=gain_error,
        kept_share=float((change * shares).sum() / change.sum().clamp_min(1e-12)),
    )


# ------------------------------------------------------------------------------------------------------------- classes


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


# ---------------------------------------------------------------------------------------------------------------- sums


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
) -> Tensor:
    """The share of every class, learned from B blocks and shrunk; see the module's docstring. [16]"""
    regions = torch.arange(NUM_CLASSES) // NUM_BINS
    share = shrunk(sums.sum(1, keepdim=True), torch.zeros(1, dtype=sums.dtype))
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


# ------------------------------------------------------------------------------------------------------------ decisions


def _held_out(sums: Tensor, level: Level) -> list[Tensor]:
    """For each trial the shares that the others teach. [T × [16]]"""
    rows = range(len(sums))
    return [
        learn_shares(sums[[other for other in rows if other != row]].flatten(0, 1), level)
        for row in rows
    ]


def _without_losing_regions(sums: Tensor, shares: Tensor) -> Tensor:
    """Set the shares of a region to 0 where the trials that did not teach them come out worse there. [T, 16]"""
    change = squared_errors(sums.sum(1), shares) - sums[..., 3].sum(1)  # [T, 16]
    loses = change.view(-1, len(REGIONS), NUM_BINS).sum((0, 2)) > 0
    return shares * ~loses.repeat_interleave(NUM_BINS)


def _gains(sums: Tensor, shares: Tensor) -> Tensor:
    """PSNR of each trial with its shares over that of the render, dB. [T]"""
    return _psnrs(sums, shares) - _psnrs(sums, torch.zeros_like(shares))


def _psnrs(sums: Tensor, shares: Tensor) -> Tensor:
    totals = sums.sum(1)
    mse = squared_errors(totals, shares).sum(-1) / totals[..., 0].sum(-1).clamp_min(1)
    return -10 * mse.clamp_min(MIN_MSE).log10()


def _mean_psnr(sums: Tensor, shares: Tensor) -> float:
    return float(_psnrs(sums, shares).mean())


def _expected_errors(sums: Tensor, shares: Tensor) -> Tensor:
    """Root mean square error of each class on trials that did not teach its share; small classes lean on their region. [16]"""
    totals = sums.sum(1)
    errors = squared_errors(totals, shares).sum(0)
    counts = totals[..., 0].sum(0)
    some = SMALL_CLASS * counts.sum()
    overall = errors.sum() / counts.sum().clamp_min(1)
    by_region = [values.view(len(REGIONS), NUM_BINS).sum(1) for values in (errors, counts)]
    region = (by_region[0] + some * overall) / (by_region[1] + some)
    prior = region.repeat_interleave(NUM_BINS)
    if not shares.any():  # the fixer is off, and then it is not asked how much it would change
        return prior.sqrt()
    return ((errors + some * prior) / (counts + some)).sqrt()
