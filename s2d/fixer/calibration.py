"""Whether a fixer is used on a scene, how much of its change is kept, and how far to trust what comes out: learned from trials with known truth.

Shares are learned from the trials (`shares`). Which of the three levels is used, and whether the fixer is used at all, is decided on
trials that the shares were not learned from, and on what is expected of the fixer: three trials alone say little, since one view of which
much is unseen moves their mean by a decibel. With the mean gain g of the trials, its standard error SE, and a gain m with spread s over scenes that the
weights never saw, the gain that is believed is (g·s² + m·SE²) / (s² + SE²), the mean of a normal posterior.

What comes out is then taken for a render, and the analytic fixer that puts all of the guidance there for a fixer of which nothing is known:
the same trials say how much more of the guidance helps, mostly none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from s2d.checks import check_shape
from s2d.fixer.analytic import AnalyticFixer
from s2d.fixer.interface import Fixer, FixResult, NovelView, as_photos
from s2d.fixer.shares import (
    LEVELS,
    NUM_BINS,
    REGIONS,
    Level,
    Trial,
    change_edges,
    classify,
    learn_shares,
    smooth,
    squared_errors,
    trial_sums,
)

# Up to this root mean square error a pixel is as good as a photo's (26 dB); beyond, its weight falls as 1 / error.
TRUSTED_ERROR = 0.05
# A class with fewer pixels than this share of all is expected to be as wrong as its region.
SMALL_CLASS = 0.005
# A fixer must be believed to gain this many dB; chance alone makes as much.
MIN_GAIN = 0.05
MIN_MSE = 1e-10  # as the PSNR that is reported
# Standard error of a gain that one trial alone tells of, dB. An assumption: one view of which much is unseen moves a mean by as much.
LONE_ERROR = 1.0


@dataclass(frozen=True)
class Expectation:
    """What a fixer is worth before any trial. The default is that of a fixer about which nothing is known."""

    gain: float = 0.0
    """dB, mean over scenes that its weights never saw."""
    spread: float = 0.5
    """Standard deviation over those scenes, dB."""
    share: float = 0.0
    """Share of its change that is kept where the trials say nothing clear, in [0, 1]."""

    def believed(self, gain: float, error: float | None) -> float:
        """The gain to believe in where trials gained `gain` with a standard error of `error` (None: no trial tells), dB."""
        if error is None:
            return self.gain
        return (gain * self.spread**2 + self.gain * error**2) / (self.spread**2 + error**2)


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
    gain_error: float | None
    """Standard error of the mean gain over the trials that the fixer changed, dB; None if it changed none."""
    gain_believed: float
    """What is made of the two and of what is expected of the fixer, dB; decides whether it is used."""
    kept_share: float
    """Share of the squared change that is kept, over all trials: 1 is the fixer as it is."""
    overlay: Calibration | None = None
    """How much of the guidance is laid over what is kept; None: nothing."""

    @property
    def is_used(self) -> bool:
        return self.level != "off"

    @property
    def keeps_renders(self) -> bool:
        """Whether views come out as they went in."""
        return not self.is_used and self.overlay is None

    def describe(self) -> str:
        """One line for people: what was decided and why."""
        if self.overlay is None:
            return self._describe_fixer() + (
                "" if self.is_used else "; the renders are kept as they are"
            )
        gain = f"{self.overlay.psnr_rendered:.2f} → {self.overlay.psnr_kept:.2f} dB"
        return f"{self._describe_fixer()}; {self.overlay.kept_share:.0%} of the guidance over that: {gain}"

    def _describe_fixer(self) -> str:
        trials = f"{self.num_trials} trial{'s' * (self.num_trials != 1)}"
        gain = self.psnr_kept - self.psnr_rendered
        if self.is_used:
            return (
                f"fixer on {trials}: {self.psnr_rendered:.2f} → {self.psnr_kept:.2f} dB, keeps {self.kept_share:.0%} of its change "
                f"(as it is: {self.psnr_fixed:.2f} dB; believed to gain {self.gain_believed:.2f} dB)"
            )
        if self.gain_error is None:
            return f"off: in {trials} the fixer changed nothing, and nothing else speaks for it"
        return (
            f"off: on {trials} the fixer turns {self.psnr_rendered:.2f} dB into {self.psnr_fixed:.2f}, and the best part of its change "
            f"gains {gain:+.2f} ± {self.gain_error:.2f} dB, of which {self.gain_believed:+.2f} is believed"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` reads."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
        return values | {"overlay": self.overlay and self.overlay.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        known = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        overlay = known.pop("overlay", None)  # not in files of before there were any
        return cls(**known, overlay=overlay and cls.from_dict(overlay))

    def apply(
        self,
        rendered: Tensor,  # [H, W, 3]
        fixed: Tensor,  # [H, W, 3]
        guidance: Tensor,  # [H, W, 3]
        coverage_mask: Tensor,  # [H, W, 1]
    ) -> tuple[Tensor, Tensor]:
        """Keep the learned share of a change, and lay the learned share of the guidance over it.

        Returns:
            The view [H, W, 3], bit for bit the render where `keeps_renders`, and its confidence [H, W, 1]: 1 up to an expected error of
            0.05, beyond that 0.05 / error. An absolute difference, which stage 3's loss mostly is, weighs a Laplacian error so.
        """
        classes = classify(rendered, fixed, guidance, coverage_mask, self.edges)
        trust = [min(1.0, TRUSTED_ERROR / max(error, 1e-6)) for error in self.errors]
        confidence = smooth(torch.tensor(trust)[classes])[..., None].clamp(0, 1)
        kept = rendered
        if self.is_used:
            share = smooth(torch.tensor(self.shares)[classes])[..., None].clamp(0, 1)
            kept = torch.lerp(rendered, fixed, share)
        if self.overlay is None:
            return kept, confidence
        covered = laid_over(kept, guidance, coverage_mask)
        return self.overlay.apply(kept, covered, guidance, coverage_mask)


@dataclass(frozen=True)
class CalibratedFixer(Fixer):
    """A fixer of which the learned share is kept."""

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
        view = NovelView(rendered, guidance, coverage_mask, as_photos(reference))
        return self.fix_together([view])[0]

    def views_at_once(self, height: int, width: int) -> int:
        """As many as the fixer takes."""
        return self.fixer.views_at_once(height, width) if self.calibration.is_used else 1

    def fix_together(self, views: Sequence[NovelView]) -> list[FixResult]:
        """See `fix`."""
        if self.calibration.is_used:
            results = self.fixer.fix_together(views)
        else:
            masks = [(view.coverage_mask > 0.5).float() for view in views]
            results = [
                FixResult(view.rendered, mask, mask)
                for view, mask in zip(views, masks, strict=True)
            ]
        return [self._kept(view, result) for view, result in zip(views, results, strict=True)]

    def _kept(self, view: NovelView, result: FixResult) -> FixResult:
        fixed, confidence = self.calibration.apply(
            view.rendered, result.fixed, view.guidance, view.coverage_mask
        )
        return replace(result, fixed=fixed, confidence=confidence)


def laid_over(
    image: Tensor,  # [H, W, 3]
    guidance: Tensor,  # [H, W, 3]
    coverage_mask: Tensor,  # [H, W, 1]
) -> Tensor:
    """The guidance where there is any, with soft edges, else the image. [H, W, 3]"""
    return AnalyticFixer(guidance_share=1.0).fix(image, guidance, coverage_mask, image).fixed


def with_overlay(calibration: Calibration, trials: Sequence[Trial]) -> Calibration:
    """Learn from the trials that taught a calibration how much of the guidance helps on top of what is kept of the fixer's change."""
    guided = []
    for trial in trials:
        given = trial.guidance, trial.coverage_mask
        kept, _ = calibration.apply(trial.rendered, trial.fixed, *given)
        guided.append(replace(trial, rendered=kept, fixed=laid_over(kept, *given)))
    overlay = calibrate(guided)
    return replace(calibration, overlay=overlay if overlay.is_used else None)


