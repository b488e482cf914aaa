# SPDX-License-Identifier: Apache-2.0
"""What a rendered image is trained on, with its gradient, on the CPU or a GPU: structural similarity, alone or mixed with L1.

Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004: Gaussian window 11 x 11 with
sigma 1.5, C1 = 0.01², C2 = 0.03², images in [0, 1]. One kernel computes value and gradient together; it is compiled on
first use.
"""

import torch
from native_build import cuda
from torch import Tensor

from fused_ssim import _native

__all__ = ["fused_ssim", "photometric_loss", "ssim_map"]

_MARGINS = {"same": 0, "valid": 5}  # pixels without a value at each edge: half of the window


def photometric_loss(
    rendered: Tensor,  # [H, W, 3]
    target: Tensor,  # [H, W, 3]
    ssim_weight: float = 0.2,
    gradient_weight: Tensor | None = None,  # [H, W, 1]
) -> Tensor:
    """Mix L1 and structural similarity: (1 - ssim_weight) mean|rendered - target| + ssim_weight (1 - mean SSIM).

    The gradient is computed with the value, so the backward pass costs nothing. It flows to `rendered` alone.

    Args:
        rendered: Image in [0, 1] (overshoot is allowed); any number of channels. [H, W, 3]
        target: Image to match. [H, W, 3]
        ssim_weight: 0 is pure L1, 1 pure structural similarity (zeros outside the image, as in `fused_ssim`).
        gradient_weight: Factor of each pixel's gradient; the value does not change. None is 1. [H, W, 1]

    Returns:
        Float32 scalar; not finite where a pixel is not finite.

    Raises:
        ValueError: Shapes that do not fit, empty images, or tensors that are not all on the CPU or on one GPU.
    """
    if rendered.ndim != 3 or rendered.shape != target.shape or rendered.numel() == 0:
        raise ValueError(
            "photometric_loss: rendered and target must be [H, W, 3] of equal shape and not empty,"
            f" got {list(rendered.shape)} and {list(target.shape)}."
        )
    if gradient_weight is not None:
        if gradient_weight.shape != (*rendered.shape[:2], 1):
            raise ValueError(
                f"photometric_loss: gradient_weight must be {[*rendered.shape[:2], 1]} (from rendered),"
                f" got {list(gradient_weight.shape)}."
            )
        _check_device("photometric_loss", rendered, gradient_weight)
        gradient_weight = gradient_weight.detach().float().contiguous()
    _check_device("photometric_loss", rendered, target)
    function = _Loss
    if cuda.on_gpu(rendered):
        from fused_ssim import _cuda

        function, rendered = _cuda.Loss, _without_unused_gradient(rendered)
    return function.apply(
        rendered.float(), target.detach().float(), float(ssim_weight), gradient_weight
    )


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
        train: False saves the time and the memory of the gradient.

    Returns:
        Mean over all pixels, channels and images, float32 scalar; 1 where the images are equal.

    Raises:
        ValueError: Shapes that differ or are too small, an unknown padding, or tensors that are not all on the CPU or on one GPU.
    """
    margin = _check("fused_ssim", img1, img2, padding)
    if cuda.on_gpu(img1):
        from fused_ssim import _cuda

        x, y = (_planes(image.float()) for image in (_without_unused_gradient(img1), img2.detach()))
        return _cuda.Mean.apply(x, y, margin, train)
    return _Mean.apply(img1.float(), img2.detach().float(), margin, train)


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
    if cuda.on_gpu(img1):
        from fused_ssim import _cuda

        planes = _planes(img1.float()), _planes(img2.detach().float())
        values = _cuda.Map.apply(*planes, margin).view(img1.shape)
    else:
        values = _Map.apply(img1.float(), img2.detach().float(), margin)
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
    _check_device(caller, img1, img2)
    margin = _MARGINS[padding]
    if img1.numel() == 0 or min(img1.shape[-2:]) <= 2 * margin:
        raise ValueError(
            f'{caller}: no pixel to compare in images {list(img1.shape)} with padding="{padding}".'
            ' Images must not be empty, and "valid" needs at least 11 x 11 pixels.'
        )
    return margin


def _check_device(caller: str, *images: Tensor) -> None:
    first = images[0]
    usable = first.device.type == "cpu" or cuda.on_gpu(first)
    if not usable or any(image.device != first.device for image in images):
        devices = " and ".join(str(image.device) for image in images)
        raise ValueError(f"{caller}: images must be on the CPU or on one GPU, got {devices}.")


def _planes(images: Tensor) -> Tensor:
    """View [B, C, H, W] as the kernel's [planes, H, W, channels]."""
    batch, channels, height, width = images.shape
    return images.contiguous().view(batch * channels, height, width, 1)


def _without_unused_gradient(image: Tensor) -> Tensor:
    """Under `no_grad` an autograd function still hears that its input wants a gradient, and would prepare it."""
    return image if torch.is_grad_enabled() else image.detach()


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply by a scalar gradient from upstream: nearly always 1, and then without a pass over the image."""
    factor = float(upstream)
    return gradient if factor == 1.0 else gradient * factor


class _Loss(torch.autograd.Function):
    """Value and gradient in one call; an upstream gradient other than 1 scales what is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, ssim_weight: float, pixel_weight: Tensor | None):
        x = x.contiguous()
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        total = _native.image_loss(
            x[None],
            y.contiguous()[None],
            l1_factor=1.0 - ssim_weight,
            ssim_factor=-ssim_weight,
            gradient=gradient,
            gradient_factor=1.0 / x.numel(),
            pixel_weight=pixel_weight,
        )
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return torch.tensor(ssim_weight + total / x.numel(), dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, upstream), None, None, None


class _Mean(torch.autograd.Function):
    """As `_Loss`, for the mean similarity of a batch."""

    @staticmethod
    def forward(ctx, img1: Tensor, img2: Tensor, margin: int, train: bool) -> Tensor:
        x, y = _planes(img1), _planes(img2)
        planes, height, width, _ = x.shape
        count = planes * (height - 2 * margin) * (width - 2 * margin)
        gradient = torch.empty_like(x) if train and ctx.needs_input_grad[0] else None
        total = _native.image_loss(
            x, y, margin=margin, gradient=gradient, gradient_factor=1.0 / count
        )
        ctx.save_for_backward(*([] if gradient is None else [gradient.view(img1.shape)]))
        return torch.tensor(total / count, dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.saved_tensors:
            raise ValueError("fused_ssim: no gradient was prepared. Pass train=True.")
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, upstream), None, None, None


class _Map(torch.autograd.Function):
    """The backward pass runs the kernel again, with the gradient of every value."""

    @staticmethod
    def forward(ctx, img1: Tensor, img2: Tensor, margin: int) -> Tensor:
        values = torch.empty(img1.shape)
        _native.image_loss(_planes(img1), _planes(img2), margin=margin, ssim_map=values)
        ctx.save_for_backward(img1, img2)
        ctx.margin = margin
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        img1, img2 = ctx.saved_tensors
        gradient = torch.empty(img1.shape)
        _native.image_loss(
            _planes(img1),
            _planes(img2),
            margin=ctx.margin,
            gradient=gradient,
            map_gradient=upstream.contiguous(),
        )
        return gradient, None, None
