# SPDX-License-Identifier: Apache-2.0
"""The face that 3DGS code imports: tangents of the field of view, transposed matrices, activated parameters.

A translation onto the general face. It serves the call styles of three generations of 3DGS code; docs/kernels.md lists them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from diff_gaussian_rasterization.general import (
    MAX_DEGREE,
    RenderOptions,
    SceneTensors,
    check_tensor,
    render,
)

NEAR = 0.2  # world units; these three as in csrc/common/constants.h
BLUR = 0.3  # pixel²
FOV_MARGIN = 0.3  # of the half-width (half-height)


class GaussianRasterizationSettings(NamedTuple):
    """One camera and how to render it, in 3DGS's terms."""

    image_height: int
    image_width: int
    tanfovx: float  # half the image's width at distance 1
    tanfovy: float
    bg: Tensor  # [3]
    scale_modifier: float  # multiplies the scales
    viewmatrix: Tensor  # [4, 4] world-to-camera, transposed: for row vectors
    projmatrix: Tensor  # [4, 4] unused: tangents and viewmatrix say the same
    sh_degree: int  # in use
    campos: Tensor  # [3] unused: viewmatrix says the same
    prefiltered: bool  # unused: culling is exact and cheap
    debug: bool  # unused
    # Opacity times sqrt(det cov / det blurred cov). Code from before there was this field expects two results, not three: None.
    antialiasing: bool | None = None


class GaussianRasterizer(nn.Module):
    """Callable with the signature of `forward`."""

    def __init__(self, raster_settings: GaussianRasterizationSettings) -> None:
        super().__init__()
        self.raster_settings = raster_settings

    def markVisible(self, positions: Tensor) -> Tensor:
        """Tell which positions [N, 3] lie beyond the near plane. -> [N] bool"""
        return mark_visible(positions, self.raster_settings.viewmatrix)

    def forward(
        self,
        means3D: Tensor,  # [N, 3]
        means2D: Tensor | None,  # [N, 2 or 3]
        opacities: Tensor,  # [N, 1]
        shs: Tensor | None = None,  # [N, K, 3]
        colors_precomp: Tensor | None = None,  # [N, 3]
        scales: Tensor | None = None,  # [N, 3]
        rotations: Tensor | None = None,  # [N, 4]
        cov3D_precomp: Tensor | None = None,  # [N, 6]
        *,
        dc: Tensor | None = None,  # [N, 1, 3]
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor]:
        """Render one image.

        Args:
            means3D: Centres, world. [N, 3]
            means2D: Values are not read; its gradient receives dL/d(position in [-1, 1] image coordinates). [N, 2 or 3]
            opacities: In (0, 1]. [N, 1]
            shs: Colour coefficients; or give `colors_precomp`. With `dc`, those of the higher degrees. [N, K, 3] or [N, K-1, 3]
            colors_precomp: Colours as they are drawn. [N, 3]
            scales: Standard deviations, world units; or give `cov3D_precomp`. [N, 3]
            rotations: Quaternions wxyz. [N, 4]
            cov3D_precomp: Covariances xx, xy, xz, yy, yz, zz; `scale_modifier` does not apply to them. [N, 6]
            dc: Colour coefficients of degree 0, where the caller keeps them apart. [N, 1, 3]

        Returns:
            colour [3, H, W], radii [N] int32 (0 = not visible), inverse depth Σ w / z [1, H, W]; without the inverse depth where
            the settings were made without `antialiasing`.

        Raises:
            ValueError: A shape, type or device is wrong, or not exactly one way to give colours (shapes) was used.

        Differentiable in every float tensor here, and in the settings' `bg` and `viewmatrix`.
        """
        s = self.raster_settings
        _exactly_one("shs (or dc)", dc if shs is None else shs, "colors_precomp", colors_precomp)
        _exactly_one("scales and rotations", scales, "cov3D_precomp", cov3D_precomp)
        if (scales is None) != (rotations is None):
            raise ValueError(
                "rasterize: scales and rotations go together, or cov3D_precomp instead of both."
            )
        n = len(means3D)
        check_tensor("means3D", means3D, (n, 3))
        device = means3D.device
        check_tensor("opacities", opacities, (n, 1), device)
        for name, value, shape in (
            ("colors_precomp", colors_precomp, (n, 3)),
            ("scales", scales, (n, 3)),
            ("rotations", rotations, (n, 4)),
            ("cov3D_precomp", cov3D_precomp, (n, 6)),
        ):
            if value is not None:
                check_tensor(name, value, shape, device)
        degree, sh0, shN = _coefficients(n, device, dc, shs, s.sh_degree)
        if s.antialiasing and cov3D_precomp is not None:
            opacities = opacities * _sharpness(s, means3D, cov3D_precomp)[:, None]
        scene = SceneTensors(
            means=means3D,
            log_scales=scales,
            quats=rotations,
            opacity_logits=opacities[:, 0],
            sh0=sh0,
            shN=shN,
            colors=colors_precomp,
            covars=cov3D_precomp,
        )
        options = RenderOptions(
            width=int(s.image_width),
            height=int(s.image_height),
            degree=degree,
            activated=True,
            scale_modifier=float(s.scale_modifier),
            inverse_depth=True,
            antialiasing=bool(s.antialiasing) and cov3D_precomp is None,
        )
        probe = None
        if means2D is not None and means2D.requires_grad:
            probe = _PixelGradient.apply(means2D, s.image_width, s.image_height)
        out = render(scene, s.viewmatrix.mT[None], _intrinsics(s), s.bg, probe, options)
        colour, radii = out.rgb[0].permute(2, 0, 1).contiguous(), out.radii[0]
        if s.antialiasing is None:
            return colour, radii
        return colour, radii, out.depth[0].permute(2, 0, 1)


