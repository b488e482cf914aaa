"""Weights on disk: ours as one safetensors file, DINOv2's from where they are, and what of a released HiSplat checkpoint fits.

The frozen ViT of the `paper` size is not in our files: 87 of 150 million numbers that anybody has already.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from s2d.files import atomic_write_bytes
from s2d.hier.config import HierConfig
from s2d.hier.model import HierModel

# What comes with S2D; its model card lies beside it.
SHIPPED_WEIGHTS = Path(__file__).parent / "pretrained" / "compact.safetensors"
FORMAT = 1
METADATA_KEY = "s2d_hier"
VIT = "dino.vit."


def find_weights(path: Path | None) -> Path:
    """The file to load: `path`, or where None what comes with S2D.

    Raises:
        FileNotFoundError: It is not there.
    """
    found = SHIPPED_WEIGHTS if path is None else path
    if not found.is_file():
        raise FileNotFoundError(
            f"Weights not found: {found}. Give a .safetensors file written by tools/train_hier_init.py; stage 1 makes levels of stage 0's depth "
            "without any (--init depth)."
        )
    return found


def save_model(path: Path, model: HierModel, info: dict[str, Any]) -> Path:
    """Write a model that `load_model` reads; all or nothing.

    Args:
        path: A .safetensors file.
        model: Of any size; a frozen ViT is left out.
        info: What is worth knowing about the training; plain values, for JSON.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(VIT)
    }
    description = {"format": FORMAT, "config": model.config.to_dict(), "info": info}
    atomic_write_bytes(path, save(tensors, {METADATA_KEY: json.dumps(description)}))
    return path


def load_model(path: Path, dino: Path | None = None) -> HierModel:
    """Read what `save_model` wrote; float32, on the CPU, ready to predict.

    Args:
        path: A .safetensors file.
        dino: For a model with a DINO branch, weights as `load_dino` takes them.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Damaged, not one of ours, of another version, or DINO's weights are needed and not given.
    """
    description, tensors = _read(path)
    config = HierConfig.from_dict(description["config"])
    if config.dino and dino is None:
        raise ValueError(
            f"{path} has a DINO branch, whose frozen ViT-B/14 is not in the file. Give the folder or file of DINOv2 ViT-B/14 weights (--dino)."
        )
    model = HierModel(config)
    fitting = model.load_state_dict(tensors, strict=False)
    missing = [name for name in fitting.missing_keys if not name.startswith(VIT)]
    if missing or fitting.unexpected_keys:
        first = (missing + fitting.unexpected_keys)[0]
        raise ValueError(
            f"{path}: its tensors do not fit its description ({len(missing)} missing, {len(fitting.unexpected_keys)} unknown, first {first}). "
            "Download or train the weights again."
        )
    if config.dino and dino is not None:
        load_dino(model, dino)
    return model.eval()


def load_info(path: Path) -> dict[str, Any]:
    """Read what is known about the training of a saved model, as it was given to `save_model`."""
    return _read(path)[0]["info"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = find_weights(Path(path))
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}). Was the download complete?"
        ) from error
    if text is None:
        raise ValueError(
            f"{path} is no model of hierarchical Gaussians: its metadata has no {METADATA_KEY}."
        )
    description = json.loads(text)
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {description.get('format')}. Expected {FORMAT}. Train the weights again with this version."
        )
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{path}: {name} has values that are not finite. Use earlier weights of that training."
            )
    return description, tensors


def load_dino(model: HierModel, path: Path) -> None:
    """Fill the frozen ViT-B/14 from a folder of transformers, or from a file of weights with DINOv2's own names. Nothing is downloaded.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: The model has no DINO branch, or these are not the weights of a DINOv2 ViT-B/14.
    """
    if model.dino is None:
        raise ValueError("load_dino: this model has no DINO branch. Expected the `paper` size.")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"DINO weights not found: {path}. Give a folder with config.json and model.safetensors of facebook/dinov2-base, or dinov2_vitb14_pretrain.pth."
        )
    if path.is_dir():
        from transformers import Dinov2Model

        vit, found = Dinov2Model.from_pretrained(
            path, local_files_only=True, output_loading_info=True
        )
        if found["missing_keys"]:  # the library would leave random numbers in their place
            raise ValueError(
                f"{path} lacks {len(found['missing_keys'])} tensors of a DINOv2 ViT (first {sorted(found['missing_keys'])[0]}). "
                "Download the folder again."
            )
        tensors = vit.state_dict()
    else:
        tensors = {name: tensor for name, (_, tensor) in _vit_tensors(_load_plain(path)).items()}
    try:
        model.dino.vit.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not hold the weights of a DINOv2 ViT-B/14 without registers ({' '.join(str(error).split())[:300]})."
        ) from error


