"""The fixer network: mix, encode, one step of denoising next to the reference, decode with skips.

Closed form of the one step, at the fixed timestep t with a = alpha_bar[t] and predicted noise e: x0 = (z - sqrt(1-a)·e) / sqrt(a).
No noise is added to z: the artifacts are the noise.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from s2d.fixer.mixing import make_mixing
from s2d.fixer.model_config import FixerConfig
from s2d.fixer.network.vae import SkipAutoencoder
from s2d.fixer.network.views import MultiViewUNet


class Encoding(NamedTuple):
    """What the VAE's encoder says about images."""

    latents: Tensor  # [B, c, h, w], scaled
    skips: list[Tensor]  # inputs of the down blocks, largest first


class FixerModel(nn.Module):
    """One architecture for every size of fixer; `config` says which.

    Args:
        config: The description that the weights come with.
        unet, vae: Built from the description; see `build_model`.
        prompt: Embedding of the prompt; a constant, since the prompt is. [L, D]
    """

    def __init__(
        self, config: FixerConfig, unet: MultiViewUNet, vae: SkipAutoencoder, prompt: Tensor
    ) -> None:
        super().__init__()
        scheduler = DDPMScheduler(**config.scheduler)
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                f"The scheduler predicts {scheduler.config.prediction_type}; the one-step fixer needs epsilon. "
                "Use stabilityai/sd-turbo or nvidia/difix_ref as the base."
            )
        self.config = config
        self.unet = unet
        self.vae = vae
        self.mixing = make_mixing(config.mixing)
        alpha_bar = float(scheduler.alphas_cumprod[config.timestep])
        self.signal, self.noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        self.register_buffer("prompt", prompt, persistent=False)

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this: every halving of VAE and UNet comes out even."""
        halvings = (
            len(self.vae.config.block_out_channels) + len(self.unet.config.block_out_channels) - 2
        )
        stride = self.config.mixing.stride if self.config.mixing.kind == "learned" else 1
        return math.lcm(self.config.patch * 2**halvings, stride)

    def show(
        self,
        rendered: Tensor,  # [B, 3, H, W] in [-1, 1]
        guidance: Tensor,  # [B, 3, H, W] in [-1, 1]
        coverage_mask: Tensor,  # [B, 1, H, W] 0 or 1
    ) -> Tensor:
        """Make what the network sees of a view: the mix M, and with `config.difference` also c·(P - A) and the coverage c. [B, 3 or 7, H, W]"""
        mixed = self.mixing(rendered, guidance, coverage_mask)
        if not self.config.difference:
            return mixed
        return torch.cat([mixed, coverage_mask * (guidance - rendered), coverage_mask], dim=1)

    def encode_photos(
        self,
        photos: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> Tensor:
        """Encode reference photos, which nothing differs from. Latents [B, c, h, w]: small, and all that is needed of them"""
        if self.config.difference:
            shape = (photos.shape[0], 1, *photos.shape[-2:])
            photos = torch.cat([photos, torch.zeros_like(photos), photos.new_ones(shape)], dim=1)
        return self.encode(photos).latents

    def encode(
        self,
        shown: Tensor,  # [B, 3 or 7, H, W], from `show`
    ) -> Encoding:
        """Encode what the network sees."""
        return Encoding(*self.vae.encode_with_skips(F.pixel_unshuffle(shown, self.config.patch)))

    def denoise(
        self,
        latents: Tensor,  # [B, V, c, h, w], view 0 is the one to repair
    ) -> Tensor:
        """Predict the clean latents of view 0. [B, c, h, w]"""
        noise = self.unet.predict(latents, self.config.timestep, self.prompt)
        return (latents[:, 0] - self.noise * noise[:, 0]) / self.signal

    def repair(
        self,
        shown: Tensor,  # [B, 3 or 7, H, W], from `show`
        references: Tensor | None = None,  # [B, R, c, h, w]
    ) -> Tensor:
        """Repair a view with the latents of any number R of reference photos. [B, 3, H, W]

        Not clamped: training wants the gradient of values that overshoot.
        """
        latents, skips = self.encode(shown)
        views = latents[:, None]
        if references is not None:
            views = torch.cat([views, references], dim=1)
        painted = self.vae.decode_with_skips(self.denoise(views), skips)
        painted = F.pixel_shuffle(painted, self.config.patch)
        if not self.config.residual:
            return painted
        fixed = shown[:, :3] + painted[:, :3]
        return fixed + painted[:, 3:] * shown[:, 3:6] if self.config.difference else fixed

    def forward(
        self,
        rendered: Tensor,  # [B, 3, H, W] in [-1, 1]
        guidance: Tensor,  # [B, 3, H, W] in [-1, 1]
        coverage_mask: Tensor,  # [B, 1, H, W] 0 or 1
        references: Tensor | None = None,  # [B, R, 3, H, W] in [-1, 1]
    ) -> Tensor:
        """Repair renders: what training runs. [B, 3, H, W], not clamped

        Args:
            rendered: Renders with artifacts; H and W multiples of `multiple`. [B, 3, H, W]
            guidance: The point cloud from the same cameras, -1 (black) where nothing projects. [B, 3, H, W]
            coverage_mask: 1 where a point projects. [B, 1, H, W]
            references: Nearby photos of the same size, R per render. [B, R, 3, H, W]
        """
        latents = None
        if references is not None:
            latents = self.encode_photos(references.flatten(0, 1))
            latents = latents.unflatten(0, references.shape[:2])
        return self.repair(self.show(rendered, guidance, coverage_mask), latents)


def build_model(config: FixerConfig, prompt: Tensor | None = None) -> FixerModel:
    """Build a network with random weights; one that paints a correction starts with none.

    Args:
        config: What to build.
        prompt: Embedding of the prompt; a zero where the description has no prompt. [L, D]
    """
    unet = MultiViewUNet(**config.unet)
    vae = SkipAutoencoder(config.skip_gamma, config.skip_init, **config.vae)
    if config.residual:
        nn.init.zeros_(vae.decoder.conv_out.weight)
        nn.init.zeros_(vae.decoder.conv_out.bias)
    if prompt is None:
        prompt = zero_prompt(config)
    return FixerModel(config, unet, vae, prompt)


@contextmanager
def built_from(source: str) -> Iterator[None]:
    """Name the file where a network cannot be built from its description: diffusers fails on a bad one in any of these ways."""
    try:
        yield
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        NotImplementedError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{source}: no network can be built from its description ({type(error).__name__}: {reason}). Download or "
            "train the weights again."
        ) from error


def zero_prompt(config: FixerConfig) -> Tensor:
    """The embedding that says nothing. [1, D]"""
    if config.prompt is not None:
        raise ValueError(
            f"The prompt {config.prompt!r} needs its embedding: load the model from a folder with a text encoder."
        )
    return torch.zeros(1, config.unet["cross_attention_dim"])
