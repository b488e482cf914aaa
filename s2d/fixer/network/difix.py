"""The diffusion base with or without a trained checkpoint: folder + `.pkl` → `FixerModel`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from s2d.fixer.model_config import FixerConfig
from s2d.fixer.network.checkpoint import Checkpoint, read_checkpoint
from s2d.fixer.network.folder import embed_prompt, find_folder, read_config, read_weights
from s2d.fixer.network.lora import add_loaded_lora
from s2d.fixer.network.model import FixerModel, built_from
from s2d.fixer.network.state import NetworkState, fit_to, folded
from s2d.fixer.network.vae import SKIP_INIT, SkipAutoencoder
from s2d.fixer.network.views import MultiViewUNet
from s2d.log import logger


def load_difix(
    base_model: str,
    checkpoint: Path | None = None,
    keep_adapters: bool = False,
) -> FixerModel:
    """Load a base model and lay a trained checkpoint over it.

    Args:
        base_model: Folder in the layout of nvidia/difix_ref or stabilityai/sd-turbo, or such a name if it is in the cache.
        checkpoint: `.pkl` of any known form; the base alone where None.
        keep_adapters: Leave LoRA adapters as peft layers, to go on training; otherwise they are added into the weights.

    Returns:
        The model in float32 on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: Something is not there; says where to get it.
        ValueError: Something is damaged or does not fit; names the file.
    """
    folder = find_folder(base_model)
    config = read_config(folder)
    overlay = (
        Checkpoint(None, None, None, {}) if checkpoint is None else read_checkpoint(checkpoint)
    )
    if overlay.mixing is not None:
        config = replace(config, mixing=overlay.mixing)
    unet = _load_network(
        lambda: MultiViewUNet(**config.unet), folder / "unet", overlay.unet, keep_adapters
    )
    vae = _load_network(lambda: _make_vae(config), folder / "vae", overlay.vae, keep_adapters)
    prompt = embed_prompt(folder, config.prompt)
    with built_from(str(folder)):
        model = FixerModel(config, unet, vae, prompt)
    _load_mixing(model, overlay.mixing_weights, checkpoint)
    return model.eval()


def _make_vae(config: FixerConfig) -> SkipAutoencoder:
    return SkipAutoencoder(config.skip_gamma, config.skip_init, **config.vae)


def _load_network(
    build: Callable[[], nn.Module],
    folder: Path,
    overlay: NetworkState | None,
    keep_adapters: bool,
) -> nn.Module:
    """Build a network without drawing random weights, and fill it from its folder and the checkpoint."""
    with built_from(str(folder / "config.json")), torch.device("meta"):
        network = build()
    base = fit_to(network, read_weights(folder))
    state = base
    if overlay is not None:
        overlay = fit_to(network, overlay)
        state = base.overlaid(overlay)
        _report(network, base, overlay)
    _complete_skips(network, state)
    if missing := sorted(network.state_dict().keys() - state.weights.keys()):
        raise ValueError(
            f"{base.source}: {len(missing)} of {len(network.state_dict())} tensors of the network are missing "
            f"(first: {missing[0]}). Download the model again."
        )
    weights = state.weights if keep_adapters else folded(state)
    # float32 throughout: a folder may hold half precision, and adapters are trained in full.
    network.load_state_dict({key: weight.float() for key, weight in weights.items()}, assign=True)
    if keep_adapters:
        for name, adapter in state.adapters.items():
            add_loaded_lora(network, name, adapter)
    return network


def _complete_skips(network: nn.Module, state: NetworkState) -> None:
    """A plain VAE has no skip convolutions: start them where their trainer did."""
    missing = [
        key for key in network.state_dict() if "skip_conv" in key and key not in state.weights
    ]
    for key in missing:
        shape = network.get_parameter(key).shape
        state.weights[key] = torch.full(shape, SKIP_INIT)
    if missing:
        logger.warning(
            "%s: no skip convolutions in it: %s start without effect",
            state.source,
            ", ".join(missing),
        )


def _report(network: nn.Module, base: NetworkState, overlay: NetworkState) -> None:
    """Say what a checkpoint brought."""
    adapters = [
        f"adapter {name} "
        f"{'replaces the base’s' if name in base.adapters else 'added'}"
        f" (rank {', '.join(map(str, sorted(set(adapter.ranks().values()))))}, {len(adapter.a)} modules,"
        f" alpha {adapter.alpha:g})"
        for name, adapter in overlay.adapters.items()
    ]
    logger.info(
        "%s: %d of %d tensors%s",
        overlay.source,
        len(overlay.weights),
        len(network.state_dict()),
        "".join(f", {text}" for text in adapters),
    )


def _load_mixing(model: FixerModel, weights: dict[str, Tensor], checkpoint: Path | None) -> None:
    try:
        model.mixing.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint}: state_dict_mixing does not fit its description ({' '.join(str(error).split())[:300]}). "
            "Save the checkpoint again."
        ) from error
