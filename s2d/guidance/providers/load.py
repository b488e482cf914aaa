"""Providers by name."""

from pathlib import Path
from typing import Literal, get_args

from s2d.device import choose_device
from s2d.guidance.providers.depth_anything3 import load_depth_anything3
from s2d.guidance.providers.interface import Provider
from s2d.guidance.providers.mapanything import load_mapanything
from s2d.guidance.providers.monocular import load_monocular
from s2d.guidance.providers.pi3 import load_pi3
from s2d.guidance.providers.vggt import load_vggt

ProviderName = Literal["pi3", "pi3x", "vggt", "mapanything", "depth-anything-3", "monocular"]
PROVIDER_NAMES: tuple[ProviderName, ...] = get_args(ProviderName)


def load_provider(name: str, weight_path: Path | None = None, device: str = "cpu") -> Provider:
    """Load a model, ready to run.

    Args:
        name: One of PROVIDER_NAMES.
        weight_path: A file (pi3, pi3x, vggt) or a folder (the others) of weights. None: what the hub's cache has, or can download.
        device: auto, cpu, cuda or cuda:N, as in every script.

    Raises:
        ValueError: an unknown name, no such device, or a package or weights that are missing; says how to get them.
    """
    on = choose_device(device, kernels=False).device
    match name:
        case "pi3" | "pi3x":
            return load_pi3(weight_path, on, name)
        case "vggt":
            return load_vggt(weight_path, on)
        case "mapanything":
            return load_mapanything(weight_path, on)
        case "depth-anything-3":
            return load_depth_anything3(weight_path, on)
        case "monocular":
            return load_monocular(weight_path, on)
    raise ValueError(f"Unknown provider {name!r}. Expected one of {', '.join(PROVIDER_NAMES)}.")
