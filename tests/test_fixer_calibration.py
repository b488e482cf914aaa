"""Calibration on synthetic fixers whose worth is known: perfect, harmful, useless, good in one region and bad in another."""

import json
import math
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch

from s2d.fixer.calibration import CalibratedFixer, Calibration, Expectation, calibrate
from s2d.fixer.choice import FixerChoice
from s2d.fixer.interface import Fixer, FixResult
from s2d.fixer.shares import (
    NUM_BINS,
    NUM_CLASSES,
    REGIONS,
    Trial,
    classify,
    learn_shares,
    shrunk,
    smooth,
    squared_errors,
    trial_sums,
)
from s2d.metrics import psnr

SIZE = (48, 64)


def waves(seed: int, scale: float = 1.0) -> torch.Tensor:
    """Smooth noise, as artifacts are: neighbours err alike. [H, W, 3]"""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*SIZE, 3, generator=generator)
    return scale * 5 * torch.stack([smooth(noise[..., c]) for c in range(3)], -1)


def scene(seed: int, error: float = 0.1) -> Trial:
    """A photo, a render that is off by `error`, and guidance of the left half that agrees with the render there."""
    truth = (0.5 + waves(seed, 0.15)).clamp(0.1, 0.9)
    rendered = (truth + waves(seed + 1000, error)).clamp(0, 1)
    covered = torch.zeros(*SIZE, 1)
    covered[:, : SIZE[1] // 2] = 1
    return Trial(rendered, rendered, rendered * covered, covered, truth)


def trials(fix, count=3, error=0.1):
    scenes = [scene(seed, error) for seed in range(count)]
    return [replace(one, fixed=fix(one, seed).clamp(0, 1)) for seed, one in enumerate(scenes)]


@dataclass
class Fixed(Fixer):
    """A fixer that returns what it was given beforehand."""

    image: torch.Tensor

    def fix(self, rendered, guidance, coverage_mask, reference):
        return FixResult(self.image, coverage_mask, torch.ones_like(coverage_mask))


def outcome(calibration: Calibration, trial: Trial) -> FixResult:
    fixer = CalibratedFixer(Fixed(trial.fixed), calibration)
    return fixer.fix(trial.rendered, trial.guidance, trial.coverage_mask, trial.truth)


def test_a_perfect_fixer_is_kept_as_it_is():
    known = trials(lambda one, _: one.truth)
    calibration = calibrate(known)
    assert calibration.is_used and calibration.kept_share > 0.999
    new = replace(scene(7), fixed=scene(7).truth)
    result = outcome(calibration, new)
    assert torch.allclose(result.fixed, new.truth, atol=1e-3)
    assert result.confidence.min() > 0.999
    assert "keeps 100 % of its change" in calibration.describe().replace("100%", "100 %")


def test_a_harmful_fixer_is_off_and_the_render_comes_out_bit_for_bit():
    known = trials(lambda one, seed: one.rendered + (one.rendered - one.truth))
    calibration = calibrate(known)
    assert calibration.level == "off" and set(calibration.shares) == {0.0}
    assert calibration.describe().startswith("off: on 3 trials")
    assert calibration.psnr_fixed < calibration.psnr_rendered
    assert torch.equal(outcome(calibration, known[0]).fixed, known[0].rendered)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_off(seed):
    """Changes that have nothing to do with the truth: over five draws of three trials none is believed."""
    known = trials(lambda one, number: one.rendered + waves(50 + 7 * number + 100 * seed, 0.1))
    calibration = calibrate(known)
    # Without a least gain the second draw would keep 7 %, for 0.02 dB.
    assert calibration.level == "off"
    assert torch.equal(outcome(calibration, known[0]).fixed, known[0].rendered)


def test_good_in_holes_and_bad_where_the_photos_see_keeps_the_one_and_drops_the_other():
    def fix(one, seed):
        bad = one.rendered + waves(500 + seed, 0.08)
        return torch.where(one.coverage_mask > 0, bad, one.truth)

    calibration = calibrate(trials(fix))
    shares = torch.tensor(calibration.shares).view(len(REGIONS), NUM_BINS)
    assert calibration.level in ("regions", "classes")
    assert shares[REGIONS.index("agree")].max() < 0.03  # measured 0
    assert shares[REGIONS.index("unseen")].min() > 0.97  # measured 1
    new = replace(scene(7), fixed=fix(scene(7), 7))
    result = outcome(calibration, new)
    covered, middle = new.coverage_mask[..., 0] > 0, SIZE[1] // 2
    before, after = (psnr(image, new.truth, covered) for image in (new.rendered, result.fixed))
    assert after > before - 0.1  # measured -0.055, all of it at the seam, where shares fade
    assert psnr(result.fixed, new.truth, ~covered) > psnr(new.rendered, new.truth, ~covered) + 10
    # Away from the seam the covered half is the render itself.
    assert torch.allclose(result.fixed[:, : middle - 16], new.rendered[:, : middle - 16], atol=1e-6)


def test_half_of_a_change_that_goes_twice_too_far_is_kept():
    calibration = calibrate(trials(lambda one, _: one.rendered + 2 * (one.truth - one.rendered)))
    # Not 0.5 sharp: colours are cut off at 0 and 1.
    assert calibration.kept_share == pytest.approx(0.5, abs=0.03)  # measured 0.503


def test_small_gains_that_differ_from_trial_to_trial_are_not_believed():
    """Good on one trial, as bad on the next: the mean is about nothing."""
    sign = {0: 1.0, 1: -1.0, 2: 0.3}
    known = trials(lambda one, seed: one.rendered + sign[seed] * (one.truth - one.rendered))
    calibration = calibrate(known)
    assert calibration.level == "off"


def test_what_is_expected_decides_where_trials_contradict_each_other():
    """The same three trials: a fixer that is known to be good is used whole, but not against clear evidence."""
    good = Expectation(gain=0.5, spread=0.5, share=1.0)
    sign = {0: 0.5, 1: -0.15, 2: 0.1}
    mixed = trials(lambda one, seed: one.rendered + sign[seed] * (one.truth - one.rendered))
    assert calibrate(mixed).level == "off"
    trusted = calibrate(mixed, good)
    assert trusted.is_used and trusted.kept_share > 0.3
    harmful = trials(lambda one, _: one.rendered - 0.3 * (one.truth - one.rendered))
    assert calibrate(harmful, good).level == "off"


def test_the_gain_that_is_believed_is_a_normal_posterior():
    prior = Expectation(gain=0.4, spread=0.5)
    assert prior.believed(1.0, 0.5) == pytest.approx(0.7)  # as much weight on either
    assert prior.believed(1.0, 0.0) == 1.0
    assert prior.believed(-3.0, 50.0) == pytest.approx(0.4, abs=1e-3)


def test_who_uses_a_fixer_can_say_what_is_known_of_it():
    unknown = FixerChoice("analytic", "a test", {})
    assert unknown.expected == Expectation() and unknown.with_expectation(None, None) is unknown
    good = unknown.with_expectation(0.4, 0.7)
    assert good.expected == Expectation(gain=0.4, spread=0.7, share=1.0)
    # Of what is expected to do harm, no more than the trials show is kept.
    assert unknown.with_expectation(-0.1, None).expected == Expectation(-0.1, 0.5, share=0.0)
    for wrong in ((None, 0.5), (math.nan, 0.5), (math.inf, 0.5), (0.1, 0.0), (0.1, math.inf)):
        with pytest.raises(ValueError, match=r"expected[-_](gain|spread)"):
            unknown.with_expectation(*wrong)


def test_one_trial_is_judged_by_its_quarters():
    assert calibrate(trials(lambda one, _: one.truth, 1)).kept_share > 0.999
    assert calibrate(trials(lambda one, _: 2 * one.rendered - one.truth, 1)).level == "off"


def test_a_fixer_that_changes_nothing_is_off():
    calibration = calibrate(trials(lambda one, _: one.rendered))
    assert calibration.level == "off" and calibration.kept_share == 0
    assert calibration.psnr_fixed == calibration.psnr_rendered
    assert calibration.describe().startswith("off: in 3 trials the fixer changed nothing")


def test_trials_that_the_fixer_left_alone_say_nothing():
    """Two views without guidance, as leave-one-out of three photos often has: neither a gain of 0 nor a certain one."""
    prior = Expectation(gain=0.3, spread=0.8, share=1.0)
    untouched = trials(lambda one, _: one.rendered)
    calibration = calibrate(untouched, prior)
    assert calibration.is_used and set(calibration.shares) == {1.0}
    assert calibration.gain_believed == 0.3 and calibration.gain_error is None
    known = [
        *untouched[:2],
        replace(untouched[2], fixed=untouched[2].truth.lerp(untouched[2].rendered, 0.5)),
    ]
    calibration = calibrate(known, prior)
    gain = 20 * math.log10(2)  # half of the error is gone
    expected = (gain * 0.8**2 + 0.3 * 1.0) / (0.8**2 + 1.0)
    assert calibration.gain_believed == pytest.approx(
        expected, rel=1e-4
    )  # 2e-6: colours in float32
    harmful = [
        *untouched[:2],
        replace(untouched[2], fixed=2 * untouched[2].rendered - untouched[2].truth),
    ]
    assert not calibrate(harmful, prior).is_used


def test_confidence_falls_with_the_error_that_is_to_be_expected():
    """The right half of the render is wrong by far, and the fixer does nothing about it."""

    def worse(one, seed):
        wrong = one.truth + waves(300 + seed, 0.3) * (1 - one.coverage_mask)
        return replace(one, rendered=wrong, fixed=wrong, guidance=wrong * one.coverage_mask)

    known = [worse(scene(seed, 0.01), seed) for seed in range(3)]
    calibration = calibrate(known)
    confidence = outcome(calibration, known[0]).confidence[..., 0]
    errors = torch.tensor(calibration.errors).view(len(REGIONS), NUM_BINS)
    used = errors[REGIONS.index("unseen"), 0]
    truth = (known[0].rendered - known[0].truth)[:, SIZE[1] // 2 :].square().mean().sqrt()
    assert used == pytest.approx(float(truth), rel=0.2)
    assert confidence[:, :16].min() > 0.99
    assert confidence[:, -16:].max() == pytest.approx(0.05 / float(used), rel=1e-3)


def test_sums_tell_the_error_of_any_share(generator):
    """Against the pictures themselves."""
    one = replace(scene(3), fixed=torch.rand(*SIZE, 3, generator=generator))
    edges = (0.1, 0.2, 0.3)
    classes = classify(one.rendered, one.fixed, one.guidance, one.coverage_mask, edges)
    shares = torch.rand(NUM_CLASSES, generator=generator, dtype=torch.float64)
    kept = torch.lerp(one.rendered.double(), one.fixed.double(), shares[classes][..., None])
    error = (kept - one.truth).square().sum(-1)
    sums = trial_sums(one, edges)
    expected = torch.stack([error[classes == k].sum() for k in range(NUM_CLASSES)])
    assert torch.allclose(
        squared_errors(sums.sum(0), shares), expected, atol=1e-4
    )  # float32 images
    assert sums[..., 0].sum() == one.truth.numel()


def test_classes_by_hand():
    """Eight patches: each agreement by a small and a large change."""
    rendered = torch.full((40, 160, 3), 0.5)
    guidance, fixed, covered = rendered.clone(), rendered.clone(), torch.ones(40, 160, 1)
    for number, (off, change) in enumerate(product((0.0, 0.08, 0.3, None), (0.0, 0.15))):
        columns = slice(20 * number, 20 * number + 20)
        fixed[:, columns] += change
        if off is None:
            covered[:, columns] = 0
        else:
            guidance[:, columns] -= off
    classes = classify(rendered, fixed, guidance, covered, (0.05, 0.1, 0.2))
    middles = classes[20, 10::20].tolist()
    assert middles == [4 * region + size for region in range(4) for size in (0, 2)]


def test_shares_by_hand():
    """Two blocks, d = 1 each: shares 0.4 and 0.6 have mean 0.5 and standard error 0.1, 0.04 of the distance to 0 squared."""
    sums = torch.zeros(2, 1, 4, dtype=torch.float64)
    sums[..., 0] = 3
    sums[..., 1] = 1
    sums[:, 0, 2] = torch.tensor([0.4, 0.6])
    zero = torch.zeros(1, dtype=torch.float64)
    # Σ(de - s·dd)² = 0.02, over (Σdd)² = 4, times 2 / (2 - 1): a variance of 0.01.
    assert shrunk(sums, zero).item() == pytest.approx(0.5 * (1 - 0.01 / 0.25))
    assert shrunk(sums, zero + 0.45).item() == pytest.approx(0.45)
    assert shrunk(sums[:1], zero + 0.3).item() == pytest.approx(0.3), "one block says nothing"
    sums[:, 0, 2] = torch.tensor([1.5, 1.6])
    assert shrunk(sums, zero).item() == 1
    assert shrunk(-sums, zero).item() == 0


def test_a_class_without_pixels_takes_what_its_region_says():
    sums = trial_sums(replace(scene(1), fixed=scene(1).truth), (0.05, 0.1, 0.2))
    sums[:, 5:] = 0
    shares = learn_shares(sums, "classes")
    assert torch.isfinite(shares).all()
    assert shares[-1] == pytest.approx(float(learn_shares(sums, "global")[0]))


def test_it_survives_json():
    calibration = calibrate(trials(lambda one, _: one.truth))
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
