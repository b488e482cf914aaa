# SPDX-License-Identifier: Apache-2.0
"""The rasteriser in plain PyTorch: the document of the algorithm and the oracle of the kernels.

Same signature and conventions as `general.rasterize_gaussians_raw`, any float dtype, gradients by autograd. Every pixel looks
at every visible Gaussian, so memory is O(H W N): for tests and for reading, not for training.

Notation: C cameras, N Gaussians, M of them visible to one camera (nearest first), P = H W pixels.

- Camera: OpenCV axes (x right, y down, z forward), `x_cam = R x_world + t` with `viewmat = [R t; 0 1]`, its centre is `-Rᵀ t`.
- Pixels: corner origin. Pixel (row i, column j) is sampled at (j + 0.5, i + 0.5); a point projects to `fx X/Z + cx, fy Y/Z + cy`.
- Shape: Σ = R(q/|q|) diag(exp(2 log_scales)) R(q/|q|)ᵀ, seen through the affine approximation of the projection (EWA: Zwicker et
  al., "EWA splatting", 2002) at the centre, plus BLUR on the diagonal so that no splat falls between the pixels.
- The approximation is bad far off the axis: there X/Z and Y/Z are clamped to the field of view and 30 % of its half-width
  beyond each edge, in the Jacobian only. A clamped ratio passes no gradient.
- Density: α = min(ALPHA_MAX, opacity · exp(-½ dᵀ conic d)), d = pixel - mean2d. α < ALPHA_MIN is skipped, so a splat ends exactly at
  the ellipse dᵀ conic d = 2 ln(opacity / ALPHA_MIN), and opacities below ALPHA_MIN are never visible.
- Order: nearest camera-z first, equal z by index. A pixel is finished BEFORE the Gaussian that would bring its transmittance T below
  T_MIN. Weights w = α T.
- Colour: max(0, SH(direction) + ½), direction from the camera centre to the mean. Differentiable through the direction; zero
  gradient where the maximum cuts.
- Result: rgb = Σ w c + T_final background, alpha = 1 - T_final, depth = Σ w z / Σ w (0 where alpha is 0).
- radii: half-extent of the axis-aligned bound of the ellipse, in pixels, rounded up; 0 where the Gaussian is not visible, which means
  culled (z <= NEAR, opacity < ALPHA_MIN), or its bound does not overlap the image.
- Poison: a Gaussian with a non-finite parameter, a zero quaternion or a covariance that is not finite is not visible and gets zero
  gradient: outputs are always finite. A non-finite camera or background is the caller's mistake: ValueError.

Constants as in Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance Field Rendering", 2023, and its public viewers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diff_gaussian_rasterization.general import RasterOutput

ALPHA_MIN = 1 / 255  # one step of an 8-bit image: what is fainter cannot be seen
ALPHA_MAX = 0.99  # keeps 1 - α away from zero: the backward pass divides by it
T_MIN = 1e-4  # (1 - ALPHA_MAX)²: two opaque splats finish a pixel
BLUR = 0.3  # pixel², variance of the low-pass filter added to the 2D covariance
NEAR = 0.2  # world units: splats nearer than this cover the image and carry no information
FOV_MARGIN = 0.3  # of the half-width (half-height), where the ratios in the Jacobian are clamped

# Real spherical harmonics, normalised over the sphere, in the sign convention of 3DGS files: SH_C[l] holds the constants of
# degree l, order m = -l … l.
SH_C = (
    (math.sqrt(1 / (4 * math.pi)),),
    (-math.sqrt(3 / (4 * math.pi)), math.sqrt(3 / (4 * math.pi)), -math.sqrt(3 / (4 * math.pi))),
    (
        math.sqrt(15 / (4 * math.pi)),
        -math.sqrt(15 / (4 * math.pi)),
        math.sqrt(5 / (16 * math.pi)),
        -math.sqrt(15 / (4 * math.pi)),
        math.sqrt(15 / (16 * math.pi)),
    ),
    (
        -math.sqrt(35 / (32 * math.pi)),
        math.sqrt(105 / (4 * math.pi)),
        -math.sqrt(21 / (32 * math.pi)),
        math.sqrt(7 / (16 * math.pi)),
        -math.sqrt(21 / (32 * math.pi)),
        math.sqrt(105 / (16 * math.pi)),
        -math.sqrt(35 / (32 * math.pi)),
    ),
)


class _Splats(NamedTuple):
    """What one camera sees of M Gaussians."""

    means2d: Tensor  # [M, 2] pixels
    covs2d: Tensor  # [M, 2, 2] pixels², blur included
    depths: Tensor  # [M] camera-z
    opacities: Tensor  # [M]
    colours: Tensor  # [M, 3]


def rasterize_reference(
    means: Tensor,  # [N, 3]
    log_scales: Tensor,  # [N, 3]
    quats: Tensor,  # [N, 4]
    opacity_logits: Tensor,  # [N]
    sh0: Tensor,  # [N, 1, 3]
    shN: Tensor,  # [N, K-1, 3]
    viewmats: Tensor,  # [C, 4, 4]
    Ks: Tensor,  # [C, 3, 3]
    width: int,
    height: int,
    *,
    background: Tensor | None = None,  # [3]
    sh_degree: int | None = None,
    means2d_probe: Tensor | None = None,  # [C, N, 2]
) -> RasterOutput:
    """Render Gaussians into every camera, slowly and readably.

    Args:
        means: Centres, world. [N, 3]
        log_scales: Natural logarithms of the standard deviations, world units. [N, 3]
        quats: Rotations wxyz, any norm but zero. [N, 4]
        opacity_logits: Opacity is their sigmoid. [N]
        sh0: Colour coefficients of degree 0. [N, 1, 3]
        shN: Those of the higher degrees, K = (degree + 1)². [N, K-1, 3]
        viewmats: World-to-camera. [C, 4, 4]
        Ks: Intrinsics in pixels; no skew. [C, 3, 3]
        width: Image width in pixels.
        height: Image height in pixels.
        background: Colour behind everything; black where None. [3]
        sh_degree: Degree in use, 0-3; all that sh0 and shN hold where None.
        means2d_probe: Zeros, added to the projected means: its gradient is that of the pixel positions. [C, N, 2]

    Returns:
        `RasterOutput` with
        - **rgb** [C, H, W, 3], **alpha** [C, H, W, 1], **depth** [C, H, W, 1] in the dtype of `means`
        - **radii** [C, N] int32, pixels; 0 = not visible

    Raises:
        ValueError: A camera or the background is not finite.

    Differentiable in every float argument; of `Ks` in focal lengths and principal point.
    """
    for name, value in (("viewmats", viewmats), ("Ks", Ks), ("background", background)):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise ValueError(f"rasterize: {name} has non-finite values. Check the cameras.")
    if background is None:
        background = means.new_zeros(3)
    degree = math.isqrt(1 + shN.shape[1]) - 1 if sh_degree is None else sh_degree
    coeffs = torch.cat([sh0, shN], dim=1)  # [N, K, 3]
    gaussians = (means, log_scales, quats, opacity_logits, coeffs)
    healthy = torch.stack([torch.isfinite(x).flatten(1).all(1) for x in _columns(gaussians)]).all(0)
    healthy &= quats.norm(dim=1) > 0

    images = []
    radii = torch.zeros(len(viewmats), len(means), dtype=torch.int32)
    for c, (viewmat, K) in enumerate(zip(viewmats, Ks, strict=True)):
        with torch.no_grad():
            ids = healthy.nonzero()[:, 0]
            ids = ids[(means[ids] @ viewmat[2, :3] + viewmat[2, 3]) > NEAR]
            splats = _project(*(x[ids] for x in gaussians), viewmat, K, width, height, degree)
            extents = _extents(splats)  # [M, 2]
            low, high = splats.means2d - extents, splats.means2d + extents
            size = means.new_tensor([width, height])
            seen = (extents > 0).all(1) & (high > 0).all(1) & (low < size).all(1)
            radii[c, ids[seen]] = extents[seen].amax(1).ceil().clamp_max(2**31 - 1).to(torch.int32)
            order = torch.sort(splats.depths[seen], stable=True).indices
            ids = ids[seen][order]
        # Indexing with what is visible gives everything else a gradient of exactly zero.
        splats = _project(*(x[ids] for x in gaussians), viewmat, K, width, height, degree)
        if means2d_probe is not None:
            splats = splats._replace(means2d=splats.means2d + means2d_probe[c, ids])
        images.append(_blend(splats, background, width, height))
    rgb, alpha, depth = (torch.stack(x) for x in zip(*images, strict=True))
    return RasterOutput(rgb, alpha, depth, radii)


def _columns(gaussians: tuple[Tensor, ...]) -> list[Tensor]:
    """View every parameter as [N, anything]."""
    return [x.reshape(len(x), -1) for x in gaussians]


def _rotations(quats: Tensor) -> Tensor:  # [M, 4] -> [M, 3, 3]
    w, x, y, z = (quats / quats.norm(dim=1, keepdim=True)).unbind(1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def sh_basis(
    dirs: Tensor,  # [M, 3] unit
    degree: int,
) -> Tensor:
    """Evaluate the real spherical harmonics of degree 0 to `degree` (at most 3) at unit directions. -> [M, (degree + 1)²]"""
    x, y, z = dirs.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    polynomials = (
        (torch.ones_like(x),),
        (y, z, x),
        (x * y, y * z, 2 * zz - xx - yy, x * z, xx - yy),
        (
            y * (3 * xx - yy),
            x * y * z,
            y * (4 * zz - xx - yy),
            z * (2 * zz - 3 * xx - 3 * yy),
            x * (4 * zz - xx - yy),
            z * (xx - yy),
            x * (xx - 3 * yy),
        ),
    )
    rows = [
        constant * polynomial
        for constants, row in zip(SH_C[: degree + 1], polynomials, strict=False)
        for constant, polynomial in zip(constants, row, strict=True)
    ]
    return torch.stack(rows, dim=-1)


def _project(
    means: Tensor,  # [M, 3]
    log_scales: Tensor,  # [M, 3]
    quats: Tensor,  # [M, 4]
    opacity_logits: Tensor,  # [M]
    coeffs: Tensor,  # [M, K, 3]
    viewmat: Tensor,  # [4, 4]
    K: Tensor,  # [3, 3]
    width: int,
    height: int,
    degree: int,
) -> _Splats:
    """Turn Gaussians in front of a camera into 2D Gaussians with a colour."""
    R, t = viewmat[:3, :3], viewmat[:3, 3]
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]

    x, y, z = (means @ R.T + t).unbind(1)  # [M]
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=1)  # [M, 2]

    margin_x, margin_y = FOV_MARGIN * width / (2 * fx), FOV_MARGIN * height / (2 * fy)
    tan_x = (x / z).clamp(-cx / fx - margin_x, (width - cx) / fx + margin_x)
    tan_y = (y / z).clamp(-cy / fy - margin_y, (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    J = torch.stack([fx / z, zero, -fx * tan_x / z, zero, fy / z, -fy * tan_y / z], dim=1)
    half = _rotations(quats) * log_scales.exp()[:, None, :]  # [M, 3, 3], Σ = half halfᵀ
    half2d = J.reshape(-1, 2, 3) @ R @ half  # [M, 2, 3]
    covs2d = half2d @ half2d.transpose(1, 2) + BLUR * torch.eye(2, dtype=means.dtype)

    offsets = means - (-R.T @ t)  # [M, 3] from the camera centre
    dirs = offsets / offsets.norm(dim=1, keepdim=True)
    basis = sh_basis(dirs, degree)  # [M, (degree + 1)²]
    colours = (torch.einsum("mk,mkc->mc", basis, coeffs[:, : basis.shape[1]]) + 0.5).relu()
    return _Splats(means2d, covs2d, z, opacity_logits.sigmoid(), colours)


def _extents(splats: _Splats) -> Tensor:
    """Half-extents in x and y of the ellipse where α = ALPHA_MIN; 0 for a splat that cannot be drawn. -> [M, 2]"""
    level = 2 * (splats.opacities / ALPHA_MIN).log()  # [M] dᵀ conic d on the ellipse
    variances = splats.covs2d.diagonal(dim1=1, dim2=2)  # [M, 2]
    drawable = torch.isfinite(splats.covs2d).all(2).all(1) & (torch.linalg.det(splats.covs2d) > 0)
    drawable &= torch.isfinite(splats.means2d).all(1) & torch.isfinite(splats.colours).all(1)
    extents = (level.clamp_min(0)[:, None] * variances).sqrt()
    return torch.where(drawable[:, None], extents, torch.zeros_like(extents))


def _blend(
    splats: _Splats,  # nearest first
    background: Tensor,  # [3]
    width: int,
    height: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Composite front to back. -> rgb [H, W, 3], alpha [H, W, 1], depth [H, W, 1]"""
    dtype = splats.means2d.dtype
    rows = torch.arange(height, dtype=dtype) + 0.5
    columns = torch.arange(width, dtype=dtype) + 0.5
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).reshape(-1, 1, 2)

    (a, b), (_, c) = (row.unbind(1) for row in splats.covs2d.unbind(1))  # [M] each
    dx, dy = (pixels - splats.means2d).unbind(-1)  # [P, M]
    # dᵀ conic d with the closed inverse of [[a, b], [b, c]].
    distance2 = (c * dx * dx - 2 * b * dx * dy + a * dy * dy) / (a * c - b * b)
    alphas = (splats.opacities * torch.exp(-0.5 * distance2)).clamp_max(ALPHA_MAX)  # [P, M]
    alphas = torch.where(alphas < ALPHA_MIN, torch.zeros_like(alphas), alphas)
    open_ = torch.cumprod(1 - alphas, dim=1) >= T_MIN  # false from the stopping Gaussian on
    alphas = alphas * open_

    ones = alphas.new_ones(len(alphas), 1)
    T = torch.cumprod(torch.cat([ones, 1 - alphas], dim=1), dim=1)  # [P, M+1]
    T_final = T[:, -1:]  # [P, 1]
    weights = alphas * T[:, :-1]  # [P, M]
    rgb = weights @ splats.colours + T_final * background
    total = weights.sum(1, keepdim=True)
    covered = total > 0
    depth = (weights @ splats.depths[:, None]) / torch.where(covered, total, torch.ones_like(total))
    shape = (height, width, -1)
    return rgb.reshape(shape), (1 - T_final).reshape(shape), depth.reshape(shape)
