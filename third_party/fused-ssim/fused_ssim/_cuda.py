# SPDX-License-Identifier: Apache-2.0
"""The core on a GPU: the launches of csrc/cuda/ssim.cu behind the same autograd functions as on the CPU. Nothing waits for the GPU."""

import functools
from pathlib import Path

import torch
from native_build import cuda
from torch import Tensor

TILE = 32  # pixels
MOST_PLANES = 65535  # blocks of a grid along z


@functools.cache
def kernels() -> cuda.Kernels:
    """The kernels; compiled when the first is launched."""
    return cuda.Kernels("fused_ssim", [Path(__file__).parent / "csrc" / "cuda" / "ssim.cu"])


def forward(
    x: Tensor,  # [planes, H, W, channels]
    y: Tensor,  # [planes, H, W, channels]
    l1_factor: float,
    ssim_factor: float,
    margin: int = 0,
    *,
    map_gradient: Tensor | None = None,  # [planes, H, W, channels]
    ssim_map: Tensor | None = None,  # [planes, H, W, channels]
    with_partials: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Sum l1_factor |x - y| + ssim_factor S over all values; `_native.image_loss` says what the arguments are.

    Returns:
        The sum [1] float64, and with `with_partials` what `gradient` needs [3, planes, H, W, channels].

    Raises:
        ValueError: More planes than one grid has blocks.
    """
    _, height, width, channels = x.shape
    total = torch.zeros(1, dtype=torch.float64, device=x.device)
    partials = x.new_empty(3, *x.shape) if with_partials else None
    kernels().launch(
        "ssim_forward",
        _grid(x),
        256,
        height,
        width,
        channels,
        margin,
        l1_factor,
        ssim_factor,
        x,
        y,
        map_gradient,
        total,
        ssim_map,
        partials,
    )
    return total, partials


def gradient(
    x: Tensor,  # [planes, H, W, channels]
    y: Tensor,  # [planes, H, W, channels]
    partials: Tensor,  # [3, planes, H, W, channels]
    l1_factor: float,
    ssim_factor: float,
    gradient_factor: float,
    *,
    upstream: Tensor | None = None,  # []
    pixel_weight: Tensor | None = None,  # [H, W, 1]
) -> Tensor:
    """gradient_factor times `upstream` times the derivative of the sum by x. [planes, H, W, channels]"""
    _, height, width, channels = x.shape
    out = torch.empty_like(x)
    kernels().launch(
        "ssim_gradient",
        _grid(x),
        256,
        height,
        width,
        channels,
        l1_factor,
        ssim_factor,
        gradient_factor,
        upstream,
        x,
        y,
        pixel_weight,
        partials,
        out,
    )
    return out


def _grid(x: Tensor) -> tuple[int, int, int]:
    planes, height, width, _ = x.shape
    if planes > MOST_PLANES:
        raise ValueError(
            f"fused_ssim: {planes} image planes are too many at once. Expected up to {MOST_PLANES}: give fewer images at a time."
        )
    return cuda.blocks(width, TILE), cuda.blocks(height, TILE), planes


class Loss(torch.autograd.Function):
    """L1 mixed with similarity; the backward pass takes a second launch."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, ssim_weight: float, pixel_weight: Tensor | None):
        x, y = x.contiguous()[None], y.contiguous()[None]
        factors = (1.0 - ssim_weight, -ssim_weight)
        total, partials = forward(x, y, *factors, with_partials=ctx.needs_input_grad[0])
        ctx.factors = factors
        ctx.save_for_backward(x, y, partials, pixel_weight)
        return (ssim_weight + total[0] / x.numel()).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, partials, pixel_weight = ctx.saved_tensors
        factors = (*ctx.factors, 1.0 / x.numel())
        out = gradient(
            x, y, partials, *factors, upstream=upstream.contiguous(), pixel_weight=pixel_weight
        )
        return out[0], None, None, None


class Mean(torch.autograd.Function):
    """As `Loss`, for the mean similarity of a batch [planes, H, W, 1]."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, margin: int, train: bool) -> Tensor:
        planes, height, width, _ = x.shape
        ctx.count = planes * (height - 2 * margin) * (width - 2 * margin)
        wanted = train and ctx.needs_input_grad[0]
        total, partials = forward(x, y, 0.0, 1.0, margin, with_partials=wanted)
        ctx.save_for_backward(x, y, partials)
        return (total[0] / ctx.count).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, partials = ctx.saved_tensors
        if partials is None:
            raise ValueError("fused_ssim: no gradient was prepared. Pass train=True.")
        up = upstream.contiguous()
        return gradient(x, y, partials, 0.0, 1.0, 1.0 / ctx.count, upstream=up), None, None, None


class Map(torch.autograd.Function):
    """Similarity of every value; the backward pass runs the forward kernel again, with the gradient of every value."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, margin: int) -> Tensor:
        values = torch.empty_like(x)
        forward(x, y, 0.0, 1.0, margin, ssim_map=values)
        ctx.save_for_backward(x, y)
        ctx.margin = margin
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        _, partials = forward(
            x, y, 0.0, 1.0, ctx.margin, map_gradient=upstream.contiguous(), with_partials=True
        )
        return gradient(x, y, partials, 0.0, 1.0, 1.0), None, None