def calibrate(trials: Sequence[Trial], expected: Expectation | None = None) -> Calibration:
    """Learn from trials, at least one, and from what is `expected` of the fixer (None: nothing is known of it).

    With one trial its quarters stand for trials: what it says is used with the same rules, and is worth less.
    """
    expected = expected or Expectation()
    for trial in trials:
        dims = check_shape("rendered", trial.rendered, ("H", "W", 3))
        for name in ("fixed", "guidance", "truth"):
            check_shape(name, getattr(trial, name), ("H", "W", 3), dims)
        check_shape("coverage_mask", trial.coverage_mask, ("H", "W", 1), dims)
    edges = change_edges(trials)
    sums = torch.stack([trial_sums(trial, edges) for trial in trials])  # [T, 4, 16, 4]
    if len(trials) == 1:
        sums = sums.transpose(0, 1)
    held_out = {level: torch.stack(_held_out(sums, level, expected.share)) for level in LEVELS}
    for level in LEVELS:
        held_out[level] = _without_losing_regions(sums, held_out[level])
    gains = {level: _gains(sums, shares) for level, shares in held_out.items()}
    level = max(LEVELS, key=lambda level: float(gains[level].mean()))  # of equals the simpler
    # A view that the fixer leaves alone (too little guidance, mostly) says nothing of what it is worth where it does not.
    told = gains[level][sums[..., 1].sum((1, 2)) > 0]
    gain = float(told.mean()) if len(told) else 0.0
    gain_error = _standard_error(told)
    believed = expected.believed(gain, gain_error)
    used = believed > MIN_GAIN
    kept = held_out[level] if used else torch.zeros_like(held_out[level])
    shares = (
        learn_shares(sums.flatten(0, 1), level, expected.share) * (kept.amax(0) > 0)
        if used
        else kept[0]
    )
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
        gain_believed=believed,
        kept_share=float((change * shares).sum() / change.sum().clamp_min(1e-12)),
    )


def _held_out(sums: Tensor, level: Level, expected: float) -> list[Tensor]:
    """For each trial the shares that the others teach. [T × [16]]"""
    rows = range(len(sums))
    return [
        learn_shares(sums[[other for other in rows if other != row]].flatten(0, 1), level, expected)
        for row in rows
    ]


def _without_losing_regions(sums: Tensor, shares: Tensor) -> Tensor:
    """Set the shares of a region to 0 where the trials that did not teach them come out worse there. [T, 16]

    Not of what no photo sees well enough for points: there is little to lose, and single trials decide such sums.
    """
    change = squared_errors(sums.sum(1), shares) - sums[..., 3].sum(1)  # [T, 16]
    loses = change.view(-1, len(REGIONS), NUM_BINS).sum((0, 2)) > 0
    loses[REGIONS.index("unseen")] = False
    return shares * ~loses.repeat_interleave(NUM_BINS)


def _gains(sums: Tensor, shares: Tensor) -> Tensor:
    """PSNR of each trial with its shares over that of the render, dB. [T]"""
    return _psnrs(sums, shares) - _psnrs(sums, torch.zeros_like(shares))


def _standard_error(gains: Tensor) -> float | None:
    """Of the mean of some gains [T], dB; None where there are none."""
    if len(gains) < 2:
        return LONE_ERROR if len(gains) else None
    return float(gains.std() / math.sqrt(len(gains)))


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
