# SPDX-License-Identifier: Apache-2.0
"""Structural similarity of images with its gradient, on the CPU: one pass forward, one backward.

Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004: Gaussian window 11 x 11 with
sigma 1.5, C1 = 0.01², C2 = 0.03², images in [0, 1]. The kernel is compiled on first use.
"""

import ctypes
import functools
from pathlib import Path

import native_build
import torch
from torch import Tensor

__all__ = ["fused_ssim", "ssim_map"]

_MARGINS = {"same": 0, "valid": 5}  # pixels without a value at each edge: half of the window


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_build.load("fused_ssim", [Path(__file__).parent / "csrc" / "ssim.cpp"])
    pointer, int32 = ctypes.c_void_p, ctypes.c_int32
    library.s2d_ssim_forward.argtypes = [pointer] * 2 + [int32] * 5 + [pointer] * 5
    library.s2d_ssim_forward.restype = ctypes.c_int
    library.s2d_ssim_backward.argtypes = [pointer] * 6 + [ctypes.c_float] + [int32] * 4 + [pointer]
    library.s2d_ssim_backward.restype = ctypes.c_int
    return library


def fused_ssim(
    img1: Tensor,  # [B, C, H, W]
    img2: Tensor,  # [B, C, H, W]
    padding: str = "same",
    train: bool = True,
) -> Tensor:
    """Average the structural similarity of two batches of images.

    The gradient flows to `img1` alone: `img2` is the truth.

    Args:
        img1: Images in [0, 1]. [B, C, H, W]
        img2: Images in [0, 1]. [B, C, H, W]
        padding: "same" extends the images by zeros, every pixel counts; "valid" leaves out pixels nearer than 5 to an edge.
        train: False saves the memory that a backward pass needs.

    Returns:
        Mean over all pixels, channels and images, float32 scalar; 1 where the images are equal.

    Raises:
        ValueError: Shapes that differ or are too small, an unknown padding, or tensors that are not on the CPU.
    """
    margin = _check("fused_ssim", img1, img2, padding)
    return _Ssim.apply(img1.float(), img2.detach().float(), margin, train, False)


def ssim_map(
    img1: Tensor,  # [B, C, H, W]
    img2: Tensor,  # [B, C, H, W]
    padding: str = "same",
) -> Tensor:
    """Return the structural similarity of every pixel: `fused_ssim` before the mean.

    Args:
        img1: Images in [0, 1]; the gradient flows to these alone. [B, C, H, W]
        img2: Images in [0, 1]. [B, C, H, W]
        padding: As in `fused_ssim`.

    Returns:
        Similarity in [-1, 1], float32. [B, C, H, W], or [B, C, H - 10, W - 10] for "valid"

    Raises:
        ValueError: As `fused_ssim`.
    """
    margin = _check("ssim_map", img1, img2, padding)
    values = _Ssim.apply(img1.float(), img2.detach().float(), margin, True, True)
    height, width = values.shape[-2:]
    return values[..., margin : height - margin, margin : width - margin]


def _check(caller: str, img1: Tensor, img2: Tensor, padding: str) -> int:
    if padding not in _MARGINS:
        raise ValueError(f'{caller}: padding must be "same" or "valid", got {padding!r}.')
    if img1.ndim != 4 or img1.shape != img2.shape:
        raise ValueError(
            f"{caller}: img1 and img2 must be [B, C, H, W] of equal shape,"
            f" got {list(img1.shape)} and {list(img2.shape)}."
        )
    if img1.device.type != "cpu" or img2.device.type != "cpu":
        raise ValueError(
            f"{caller}: images must be on the CPU, got {img1.device} and {img2.device}."
        )
    margin = _MARGINS[padding]
    if img1.numel() == 0 or min(img1.shape[-2:]) <= 2 * margin:
        raise ValueError(
            f'{caller}: no pixel to compare in images {list(img1.shape)} with padding="{padding}".'
            ' Images must not be empty, and "valid" needs at least 11 x 11 pixels.'
        )
    return margin


def _check_memory(failed: int, img1: Tensor) -> None:
    if failed:
        raise MemoryError(f"fused_ssim: no memory left for images {list(img1.shape)}.")


class _Ssim(torch.autograd.Function):
    """Maps or means on float32 images; both keep the same three partial derivatives per pixel."""

    @staticmethod
    def forward(ctx, img1: Tensor, img2: Tensor, margin: int, train: bool, as_map: bool) -> Tensor:
        img1, img2 = img1.contiguous(), img2.contiguous()
        batch, channels, height, width = img1.shape
        planes = batch * channels
        keep = train and ctx.needs_input_grad[0]
        partials = [torch.empty_like(img1) for _ in range(3)] if keep else []
        values = torch.empty_like(img1) if as_map else None
        row_sums = None if as_map else torch.empty(planes, height, dtype=torch.float64)
        failed = _library().s2d_ssim_forward(
            img1.data_ptr(),
            img2.data_ptr(),
            planes,
            height,
            width,
            margin,
            native_build.num_threads(),
            None if values is None else values.data_ptr(),
            None if row_sums is None else row_sums.data_ptr(),
            *([x.data_ptr() for x in partials] or [None] * 3),
        )
        _check_memory(failed, img1)
        ctx.save_for_backward(img1, img2, *partials)
        ctx.count = planes * (height - 2 * margin) * (width - 2 * margin)
        return values if as_map else (row_sums.sum() / ctx.count).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        img1, img2, *partials = ctx.saved_tensors
        if not partials:
            raise ValueError("fused_ssim: no gradient was prepared. Pass train=True.")
        batch, channels, height, width = img1.shape
        as_map = grad.ndim == 4
        grad = grad.contiguous()
        grad_img1 = torch.empty_like(img1)
        failed = _library().s2d_ssim_backward(
            img1.data_ptr(),
            img2.data_ptr(),
            *(x.data_ptr() for x in partials),
            grad.data_ptr() if as_map else None,
            1.0 if as_map else float(grad) / ctx.count,
            batch * channels,
            height,
            width,
            native_build.num_threads(),
            grad_img1.data_ptr(),
        )
        _check_memory(failed, img1)
        return grad_img1, None, None, None, None
