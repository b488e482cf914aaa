"""How long the fixer's networks take for a frame on a GPU. The size decides, not the weights: SD-Turbo's is made of random ones."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from benchmarks.gpu_kernels import milliseconds

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

    Args:
        network: One of `NETWORKS`.
        frame: width, height; rounded up to what the network's halvings need.
        repeats: Frames that are timed.
        device: bf16 on a GPU, float32 elsewhere.
    """
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    model = build(network).to(device, dtype, memory_format=torch.channels_last).eval()
    width, height = (-(-side // model.multiple) * model.multiple for side in frame)
    images = [torch.rand(1, 3, height, width, device=device, dtype=dtype) * 2 - 1 for _ in range(3)]
    mask = torch.ones_like(images[0][:, :1])
    shown = model.show(images[0], images[1], mask)
    latents = model.encode_photos(images[2])[:, None]
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = {}
    ways = {"one at a time": (model.repair, 1)}
    if gpu:
        ways["four at a time"] = (model.repair, 4)
        ways["one at a time, compiled"] = (torch.compile(model.repair), 1)
    for how, (repair, batch) in ways.items():
        views = [
            tensor.expand(batch, *tensor.shape[1:]).contiguous() for tensor in (shown, latents)
        ]
        taken = milliseconds(
            lambda run=repair, views=views: run(*views), device, repeats, WARM_UP if gpu else 1
        )
        times[how] = median(taken) / batch
    return {
        "frame_ms": times,
        "precision": str(dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if gpu else None,
    }
