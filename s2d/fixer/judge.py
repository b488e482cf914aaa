"""What a fixer is worth on a scene: it repairs trials, whose truth is known, and is calibrated, or refused, by them.

SCRATCH/trials/<view>.png/   a trial (s2d.pairs.trials), and what becomes of it: fixed.png, adapted.png, calibrated.png
SCRATCH/trials.json          the verdict; with it nothing is computed again
SCRATCH/adapted.safetensors  where the network was adapted to the scene (s2d.fixer.adaptation)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from s2d.files import atomic_write_json
from s2d.fixer.adaptation import AdaptSettings, adapt
from s2d.fixer.calibration import MIN_GAIN, Calibration, calibrate, with_overlay
from s2d.fixer.choice import FixerChoice, usable_device
from s2d.fixer.shares import Trial
from s2d.images import read_image, write_image
from s2d.log import logger
from s2d.metrics import psnr
from s2d.pairs.trials import TrialPair, TrialSettings, make_trials
from s2d.scene import Scene

FORMAT = 1
VERDICT = "trials.json"
ADAPTED = "adapted.safetensors"
# What is shown of a trial: `<view>_<picture>.png`.
PICTURES = ("truth", "render", "guidance", "coverage", "fixed", "calibrated")


@dataclass(frozen=True)
class Verdict:
    """What stage 2 is to run."""

    choice: FixerChoice
    """As given, or with the weights that were adapted to the scene."""
    calibration: Calibration | None = None
    """None where there was nothing to learn from: the fixer is used as it is."""
    summary: dict[str, Any] | None = None
    """The content of trials.json."""


def judge(
    choice: FixerChoice,
    kept: Scene,
    source: Path,
    settings: TrialSettings,
    adapting: AdaptSettings | None,
    scratch: Path,
    device: str,
) -> Verdict:
    """Make the trials, adapt the network if asked to, calibrate; logs what was decided.

    Args:
        choice: The fixer.
        kept: The kept views; nothing else of the scene is looked at.
        source: What `load_scene` takes, for the worker processes.
        settings: Of the trials.
        adapting: None leaves the network as it is.
        scratch: Keeps what is finished: the same call goes on from there.
        device: For the network and the trials' fits.

    Raises:
        OSError, ValueError: See `make_trials`, `FixerChoice.load`, `adaptation`.
    """
    if (scratch / VERDICT).is_file():
        summary = json.loads((scratch / VERDICT).read_text(encoding="utf-8"))
        calibration = summary["calibration"] and Calibration.from_dict(summary["calibration"])
        logger.info("%s", summary["decision"])
        return Verdict(_with_adapted(choice, summary, scratch), calibration, summary)
    # Kernels for Gaussians are there for CPUs and NVIDIA's GPUs alone; a network may be on another device.
    place = device if device == "auto" or device.startswith("cuda") else "cpu"
    pairs, failed = make_trials(kept, source, settings, scratch / "trials", place)
    summary: dict[str, Any] = {"format": FORMAT, "fixer": choice.name, "steps": settings.num_steps}
    summary |= {"failed": failed, "adaptation": None, "calibration": None, "trials": []}
    calibration = None
    if pairs:
        calibration = _calibrated(choice, pairs, "fixed", device)
        picture = "fixed"
        if adapting is not None:
            adapted = _cross_adapted(choice, pairs, adapting, scratch, device)
            summary["adaptation"] = _compare(calibration, adapted, adapting)
            logger.info("%s", summary["adaptation"]["decision"])
            if summary["adaptation"]["used"]:
                calibration, picture = adapted, "adapted"
                _adapt(choice, pairs, adapting, scratch / ADAPTED, device, "adapt to all")
        calibration = with_overlay(calibration, [read_trial(pair, picture) for pair in pairs])
        summary["calibration"] = calibration.to_dict()
        summary["decision"] = calibration.describe()
        summary["trials"] = [score_trial(pair, picture, calibration) for pair in pairs]
    else:
        summary["decision"] = "the fixer is used as it is: no trial could be made"
    logger.info("%s", summary["decision"])
    atomic_write_json(scratch / VERDICT, summary)
    return Verdict(_with_adapted(choice, summary, scratch), calibration, summary)


def publish(verdict: Verdict, scratch: Path, stage_dir: Path) -> None:
    """Copy what people and the report look at into the stage's folder."""
    summary = verdict.summary
    if summary is None:
        return
    for trial in summary["trials"]:
        for picture in PICTURES:
            name = trial["picture"] if picture == "fixed" else picture
            target = stage_dir / "trials" / f"{trial['name']}_{picture}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(scratch / "trials" / f"{trial['name']}.png" / f"{name}.png", target)
    atomic_write_json(stage_dir / VERDICT, summary)
    if summary["adaptation"] and summary["adaptation"]["used"]:
        shutil.copyfile(scratch / ADAPTED, stage_dir / ADAPTED)


