"""Hugging Face folders: unet/, vae/, scheduler/, text_encoder/, tokenizer/, as of stabilityai/sd-turbo and nvidia/difix_ref.

The second names classes of its own, with code beside its weights; that code is neither needed nor run. Its VAE holds skip
convolutions and an adapter that is not merged. Weight files are safetensors (whole or in shards) or torch's `.bin`.
"""

import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from s2d.fixer.model_config import FixerConfig, MixingConfig
from s2d.fixer.network.state import NetworkState, take_apart
from s2d.log import logger

WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)


def find_folder(model: str) -> Path:
    """Find a base model: a local folder, or what `hf download` has put into the Hugging Face cache. Nothing is fetched.

    Raises:
        FileNotFoundError: It is in neither place; the message says where to get it and what works without.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if model.count("/") == 1 and not folder.is_absolute():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(model, local_files_only=True))
        except LocalEntryNotFoundError:
            pass  # said below, together with the missing local folder
    raise FileNotFoundError(
        f"Base model not found: {model} is neither a folder nor in the Hugging Face cache. Expected a folder with "
        "unet/, vae/, scheduler/, text_encoder/ and tokenizer/. Run: hf download nvidia/difix_ref (non-commercial "
        "licence), or use --fixer compact or --fixer analytic, which need none."
    )


def read_config(folder: Path) -> FixerConfig:
    """Collect the description of the networks from the folder's config files."""
    unet = _read_json(folder / "unet" / "config.json")
    vae = _read_json(folder / "vae" / "config.json")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    gamma = 0.0 if vae.pop("ignore_skip", False) else float(vae.pop("gamma", 1.0))
    vae.pop("lora_rank", None)  # the tensors say it
    return FixerConfig(
        unet=_known(UNet2DConditionModel, unet, folder / "unet"),
        vae=_known(AutoencoderKL, vae, folder / "vae"),
        # Samplers share the schedule's keys and have many of their own.
        scheduler=_known(DDPMScheduler, scheduler, None),
        skip_gamma=gamma,
        mixing=MixingConfig(),
    )


def read_weights(folder: Path) -> NetworkState:
    """Read the tensors of `folder` (unet/ or vae/) in whichever form they are there."""
    found = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"No weights in {folder}. Expected one of {', '.join(WEIGHT_FILES)}. Download the model again."
        )
    path = folder / found[0]
    if path.suffix == ".json":
        shards = sorted(set(_read_json(path).get("weight_map", {}).values()))
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            tensors |= _read_tensors(folder / shard)
    else:
        tensors = _read_tensors(path)
    return take_apart(tensors, str(path))


def embed_prompt(folder: Path, prompt: str) -> Tensor:
    """Run the folder's text encoder once; the fixer keeps the result alone. [L, D]"""
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging as transformers_logging

    for part in ("tokenizer", "text_encoder"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"No text encoder: {folder / part} is missing. Expected it beside unet/ and vae/. Download the model again."
            )
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # one more bar in between would break up ours
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder", local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: the text encoder cannot be read ({error}). Download the model again."
        ) from error
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
    tokens = tokenizer(
        prompt,
        padding="max_length",
        max_length=encoder.config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return encoder(tokens.input_ids).last_hidden_state[0]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"Weights not found: {path}. Download the model again.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as weights ({_first_line(error)}). Was the download complete? A file of a few "
            "hundred bytes is a Git LFS pointer: download with `hf download`."
        ) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(tensors).__name__}.")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"Not a model folder: {path} is missing. Expected a download of nvidia/difix_ref or stabilityai/sd-turbo."
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Download the model again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}.")
    return values


def _known(cls: type, config: dict[str, Any], source: Path | None) -> dict[str, Any]:
    """The entries that a class takes; others are named where `source` is given, because they may change what is computed."""
    parameters = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    unknown = sorted(key for key in config if key not in parameters and not key.startswith("_"))
    if unknown and source is not None:
        logger.warning("%s/config.json: settings without effect: %s", source, ", ".join(unknown))
    return {key: value for key, value in config.items() if key in parameters}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
