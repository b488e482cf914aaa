"""`.pkl` checkpoints of fixers trained on a base model: what torch.save wrote of a dict.

| key | holds |
|---|---|
| `state_dict_unet` | the whole UNet (Difix), or its adapter and `conv_in` (img2img-turbo and, as far as its name tells, S2D) |
| `state_dict_vae` | adapter and skip convolutions of the VAE's decoder |
| `rank_unet`, `rank_vae`, `unet_lora_target_modules`, `vae_lora_target_modules` | may be missing: the tensors tell |
| `state_dict_mixing`, `mixing`, `lora_alpha` | ours: learned mixing, how to mix, and the adapters' alpha |
| `optimizer` and others | ignored, and named |
"""

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2d.fixer.model_config import MixingConfig
from s2d.fixer.network.state import DEFAULT_ALPHA, NetworkState, take_apart
from s2d.log import logger

NETWORKS = ("unet", "vae")
OTHER_KEYS = {"state_dict_mixing", "mixing", "lora_alpha"}


@dataclass(frozen=True)
class Checkpoint:
    """What a `.pkl` holds for each network; None where it says nothing."""

    unet: NetworkState | None
    vae: NetworkState | None
    mixing: MixingConfig | None
    mixing_weights: dict[str, Tensor]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `.pkl` of any of the known forms.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, holds more than plain data, or none of the known keys.
    """
    content = _load(path)
    states = {name: content.get(f"state_dict_{name}") for name in NETWORKS}
    for name in ("state_dict_unet", "state_dict_vae", "state_dict_mixing"):
        if not isinstance(content.get(name, {}), (dict, type(None))):
            raise ValueError(
                f"{path}: {name} must be a dict of tensors, got {type(content[name]).__name__}. Save the checkpoint again."
            )
    if not any(states.values()):
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise ValueError(
            f"{path}: there are no weights in it. Expected state_dict_unet or state_dict_vae, got {found}. "
            "Give a checkpoint of train_artifact_fixer.py, S2D, Difix or img2img-turbo."
        )
    alpha = content.get("lora_alpha", DEFAULT_ALPHA)
    if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(
            f"{path}: lora_alpha must be a number above 0, got {alpha!r}. Save the checkpoint again."
        )
    parts: dict[str, NetworkState | None] = {}
    for name, tensors in states.items():
        if not tensors:
            parts[name] = None
            continue
        parts[name] = take_apart(tensors, f"{path}: {name}", alpha)
        _compare_metadata(path, name, content, parts[name])
    known = OTHER_KEYS | {f"state_dict_{name}" for name in NETWORKS}
    known |= {f"rank_{name}" for name in NETWORKS}
    known |= {f"{name}_lora_target_modules" for name in NETWORKS}
    if ignored := sorted(str(key) for key in content.keys() - known):
        logger.info("%s: ignored: %s", path, ", ".join(ignored))
    return Checkpoint(parts["unet"], parts["vae"], *_mixing(path, content))


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"Checkpoint not found: {path}. Train one with train_artifact_fixer.py, or leave the flag out."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a file cut short or of another kind: where torch's reader stumbles over it is chance
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(
            error, pickle.UnpicklingError
        ):  # torch's text is about how to load it all the same
            reason = "it is of another kind, damaged, or holds more than tensors"
        raise ValueError(
            f"{path} cannot be read as a checkpoint of plain tensors ({reason}). Was the download complete? Pickles "
            "that hold code are refused."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold a dict with state_dict_unet or state_dict_vae, got {type(content).__name__}."
        )
    return content


def _compare_metadata(path: Path, name: str, content: dict[str, Any], state: NetworkState) -> None:
    """Believe the tensors; say where the metadata tells another story."""
    ranks = {rank for adapter in state.adapters.values() for rank in adapter.ranks().values()}
    rank = content.get(f"rank_{name}")
    if rank is not None and ranks and ranks != {rank}:
        logger.warning(
            "%s: rank_%s says %s, the tensors have %s: using theirs", path, name, rank, ranks
        )
    adapted = {module for adapter in state.adapters.values() for module in adapter.a}
    targets = content.get(f"{name}_lora_target_modules")
    targets = targets if isinstance(targets, (list, tuple, set)) else []
    missing = [
        target
        for target in targets
        if not any(f".{module}".endswith(f".{target}") for module in adapted)
    ]
    if missing:
        logger.warning(
            "%s: %d of %d targets of the %s's adapter have no tensors and stay as they are (first: %s)",
            path,
            len(missing),
            len(targets),
            name,
            ", ".join(missing[:5]),
        )


def _mixing(path: Path, content: dict[str, Any]) -> tuple[MixingConfig | None, dict[str, Tensor]]:
    if "mixing" not in content:
        return None, {}
    try:
        return MixingConfig(**content["mixing"]), content.get("state_dict_mixing", {})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: its description of the mixing does not fit ({error}). Was it written by a newer S2D?"
        ) from error
