"""How long the fixer's networks take for a frame on a GPU. The size decides, not the weights: SD-Turbo's is made of random ones."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from benchmarks.gpu_kernels import milliseconds
from s2d.device import DTYPES
from s2d.fixer.compiling import Compilable

NETWORKS = ("SD-Turbo size", "compact")
WARM_UP = 5
PROMPT_TOKENS = 77

# The sizes of SD-Turbo's networks (Stable Diffusion 2.1), as the config.json files of such a model state them.
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def build(network: str) -> torch.nn.Module:
    """A network by its name, on the CPU."""
    from s2d.fixer.model_config import FixerConfig
    from s2d.fixer.network.model import build_model

    if network == "compact":
        from s2d.fixer.choice import SHIPPED_WEIGHTS
        from s2d.fixer.network.compact import load_compact

        return load_compact(SHIPPED_WEIGHTS)
    config = FixerConfig(UNET, VAE, SCHEDULER)
    return build_model(config, torch.zeros(PROMPT_TOKENS, UNET["cross_attention_dim"]))


@torch.inference_mode()
def measure(
    network: str, frame: tuple[int, int], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of a repaired frame with one reference photo, whose latents are kept as stage 2 keeps them.

    The number format and how many views go together are stage 2's on this device, and so is what is compiled.

    Args:
        network: One of `NETWORKS`.
        frame: width, height; rounded up to what the network's halvings need.
        repeats: Frames that are timed.
        device: Nothing is compiled on a CPU.
    """
    from s2d.fixer.choice import default_precision
    from s2d.fixer.diffusion import DiffusionFixer

    gpu = device.type == "cuda"
    fixer = DiffusionFixer(build(network), device, default_precision(device))
    model = fixer.model
    width, height = (-(-side // model.multiple) * model.multiple for side in frame)
    together = fixer.views_at_once(height, width)
    image = {"device": device, "dtype": DTYPES[fixer.precision]}
    images = [torch.rand(1, 3, height, width, **image) * 2 - 1 for _ in range(3)]
    mask = torch.ones_like(images[0][:, :1])
    shown = model.show(images[0], images[1], mask)
    latents = model.encode_photos(images[2])[:, None]
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = {}
    for batch, compiled in sorted({(1, False), (together, False), (together, gpu)}):
        repair = Compilable(model.repair, compiled)
        views = [
            tensor.expand(batch, *tensor.shape[1:]).contiguous() for tensor in (shown, latents)
        ]
        taken = milliseconds(
            lambda run=repair, views=views: run(*views), device, repeats, WARM_UP if gpu else 1
        )
        if repair.compiled == compiled:  # else it says why it does not work here
            times[f"{batch} at a time{', compiled' * compiled}"] = median(taken) / batch
    return {
        "frame_ms": times,
        "precision": fixer.precision,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if gpu else None,
    }
