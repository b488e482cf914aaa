# SPDX-License-Identifier: Apache-2.0
"""What scripts import from the compiled module of 3DGS's rasteriser: SSIM in two halves, for an autograd function of their own,
and the visibility test.

    from diff_gaussian_rasterization._C import fusedssim, fusedssim_backward
"""

import torch
from fused_ssim import ssim_map
from torch import Tensor

from diff_gaussian_rasterization.inria import mark_visible

__all__ = ["fusedssim", "fusedssim_backward", "mark_visible"]

SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # the kernel's, for images in [0, 1]


def fusedssim(
    C1: float,
    C2: float,
    img1: Tensor,  # [B, C, H, W] or [C, H, W]
    img2: Tensor,  # [B, C, H, W] or [C, H, W]
) -> Tensor:
    """Return the structural similarity of every pixel, images extended by zeros.

    Args:
        C1: Constant of the means; 0.01² is what there is.
        C2: Constant of the variances; 0.03² is what there is.
        img1: Images in [0, 1]. [B, C, H, W] or [C, H, W]
        img2: Images in [0, 1]. As img1.

    Returns:
        Similarity in [-1, 1], without a gradient: see `fusedssim_backward`. Shaped as img1.

    Raises:
        ValueError: Other constants, or shapes that differ.
    """
    _check_constants(C1, C2)
    with torch.no_grad():
        return ssim_map(_batch(img1), _batch(img2)).reshape(img1.shape)


def fusedssim_backward(
    C1: float,
    C2: float,
    img1: Tensor,  # [B, C, H, W] or [C, H, W]
    img2: Tensor,  # [B, C, H, W] or [C, H, W]
    dL_dmap: Tensor,  # [B, C, H, W] or [C, H, W]
) -> Tensor:
    """Carry the gradient of the map that `fusedssim` gave back to `img1`.

    Args:
        C1: As in `fusedssim`.
        C2: As in `fusedssim`.
        img1: As in `fusedssim`.
        img2: As in `fusedssim`.
        dL_dmap: Gradient by the map. Shaped as img1.

    Returns:
        Gradient by img1. Shaped as img1.

    Raises:
        ValueError: As `fusedssim`.
    """
    _check_constants(C1, C2)
    with torch.enable_grad():
        leaf = img1.detach().requires_grad_()
        values = ssim_map(_batch(leaf), _batch(img2))
    (grad,) = torch.autograd.grad(values, leaf, dL_dmap.reshape(values.shape))
    return grad


def _batch(images: Tensor) -> Tensor:
    return images[None] if images.ndim == 3 else images


def _check_constants(c1: float, c2: float) -> None:
    if abs(c1 - SSIM_C1) > 1e-6 * SSIM_C1 or abs(c2 - SSIM_C2) > 1e-6 * SSIM_C2:
        raise ValueError(
            f"fusedssim: C1, C2 must be 0.01² and 0.03² (images in [0, 1]), got {c1} and {c2}. Scale the images."
        )
