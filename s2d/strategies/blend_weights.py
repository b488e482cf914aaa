"""How much of a picture each Gaussian makes: sums of its blending weights over pixels.

Notation: w_k(u) is the weight of Gaussian k in pixel u, so that the pixel's colour is Σ w_k(u) c_k. Its sums over pixels are the gradient of
Σ_u p(u) C(u) by the colour c_k, which the rasteriser computes anyway: three channels, three sums in one pass.
"""

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.rasterize import rasterize
from s2d.sh import SH_C0


def blend_weights(
    gaussians: Gaussians,
    camera: Cameras,
    pixel_weights: Tensor,  # [H, W, 3]
) -> Tensor:
    """Sum each Gaussian's blending weights over the pixels, weighted.

    Args:
        gaussians: N Gaussians; their colours do not matter.
        camera: One camera.
        pixel_weights: p, three sets of weights. [H, W, 3]

    Returns:
        Σ_u w_k(u) p(u), in pixels; 0 for Gaussians that are not seen. [N, 3]
    """
    values = gaussians.detached()
    num, device = values.num, values.means.device
    # Mid-grey, degree 0: the rasteriser's clamp at black is far away and lets every gradient through.
    sh0 = torch.zeros(num, 1, 3, device=device, requires_grad=True)
    grey = Gaussians(
        values.means,
        values.log_scales,
        values.quats,
        values.opacity_logits,
        sh0,
        torch.zeros(num, 0, 3, device=device),
    )
    with torch.enable_grad():
        rgb = rasterize(grey, camera).rgb.squeeze(0)
    (gradient,) = torch.autograd.grad(rgb, sh0, pixel_weights)
    return gradient[:, 0] / SH_C0