def is_off(stage_dir: Path) -> bool:
    """Whether the trials of a finished stage 2 have switched the fixer off, so that its views are the renders that it was given."""
    path = stage_dir / VERDICT
    if not path.is_file():
        return False
    calibration = json.loads(path.read_text(encoding="utf-8"))["calibration"]
    return calibration is not None and Calibration.from_dict(calibration).keeps_renders


def read_trial(pair: TrialPair, picture: str) -> Trial:
    """A trial with one of its pictures as the fixed view."""
    names = ("render", picture, "guidance", "coverage", "truth")
    rendered, fixed, guidance, coverage, truth = (read_image(pair.path(name)) for name in names)
    return Trial(rendered, fixed, guidance, (coverage[..., :1] > 0.5).float(), truth)


def score_trial(pair: TrialPair, picture: str, calibration: Calibration) -> dict[str, Any]:
    """Write what the calibration makes of a trial; returns its line of trials.json."""
    trial = read_trial(pair, picture)
    inputs = (trial.rendered, trial.fixed, trial.guidance, trial.coverage_mask)
    write_image(pair.path("calibrated"), calibration.apply(*inputs)[0])
    calibrated = read_image(pair.path("calibrated"))
    images = {"render": trial.rendered, "fixed": trial.fixed, "calibrated": calibrated}
    return {
        "view": pair.view,
        "name": pair.name,
        "picture": picture,
        "coverage": round(float(trial.coverage_mask.mean()), 4),
        "psnr": {name: round(psnr(image, trial.truth), 3) for name, image in images.items()},
    }


def _calibrated(
    choice: FixerChoice, pairs: Sequence[TrialPair], picture: str, device: str
) -> Calibration:
    """Repair all trials and learn from them."""
    _fix_all(choice, pairs, picture, device)
    return calibrate([read_trial(pair, picture) for pair in pairs], choice.expected)


def _fix_all(choice: FixerChoice, pairs: Sequence[TrialPair], picture: str, device: str) -> None:
    """Repair trials, those that have not been. What is judged are 8 bits, as stage 2 writes them."""
    todo = [pair for pair in pairs if not pair.path(picture).is_file()]
    fixer = choice.load(device) if todo else None
    for pair in todo:
        trial = read_trial(pair, "render")
        photos = [read_image(path) for path in pair.references[: choice.num_references]]
        result = fixer.fix(trial.rendered, trial.guidance, trial.coverage_mask, photos)
        write_image(pair.path(picture), result.fixed)


def _cross_adapted(
    choice: FixerChoice,
    pairs: Sequence[TrialPair],
    settings: AdaptSettings,
    scratch: Path,
    device: str,
) -> Calibration | None:
    """Calibrate on what networks make of trials that they were not adapted to: two halves, each judged by the other. None: only one trial."""
    halves = (pairs[0::2], pairs[1::2])
    if not halves[1]:
        return None
    for number, half in enumerate(halves):
        weights = scratch / f"adapted_half{number}.safetensors"
        _adapt(choice, halves[1 - number], settings, weights, device, f"adapt {number + 1}/2")
        other = replace(choice, settings={**choice.settings, "weights": weights})
        _fix_all(other, half, "adapted", device)
    return calibrate([read_trial(pair, "adapted") for pair in pairs], choice.expected)


def _adapt(
    choice: FixerChoice,
    pairs: Sequence[TrialPair],
    settings: AdaptSettings,
    target: Path,
    device: str,
    label: str,
) -> None:
    adapt(choice.settings["weights"], pairs, settings, target, usable_device(device), label)


def _compare(
    before: Calibration, after: Calibration | None, settings: AdaptSettings
) -> dict[str, Any]:
    """Whether the adapted network is taken: what it makes, calibrated, of trials that it did not see must be better by as much as counts."""
    record: dict[str, Any] = {"steps": settings.num_steps, "used": False}
    if after is None:
        return record | {
            "decision": "no adaptation: it takes two trials, one to judge the other by"
        }
    record |= {"psnr_before": _final_psnr(before), "psnr_after": _final_psnr(after)}
    record["used"] = record["psnr_after"] > record["psnr_before"] + MIN_GAIN
    shown = (
        f"{record['psnr_before']:.2f} → {record['psnr_after']:.2f} dB on trials that it did not see"
    )
    verb = "adapted to the scene" if record["used"] else "not adapted to the scene"
    return record | {"decision": f"{verb} in {settings.num_steps} steps: {shown}"}


def _final_psnr(calibration: Calibration) -> float:
    """Of what stage 2 would make."""
    return calibration.psnr_kept if calibration.is_used else calibration.psnr_rendered


def _with_adapted(choice: FixerChoice, summary: dict[str, Any], scratch: Path) -> FixerChoice:
    if not (summary["adaptation"] and summary["adaptation"]["used"]):
        return choice
    return replace(choice, settings={**choice.settings, "weights": scratch / ADAPTED})
