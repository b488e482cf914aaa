"""The DINOv2 branch of the `paper` size: what a pretrained network sees in each picture, compared between the views.

The ViT-B/14 is frozen and its weights are not part of ours: `weights.load_dino` reads them from a folder. Published: the first view is the reference and the
others look at it, so that the result depends on the order. Here every view looks at all others. T tokens per view, M = B V.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.hier.pyramid import normalised

WIDTH, HEADS, PATCH = 768, 12, 14  # ViT-B/14
# Pixels of the picture per token, as published: 256 pixels become 8 tokens.
TOKEN_STRIDE = 32
TAPS = (4, 8, 12)
NUM_BLOCKS = 3
CONTEXT_WIDTH = 64


class LinearAttention(nn.Module):
    """Attention whose cost grows with the number of tokens, not its square: the kernel is elu + 1 (Katharopoulos et al., 2020)."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.merge = nn.Linear(WIDTH, WIDTH)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """source [..., T, 768], target [..., S, 768] -> [..., T, 768]"""
        query, key, value = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(-2, -3)
            for layer, x in ((self.query, source), (self.key, target), (self.value, target))
        )
        query, key = F.elu(query) + 1, F.elu(key) + 1
        summary = key.mT @ value  # [..., heads, c, c]
        total = query @ key.sum(-2)[..., None]
        mixed = (query @ summary) / total.clamp(min=1e-6)
        return self.merge(mixed.transpose(-2, -3).flatten(-2))


class ContextBlock(nn.Module):
    """Attention within a view, then to all others, then a feed-forward network."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.within = LinearAttention()
        self.across = LinearAttention()
        self.forward_network = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, V, T, 768]"""
        seen = self.norms[0](tokens)
        tokens = tokens + self.within(seen, seen)
        seen = self.norms[1](tokens)
        num_views = tokens.shape[1]
        others = torch.stack(
            [
                torch.cat([seen[:, other] for other in range(num_views) if other != view], 1)
                for view in range(num_views)
            ],
            1,
        )
        tokens = tokens + self.across(seen, others)
        return tokens + self.forward_network(self.norms[2](tokens))


class DinoContext(nn.Module):
    """Pictures in, one coarse map for each out, which the image pyramid adds to its levels."""

    def __init__(self):
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        # The released ViT-B/14 was trained at 518 pixels; its positions are resampled to other sizes.
        self.vit = Dinov2Model(Dinov2Config(image_size=518, patch_size=PATCH))
        self.vit.requires_grad_(False).eval()
        self.join = nn.Linear(len(TAPS) * WIDTH, WIDTH)
        self.blocks = nn.ModuleList(ContextBlock() for _ in range(NUM_BLOCKS))
        self.output = nn.Sequential(
            nn.Conv2d(WIDTH, 256, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(256, 128, 2, 2),
            nn.GELU(),
            nn.ConvTranspose2d(128, CONTEXT_WIDTH, 2, 2),
        )

    def train(self, mode: bool = True) -> "DinoContext":
        """Set the mode; the ViT stays as it is."""
        super().train(mode)
        self.vit.eval()
        return self

    def forward(self, images: Tensor, num_views: int) -> Tensor:
        """images [M, 3, H, W] in [0, 1] -> [M, 64, H / 8, W / 8], H and W multiples of 32"""
        grid = [side // TOKEN_STRIDE for side in images.shape[-2:]]
        small = F.interpolate(
            images, [PATCH * side for side in grid], mode="bicubic", antialias=True
        )
        with torch.no_grad():
            seen = self.vit(pixel_values=normalised(small), output_hidden_states=True)
        states = [seen.hidden_states[tap] for tap in TAPS[:-1]] + [seen.last_hidden_state]
        tokens = self.join(torch.cat([state[:, 1:] for state in states], -1))  # without the class
        tokens = tokens.unflatten(0, (-1, num_views))
        for block in self.blocks:
            tokens = block(tokens)
        return self.output(tokens.flatten(0, 1).mT.unflatten(2, grid))
