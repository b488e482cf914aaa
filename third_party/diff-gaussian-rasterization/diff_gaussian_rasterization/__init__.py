# SPDX-License-Identifier: Apache-2.0
"""Differentiable 3D Gaussian rasteriser for CPUs; `rasterize_gaussians_raw` is the general face.

`GaussianRasterizer` is the face that 3DGS code imports; both translate onto one core."""

from diff_gaussian_rasterization.general import (
    RasterOutput,
    rasterize_gaussians_raw,
    set_num_threads,
)
from diff_gaussian_rasterization.inria import GaussianRasterizationSettings, GaussianRasterizer
from diff_gaussian_rasterization.optimizer import SparseGaussianAdam
from diff_gaussian_rasterization.training_view import TrainingView

__all__ = [
    "GaussianRasterizationSettings",
    "GaussianRasterizer",
    "RasterOutput",
    "SparseGaussianAdam",
    "TrainingView",
    "rasterize_gaussians_raw",
    "set_num_threads",
]
