"""Networks that judge images, with gradients: the taps of AlexNet or VGG16 (for LPIPS and Gram matrices), and DINO's tokens.

`s2d.metrics.Lpips` scores one finished image; here whole batches are compared, in half precision where the training is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.fixer.features import TransformerFeatures
from s2d.metrics import BACKBONES, Lpips

# ImageNet's mean and deviation moved from [0, 1] to [-1, 1], as LPIPS rounds them.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Under the root of sums of squared activations, which are in the hundreds: a root's slope at zero is infinite.
SMALL = 1e-8
# Difix's weights of the five taps of VGG16 in the Gram term.
GRAM_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)


class TappedBackbone(nn.Module):
    """LPIPS's backbone up to its last tap, on batches; frozen."""

    def __init__(self, lpips: Lpips) -> None:
        super().__init__()
        self.layers = BACKBONES[lpips.net].layers
        self.pool_size = BACKBONES[lpips.net].pool_size
        for key, tensor in lpips.weights.items():
            # Buffers move with the module and are no parameters; their names may not have dots.
            self.register_buffer(key.replace(".", "_"), tensor, persistent=False)
        for number, head in enumerate(lpips.heads):
            self.register_buffer(f"head_{number}", head, persistent=False)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    @property
    def heads(self) -> list[Tensor]:
        """LPIPS's weight of each channel of each tap. [1, C, 1, 1]"""
        return [self.get_buffer(f"head_{n}") for n in range(self.layers.count("tap"))]

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> list[Tensor]:
        """Activations at the taps. [B, C, H', W'] each"""
        x = (images - self.shift) / self.scale
        x = x.contiguous(memory_format=torch.channels_last)
        taps = []
        for layer in self.layers:
            if layer == "tap":
                taps.append(x)
            elif layer == "pool":
                x = F.max_pool2d(x, self.pool_size, stride=2)
            else:
                key, stride, padding = layer
                name = key.replace(".", "_")
                weight, bias = self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias")
                x = F.relu(F.conv2d(x, weight, bias, stride, padding))
        return taps


def lpips_distance(
    taps: list[Tensor],  # [B, C, h, w] each
    target_taps: list[Tensor],
    heads: list[Tensor],
) -> Tensor:
    """LPIPS 0.1 from activations, averaged over the batch. Scalar; differentiable"""
    distance = torch.zeros((), device=taps[0].device)
    for a, b, head in zip(taps, target_taps, heads, strict=True):
        difference = (_unit(a) - _unit(b)).square()
        distance = distance + (difference * head).sum(dim=1).mean()
    return distance


def gram_distance(
    taps: list[Tensor],  # [B, C, h, w] each, of VGG16
    target_taps: list[Tensor],
) -> Tensor:
    """How far the correlations between channels differ: texture, wherever it lies. Scalar; differentiable

    Per tap: its weight / (C·h·w) times the mean squared difference of the Gram matrices, each sample by itself.
    """
    distance = torch.zeros((), device=taps[0].device)
    for tap, target_tap, weight in zip(taps, target_taps, GRAM_WEIGHTS, strict=True):
        # Sums over all pixels overflow half precision.
        a, b = tap.float().flatten(2), target_tap.float().flatten(2)
        difference = a @ a.transpose(1, 2) - b @ b.transpose(1, 2)
        distance = distance + weight / a[0].numel() * difference.square().mean()
    return distance


def dino_distance(
    features: TransformerFeatures,
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    target: Tensor,  # [B, 3, H, W] in [-1, 1]
) -> Tensor:
    """1 - cosine between what a vision transformer sees at each place, averaged. Scalar; differentiable in `images`"""
    return 1 - F.cosine_similarity(features(images).float(), features(target).float(), dim=1).mean()


def _unit(tap: Tensor) -> Tensor:
    tap = tap.float()
    return tap / (tap.square().sum(dim=1, keepdim=True) + SMALL).sqrt()
