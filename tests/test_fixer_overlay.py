"""Guidance laid over what a fixer makes: as far as trials show that it helps, and not at all where they do not."""

import json
from dataclasses import replace

import pytest
import torch
from test_fixer_calibration import SIZE, Fixed, scene, trials, waves

from s2d.fixer.calibration import (
    CalibratedFixer,
    Calibration,
    calibrate,
    laid_over,
    with_overlay,
)
from s2d.fixer.judge import VERDICT, is_off
from s2d.fixer.shares import Trial
from s2d.metrics import psnr

LEFT, RIGHT = slice(0, SIZE[1] // 2), slice(SIZE[1] // 2, None)


def guided(error: float, fix=lambda one, _: one.rendered) -> list[Trial]:
    """Trials whose guidance is off by `error` where there is any."""
    return [
        replace(one, guidance=(one.truth + waves(50 + seed, error)).clamp(0, 1) * one.coverage_mask)
        for seed, one in enumerate(trials(fix))
    ]


def better(one: Trial, seed: int) -> torch.Tensor:
    return torch.lerp(one.rendered, one.truth, 0.5)


@pytest.mark.parametrize("fix", [lambda one, _: one.rendered, better], ids=["off", "on"])
def test_points_that_are_right_are_laid_over_whatever_the_fixer_makes(fix):
    known = guided(0.0, fix)
    calibration = calibrate(known)
    assert calibration.is_used is (fix is better)
    overlaid = with_overlay(calibration, known)
    assert overlaid.overlay.kept_share > 0.9
    new = replace(guided(0.0, fix)[0], rendered=scene(9).rendered, truth=scene(9).truth)
    new = replace(new, fixed=fix(new, 9), guidance=new.truth * new.coverage_mask)
    given = new.rendered, new.guidance, new.coverage_mask, new.truth
    without, result = (
        CalibratedFixer(Fixed(new.fixed), learned).fix(*given)
        for learned in (calibration, overlaid)
    )
    gain = psnr(result.fixed[:, LEFT], new.truth[:, LEFT]) - psnr(without.fixed[:, LEFT], new.truth[:, LEFT])  # fmt: skip
    assert gain > 6
    assert torch.equal(result.fixed[:, RIGHT], without.fixed[:, RIGHT])  # no points there
    assert result.confidence[:, LEFT].mean() > without.confidence[:, LEFT].mean()
    assert torch.equal(result.mask, without.mask)
    decision = overlaid.describe()
    assert f"; {overlaid.overlay.kept_share:.0%} of the guidance over that: " in decision
    assert "renders are kept" not in decision
    assert ("renders are kept" in calibration.describe()) is calibration.keeps_renders
    assert Calibration.from_dict(json.loads(json.dumps(overlaid.to_dict()))) == overlaid


@pytest.mark.parametrize("error", [0.6, 1.0])
def test_points_that_are_worse_than_the_view_are_not_laid_over_it(error):
    known = guided(error, better)
    assert with_overlay(calibrate(known), known) == calibrate(known)


def test_points_that_are_as_wrong_as_the_view_in_another_way_are_mixed_with_it():
    """Two estimates of one variance with independent errors: the best mix is half of each, and 3 dB better."""
    known = guided(0.1)
    overlay = with_overlay(calibrate(known), known).overlay
    assert 0.4 < overlay.kept_share < 0.6
    assert overlay.psnr_kept - overlay.psnr_rendered > 0.8  # half of the picture has points


def test_points_that_the_view_shows_already_are_nothing_new():
    known = trials(lambda one, _: one.rendered)  # their guidance is the render's own left half
    assert with_overlay(calibrate(known), known) == calibrate(known)


def test_what_has_no_points_stays_bit_for_bit_and_edges_are_soft():
    one = guided(0.0)[0]
    image = laid_over(one.rendered, one.guidance, one.coverage_mask)
    assert torch.equal(image[:, RIGHT], one.rendered[:, RIGHT])
    inside = slice(0, SIZE[1] // 2 - 8)
    assert torch.allclose(image[:, inside], one.guidance[:, inside], atol=1e-6)
    edge = SIZE[1] // 2 - 1
    share = (image - one.rendered)[:, edge].abs().sum() / (one.guidance - one.rendered)[:, edge].abs().sum()  # fmt: skip
    assert 0 < share < 0.5


def test_views_with_points_laid_over_are_worth_training_on_though_the_fixer_is_off(tmp_path):
    known = guided(0.0)
    off = calibrate(known)
    for calibration, expected in ((off, True), (with_overlay(off, known), False)):
        (tmp_path / VERDICT).write_text(json.dumps({"calibration": calibration.to_dict()}))
        assert is_off(tmp_path) is expected
    older = {key: value for key, value in off.to_dict().items() if key != "overlay"}
    (tmp_path / VERDICT).write_text(json.dumps({"calibration": older}))
    assert is_off(tmp_path)
