"""The fixer without a network: mix the point guidance into the render, pixel by pixel.

Notation, all [H,W,·]: A artifact render, P point guidance, M coverage in {0,1}, g the guidance's share.
`mask` mode mixes where points project, I = A·(1 - gM) + P·(gM); `global` mode mixes everywhere with P black in holes,
I = A·(1 - g) + P·g, and is there for comparison with fixers trained that way. Averaging two estimates with unlike errors
(splats blur and float, points have holes and noise) is better than either; it is the baseline for every network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.checks import check_shape
from s2d.fixer.interface import Fixer, FixResult, as_photos

MixMode = Literal["mask", "global"]

# A gain outside this range is no exposure difference but a wrong match.
GAIN_RANGE = (0.5, 2.0)
# Darker values carry no ratio: noise and rounding rule them.
GAIN_MIN_VALUE = 0.05
GAIN_MIN_PIXELS = 100
# Mean absolute difference of colour at which render and guidance tell two different stories.
DISAGREEMENT = 0.25


@dataclass(frozen=True)
class AnalyticFixer(Fixer):
    """Masked pixel mix of render and guidance; see the module's docstring."""

    guidance_share: float = 0.5
    """g: 0 returns the render, 1 the guidance."""
    mode: MixMode = "mask"
    feather: float = 1.5
    """Standard deviation in pixels of the soft edge inside the mask; 0 is a hard edge."""
    match_gain: bool = False
    """Match the guidance's brightness to the render's, per channel, before mixing."""

    def fix(
        self,
        rendered: Tensor,  # [H, W, 3]
        guidance: Tensor,  # [H, W, 3]
        coverage_mask: Tensor,  # [H, W, 1]
        reference: Tensor | Sequence[Tensor],  # [H', W', 3] each
    ) -> FixResult:
        """Mix; the reference photos are not used. See `Fixer.fix`."""
        dims = check_shape("rendered", rendered, ("H", "W", 3))
        check_shape("guidance", guidance, ("H", "W", 3), dims)
        check_shape("coverage_mask", coverage_mask, ("H", "W", 1), dims)
        for photo in as_photos(reference):
            check_shape("reference", photo, (None, None, 3))
        if self.match_gain:
            guidance = (guidance * channel_gain(guidance, rendered, coverage_mask)).clamp(0.0, 1.0)
        soft_mask = feathered(coverage_mask, self.feather)
        share = self.guidance_share * (
            soft_mask if self.mode == "mask" else torch.ones_like(soft_mask)
        )
        fixed = torch.lerp(rendered, guidance, share)
        agreement = 1.0 - ((rendered - guidance).abs().mean(-1, keepdim=True) / DISAGREEMENT).clamp(
            max=1.0
        )
        return FixResult(
            fixed.clamp(0.0, 1.0), (coverage_mask > 0.5).float(), soft_mask * agreement
        )


def feathered(
    mask: Tensor,  # [H, W, 1]
    sigma: float,
) -> Tensor:
    """Soften a mask's edge towards its inside: 0 outside, rising to 1 within about 2·sigma pixels. [H, W, 1]

    Outside stays exactly 0, since there is nothing to mix in there. The image border is no edge.
    """
    if sigma <= 0:
        return mask
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=mask.dtype, device=mask.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(mask.permute(2, 0, 1)[None], (radius,) * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])
    # On a straight edge the blur is 0.5: stretch [0.5, 1] to [0, 1].
    return mask * ((blurred[0].permute(1, 2, 0) - 0.5) / 0.5).clamp(0.0, 1.0)


def channel_gain(
    guidance: Tensor,  # [H, W, 3]
    rendered: Tensor,  # [H, W, 3]
    mask: Tensor,  # [H, W, 1]
) -> Tensor:
    """Estimate the factor per channel that brings `guidance` to `rendered`'s exposure. [3]

    The median of the ratios over covered, not too dark pixels: half of them may be artifacts and it still holds.
    1 where too few pixels are left; clamped to [0.5, 2].
    """
    gains = torch.ones(3, dtype=guidance.dtype, device=guidance.device)
    covered = mask[..., 0] > 0.5
    for channel in range(3):
        source, target = guidance[..., channel][covered], rendered[..., channel][covered]
        usable = (source > GAIN_MIN_VALUE) & (target > GAIN_MIN_VALUE)
        if int(usable.sum()) >= GAIN_MIN_PIXELS:
            gains[channel] = (target[usable] / source[usable]).median().clamp(*GAIN_RANGE)
    return gains
