"""A VAE whose decoder sees what its encoder saw: skips keep the detail that a latent at 1/8 of the size cannot hold.

The encoder remembers the input of each of its down blocks; before each up block the decoder adds the one of the same size,
last first, through a 1×1 convolution without bias. Those start near zero, so that a plain VAE keeps its behaviour until they
are trained. The names `decoder.skip_conv_1 ... skip_conv_4` and the constant 1e-5 are those of img2img-turbo's checkpoints.
"""

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

SKIP_INIT = 1e-5  # a zero would do, but the checkpoints' trainer began here


def call(parent: nn.Module, block: nn.Module, *arguments) -> Tensor:
    """Run a block, forgetting its activations until the backward pass where diffusers' checkpointing is on."""
    if parent.gradient_checkpointing and torch.is_grad_enabled():
        return parent._gradient_checkpointing_func(block, *arguments)
    return block(*arguments)


class SkipEncoder(Encoder):
    """The stock encoder, which also hands out what its down blocks are given."""

    def forward(
        self,
        sample: Tensor,  # [B, 3, H, W]
        skips: list[Tensor] | None = None,
    ) -> Tensor:
        """Encode. Where a list is given, the inputs of the down blocks are appended to it, largest first."""
        sample = self.conv_in(sample)
        for down_block in self.down_blocks:
            if skips is not None:
                skips.append(sample)
            sample = call(self, down_block, sample)
        sample = call(self, self.mid_block, sample)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


class SkipDecoder(Decoder):
    """The stock decoder, which adds the encoder's activations where it is given them."""

    def add_skips(self, encoder: Encoder, gamma: float, init: float | None) -> None:
        """Make the skip convolutions, one per up block, that fit to `encoder`."""
        self.gamma = gamma
        widths_in = [encoder.conv_in.out_channels]
        widths_in += [block.resnets[-1].out_channels for block in encoder.down_blocks[:-1]]
        widths_out = [block.resnets[0].in_channels for block in self.up_blocks]
        for number, (width_in, width_out) in enumerate(
            zip(reversed(widths_in), widths_out, strict=True), start=1
        ):
            convolution = nn.Conv2d(width_in, width_out, kernel_size=1, bias=False)
            if init is not None:
                nn.init.constant_(convolution.weight, init)
            setattr(self, f"skip_conv_{number}", convolution)

    def forward(
        self,
        sample: Tensor,  # [B, c, h, w]
        latent_embeds: Tensor | None = None,
        skips: list[Tensor] | None = None,
    ) -> Tensor:
        """Decode; `skips` as the encoder filled them (largest first), or None for the stock decoder."""
        sample = call(self, self.mid_block, self.conv_in(sample), latent_embeds)
        for number, up_block in enumerate(self.up_blocks, start=1):
            if skips is not None:
                sample = sample + self.gamma * getattr(self, f"skip_conv_{number}")(skips[-number])
            sample = call(self, up_block, sample, latent_embeds)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


class SkipAutoencoder(AutoencoderKL):
    """diffusers' KL autoencoder with `SkipEncoder` and `SkipDecoder`. `encode` and `decode` are still the stock ones.

    Args:
        gamma: Factor on every skip.
        skip_init: Constant to start the skip convolutions from; None draws them like any convolution, for training from scratch.
        config: The arguments of `AutoencoderKL`.
    """

    def __init__(self, gamma: float = 1.0, skip_init: float | None = SKIP_INIT, **config) -> None:
        super().__init__(**config)
        shared = {
            name: self.config[name]
            for name in (
                "block_out_channels",
                "layers_per_block",
                "act_fn",
                "norm_num_groups",
                "mid_block_add_attention",
            )
        }
        latent_channels = self.config.latent_channels
        self.encoder = SkipEncoder(
            self.config.in_channels,
            latent_channels,
            self.config.down_block_types,
            double_z=True,
            **shared,
        )
        self.decoder = SkipDecoder(
            latent_channels, self.config.out_channels, self.config.up_block_types, **shared
        )
        self.decoder.add_skips(self.encoder, gamma, skip_init)

    def encode_with_skips(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the posterior's mode times the scaling factor [B,c,h,w], and the skips for `decode_with_skips`.

        The mode, not a sample: the fixer must give the same image twice.
        """
        skips: list[Tensor] = []
        moments = self.encoder(images, skips)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments.chunk(2, dim=1)[0] * self.config.scaling_factor, skips

    def decode_with_skips(
        self,
        latents: Tensor,  # [B, c, h, w], scaled
        skips: list[Tensor],
    ) -> Tensor:
        """Decode what `encode_with_skips` returned. [B, 3, H, W], not clamped"""
        latents = latents / self.config.scaling_factor
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents, skips=skips)
