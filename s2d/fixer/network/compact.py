"""The compact model as one safetensors file: tensors by name, the description in the metadata."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from s2d.files import atomic_write_bytes
from s2d.fixer.model_config import FixerConfig
from s2d.fixer.network.model import FixerModel, build_model, built_from

METADATA_KEY = "s2d_fixer"


def save_compact(model: FixerModel, path: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write a model that `load_compact` reads. Half precision halves the file; rounding is far below the image's 8 bits."""
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    atomic_write_bytes(path, save(tensors, {METADATA_KEY: model.config.to_json()}))
    return path


def load_compact(path: Path) -> FixerModel:
    """Read what `save_compact` wrote, as float32.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Damaged, not a fixer, or tensors that do not fit its description.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Fixer weights not found: {path}. Give a .safetensors file written by train_artifact_fixer.py, or use "
            "--fixer analytic, which needs none."
        )
    try:
        with safe_open(path, "pt") as file:
            description = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}). Was the download complete?"
        ) from error
    if description is None:
        raise ValueError(
            f"{path} is no fixer: its metadata has no {METADATA_KEY}. For a diffusion base use --fixer difix."
        )
    config = FixerConfig.from_json(description, str(path))
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{path}: {name} has values that are not finite. Use earlier weights of that training."
            )
    with built_from(str(path)):
        model = build_model(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: its tensors do not fit its description ({' '.join(str(error).split())[:300]}). "
            "Download or train the weights again."
        ) from error
    return model
