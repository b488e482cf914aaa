# SPDX-License-Identifier: Apache-2.0
"""Differentiable 3D Gaussian rasteriser for CPUs; `rasterize_gaussians_raw` is the general face.

`GaussianRasterizer` is the face that 3DGS code imports; both translate onto one core."""

from diff_gaussian_rasterization.general import (
    RasterOutput,
    rasterize_gaussians_raw,
    set_num_threads,
)
from diff_gaussian_rasterization.inria import GaussianRasterizationSettings, GaussianRasterizer
from diff_gaussian_rasterization.optimizer import SparseGaussianAdam, add_gradient_lengths

__all__ = [
    "GaussianRasterizationSettings",
    "GaussianRasterizer",
    "RasterOutput",
    "SparseGaussianAdam",
    "add_gradient_lengths",
    "rasterize_gaussians_raw",
    "set_num_threads",
]
