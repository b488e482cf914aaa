"""State dicts of the peers' formats, taken apart: plain weights here, LoRA adapters there.

peft names an adapted module's tensors `<module>.base_layer.weight`, `<module>.lora_A.<adapter>.weight` and
`<module>.lora_B.<adapter>.weight`. Apart from those the keys are diffusers' own. Once both are apart, a checkpoint is laid over
its base by updating two dictionaries, whichever modules either of them had wrapped.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from s2d.log import logger

# The trainers leave peft's default and do not store it: the adapter's product is scaled by alpha / rank.
DEFAULT_ALPHA = 8.0

LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")

# Attention of VAEs saved by diffusers before 0.14.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_KEY = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))$")


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: W becomes W + alpha / rank · B·A in each of its modules."""

    a: dict[str, Tensor] = field(default_factory=dict)  # module → [r, in] or [r, in, k, k]
    b: dict[str, Tensor] = field(default_factory=dict)  # module → [out, r] or [out, r, 1, 1]
    alpha: float = DEFAULT_ALPHA

    def ranks(self) -> dict[str, int]:
        """Rank of each adapted module."""
        return {module: tensor.shape[0] for module, tensor in self.a.items()}


@dataclass(frozen=True)
class NetworkState:
    """All tensors of one network."""

    weights: dict[str, Tensor]
    adapters: dict[str, Adapter]
    source: str  # the file or folder, for messages

    def overlaid(self, other: "NetworkState") -> "NetworkState":
        """This state with another's weights and adapters on top; an adapter of the same name is replaced as a whole."""
        return NetworkState(
            {**self.weights, **other.weights}, {**self.adapters, **other.adapters}, other.source
        )


def take_apart(
    tensors: Mapping[str, Tensor], source: str, alpha: float = DEFAULT_ALPHA
) -> NetworkState:
    """Sort a state dict into plain weights and adapters.

    Args:
        tensors: As saved by diffusers or peft.
        source: Names the file in messages.
        alpha: Of the adapters; not in the tensors.

    Raises:
        ValueError: Something is not a finite tensor, or half of an adapter's pair is missing.
    """
    weights: dict[str, Tensor] = {}
    adapters: dict[str, Adapter] = {}
    for key, tensor in tensors.items():
        if fault := _fault(key, tensor):
            raise ValueError(
                f"{source}: {key} must be a tensor, got {fault}. The checkpoint is damaged or of an "
                "unknown format."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{source}: {key} has values that are not finite. Use an earlier checkpoint of that training."
            )
        if match := LORA_KEY.match(key):
            adapter = adapters.setdefault(match["adapter"] or "default", Adapter(alpha=alpha))
            side = adapter.a if match["side"] == "A" else adapter.b
            side[match["module"]] = tensor
        else:
            plain = key.replace(".base_layer.", ".")
            plain = OLD_KEY.sub(lambda old: old[1] + OLD_ATTENTION[old[2]] + old[3], plain)
            weights[plain] = tensor
    for name, adapter in adapters.items():
        if lonely := sorted(adapter.a.keys() ^ adapter.b.keys()):
            raise ValueError(
                f"{source}: {len(lonely)} modules have only one of lora_A and lora_B in adapter {name} "
                f"(first: {lonely[0]}). The checkpoint is damaged: download or save it again."
            )
    return NetworkState(weights, adapters, source)


def _fault(key: object, tensor: object) -> str | None:
    """What is wrong with an entry of a state dict, if anything."""
    if not isinstance(key, str):
        return f"the name {key!r} of type {type(key).__name__}"
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
        return f"one that is {tensor.layout} {tensor.dtype} on {tensor.device}"
    if LORA_KEY.match(key) and (tensor.ndim < 2 or not tensor.numel()):
        return f"one of shape {list(tensor.shape)}, which is no adapter"
    return None


def fit_to(network: nn.Module, state: NetworkState) -> NetworkState:
    """Drop what the network has no place for and say so; refuse what fits nowhere or has another shape.

    Args:
        network: The plain network, without adapters; may be on the meta device.
        state: What a file holds.

    Raises:
        ValueError: Nothing at all matches, or a tensor's shape is not the network's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    weights = {key: tensor for key, tensor in state.weights.items() if key in shapes}
    unexpected = sorted(state.weights.keys() - weights.keys())
    adapters = {}
    for name, adapter in state.adapters.items():
        known = {module for module in adapter.a if f"{module}.weight" in shapes}
        unexpected += sorted(f"{module} (adapter {name})" for module in adapter.a.keys() - known)
        if known:
            a, b = ({m: side[m] for m in side if m in known} for side in (adapter.a, adapter.b))
            adapters[name] = replace(adapter, a=a, b=b)
    if not weights and not adapters and (state.weights or state.adapters):
        raise ValueError(
            f"{state.source}: none of its {len(unexpected)} tensors belongs to this network (first: {unexpected[0]}). "
            "Check that checkpoint and base model fit together."
        )
    if unexpected:
        logger.warning(
            "%s: %d unexpected tensors are ignored (first: %s)",
            state.source,
            len(unexpected),
            ", ".join(unexpected[:5]),
        )
    for key, tensor in weights.items():
        _require_shape(state.source, key, tuple(tensor.shape), shapes[key])
    for adapter in adapters.values():
        for module, a in adapter.a.items():
            b, shape = adapter.b[module], shapes[f"{module}.weight"]
            product = (b.shape[0], *a.shape[1:]) if a.ndim == len(shape) == b.ndim else ()
            if a.shape[0] != b.shape[1]:
                product = ()
            _require_shape(
                state.source,
                f"{module}: lora_B {list(b.shape)} · lora_A {list(a.shape)}",
                product,
                shape,
            )
    return NetworkState(weights, adapters, state.source)


def _require_shape(source: str, what: str, got: tuple, expected: tuple) -> None:
    if got != expected:
        raise ValueError(
            f"{source}: {what} does not fit. Expected {list(expected)}, got {list(got) or 'no product'}. "
            "Was it trained on another base model?"
        )


def folded(state: NetworkState) -> dict[str, Tensor]:
    """Add every adapter into the weights, for use without peft: W + alpha / rank · B·A. Plain names → tensors"""
    weights = dict(state.weights)
    for adapter in state.adapters.values():
        for module, a in adapter.a.items():
            b = adapter.b[module]
            product = (b.flatten(1).float() @ a.flatten(1).float()).view(b.shape[0], *a.shape[1:])
            key = f"{module}.weight"
            weight = weights[key]
            scale = adapter.alpha / a.shape[0]
            weights[key] = (weight.float() + scale * product).to(weight.dtype)
    return weights
