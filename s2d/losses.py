"""What the optimisation minimises, and how much a pixel of a pseudo view counts.

Notation: `rendered`, `target` are images [H,W,3] in [0,1]; `W` is the weight of a pixel's gradient [H,W,1];
`M` the guidance mask of a novel view [H,W,1], 1 where the point cloud projects, 0 where the fixer was on its own.
"""

import fused_ssim
from torch import Tensor

from s2d.checks import check_shape


def photometric_loss(
    rendered: Tensor,  # [H, W, 3]
    target: Tensor,  # [H, W, 3]
    ssim_weight: float = 0.2,
    gradient_weight: Tensor | None = None,  # [H, W, 1]
) -> Tensor:
    """Compare a render with its photo: (1 - ssim_weight)·L1 + ssim_weight·(1 - SSIM).

    0 for equal images. L1 is the mean over pixels and channels; SSIM is the mean of the 11×11 Gaussian-window
    map (sigma 1.5, zero padding), as 3DGS computes it. One kernel computes the value and its gradient.

    Args:
        rendered: Image being optimised, in [0,1] (overshoot is allowed). [H, W, 3]
        target: Image to match. [H, W, 3]
        ssim_weight: 0 is pure L1, 1 pure structural similarity.
        gradient_weight: Factor of each pixel's gradient on its way to `rendered`; the value and the windows stay. That is exact
            for L1 and SSIM alike, while weighing the SSIM map would let windows bleed across a mask's edge. The 2D gradients
            that drive densification shrink with it: what is not guided grows fewer Gaussians. None is 1. [H, W, 1]

    Returns:
        Scalar. Differentiable in `rendered`. Eq. (7) of the 3DGS paper (Kerbl et al. 2023).
    """
    dims = check_shape("rendered", rendered, ("H", "W", 3))
    check_shape("target", target, ("H", "W", 3), dims)
    if gradient_weight is not None:
        check_shape("gradient_weight", gradient_weight, ("H", "W", 1), dims)
    return fused_ssim.photometric_loss(rendered, target, ssim_weight, gradient_weight)


def novel_view_weight(
    mask: Tensor,  # [H, W, 1]
    beta: float,
) -> Tensor:
    """Weigh a novel view's pixels: W = beta + (1 - beta)·M, so 1 where guided and `beta` where not. [H, W, 1]

    beta = 1 switches the weighting off, beta = 0 ignores what no point supports. S2D uses 0.4.
    """
    return beta + (1.0 - beta) * mask
