"""The transformer that lets the coarse features of each view look at those of all others.

After GMFlow and UniMatch (Xu et al., 2022, 2023): attention within windows, half of the blocks with windows shifted by half their size. Parameters
have the names that their public weights have. M = B V views; each map is cut into 2 x 2 windows of n tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOWS = 2  # along each axis


class AttentionLayer(nn.Module):
    """Single-head attention from `source` to `target` tokens, optionally followed by a feed-forward network on both."""

    def __init__(self, width: int, feed_forward: bool):
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.mlp, self.norm2 = None, None
        if feed_forward:
            self.mlp = nn.Sequential(
                nn.Linear(2 * width, 8 * width, bias=False),
                nn.GELU(),
                nn.Linear(8 * width, width, bias=False),
            )
            self.norm2 = nn.LayerNorm(width)

    def forward(self, source: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """source [..., n, C], target [..., m, C], mask [windows, n, m], true where a token may look. -> [..., n, C]"""
        message = F.scaled_dot_product_attention(
            self.q_proj(source), self.k_proj(target), self.v_proj(target), attn_mask=mask
        )
        message = self.norm1(self.merge(message))
        if self.mlp is not None:
            message = self.norm2(self.mlp(torch.cat([source, message], -1)))
        return source + message


class Block(nn.Module):
    """Attention within each view, then to all other views."""

    def __init__(self, width: int):
        super().__init__()
        self.self_attn = AttentionLayer(width, feed_forward=False)
        self.cross_attn_ffn = AttentionLayer(width, feed_forward=True)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """tokens [B, V, windows, n, C]"""
        tokens = self.self_attn(tokens, tokens, mask)
        num_views = tokens.shape[1]
        # Each view asks the tokens of all others at once; their order among each other has no effect.
        others = torch.stack(
            [
                torch.cat([tokens[:, other] for other in range(num_views) if other != view], -2)
                for view in range(num_views)
            ],
            1,
        )
        joint = None if mask is None else mask.repeat(1, 1, num_views - 1)
        return self.cross_attn_ffn(tokens, others, joint)


class CrossViewTransformer(nn.Module):
    """Features of V views in, the same with what the other views know out."""

    def __init__(self, width: int, num_blocks: int):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(num_blocks))

    def forward(self, features: Tensor) -> Tensor:
        """features [B, V, C, h, w], h and w even"""
        height, width = (side // WINDOWS for side in features.shape[-2:])  # of a window
        x = features + _positions(features, height, width).tile(WINDOWS, WINDOWS)
        for number, block in enumerate(self.layers):
            shift = (height // 2, width // 2) if number % 2 else (0, 0)
            mask = _shift_mask(features, height, width, shift) if any(shift) else None
            moved = x.roll((-shift[0], -shift[1]), (-2, -1))
            windows = moved.unflatten(-1, (WINDOWS, width)).unflatten(-3, (WINDOWS, height))
            # [B, V, C, rows, height, columns, width] -> [B, V, windows, n, C]
            tokens = windows.permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5).flatten(2, 3)
            tokens = block(tokens, mask)
            windows = tokens.unflatten(3, (height, width)).unflatten(2, (WINDOWS, WINDOWS))
            moved = windows.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
            x = moved.roll(shift, (-2, -1))
        return x


def _positions(like: Tensor, height: int, width: int) -> Tensor:
    """Sines of the position within a window, half of the channels for each axis. [C, height, width]"""
    quarter = like.shape[2] // 4
    wavelength = 10000.0 ** (torch.arange(quarter, device=like.device) / quarter)
    channels = []
    for axis, size in enumerate((height, width)):
        place = (torch.arange(size, device=like.device) + 0.5) / size * 2 * math.pi
        angle = place[:, None] / wavelength  # [size, quarter]
        wave = torch.cat([angle.sin(), angle.cos()], 1).T  # [C / 2, size]
        shape = (-1, size, 1) if axis == 0 else (-1, 1, size)
        channels.append(wave.reshape(shape).expand(-1, height, width))
    return torch.cat(channels).to(like.dtype)


def _shift_mask(like: Tensor, height: int, width: int, shift: tuple[int, int]) -> Tensor:
    """Keep tokens apart that a shifted window holds from opposite edges of the picture. [windows, n, n] bool"""
    region = torch.zeros(WINDOWS * height, WINDOWS * width, device=like.device, dtype=torch.long)
    region[-height:, :] += 1
    region[-shift[0] :, :] += 1
    region[:, -width:] += 3
    region[:, -shift[1] :] += 3
    windows = region.unflatten(1, (WINDOWS, width)).unflatten(0, (WINDOWS, height))
    ids = windows.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1)  # [windows, n]
    return ids[:, :, None] == ids[:, None, :]
