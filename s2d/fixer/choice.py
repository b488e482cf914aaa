"""Which fixer stage 2 runs, with which weights and settings: the resolution of its flags.

`--fixer` names it. Without it the weights decide: those that a flag names, else the compact ones that come with S2D
(`SHIPPED_WEIGHTS`); where there are none it is the analytic fixer. A flag that the chosen fixer has no use for is refused: who
sets it expects other pictures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from s2d.checks import check_range
from s2d.device import DTYPES, Precision, choose_device
from s2d.fixer.analytic import AnalyticFixer
from s2d.fixer.calibration import Expectation
from s2d.fixer.diffusion import (
    COMPACT_TILE_SIZE,
    DIFIX_TILE_SIZE,
    MIN_TILE_SIZE,
    difix_weights,
    load_compact_fixer,
    load_difix_fixer,
)
from s2d.fixer.interface import Fixer
from s2d.log import logger
from s2d.stage_folders import KEY, MANIFEST, SCRATCH, partial_dir

FixerName = Literal["analytic", "compact", "difix"]

# The compact model of a release lies here, its model card beside it. A checkout without that file has no default network.
SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "compact.safetensors"

# Measured on ten scenes with weights that had not seen them, 3 and 6 kept photos (docs/fixer.md).
SHIPPED_EXPECTATION = Expectation(gain=0.3, spread=0.8, share=1.0)

# What each fixer can be told, by the name of the flag, and what it does when it is told nothing.
DEFAULTS: dict[FixerName, dict[str, Any]] = {
    "analytic": {field.name: field.default for field in fields(AnalyticFixer)},
    "compact": {
        "weights": None,
        "num_references": 1,
        "precision": None,
        "tile_size": COMPACT_TILE_SIZE,
        "compile": False,
    },
    "difix": {
        "base_model_path": "nvidia/difix_ref",
        "stage2_checkpoint": None,
        "num_references": 1,
        "precision": None,
        "tile_size": DIFIX_TILE_SIZE,
        "network_size": None,
        "compile": False,
    },
}
# These name files, which are known by their content.
WEIGHT_FLAGS = ("weights", "base_model_path", "stage2_checkpoint")
# These change how fast the pictures are made, and no more in them than another device does.
SPEED_FLAGS = ("compile",)


@dataclass(frozen=True)
class FixerChoice:
    """A fixer and all that decides its pictures."""

    name: FixerName
    reason: str
    """What chose it."""
    settings: Mapping[str, Any]
    """By flag; complete."""
    known: Expectation | None = None
    """What its user knows of it."""

    @property
    def num_references(self) -> int:
        """How many kept photos a view is fixed with; the analytic fixer is handed the nearest, like any other."""
        return self.settings.get("num_references", 1)

    @property
    def expected(self) -> Expectation:
        """What it is worth before a trial: what its user knows; else little of other weights than those that come with S2D."""
        if self.known is not None:
            return self.known
        if self.name == "compact" and self.settings["weights"] == SHIPPED_WEIGHTS:
            return SHIPPED_EXPECTATION
        return Expectation()

    def with_expectation(self, gain: float | None, spread: float | None) -> FixerChoice:
        """With what its user knows of it; itself where both are None.

        Args:
            gain: dB, mean over scenes that its weights never saw.
            spread: Standard deviation over those scenes, dB; None is the default of `Expectation`.

        Raises:
            ValueError: A spread without a gain, or not above 0; a gain that is not finite.
        """
        if gain is None:
            if spread is not None:
                raise ValueError(
                    "--expected-spread: the spread of what? Give --expected-gain, too."
                )
            return self
        spread = Expectation.spread if spread is None else spread
        check_range("expected_gain", gain, above=-math.inf, below=math.inf)
        check_range("expected_spread", spread, above=0, below=math.inf)
        known = Expectation(gain, spread, share=1.0 if gain > 0 else 0.0)
        return replace(self, known=known)

    def describe(self) -> str:
        """For people: `compact (the default) in fp32`."""
        precision = self.settings.get("precision")
        return f"{self.name} ({self.reason})" + (f" in {precision}" if precision else "")

    def with_precision(self, known: str | None, device: str) -> FixerChoice:
        """With a number format in place of none.

        Args:
            known: The one of work that is to be gone on with or is done; None if there is none.
            device: Where the network is to run, which decides otherwise; looked for only then.

        Raises:
            ValueError: See `usable_device`.
        """
        if "precision" not in self.settings or self.settings["precision"] is not None:
            return self
        precision = known if known in DTYPES else default_precision(usable_device(device))
        return replace(self, settings={**self.settings, "precision": precision})

    def inputs(self) -> dict[str, Any]:
        """What `open_stage` must know of it: settings by value, weights by content; the precision must be known by now.

        Raises:
            FileNotFoundError: The base model is not there; the message says where to get it.
        """
        found: dict[str, Any] = {"fixer": self.name}
        for flag, value in self.settings.items():
            if flag in SPEED_FLAGS:
                continue
            if flag not in WEIGHT_FLAGS:
                found[flag] = value
            elif value is not None:
                found[flag] = difix_weights(value) if flag == "base_model_path" else value
        return found

    def load(self, device: str = "cpu", number: int = 0, *, few: bool = True) -> Fixer:
        """Make the fixer; a network is loaded onto `device` (see `usable_device`).

        Args:
            device, number: See `usable_device`.
            few: It is for a handful of views, for which nothing is compiled.

        Raises:
            FileNotFoundError, ValueError: No, or no usable weights, packages, device or memory; the message says what to do.
        """
        if self.name == "analytic":
            return AnalyticFixer(**self.settings)
        place = usable_device(device, number)
        compiled = self.settings["compile"] and not few
        if compiled and place.type != "cuda":
            logger.warning("--compile: no effect on %s, only on a GPU", place)
        common = {
            "device": place,
            "precision": self.settings["precision"] or default_precision(place),
            "tile_size": self.settings["tile_size"],
            "compiled": compiled and place.type == "cuda",
        }
        if self.name == "compact":
            return load_compact_fixer(self.settings["weights"], **common)
        return load_difix_fixer(
            self.settings["base_model_path"],
            self.settings["stage2_checkpoint"],
            network_size=self.settings["network_size"],
            **common,
        )


def choose_fixer(name: FixerName | None, flags: Mapping[str, Any]) -> FixerChoice:
    """Resolve the flags.

    Args:
        name: `--fixer`, or None to let the weights decide.
        flags: Every flag of `DEFAULTS` by name; None or False is one that was not given.

    Raises:
        FileNotFoundError: The weights of the compact fixer or the checkpoint are not there.
        ValueError: A flag without effect on the chosen fixer, or a value out of range.
    """
    given = {
        flag: value for flag, value in flags.items() if value is not None and value is not False
    }
    reason = "--fixer"
    if name is None:
        name, reason = _by_weights(given)
    if useless := [flag for flag in given if flag not in DEFAULTS[name]]:
        takers = [other for other, known in DEFAULTS.items() if useless[0] in known]
        shown = " and ".join(f"--{flag.replace('_', '-')}" for flag in useless)
        raise ValueError(
            f"{shown}: no effect with the {name} fixer ({reason}). Leave it out, or pass --fixer {' or '.join(takers)}."
        )
    settings = {**DEFAULTS[name], **given}
    _check(settings)
    if name == "compact" and settings["weights"] is None:
        if not SHIPPED_WEIGHTS.is_file():
            raise FileNotFoundError(
                f"This copy of S2D has no compact weights: no file {SHIPPED_WEIGHTS}. Give --weights FILE.safetensors "
                "(train_artifact_fixer.py writes one), or use --fixer analytic, which needs none."
            )
        settings["weights"] = SHIPPED_WEIGHTS
    for flag in ("weights", "stage2_checkpoint"):
        path = settings.get(flag)
        if path is not None and not path.is_file():
            raise FileNotFoundError(
                f"--{flag.replace('_', '-')}: no file {path}. Give one that train_artifact_fixer.py wrote, or use "
                "--fixer analytic, which needs none."
            )
    return FixerChoice(name, reason, settings)


def usable_device(name: str, number: int = 0) -> torch.device:
    """The device of that name, if torch can use it here.

    Args:
        name: auto, cpu, cuda, cuda:1, as everywhere; and what else torch has, such as mps.
        number: Which of several to take where the name does not say (one process per GPU).
    """
    if name == "auto" or name.startswith("cuda"):
        return choose_device(name, kernels=False, number=number).device
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # torch says it in one of these ways, depending on the device.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--device {name} cannot be used ({reason}). Pass --device cpu, or install a torch with support for it."
        ) from error
    return device


def default_precision(device: torch.device) -> Precision:
    """The number format of a network that is told none: bf16 on a GPU that computes in it, else fp32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return "bf16"
    return "fp32"


