"""The two kinds of network that look for depth: the cost volume's, and each level's refinement.

Depth inside the networks is `place`: where the inverse depth lies between 1/far (0) and 1/near (1). So nothing depends on the unit of the world.
M = B V views; D hypotheses.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.hier.blocks import UNet, reduced, upsampled
from s2d.hier.config import STRIDES, HierConfig
from s2d.hier.decode import START_SCALE, num_raw
from s2d.hier.pyramid import normalised
from s2d.hier.sweep import expected_inverse_depth, inverse_depths, patch_descriptors, plane_sweep

# The finest level may move a surface by this share of its inverse depth to each side, as published.
FINEST_REACH = 0.1
# Logits per unit of normalised cross-correlation at the start: a difference of 0.1 is then a factor of 20.
PHOTOMETRIC_GAIN = 30.0


class CoarseDepth(nn.Module):
    """Depth of the coarsest level from a plane sweep over learned features, and over fixed ones if the configuration says so."""

    def __init__(self, config: HierConfig):
        super().__init__()
        self.num_hypotheses = config.num_hypotheses
        self.num_volumes = 2 if config.photometric else 1
        volumes = self.num_volumes * config.num_hypotheses
        self.network = UNet(volumes + config.widths[0], config.sweep_widths, config.joint_attention)
        self.head = nn.Sequential(
            nn.Conv2d(config.sweep_widths[0], config.sweep_widths[0], 3, padding=1),
            nn.GELU(),
            nn.Conv2d(config.sweep_widths[0], config.num_hypotheses, 1),
        )
        # The scores themselves are the first guess; the network corrects them.
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)
        gains = torch.tensor([1.0, PHOTOMETRIC_GAIN][: self.num_volumes])
        # As a logarithm: an optimiser's steps are then shares of it.
        self.log_gains = nn.Parameter(gains.log())

    def forward(
        self,
        features: Tensor,  # [B, V, C, h, w]
        images: Tensor,  # [B, V, 3, H, W]
        viewmats: Tensor,
        Ks: Tensor,  # of the coarsest grid
        near: Tensor,
        far: Tensor,
    ) -> tuple[Tensor, Tensor]:  # inverse depth and confidence [B, V, h, w]
        hypotheses = inverse_depths(near, far, self.num_hypotheses)
        volumes = [plane_sweep(features, hypotheses, viewmats, Ks) / features.shape[2] ** 0.5]
        if self.num_volumes == 2:
            cells, dense = (
                x.unflatten(0, images.shape[:2])
                for x in patch_descriptors(images.flatten(0, 1), STRIDES[0])
            )
            volumes.append(plane_sweep(cells, hypotheses, viewmats, Ks, dense))
        seen = torch.cat([*volumes, features], 2).flatten(0, 1)
        correction = self.head(self.network(seen, images.shape[1])).unflatten(0, images.shape[:2])
        logits = correction + sum(
            gain * volume for gain, volume in zip(self.log_gains.exp(), volumes, strict=True)
        )
        return expected_inverse_depth(logits, hypotheses)


class Refined(NamedTuple):
    """What a level says about each of its cells; grids are the level's own, `hidden` is on its work grid."""

    place: Tensor  # [M, 1, h, w]
    opacities: Tensor  # [M, h, w]
    raw: Tensor  # [M, R, h, w]
    hidden: Tensor  # [M, C, h', w']


class Refinement(nn.Module):
    """One level: the depth so far, corrected, and a Gaussian per cell.

    Where the level's grid is finer than the grid that its convolutions run on (`pack` > 1), pack x pack cells share one position there, as channels.
    """

    def __init__(self, config: HierConfig, level: int):
        super().__init__()
        self.level = level
        self.pack = config.work_strides[level] // STRIDES[level]
        self.step = 1 / config.num_hypotheses  # what a correction of 1 means in `place`
        width = config.widths[level]
        widths = config.refine_widths[level]
        self.own = nn.Conv2d(width, width, 3, padding=1)
        self.across = nn.Conv2d(config.widths[0], width, 1, bias=False)
        if level:
            self.before = nn.Conv2d(config.refine_widths[level - 1][0], width, 1, bias=False)
        pictures = 3 * self.pack**2 * (2 if level else 1)
        self.network = UNet(pictures + 2 + width, widths, config.joint_attention)
        cells, raw = self.pack**2, num_raw(config.sh_degree)
        # Packed cells need no neighbourhood here: each position of the work grid holds one.
        kernel = 3 if self.pack == 1 else 1
        self.gaussians = nn.Sequential(
            nn.Conv2d(widths[0] + width + pictures, 2 * raw, kernel, padding=kernel // 2),
            nn.GELU(),
            nn.Conv2d(2 * raw, raw * cells, 1),
        )
        self.surface = nn.Conv2d(widths[0], 2 * cells, kernel, padding=kernel // 2)
        for last in (self.gaussians[-1], self.surface):
            # At the start every cell is its picture's colour at the depth so far.
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        with torch.no_grad():
            self.gaussians[-1].bias.view(raw, cells)[2:5] = START_SCALE[level]

    def forward(
        self,
        images: Tensor,  # [M, 3, H, W]
        error: Tensor,  # [M, 3, H, W]
        own: Tensor,  # [M, width, h', w'] of the pyramid
        across: Tensor,  # [M, C, H/4, W/4] of the transformer
        before: Tensor | None,  # hidden of the level before
        place: Tensor,  # [M, 1, any, any] so far
        confidence: Tensor,  # [M, 1, H/4, W/4]
        limits: Tensor,  # [M, 2] inverse depth at place 0 and 1
        num_views: int,
    ) -> Refined:
        shape = own.shape[-2:]
        features = self.own(own) + _at(self.across(across), shape)
        if before is not None:
            features = features + _at(self.before(before), shape)
        features = F.gelu(features)

        stride = images.shape[-1] // (shape[-1] * self.pack)
        pictures = [normalised(reduced(images, stride))]
        if self.level:
            pictures.append(reduced(error, stride))
        pictures = F.pixel_unshuffle(torch.cat(pictures, 1), self.pack)
        seen = [pictures, _at(place, shape), _at(confidence, shape), features]
        hidden = self.network(torch.cat(seen, 1), num_views)
        raw = F.pixel_shuffle(self.gaussians(torch.cat([hidden, features, pictures], 1)), self.pack)
        delta, opacity = F.pixel_shuffle(self.surface(hidden), self.pack).chunk(2, 1)
        place = self._moved(_at(place, delta.shape[-2:]), delta, limits)
        # In half precision a sigmoid would round to 1.
        return Refined(place, opacity[:, 0].to(images.dtype).sigmoid(), raw, hidden)

    def _moved(self, place: Tensor, delta: Tensor, limits: Tensor) -> Tensor:
        """Correct the depth: not at the coarsest level, freely at the middle one, within a tenth at the finest."""
        if self.level == 0:
            return place
        if self.level == 1:
            return (place + delta * self.step).clamp(0, 1)
        low, high = limits[:, :, None, None, None].unbind(1)
        inverse = low + place * (high - low)
        inverse = inverse * (1 + FINEST_REACH * (2 * delta.sigmoid() - 1))
        return ((inverse - low) / (high - low)).clamp(0, 1)


def _at(x: Tensor, shape: torch.Size) -> Tensor:
    """Bring a map [M, C, h, w] to another grid of the same picture, finer by a whole factor or the same."""
    return upsampled(x, shape[-1] // x.shape[-1])
