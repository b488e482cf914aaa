"""Features of single pictures: a residual U-Net with instance norms, the same for every view."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.hier.blocks import InstanceNorm, ResidualBlock, upsampled
from s2d.hier.config import HierConfig

# Mean and deviation of natural pictures (ImageNet's, which all pretrained networks here expect).
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: Tensor) -> Tensor:
    """Pictures [..., 3, H, W] in [0, 1] to mean 0 and deviation 1 of natural pictures."""
    mean, deviation = (images.new_tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    return (images - mean) / deviation


class ImagePyramid(nn.Module):
    """A picture in, one feature map per level out."""

    def __init__(self, config: HierConfig, context_width: int = 0):
        """`context_width`: channels of a map of the whole picture (DINO) that is added to every level; 0: there is none."""
        super().__init__()
        coarse, middle, fine = config.widths
        self.stem_stride = config.stem_stride
        if config.stem_stride == 1:
            self.stem = nn.Conv2d(3, fine, 7, padding=3)
            encoder = [(fine, fine, 1), (fine, middle, 2), (middle, coarse, 2)]
        else:
            self.stem = nn.Conv2d(12, middle, 3, padding=1)
            encoder = [(middle, middle, 1), (middle, coarse, 2)]
        self.encoder = nn.ModuleList(_pair(a, b, stride) for a, b, stride in encoder)
        self.bottom = nn.Sequential(_pair(coarse, coarse), nn.Conv2d(coarse, coarse, 1))
        widths = [entry[1] for entry in reversed(encoder)]  # coarsest first
        self.context = nn.ModuleList(
            nn.Conv2d(context_width, width, 1, bias=False) for width in widths if context_width
        )
        self.decoder = nn.ModuleList(
            ResidualBlock(above + width, width, InstanceNorm) for above, width in pairwise(widths)
        )
        sources = [widths[0], widths[1], widths[-1]]
        self.output = nn.ModuleList(
            nn.Conv2d(source, width, 1)
            for source, width in zip(sources, config.widths, strict=True)
        )

    def forward(self, images: Tensor, context: Tensor | None = None) -> list[Tensor]:
        """Compute the features.

        Args:
            images: [M, 3, H, W] in [0, 1].
            context: [M, context_width, any, any], or None.

        Returns:
            Per level, coarsest first: [M, widths[level], h, w] on the grid of the level's work stride.
        """
        x = self.stem(F.pixel_unshuffle(normalised(images), self.stem_stride))
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        skips.pop()
        x = self.bottom(x)
        maps = []
        for number in range(len(self.encoder)):
            if number:
                x = self.decoder[number - 1](torch.cat([upsampled(x, 2), skips.pop()], 1))
            if context is not None:
                x = x + self.context[number](
                    F.interpolate(context, x.shape[-2:], mode="bilinear", align_corners=False)
                )
            maps.append(x)
        sources = [maps[0], maps[1], maps[-1]]
        return [layer(source) for layer, source in zip(self.output, sources, strict=True)]


def _pair(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels_in, channels, InstanceNorm, stride),
        ResidualBlock(channels, channels, InstanceNorm),
    )
