"""The convolutional blocks that the networks here share. Maps are [M, C, h, w]; M = B V, the views of all scenes one after the other."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, each with a norm without batch statistics."""

    def __init__(self, channels_in: int, channels: int, norm: type[nn.Module], stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = norm(channels)
        same = channels_in == channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class InstanceNorm(nn.InstanceNorm2d):
    """Mean and deviation of each channel of each view; no parameters."""

    def __init__(self, channels: int):
        super().__init__(channels)


class GroupNorm(nn.GroupNorm):
    """Groups of at least eight channels, with a gain and an offset per channel."""

    def __init__(self, channels: int):
        groups = next(
            g for g in (8, 4, 2, 1) if (channels % g == 0 and channels // g >= 8) or g == 1
        )
        super().__init__(groups, channels)


class JointAttention(nn.Module):
    """Self-attention over the tokens of all views of a scene, so that views exchange what they know. Same for every view order."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        nn.init.zeros_(self.merge.weight)
        nn.init.zeros_(self.merge.bias)

    def forward(self, x: Tensor, num_views: int) -> Tensor:
        height, width = x.shape[-2:]
        tokens = x.flatten(2).mT.unflatten(0, (-1, num_views)).flatten(1, 2)  # [B, V h w, C]
        query, key, value = self.qkv(self.norm(tokens)).chunk(3, -1)
        tokens = tokens + self.merge(F.scaled_dot_product_attention(query, key, value))
        return (
            tokens.unflatten(1, (num_views, height * width))
            .flatten(0, 1)
            .mT.unflatten(2, (height, width))
        )


class UNet(nn.Module):
    """One residual block per resolution on the way down and up, and attention between the views at the bottom if asked for."""

    def __init__(self, channels_in: int, widths: Sequence[int], joint_attention: bool):
        super().__init__()
        self.first = nn.Conv2d(channels_in, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            ResidualBlock(widths[max(i - 1, 0)], width, GroupNorm, stride=1 if i == 0 else 2)
            for i, width in enumerate(widths)
        )
        self.attention = JointAttention(widths[-1]) if joint_attention else None
        self.up = nn.ModuleList(
            ResidualBlock(widths[i] + widths[i + 1], widths[i], GroupNorm)
            for i in reversed(range(len(widths) - 1))
        )

    def forward(self, x: Tensor, num_views: int) -> Tensor:  # [M, widths[0], h, w]
        x = self.first(x)
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        if self.attention is not None:
            x = self.attention(x, num_views)
        skips.pop()
        for block in self.up:
            x = block(torch.cat([skips.pop(), upsampled(x, 2)], 1))
        return x


def upsampled(x: Tensor, factor: int) -> Tensor:
    """Enlarge maps [M, C, h, w] bilinearly; pixel centres stay where they are in the picture."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def reduced(x: Tensor, factor: int) -> Tensor:
    """Shrink maps [M, C, h, w] by averaging areas."""
    return x if factor == 1 else F.avg_pool2d(x, factor)


def padded(images: Tensor, multiple: int) -> Tensor:
    """Continue pictures [M, 3, H, W] below and on the right until their sides are multiples of `multiple`; intrinsics stay valid."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")