def mark_visible(
    positions: Tensor,  # [N, 3]
    viewmatrix: Tensor,  # [4, 4]
    projmatrix: Tensor | None = None,  # [4, 4]
) -> Tensor:
    """Tell which positions lie beyond the near plane of a camera.

    Args:
        positions: World. [N, 3]
        viewmatrix: World-to-camera, transposed: for row vectors. [4, 4]
        projmatrix: Not read: the sides of the frustum do not count. [4, 4]

    Returns:
        True where camera-z is beyond 0.2 world units. [N] bool
    """
    with torch.no_grad():
        return positions @ viewmatrix[:3, 2] + viewmatrix[3, 2] > NEAR


class _PixelGradient(torch.autograd.Function):
    """Zeros [1, N, 2] for the general face; their gradient comes back in half images, as 3DGS's thresholds expect."""

    @staticmethod
    def forward(ctx, means2d: Tensor, width: int, height: int) -> Tensor:
        ctx.width, ctx.height, ctx.shape = width, height, means2d.shape
        return means2d.new_zeros(1, len(means2d), 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        out = grad.new_zeros(ctx.shape)
        out[:, 0] = grad[0, :, 0] * (0.5 * ctx.width)
        out[:, 1] = grad[0, :, 1] * (0.5 * ctx.height)
        return out, None, None


def _coefficients(
    n: int, device: torch.device, dc: Tensor | None, shs: Tensor | None, sh_degree: int
) -> tuple[int, Tensor | None, Tensor | None]:
    """Check the SH coefficients in either style. -> degree in use, sh0 [N, 1, 3], shN [N, K-1, 3]"""
    if dc is None and shs is None:
        return 0, None, None
    name, given = ("dc", dc) if shs is None else ("shs", shs)
    apart = 0 if dc is None else 1
    coefficients = apart if shs is None else apart + (shs.shape[1] if shs.dim() == 3 else 0)
    degree = min(sh_degree, MAX_DEGREE)
    if coefficients not in (1, 4, 9, 16) or (degree + 1) ** 2 > coefficients:
        beside = ", dc counted" if apart else ""
        raise ValueError(
            f"rasterize: {name} must be [N, K, 3] with K = 1, 4, 9 or 16{beside} and at least {(degree + 1) ** 2} for "
            f"sh_degree {sh_degree}, got {list(given.shape)}."
        )
    if shs is not None:
        check_tensor("shs", shs, (n, coefficients - apart, 3), device)
    if dc is None:
        return degree, shs[:, :1], shs[:, 1:]
    check_tensor("dc", dc, (n, 1, 3), device)
    return degree, dc, dc.new_zeros(n, 0, 3) if shs is None else shs


def _sharpness(
    s: GaussianRasterizationSettings,
    means: Tensor,  # [N, 3]
    covars: Tensor,  # [N, 6]
) -> Tensor:
    """Return sqrt(det cov2d / det (cov2d + BLUR)), what antialiasing multiplies opacities by. [N]

    The core does this for scales and rotations, where it knows a root of the covariance. Here determinants of products have to
    do, and on needles these have no digits left in float32: hence float64.
    """
    viewmat = s.viewmatrix.mT.double()
    K = _intrinsics(s)[0].double().to(viewmat.device)
    x, y, z = (means.double() @ viewmat[:3, :3].mT + viewmat[:3, 3]).unbind(1)
    # Only what can be drawn: nothing else may put an infinity into the gradients.
    drawable = (z > NEAR) & torch.isfinite(means).all(1) & torch.isfinite(covars).all(1)
    one, zero = torch.ones_like(z), torch.zeros_like(z)
    x, y, z = (torch.where(drawable, value, one) for value in (x, y, z))
    limit_x, limit_y = (1 + FOV_MARGIN) * s.tanfovx, (1 + FOV_MARGIN) * s.tanfovy
    tan_x, tan_y = (x / z).clamp(-limit_x, limit_x), (y / z).clamp(-limit_y, limit_y)
    rows = torch.stack([one, zero, -tan_x, zero, one, -tan_y], dim=1).reshape(-1, 2, 3)
    A = K.diagonal()[:2, None] / z[:, None, None] * rows @ viewmat[:3, :3]  # [N, 2, 3]
    corner = covars.new_tensor([0, 1, 2, 1, 3, 4, 2, 4, 5], dtype=torch.long)
    sigma = torch.where(drawable[:, None], covars.double(), 0.0)[:, corner].reshape(-1, 3, 3)
    sharp = A @ sigma @ A.mT
    a, b, c = sharp[:, 0, 0], sharp[:, 0, 1], sharp[:, 1, 1]
    ratio = (a * c - b * b) / ((a + BLUR) * (c + BLUR) - b * b)
    # A flat splat seen edge-on has none; a root's gradient is infinite there.
    visible = drawable & (ratio > 1e-12)
    return torch.where(visible, torch.where(visible, ratio, one).sqrt(), zero).float()


def _intrinsics(s: GaussianRasterizationSettings) -> Tensor:  # [1, 3, 3]
    width, height = s.image_width, s.image_height
    fx, fy = width / (2 * s.tanfovx), height / (2 * s.tanfovy)
    return torch.tensor([[[fx, 0, width / 2], [0, fy, height / 2], [0, 0, 1]]], dtype=torch.float32)


def _exactly_one(name: str, value: Tensor | None, other_name: str, other: Tensor | None) -> None:
    if (value is None) == (other is None):
        raise ValueError(f"rasterize: give exactly one of {name} and {other_name}.")