@dataclass(frozen=True)
class Match:
    """What of a checkpoint found a place."""

    loaded: dict[str, str]
    """Name in the model → name in the checkpoint."""
    missing: tuple[str, ...]
    """Names in the model that nothing in the checkpoint fits; they keep their values."""
    unused: tuple[str, ...]
    """Names in the checkpoint that found no place."""
    share: float
    """Of the model's numbers, how many were loaded."""

    def report(self) -> str:
        """Say it part by part, one line each."""
        parts: dict[str, list[int]] = {}
        for found, names in ((1, self.loaded), (0, self.missing)):
            for name in names:
                counts = parts.setdefault(name.split(".")[0], [0, 0])
                counts[0] += found
                counts[1] += 1
        lines = [f"{part}: {found} of {total} tensors" for part, (found, total) in parts.items()]
        lines.append(
            f"{self.share:.1%} of the model's numbers loaded; {len(self.unused)} tensors of the checkpoint unused"
        )
        return "\n".join(lines)


def load_released(model: HierModel, path: Path) -> Match:
    """Fill a model, as far as it goes, from a checkpoint laid out as HiSplat's is (`state_dict` inside; read with weights_only=True).

    Two parts have names and shapes that are public by themselves: the ViT (DINOv2's names) and the cross-view transformer (UniMatch's). Anything else is taken
    where a name's end and the shape are the same; the network is our own, so most is not. `Match.report` says what was.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a checkpoint, or nothing in it fits.
    """
    given = _load_plain(Path(path))
    available = {name: (name, tensor) for name, tensor in given.items()}
    available |= {VIT + name: entry for name, entry in _vit_tensors(given).items()}
    wanted = model.state_dict()
    found: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in wanted.items():
        fitting = [
            entry
            for other, entry in available.items()
            if f".{other}".endswith(f".{name}") and entry[1].shape == tensor.shape
        ]
        if len(fitting) == 1:  # two that fit would be a guess
            found[name] = fitting[0]
    if not found:
        raise ValueError(
            f"{path}: none of its {len(given)} tensors fits one of the model's {len(wanted)} (names and shapes). "
            "Expected a HiSplat checkpoint and the `paper` size."
        )
    with torch.no_grad():
        for name, (_, source) in found.items():
            wanted[name].copy_(source)
    used = {origin for origin, _ in found.values()}
    return Match(
        loaded={name: origin for name, (origin, _) in found.items()},
        missing=tuple(name for name in wanted if name not in found),
        unused=tuple(name for name in given if name not in used),
        share=sum(wanted[n].numel() for n in found) / sum(t.numel() for t in wanted.values()),
    )


def _vit_tensors(given: dict[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Find a ViT with DINOv2's own names, below any prefix: transformers' name → (name in the file, tensor)."""
    result: dict[str, tuple[str, Tensor]] = {}
    anchor = next((name for name in given if name.endswith("patch_embed.proj.weight")), None)
    if anchor is None:
        return result
    prefix = anchor.removesuffix("patch_embed.proj.weight")
    for full, tensor in given.items():
        if not full.startswith(prefix):
            continue
        name = full.removeprefix(prefix)
        qkv = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name)
        if qkv:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[f"encoder.layer.{qkv[1]}.attention.{part}_proj.{qkv[2]}"] = (full, piece)
            continue
        for old, new in _VIT_NAMES:
            name = re.sub(old, new, name)
        result[name] = (full, tensor)
    return result


# DINOv2's names → those inside transformers 5, which are its own affair: a test compares them with the installed version.
_VIT_NAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^mask_token$", "embeddings.mask_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"^norm\.", "layernorm."),
)


def _load_plain(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a file of torch.save, nothing in it executed."""
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint not found: {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several unrelated types for a file not its own
        raise ValueError(f"{path} is not a readable checkpoint ({error}).") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected tensors by name, or a `state_dict` of them, got {type(content).__name__}."
        )
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
