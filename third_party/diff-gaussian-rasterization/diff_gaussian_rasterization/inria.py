# SPDX-License-Identifier: Apache-2.0
"""The face that 3DGS code imports: tangents of the field of view, transposed matrices, activated parameters.

A translation onto the general face. What it cannot express there (a principal point off the middle) it cannot express here either.
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

NEAR = 0.2  # world units; as in csrc/common/constants.h


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
    antialiasing: bool = False  # opacity times sqrt(det cov / det blurred cov)


class GaussianRasterizer(nn.Module):
    """Callable with the signature of `forward`."""

    def __init__(self, raster_settings: GaussianRasterizationSettings) -> None:
        super().__init__()
        self.raster_settings = raster_settings

    def markVisible(self, positions: Tensor) -> Tensor:
        """Tell which positions [N, 3] lie beyond the near plane. -> [N] bool"""
        with torch.no_grad():
            viewmatrix = self.raster_settings.viewmatrix
            return positions @ viewmatrix[:3, 2] + viewmatrix[3, 2] > NEAR

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Render one image.

        Args:
            means3D: Centres, world. [N, 3]
            means2D: Values are not read; its gradient receives dL/d(position in [-1, 1] image coordinates). [N, 2 or 3]
            opacities: In (0, 1]. [N, 1]
            shs: Colour coefficients; or give `colors_precomp`. [N, K, 3]
            colors_precomp: Colours as they are drawn. [N, 3]
            scales: Standard deviations, world units; or give `cov3D_precomp`. [N, 3]
            rotations: Quaternions wxyz. [N, 4]
            cov3D_precomp: Covariances xx, xy, xz, yy, yz, zz; `scale_modifier` does not apply to them. [N, 6]

        Returns:
            colour [3, H, W], radii [N] int32 (0 = not visible), inverse depth Σ w / z [1, H, W].
        """
        s = self.raster_settings
        _exactly_one("shs", shs, "colors_precomp", colors_precomp)
        _exactly_one("scales and rotations", scales, "cov3D_precomp", cov3D_precomp)
        if (scales is None) != (rotations is None):
            raise ValueError(
                "rasterize: scales and rotations go together, or cov3D_precomp instead of both."
            )
        if s.antialiasing and cov3D_precomp is not None:
            raise ValueError(
                "rasterize: antialiasing with cov3D_precomp is not supported. Pass scales and rotations."
            )
        n = len(means3D)
        check_tensor("means3D", means3D, (n, 3))
        check_tensor("opacities", opacities, (n, 1))
        for name, value, shape in (
            ("colors_precomp", colors_precomp, (n, 3)),
            ("scales", scales, (n, 3)),
            ("rotations", rotations, (n, 4)),
            ("cov3D_precomp", cov3D_precomp, (n, 6)),
        ):
            if value is not None:
                check_tensor(name, value, shape)
        degree = 0
        if shs is not None:
            coefficients = shs.shape[1] if shs.dim() == 3 else 0
            degree = min(s.sh_degree, MAX_DEGREE)
            if coefficients not in (1, 4, 9, 16) or (degree + 1) ** 2 > coefficients:
                raise ValueError(
                    f"rasterize: shs must be [N, K, 3] with K = 1, 4, 9 or 16 and at least {(degree + 1) ** 2} for "
                    f"sh_degree {s.sh_degree}, got {list(shs.shape)}."
                )
            check_tensor("shs", shs, (n, coefficients, 3))
        scene = SceneTensors(
            means=means3D,
            log_scales=scales,
            quats=rotations,
            opacity_logits=opacities[:, 0],
            sh0=None if shs is None else shs[:, :1],
            shN=None if shs is None else shs[:, 1:],
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
            antialiasing=bool(s.antialiasing),
        )
        probe = None
        if means2D is not None and means2D.requires_grad:
            probe = _PixelGradient.apply(means2D, s.image_width, s.image_height)
        out = render(scene, s.viewmatrix.mT[None], _intrinsics(s), s.bg, probe, options)
        return out.rgb[0].permute(2, 0, 1).contiguous(), out.radii[0], out.depth[0].permute(2, 0, 1)


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


def _intrinsics(s: GaussianRasterizationSettings) -> Tensor:  # [1, 3, 3]
    width, height = s.image_width, s.image_height
    fx, fy = width / (2 * s.tanfovx), height / (2 * s.tanfovy)
    return torch.tensor([[[fx, 0, width / 2], [0, fy, height / 2], [0, 0, 1]]], dtype=torch.float32)


def _exactly_one(name: str, value: Tensor | None, other_name: str, other: Tensor | None) -> None:
    if (value is None) == (other is None):
        raise ValueError(f"rasterize: give exactly one of {name} and {other_name}.")
