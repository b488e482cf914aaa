"""A small data set of training pairs and a network of a size for tests."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from s2d.fixer.model_config import COMPACT
from s2d.fixer.network.compact import save_compact
from s2d.fixer.network.model import build_model
from s2d.images import write_image

WIDTH, HEIGHT = 48, 40

TINY = replace(
    COMPACT,
    unet={
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": (2, 2),
        "cross_attention_dim": 8,
        "use_linear_projection": True,
    },
    vae={
        **COMPACT.vae,
        "block_out_channels": (8, 8),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
)


def save_tiny(path: Path) -> Path:
    """A compact model with 30 thousand parameters, as --init-weights takes it."""
    torch.manual_seed(1)
    return save_compact(build_model(TINY), path, torch.float32)


def write_pairs(folder: Path, num_train: int = 8, num_test: int = 2) -> Path:
    """Smooth pictures moving past the camera; their renders are pale, their guidance has holes."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", num_train), ("test", num_test)):
        coarse = torch.rand(1, 3, 8, 24, generator=generator)
        wide = F.interpolate(coarse, (HEIGHT, 3 * WIDTH), mode="bicubic")[0].clamp(0, 1)
        for frame in range(count):
            clean = wide[..., 4 * frame : 4 * frame + WIDTH].permute(1, 2, 0)
            mask = torch.rand(HEIGHT, WIDTH, 1, generator=generator) < 0.3
            name = f"scene_sparse_{frame:04d}.png"
            write_image(folder / f"{split}_A" / name, 0.6 * clean + 0.2)
            write_image(folder / f"{split}_B" / name, clean)
            write_image(folder / f"{split}_P" / name, clean * mask)
    return folder
