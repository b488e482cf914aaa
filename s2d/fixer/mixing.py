"""Mixing render and guidance in pixel space, before the VAE: the network sees one image.

Notation: A render, P guidance, both [B,3,H,W] in [-1,1]; M coverage [B,1,H,W] in {0,1}; g the guidance's share.
Fixed: I = A(1 - gM) + P(gM), the analytic fixer's mix without a soft edge. Learned: the same with a share per pixel
and a correction, I = A + s·M·(P - A) + r, where s and r come from a cross-attention of the render's tokens to the guidance's.
It starts as the fixed mix: r = 0 and s = g everywhere.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.fixer.analytic import AnalyticFixer
from s2d.fixer.features import FeatureExtractor, make_features
from s2d.fixer.model_config import MixingConfig


def make_mixing(config: MixingConfig) -> "FixedMixing | LearnedMixing":
    """The module that `config.kind` names."""
    if config.kind == "fixed":
        return FixedMixing(config)
    return LearnedMixing(config, make_features(config.features, config.width))


class FixedMixing(nn.Module):
    """`AnalyticFixer`'s mix on a batch; no weights."""

    def __init__(self, config: MixingConfig) -> None:
        super().__init__()
        self.mixer = AnalyticFixer(
            config.guidance_share, config.mode, config.feather, config.match_gain
        )

    def forward(
        self,
        rendered: Tensor,  # [B, 3, H, W] in [-1, 1]
        guidance: Tensor,  # [B, 3, H, W] in [-1, 1]
        coverage_mask: Tensor,  # [B, 1, H, W]
    ) -> Tensor:
        """Mix each sample by itself (the gain is one per image). [B, 3, H, W]"""
        mixed = []
        for sample in zip(rendered, guidance, coverage_mask, strict=True):
            a, p, m = (image.permute(1, 2, 0) for image in sample)
            a, p = (a + 1) / 2, (p + 1) / 2  # the analytic fixer works in [0, 1]
            mixed.append(self.mixer.fix(a, p, m, reference=a).fixed.permute(2, 0, 1) * 2 - 1)
        return torch.stack(mixed)


class LearnedMixing(nn.Module):
    """Cross-attention from the render to the guidance on image features, lifted back to one image."""

    def __init__(self, config: MixingConfig, features: FeatureExtractor) -> None:
        super().__init__()
        width, stride = config.width, config.stride
        self.stride, self.heads = stride, config.heads
        self.features = features
        self.render_pixels = nn.Conv2d(3, width, stride, stride)
        self.guidance_pixels = nn.Conv2d(4, width, stride, stride)  # with its coverage
        self.render_features = nn.Conv2d(features.channels, width, 1)
        self.guidance_features = nn.Conv2d(features.channels, width, 1)
        self.norm_render = nn.LayerNorm(width)
        self.norm_guidance = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.norm_merged = nn.LayerNorm(2 * width)
        self.merge = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU())
        self.lift = nn.Linear(width, 4 * stride**2)  # a share and a colour correction per pixel
        nn.init.zeros_(self.lift.weight)
        share = min(max(config.guidance_share, 1e-3), 1 - 1e-3)  # the logit of 0 or 1 is infinite
        with torch.no_grad():
            self.lift.bias.zero_().view(4, -1)[0] = math.log(share / (1 - share))

    def forward(
        self,
        rendered: Tensor,  # [B, 3, H, W] in [-1, 1], H and W multiples of the stride
        guidance: Tensor,  # [B, 3, H, W] in [-1, 1]
        coverage_mask: Tensor,  # [B, 1, H, W]
    ) -> Tensor:
        """Mix. [B, 3, H, W]"""
        render = self._tokens(
            rendered, self.render_pixels(rendered), self.render_features, self.norm_render
        )
        masked = torch.cat([guidance, coverage_mask], dim=1)
        points = self._tokens(
            guidance, self.guidance_pixels(masked), self.guidance_features, self.norm_guidance
        )
        size = (rendered.shape[-2] // self.stride, rendered.shape[-1] // self.stride)
        # Where a token stands decides what it may look for, so queries and keys know it; values need not.
        place = positions(*size, render.shape[-1]).to(render)
        found = F.scaled_dot_product_attention(
            self._split(self.to_q(render + place)),
            self._split(self.to_k(points + place)),
            self._split(self.to_v(points)),
        )
        found = self.to_out(found.transpose(1, 2).flatten(2))
        merged = self.merge(self.norm_merged(torch.cat([render, found], dim=-1)))
        lifted = self.lift(merged).transpose(1, 2).unflatten(2, size)
        share, correction = F.pixel_shuffle(lifted, self.stride).split([1, 3], dim=1)
        return rendered + share.sigmoid() * coverage_mask * (guidance - rendered) + correction

    def _tokens(
        self, images: Tensor, pixels: Tensor, projection: nn.Module, norm: nn.Module
    ) -> Tensor:
        """Add an image's features to its pixels' embedding. [B, tokens, width]"""
        features = F.interpolate(
            projection(self.features(images)), pixels.shape[-2:], mode="bilinear"
        )
        return norm((pixels + features).flatten(2).transpose(1, 2))

    def _split(self, tokens: Tensor) -> Tensor:  # [B, N, D] → [B, heads, N, D / heads]
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def positions(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of each token's row and column, wavelengths from 2π to 2π·100 tokens. [height·width, channels]"""
    count = channels // 4
    frequencies = 100.0 ** -(torch.arange(count) / max(count - 1, 1))
    rows = torch.arange(height)[:, None, None] * frequencies
    columns = torch.arange(width)[None, :, None] * frequencies
    parts = [rows.sin(), rows.cos(), columns.sin(), columns.cos()]
    return torch.cat([part.expand(height, width, count) for part in parts], dim=-1).flatten(0, 1)
