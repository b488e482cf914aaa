"""Adaptation of the compact network to the trials of a scene: what it learns, and when it is dropped."""

from functools import partial

import pytest
import torch
from tiny_pairs import TINY, save_tiny

from s2d.fixer import judge as judging
from s2d.fixer.adaptation import AdaptSettings, adapt, as_pair
from s2d.fixer.choice import DEFAULTS
from s2d.fixer.diffusion import load_compact_fixer
from s2d.images import read_image, write_image
from s2d.metrics import psnr
from s2d.pairs.trials import TrialPair, TrialSettings


@pytest.fixture
def pale_trials(tmp_path) -> list[TrialPair]:
    """Four views whose renders are all pale in the same way: what adaptation can learn at once."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(4):
        folder = tmp_path / "scratch/trials" / f"view_{number}.png"
        truth = 0.8 * torch.rand(5, 6, 3, generator=generator).repeat_interleave(8, 0)
        truth = truth.repeat_interleave(8, 1)
        covered = (torch.rand(40, 48, 1, generator=generator) > 0.5).float()
        pictures = {"truth": truth, "render": truth + 0.2, "coverage": covered}
        pictures["guidance"] = (truth + 0.2) * covered
        for name, image in pictures.items():
            write_image(folder / f"{name}.png", image)
        found.append(TrialPair(f"view_{number}.png", folder, (folder / "truth.png",)))
    return found


def settings_of(num_steps):
    return AdaptSettings(num_steps, learning_rate=1e-2, ema_decay=0.9, crop=32)


def test_adaptation_learns_what_the_trials_have_in_common(pale_trials, tmp_path):
    weights = save_tiny(tmp_path / "tiny.safetensors")
    device = torch.device("cpu")
    done = [
        adapt(weights, pale_trials[:3], settings_of(30), tmp_path / f"{n}.safetensors", device, "x")
        for n in range(2)
    ]
    assert done[0].read_bytes() == done[1].read_bytes()
    scores = []
    for path in (weights, done[0]):
        one = judging.read_trial(pale_trials[3], "render")
        result = load_compact_fixer(path).fix(
            one.rendered, one.guidance, one.coverage_mask, one.truth
        )
        scores.append(psnr(result.fixed, one.truth))
    # The render is off by 0.2: 14 dB.
    assert scores[1] > scores[0] + 2  # measured
    before = done[0].stat().st_mtime_ns
    adapt(weights, pale_trials, settings_of(1), done[0], device, "x")
    assert done[0].stat().st_mtime_ns == before, "finished work was done again"


def judge_trials(pale_trials, weights, num_steps, monkeypatch):
    scratch = pale_trials[0].folder.parent.parent
    monkeypatch.setattr(judging, "make_trials", lambda *_: (pale_trials, {}))
    choice = judging.FixerChoice(
        "compact",
        "a test",
        {**DEFAULTS["compact"], "weights": weights, "precision": "fp32", "tile_size": 64},
    )
    arguments = (choice, None, None, TrialSettings(), settings_of(num_steps), scratch, "cpu")
    return partial(judging.judge, *arguments), scratch


def test_adaptation_is_taken_where_it_helps_on_trials_that_it_did_not_see(
    pale_trials, tmp_path, monkeypatch
):
    weights = save_tiny(tmp_path / "tiny.safetensors")
    run_judge, scratch = judge_trials(pale_trials, weights, 30, monkeypatch)
    verdict = run_judge()
    assert verdict.summary["adaptation"]["used"], verdict.summary["adaptation"]
    assert verdict.choice.settings["weights"] == scratch / "adapted.safetensors"
    judging.publish(verdict, scratch, tmp_path / "stage")
    assert (tmp_path / "stage/adapted.safetensors").is_file()
    shown = read_image(tmp_path / "stage/trials/view_0_fixed.png")
    assert torch.equal(shown, read_image(pale_trials[0].path("adapted")))
    monkeypatch.setattr(judging, "adapt", pytest.fail)
    assert run_judge() == verdict


def test_adaptation_that_does_not_help_is_dropped(pale_trials, tmp_path, monkeypatch):
    weights = save_tiny(tmp_path / "tiny.safetensors")
    for number, pair in enumerate(pale_trials):  # one half is pale, the other dark
        if number % 2:
            write_image(pair.path("render"), (read_image(pair.path("truth")) - 0.2).clamp(0, 1))
    run_judge, _ = judge_trials(pale_trials, weights, 30, monkeypatch)
    verdict = run_judge()
    assert not verdict.summary["adaptation"]["used"]
    assert verdict.summary["adaptation"]["decision"].startswith("not adapted to the scene")
    assert verdict.choice.settings["weights"] == weights
    assert verdict.summary["trials"][0]["picture"] == "fixed"


def test_one_trial_cannot_judge_an_adaptation(pale_trials, tmp_path, monkeypatch):
    weights = save_tiny(tmp_path / "tiny.safetensors")
    monkeypatch.setattr(judging, "adapt", pytest.fail)
    verdict = judge_trials(pale_trials[:1], weights, 30, monkeypatch)[0]()
    assert "it takes two trials" in verdict.summary["adaptation"]["decision"]


def test_windows_fit_the_network_and_pairs_the_trial(pale_trials):
    pair = as_pair(pale_trials[0])
    assert pair.size == (48, 40) and pair.name == "view_0"
    assert pair.target.name == "truth.png" and pair.references == pale_trials[0].references
    assert TINY.residual
