"""What training minimises: a weighted sum of terms between the fixed view and the truth, both [B,3,H,W] in [-1,1]."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.device import DTYPES, Precision
from s2d.fixer.features import TransformerFeatures
from s2d.fixer.training.perceptual import (
    TappedBackbone,
    dino_distance,
    gram_distance,
    lpips_distance,
)
from s2d.losses import photometric_loss
from s2d.metrics import SSIM_C1, SSIM_C2, SSIM_SIGMA, SSIM_WINDOW, LpipsUnavailable, load_lpips

# Of PSNR's logarithm: 50 dB. Nothing is gained by being closer to a photo than its own noise.
MIN_ERROR = 1e-5


@dataclass(frozen=True)
class LossWeights:
    """Factor of each term; 0 leaves it out. The defaults are those of S2D's released training command."""

    l2: float = 6.0
    psnr: float = 0.0
    lpips: float = 1.0
    ssim: float = 4.0
    gram: float = 0.0
    dino: float = 0.0
    gram_start_step: int = 0
    """The Gram term sets in here: before that there is no texture to compare."""


class FixerLoss(nn.Module):
    """The terms and the networks that they need.

    Args:
        weights: Which terms, and how much of each.
        lpips_net: Backbone of LPIPS and of the Gram term, "vgg" or "alex".
        dino_folder: A vision transformer in transformers' layout, for the DINO term.
        precision: What the networks compute in; the terms themselves are always float32.

    Raises:
        ValueError: A network's weights are not here; says which flag does without.
    """

    def __init__(
        self,
        weights: LossWeights,
        lpips_net: str = "vgg",
        dino_folder: Path | None = None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.weights = weights
        self.precision = precision
        self.backbone: TappedBackbone | None = None
        self.dino: TransformerFeatures | None = None
        if weights.gram > 0 and lpips_net != "vgg":
            raise ValueError("The Gram term is defined on VGG16: pass --lpips-net vgg.")
        if weights.lpips > 0 or weights.gram > 0:
            try:
                self.backbone = TappedBackbone(load_lpips(lpips_net))
            except LpipsUnavailable as error:
                raise ValueError(
                    f"{error} Or train without: --lambda-lpips 0 --lambda-gram 0."
                ) from error
        if weights.dino > 0:
            if dino_folder is None:
                raise ValueError(
                    "The DINO term needs a vision model: give --dino-folder (hf download facebook/dinov2-small), or "
                    "--lambda-dino 0."
                )
            self.dino = TransformerFeatures.from_folder(dino_folder)

    def forward(
        self,
        fixed: Tensor,  # [B, 3, H, W] in [-1, 1], overshoot allowed
        target: Tensor,  # [B, 3, H, W] in [-1, 1]
        step: int,
    ) -> dict[str, Tensor]:
        """Compute the terms whose weight is not 0, unweighted, and `loss`, their weighted sum. Scalars"""
        weights = self.weights
        fixed, target = fixed.float(), target.float()
        terms: dict[str, Tensor] = {}
        if weights.l2 > 0:
            terms["l2"] = F.mse_loss(fixed, target)
        if weights.psnr > 0:
            terms["psnr"] = log_error(fixed, target)
        if weights.ssim > 0:
            terms["ssim"] = structural_loss((fixed + 1) / 2, (target + 1) / 2)
        with_gram = weights.gram > 0 and step >= weights.gram_start_step
        if self.backbone is not None and (weights.lpips > 0 or with_gram):
            with self._autocast(fixed):
                taps = self.backbone(fixed)
                with torch.no_grad():
                    target_taps = self.backbone(target)
            if weights.lpips > 0:
                terms["lpips"] = lpips_distance(taps, target_taps, self.backbone.heads)
            if with_gram:
                terms["gram"] = gram_distance(taps, target_taps)
        if self.dino is not None:
            with self._autocast(fixed):
                terms["dino"] = dino_distance(self.dino, fixed, target)
        loss = sum(getattr(weights, name) * term for name, term in terms.items())
        return {"loss": loss, **terms}

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(
            images.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"
        )


def log_error(
    images: Tensor,  # [B, C, H, W] in [-1, 1]
    target: Tensor,  # [B, C, H, W] in [-1, 1]
) -> Tensor:
    """Mean over the samples of -PSNR / 10, the decimal logarithm of the mean squared error of colours in [0, 1]. Scalar

    The squared error itself listens to hopeless views alone; here a decibel counts the same in every view.
    """
    errors = ((images - target) / 2).square().flatten(1).mean(1)
    return torch.log10(errors + MIN_ERROR).mean()


def structural_loss(
    images: Tensor,  # [B, C, H, W] in [0, 1]
    target: Tensor,  # [B, C, H, W] in [0, 1]
) -> Tensor:
    """1 - SSIM, averaged. On the CPU by the stages' kernel, which takes a tenth of the time of torch's convolutions. Scalar"""
    if images.device.type != "cpu":
        return 1 - ssim(images, target)
    pairs = zip(images.permute(0, 2, 3, 1), target.permute(0, 2, 3, 1), strict=True)
    return torch.stack([photometric_loss(x, y, ssim_weight=1.0) for x, y in pairs]).mean()


def ssim(
    images: Tensor,  # [B, C, H, W] in [0, 1]
    target: Tensor,  # [B, C, H, W] in [0, 1]
) -> Tensor:
    """Mean structural similarity with zero padding, the metric's definition on batches and on any device. Scalar; differentiable"""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float32) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window = (window / window.sum()).to(images)[None, None]
    x, y = images.flatten(0, 1)[:, None], target.flatten(0, 1)[:, None]

    def blur(planes: Tensor) -> Tensor:  # [N, 1, H, W]
        half = SSIM_WINDOW // 2
        rows = F.conv2d(planes, window[..., None], padding=(half, 0))
        return F.conv2d(rows, window[:, :, None], padding=(0, half))

    mean_x, mean_y, xx, yy, xy = blur(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    variances = xx - mean_x**2 + yy - mean_y**2
    covariance = xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return (luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)).mean()
