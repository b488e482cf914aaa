"""LoRA by peft: adapters put into a network for training, or to go on from a checkpoint's."""

import warnings
from collections import Counter
from re import escape

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from s2d.fixer.network.state import DEFAULT_ALPHA, Adapter

# img2img-turbo's choice, which Difix and S2D inherit. Names are compared with the last parts of a module's path.
UNET_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("conv", "conv1", "conv2", "conv_shortcut", "conv_out"),
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
)
UNET_RANK, UNET_ADAPTER = 8, "default"
VAE_TARGETS = (
    *("conv_in", "conv", "conv1", "conv2", "conv_shortcut", "conv_out"),
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("skip_conv_1", "skip_conv_2", "skip_conv_3", "skip_conv_4"),
)
VAE_RANK, VAE_ADAPTER = 4, "vae_skip"


def target_modules(network: nn.Module, suffixes: tuple[str, ...], part: str = "") -> list[str]:
    """Full names of the modules whose path ends with one of the suffixes and starts with `part` (`decoder`)."""
    dotted = tuple(f".{suffix}" for suffix in suffixes)
    return [
        name
        for name, module in network.named_modules()
        if f".{name}".endswith(dotted)
        and name.startswith(part)
        and isinstance(module, nn.Linear | nn.Conv2d)
    ]


def add_lora(
    network: nn.Module, name: str, ranks: dict[str, int], alpha: float = DEFAULT_ALPHA
) -> None:
    """Wrap modules in peft's LoRA layers; the adapter starts without effect (B = 0) and is the only part that trains.

    Args:
        network: Changed in place. Adapters that it has stay, and stay in effect.
        name: Of the adapter; part of the tensors' names.
        ranks: Full module name → rank.
        alpha: The product is scaled by alpha / rank.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{escape(module)}$": r for module, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=f"^(?:{'|'.join(map(escape, ranks))})$",
        rank_pattern=others,
        init_lora_weights="gaussian",
    )
    with warnings.catch_warnings():
        # peft warns that a second adapter is a second adapter.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, network, adapter_name=name)
    wrapped = lora_layers(network, name)
    assert wrapped.keys() == ranks.keys(), f"peft wrapped {len(wrapped)} of {len(ranks)} modules"
    for layer in lora_layers(network).values():
        layer.set_adapter(list(layer.lora_A))


def lora_layers(network: nn.Module, adapter: str | None = None) -> dict[str, LoraLayer]:
    """peft's layers by module name; those of one adapter where it is named."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer) and (adapter is None or adapter in module.lora_A)
    }


@torch.no_grad()
def add_loaded_lora(network: nn.Module, name: str, adapter: Adapter) -> None:
    """`add_lora` with the values of a checkpoint."""
    add_lora(network, name, adapter.ranks(), adapter.alpha)
    for module, layer in lora_layers(network, name).items():
        layer.lora_A[name].weight.copy_(adapter.a[module])
        layer.lora_B[name].weight.copy_(adapter.b[module])
