# SPDX-License-Identifier: Apache-2.0
"""Differentiable 3D Gaussian rasteriser for CPUs; see `general.rasterize_gaussians_raw`."""

from diff_gaussian_rasterization.general import (
    RasterOutput,
    rasterize_gaussians_raw,
    set_num_threads,
)

__all__ = ["RasterOutput", "rasterize_gaussians_raw", "set_num_threads"]