def recorded_precision(final_dir: Path, fixer: FixerName, overwrite: bool) -> str | None:
    """The number format in which a stage was computed that is finished, or was interrupted; None if it was not with that fixer.

    So a stage is up to date, and goes on as it began, on another device than the one whose default it was made with.

    Args:
        final_dir: OUT/stage2.
        fixer: The one that is to run.
        overwrite: The finished one is to be made anew.
    """
    files = [partial_dir(final_dir) / SCRATCH / KEY]
    if not overwrite:
        files.insert(0, final_dir / MANIFEST)
    for path in files:
        try:
            inputs = json.loads(path.read_text(encoding="utf-8"))["inputs"]
            return inputs["precision"]["value"] if inputs["fixer"]["value"] == fixer else None
        # Not there, or with another fixer's inputs; a damaged one is refused by who opens the stage.
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def _by_weights(given: Mapping[str, Any]) -> tuple[FixerName, str]:
    """The fixer that the given weights are for, else that of the shipped ones; and why."""
    named: dict[FixerName, list[str]] = {
        "compact": [flag for flag in ("weights",) if flag in given],
        "difix": [flag for flag in ("base_model_path", "stage2_checkpoint") if flag in given],
    }
    found = {name: flags for name, flags in named.items() if flags}
    if len(found) > 1:
        raise ValueError(
            "--weights is for the compact fixer, --base-model-path and --stage2-checkpoint are for difix. Give one kind."
        )
    for name, flags in found.items():
        return name, f"chosen by --{flags[0].replace('_', '-')}"
    if SHIPPED_WEIGHTS.is_file():
        return "compact", "the default"
    return "analytic", "the default without weights"


def _check(settings: Mapping[str, Any]) -> None:
    """Refuse values before anything is loaded."""
    limits = {
        "guidance_share": {"low": 0.0, "high": 1.0},
        "feather": {"low": 0.0},
        "num_references": {"low": 1},
        "tile_size": {"low": MIN_TILE_SIZE},
        "network_size": {"low": MIN_TILE_SIZE},
    }
    for flag, limit in limits.items():
        if settings.get(flag) is not None:
            check_range(flag, settings[flag], **limit)
