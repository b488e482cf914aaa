"""Real spherical harmonics up to degree 3, in the sign and order that 3DGS files use.

Notation: direction d = (x, y, z), unit, from the camera to the Gaussian, world frame; K = (degree + 1)² basis functions, degree by
degree; colour = 0.5 + Σ_k c_k Y_k(d), clamped at 0 by the rasteriser. The odd-in-sign functions (Y_1, Y_3, …) carry the Condon–Shortley
minus of the 3DGS convention.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SH_C0 = 0.5 / math.sqrt(math.pi)  # the constant function, normalised over the sphere


def sh_basis(
    directions: Tensor,  # [..., 3]
    degree: int,
) -> Tensor:
    """Evaluate the basis functions at directions of any length > 0.

    They are orthonormal: the integral of Y_i Y_j over the unit sphere is 1 where i = j, else 0.

    Args:
        directions: World. [..., 3]
        degree: 0 to 3.

    Returns:
        [..., (degree + 1)²]

    Differentiable.
    """
    if degree not in (0, 1, 2, 3):
        raise ValueError(f"sh_basis: degree must be 0, 1, 2 or 3, got {degree}.")
    x, y, z = F.normalize(directions, dim=-1).unbind(-1)
    pi = math.pi
    basis = [torch.full_like(x, SH_C0)]
    if degree >= 1:
        c = math.sqrt(3 / (4 * pi))
        basis += [-c * y, c * z, -c * x]
    if degree >= 2:
        c = math.sqrt(15 / (4 * pi))
        basis += [
            c * x * y,
            -c * y * z,
            math.sqrt(5 / (16 * pi)) * (3 * z * z - 1),
            -c * x * z,
            c / 2 * (x * x - y * y),
        ]
    if degree >= 3:
        outer = math.sqrt(35 / (32 * pi))
        middle = math.sqrt(105 / (4 * pi))
        inner = math.sqrt(21 / (32 * pi))
        basis += [
            -outer * y * (3 * x * x - y * y),
            middle * x * y * z,
            -inner * y * (5 * z * z - 1),
            math.sqrt(7 / (16 * pi)) * z * (5 * z * z - 3),
            -inner * x * (5 * z * z - 1),
            middle / 2 * z * (x * x - y * y),
            -outer * x * (x * x - 3 * y * y),
        ]
    return torch.stack(basis, -1)


def eval_sh(
    coefficients: Tensor,  # [..., K, 3]
    directions: Tensor,  # [..., 3]
) -> Tensor:
    """Evaluate view-dependent colour: 0.5 + Σ_k c_k Y_k(d), not clamped. Differentiable in both. [..., 3]

    Args:
        coefficients: `sh0` and `shN` joined. [..., K, 3], K = 1, 4, 9 or 16
        directions: From the camera to the Gaussian, any length > 0. [..., 3]
    """
    degree = math.isqrt(coefficients.shape[-2]) - 1
    if (degree + 1) ** 2 != coefficients.shape[-2]:
        raise ValueError(f"eval_sh: K must be 1, 4, 9 or 16, got {coefficients.shape[-2]}.")
    return 0.5 + (sh_basis(directions, degree)[..., None] * coefficients).sum(-2)


def rgb_to_sh0(rgbs: Tensor) -> Tensor:
    """Turn colours in [0, 1] into the coefficient of the constant function; any shape."""
    return (rgbs - 0.5) / SH_C0


def sh0_to_rgb(sh0: Tensor) -> Tensor:
    """Invert `rgb_to_sh0`; any shape."""
    return sh0 * SH_C0 + 0.5
