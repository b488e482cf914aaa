"""Image quality numbers: PSNR, SSIM and LPIPS, as the 3DGS code family reports them.

Images are float32 [H, W, 3] in [0, 1] (sRGB, read back from 8-bit files by the evaluation). Every function scores one image
against its truth and returns a Python float; means over views are the caller's.

LPIPS (Zhang et al., 2018, version 0.1) is written out here because the `lpips` package needs torchvision at import. Only its
head weights are used, read from the installed package's files. The backbone is torchvision's ImageNet AlexNet or VGG16:
from the folder named by S2D_WEIGHTS, else from torch hub's cache, else downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.checks import check_shape
from s2d.log import logger

# An exact match has infinite PSNR, which JSON cannot hold; 1e-10 is far below one 8-bit step in one pixel of a megapixel.
SMALLEST_MSE = 1e-10
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
LPIPS_MIN_SIDE = 31  # pixels: AlexNet's second pooling needs them
DOWNLOAD_TIMEOUT_S = 10.0

Metrics = dict[str, float | None]


def psnr(
    image: Tensor,  # [H, W, 3]
    target: Tensor,  # [H, W, 3]
    mask: Tensor | None = None,  # [H, W]
) -> float:
    """Measure the peak signal-to-noise ratio in dB over all pixels and channels.

    Args:
        image: In [0, 1]. [H, W, 3]
        target: In [0, 1]. [H, W, 3]
        mask: Pixels that count (> 0); all where None. [H, W]

    Returns:
        dB, at most 100 (identical images); NaN where the mask is empty.
    """
    dims = check_shape("image", image, ("H", "W", 3))
    check_shape("target", target, ("H", "W", 3), dims)
    squared_error = (image - target).double().square()
    if mask is not None:
        check_shape("mask", mask, ("H", "W"), dims)
        squared_error = squared_error[mask > 0]
        if squared_error.numel() == 0:
            return float("nan")
    return float(-10.0 * squared_error.mean().clamp_min(SMALLEST_MSE).log10())


def ssim(
    image: Tensor,  # [H, W, 3]
    target: Tensor,  # [H, W, 3]
) -> float:
    """Measure structural similarity with an 11×11 Gaussian window (sigma 1.5), averaged over pixels and channels.

    The border is padded with zeros, as the 3DGS code family does: not the 'valid' average of Wang et al. (2004), so a uniform
    image pair is not flat at its border.

    Args:
        image: In [0, 1]. [H, W, 3]
        target: In [0, 1]. [H, W, 3]
    """
    dims = check_shape("image", image, ("H", "W", 3))
    check_shape("target", target, ("H", "W", 3), dims)
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()

    def blur(plane: np.ndarray) -> np.ndarray:  # [H, W]
        return cv2.sepFilter2D(plane, -1, window, window, borderType=cv2.BORDER_CONSTANT)

    total = 0.0
    for channel in range(3):  # one at a time stays in the cache
        x, y = (picture[..., channel].double().numpy() for picture in (image, target))
        mean_x, mean_y, xx, yy, xy = (blur(plane) for plane in (x, y, x * x, y * y, x * y))
        variance_x, variance_y = xx - mean_x**2, yy - mean_y**2
        covariance = xy - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
        structure = (2 * covariance + SSIM_C2) / (variance_x + variance_y + SSIM_C2)
        total += float((luminance * structure).mean())
    return total / 3


# ---------------------------------------------------------------------------------------------------------------- LPIPS


class LpipsUnavailable(RuntimeError):
    """A weight file that LPIPS needs is not here and cannot be fetched; the message says which and what to do."""


@dataclass(frozen=True)
class Backbone:
    """One ImageNet network up to its last tapped ReLU. A layer is (key, stride, padding), "pool" or "tap" (a ReLU output)."""

    name: str
    pool_size: int
    hub_url: str
    layers: tuple


def _vgg_layers() -> tuple:
    layers: list = []
    index = 0
    for block, num_convs in enumerate((2, 2, 3, 3, 3)):
        if block:
            layers.append("pool")
            index += 1
        for conv in range(num_convs):
            layers.append((f"features.{index}", 1, 1))
            index += 2  # each convolution is followed by its ReLU
            if conv == num_convs - 1:
                layers.append("tap")
    return tuple(layers)


BACKBONES = {
    "alex": Backbone(
        "alexnet",
        pool_size=3,
        hub_url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        layers=(
            *(("features.0", 4, 2), "tap", "pool", ("features.3", 1, 2), "tap", "pool"),
            *(("features.6", 1, 1), "tap", ("features.8", 1, 1), "tap", ("features.10", 1, 1), "tap"),
        ),
    ),
    "vgg": Backbone(
        "vgg16",
        pool_size=2,
        hub_url="https://download.pytorch.org/models/vgg16-397923af.pth",
        layers=_vgg_layers(),
    ),
}  # fmt: skip


@dataclass
class Lpips:
    """LPIPS with one backbone; calling it scores one image. Features of a truth image are kept, since stages share truths."""

    net: str  # "alex" or "vgg"
    weights: dict[str, Tensor]  # the backbone's, torchvision's key names
    heads: list[Tensor]  # per tap [1, channels, 1, 1]
    _truth: tuple[str, list[Tensor]] = field(default=("", []), repr=False)

    def to(self, device: torch.device) -> Lpips:
        """A copy that computes on a device; pictures stay on the CPU."""
        weights = {key: weight.to(device) for key, weight in self.weights.items()}
        return Lpips(self.net, weights, [head.to(device) for head in self.heads])

    @torch.no_grad()
    def __call__(
        self,
        image: Tensor,  # [H, W, 3]
        target: Tensor,  # [H, W, 3]
    ) -> float:
        """Measure the learned perceptual distance; 0 is identical, lower is better. Images in [0, 1], no side below LPIPS_MIN_SIDE."""
        dims = check_shape("image", image, ("H", "W", 3))
        check_shape("target", target, ("H", "W", 3), dims)
        key = hashlib.sha256(target.contiguous().numpy()).hexdigest()
        if self._truth[0] != key:
            self._truth = (key, self._features(target))
        means = []
        for a, b, head in zip(self._features(image), self._truth[1], self.heads, strict=True):
            means.append(((a - b).square() * head).sum(dim=1).mean())
        return sum(torch.stack(means).tolist())

    # A GPU's convolutions round to TF32, 10 bits, unless told not to; a score is the same on all devices.
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def _features(
        self, image: Tensor
    ) -> list[Tensor]:  # [H, W, 3] → per tap [1, C, H', W'], unit length over channels
        # The scaling layer: ImageNet normalisation, moved from [0, 1] to the [-1, 1] that LPIPS is defined on.
        shift = torch.tensor([-0.030, -0.088, -0.188])
        scale = torch.tensor([0.458, 0.448, 0.450])
        # NHWC in memory, as the weights are: CPU convolutions take half the time.
        x = ((image.float() * 2 - 1 - shift) / scale).permute(2, 0, 1)[None]
        x = x.contiguous(memory_format=torch.channels_last).to(self.heads[0].device)
        pool_size = BACKBONES[self.net].pool_size
        taps = []
        for layer in BACKBONES[self.net].layers:
            if layer == "tap":
                taps.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
            elif layer == "pool":
                x = F.max_pool2d(x, pool_size, stride=2)
            else:
                key, stride, padding = layer
                weight, bias = self.weights[f"{key}.weight"], self.weights[f"{key}.bias"]
                x = F.relu_(F.conv2d(x, weight, bias, stride, padding))
        return taps


def score(
    image: Tensor,  # [H, W, 3]
    truth: Tensor,  # [H, W, 3]
    networks: Mapping[str, Lpips],
    mask: Tensor | None = None,  # [H, W]
) -> Metrics:
    """Score one picture by PSNR, SSIM and LPIPS.

    Args:
        image, truth: In [0, 1], as 8 bits hold them. [H, W, 3]
        networks: For LPIPS, by the name that its score gets; None where the picture is too small for them.
        mask: Pixels that count (1, else 0); all where None. [H, W]

    With a mask the PSNR is that of its pixels; SSIM and LPIPS are those of both pictures in front of white, as the sparse-view
    protocols on DTU have it, where the table that objects stand on is not counted.
    """
    value = psnr(image, truth, mask)
    if mask is not None:
        image, truth = (
            picture * mask[..., None] + 1 - mask[..., None] for picture in (image, truth)
        )
    large_enough = min(truth.shape[:2]) >= LPIPS_MIN_SIDE
    values = {
        key: network(image, truth) if large_enough else None for key, network in networks.items()
    }
    return {"psnr": None if math.isnan(value) else value, "ssim": ssim(image, truth)} | values


def load_lpips(net: str, *, download: bool = True) -> Lpips:
    """Load LPIPS 0.1 with the "alex" or the "vgg" backbone.

    Raises:
        LpipsUnavailable: The backbone's or the heads' weights cannot be had; the message starts with "LPIPS: not available".
    """
    if net not in BACKBONES:
        raise ValueError(f"load_lpips: net must be one of {sorted(BACKBONES)}, got {net!r}.")
    heads = _load_heads(net)
    weights = _load_backbone(BACKBONES[net], download)
    needed = [layer[0] for layer in BACKBONES[net].layers if isinstance(layer, tuple)]
    absent = [key for key in needed if f"{key}.weight" not in weights]
    if absent:
        raise LpipsUnavailable(
            f"LPIPS: not available: the {BACKBONES[net].name} weights have no {absent[0]}.weight. Expected torchvision's key names."
        )
    for layer in needed:
        kernel = weights[f"{layer}.weight"]
        weights[f"{layer}.weight"] = kernel.contiguous(memory_format=torch.channels_last)
    return Lpips(net, weights, heads)


def find_lpips(net: str, *, download: bool = True) -> Lpips | None:
    """Load LPIPS where it can be had; without it a message says why, unless fetching it was not asked for."""
    try:
        return load_lpips(net, download=download)
    except LpipsUnavailable as error:
        if download:
            logger.warning("%s", error)
        return None


def _load_heads(net: str) -> list[Tensor]:
    spec = importlib.util.find_spec(
        "lpips"
    )  # finds the folder without running the package, which imports torchvision
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / "weights" / "v0.1" / f"{net}.pth"
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            return [state[f"lin{i}.model.1.weight"] for i in range(5)]
    raise LpipsUnavailable(
        f"LPIPS: not available: the pip package lpips (its head weights v0.1/{net}.pth) is not installed. Run: pip install --no-deps lpips"
    )


def _load_backbone(backbone: Backbone, download: bool) -> dict[str, Tensor]:
    folder = os.environ.get("S2D_WEIGHTS")
    if folder:
        path = Path(folder) / f"{backbone.name}_features.safetensors"
        if path.is_file():
            from safetensors.torch import load_file

            return load_file(path)
    file_name = backbone.hub_url.rsplit("/", 1)[1]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if cached.is_file():
        return torch.load(cached, map_location="cpu", weights_only=True)
    advice = (
        f"Put {file_name} (torchvision's {backbone.name}) into {cached.parent}, "
        f"or {backbone.name}_features.safetensors into the folder that S2D_WEIGHTS names."
    )
    if not download:
        raise LpipsUnavailable(f"LPIPS: not available: no {backbone.name} weights here. {advice}")
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torch.hub has no timeout of its own
    try:
        return torch.hub.load_state_dict_from_url(
            backbone.hub_url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:  # no network, refused, or a damaged file
        raise LpipsUnavailable(
            f"LPIPS: not available: could not download {backbone.hub_url} ({error}). {advice}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_before)
