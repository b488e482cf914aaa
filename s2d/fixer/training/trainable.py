"""The model to be trained and the file that it becomes: all of a compact model, or LoRA adapters on a diffusion base."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from s2d.files import atomic_torch_save
from s2d.fixer.mixing import make_mixing
from s2d.fixer.model_config import COMPACT
from s2d.log import logger

if TYPE_CHECKING:  # diffusers takes seconds to import
    from s2d.fixer.network.model import FixerModel


@dataclass(frozen=True)
class Trainee:
    """A model whose trainable parameters alone require a gradient."""

    model: FixerModel
    base_model: str | None
    """Folder or name of the diffusion base; None for a compact model."""
    whole_unet: bool = False
    """The UNet's own weights differ from the base's (a Difix checkpoint was loaded) and go into the file."""

    @property
    def suffix(self) -> str:
        """Of the file that `save` writes."""
        return ".safetensors" if self.base_model is None else ".pkl"

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def save(self, path: Path) -> Path:
        """Write the weights as stage 2 reads them."""
        if self.base_model is None:
            from s2d.fixer.network.compact import save_compact

            return save_compact(self.model, path)
        atomic_torch_save(path, self._checkpoint())
        return path

    def _checkpoint(self) -> dict[str, Any]:
        """img2img-turbo's form: the adapters, and what is trained whole; see `network.checkpoint`."""
        from s2d.fixer.network.lora import UNET_ADAPTER, VAE_ADAPTER, lora_layers
        from s2d.fixer.network.state import DEFAULT_ALPHA

        model = self.model
        content: dict[str, Any] = {
            "lora_alpha": DEFAULT_ALPHA,
            "mixing": asdict(model.config.mixing),
            "state_dict_mixing": _on_cpu(model.mixing.state_dict()),
        }
        kept = {"unet": ("lora", "conv_in."), "vae": ("lora", "skip")}
        for part, network, adapter in (
            ("unet", model.unet, UNET_ADAPTER),
            ("vae", model.vae, VAE_ADAPTER),
        ):
            layers = lora_layers(network, adapter)
            content[f"rank_{part}"] = next(iter(layers.values())).r[adapter]
            content[f"{part}_lora_target_modules"] = list(layers)
            content[f"state_dict_{part}"] = _on_cpu(
                {
                    key: tensor
                    for key, tensor in network.state_dict().items()
                    if any(word in key for word in kept[part])
                    or (part == "unet" and self.whole_unet)
                }
            )
        return content


def make_trainee(
    base_model: str | None,
    init_weights: Path | None,
    mixing: dict[str, Any],
    rank_unet: int,
    rank_vae: int,
) -> Trainee:
    """Load or build what is to be trained.

    Args:
        base_model: Diffusion base, see `load_difix`; None for the compact model.
        init_weights: Weights to go on from: `.pkl` on a base, `.safetensors` of a compact model (whose description it
            takes over), or None.
        mixing: Settings of the mixing that are to differ from those of the weights.
        rank_unet: Of a new adapter on the UNet; one that is there keeps its own.
        rank_vae: Of a new adapter on the VAE's decoder.

    Raises:
        FileNotFoundError, ValueError: Weights that are missing or do not fit; the message says what to do.
    """
    if base_model is None:
        from s2d.fixer.network.compact import load_compact
        from s2d.fixer.network.model import build_model

        model = build_model(COMPACT) if init_weights is None else load_compact(init_weights)
        trainee = Trainee(model, None)
    else:
        trainee = _adapted(base_model, init_weights, rank_unet, rank_vae)
    model = trainee.model
    changed = replace(model.config.mixing, **mixing)
    if changed != model.config.mixing:
        logger.info("mixing: %s", ", ".join(f"{key} {value}" for key, value in mixing.items()))
        model.config = replace(model.config, mixing=changed)
        model.mixing = make_mixing(changed)
    count = sum(value.numel() for value in trainee.parameters().values())
    total = sum(value.numel() for value in model.parameters())
    logger.info("%.2f M of %.2f M parameters are trained", count / 1e6, total / 1e6)
    return trainee


def _adapted(base_model: str, checkpoint: Path | None, rank_unet: int, rank_vae: int) -> Trainee:
    """Adapters on UNet and VAE decoder, as img2img-turbo has them: with the UNet's first convolution and the skips whole."""
    from s2d.fixer.network.checkpoint import read_checkpoint
    from s2d.fixer.network.difix import load_difix
    from s2d.fixer.network.lora import (
        UNET_ADAPTER,
        UNET_TARGETS,
        VAE_ADAPTER,
        VAE_TARGETS,
        add_lora,
        lora_layers,
        target_modules,
    )

    model = load_difix(base_model, checkpoint, keep_adapters=True)
    for network, name, suffixes, part, rank in (
        (model.unet, UNET_ADAPTER, UNET_TARGETS, "", rank_unet),
        (model.vae, VAE_ADAPTER, VAE_TARGETS, "decoder.", rank_vae),
    ):
        if not lora_layers(network, name):
            add_lora(network, name, dict.fromkeys(target_modules(network, suffixes, part), rank))
    whole = ("unet.conv_in.", "vae.decoder.skip_conv_", "mixing.")
    for name, value in model.named_parameters():
        adapter = VAE_ADAPTER if name.startswith("vae.") else UNET_ADAPTER
        ours = ".lora_" in name and f".{adapter}." in name
        value.requires_grad_(ours or name.startswith(whole))
    overlay = None if checkpoint is None else read_checkpoint(checkpoint).unet
    plain = [] if overlay is None else [key for key in overlay.weights if "conv_in" not in key]
    return Trainee(model, base_model, whole_unet=bool(plain))


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu() for key, tensor in tensors.items()}
