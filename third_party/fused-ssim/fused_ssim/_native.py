# SPDX-License-Identifier: Apache-2.0
"""The compiled core and the one call into it."""

import ctypes
import functools
from pathlib import Path

import native_build
from torch import Tensor

# All fused multiply-adds are written out: contraction would let the bits depend on where a compiler unrolls.
FLAGS = ("-ffp-contract=off",)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled core; compiles it on the first call ever."""
    return load_library()


def load_library(extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile (or find in the cache) and load the core. Extra flags: the tests build it for lesser CPUs."""
    source = Path(__file__).parent / "csrc" / "ssim.cpp"
    lib = native_build.load("fused_ssim", [source], extra_flags=(*FLAGS, *extra_flags))
    pointer, int32, float32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
    lib.s2d_image_loss.argtypes = [pointer] * 4 + [int32] * 5 + [float32] * 3 + [int32]
    lib.s2d_image_loss.argtypes += [pointer] * 3
    lib.s2d_image_loss.restype = ctypes.c_int
    return lib


def image_loss(
    x: Tensor,  # [planes, H, W, channels]
    y: Tensor,  # [planes, H, W, channels]
    *,
    l1_factor: float = 0.0,
    ssim_factor: float = 1.0,
    margin: int = 0,
    gradient: Tensor | None = None,  # [planes, H, W, channels]
    gradient_factor: float = 1.0,
    pixel_weight: Tensor | None = None,  # [H, W, 1]
    ssim_map: Tensor | None = None,  # [planes, H, W, channels]
    map_gradient: Tensor | None = None,  # [planes, H, W, channels]
) -> float:
    """Sum l1_factor |x - y| + ssim_factor S over all values; write S and the derivative where asked.

    Args:
        x: Contiguous float32 images on the CPU, as all other tensors. [planes, H, W, channels]
        y: Images to compare with. [planes, H, W, channels]
        l1_factor: Factor of the absolute difference.
        ssim_factor: Factor of the similarity S.
        margin: Values nearer than this to an edge do not count.
        gradient: Receives gradient_factor times the derivative of the sum by x. [planes, H, W, channels]
        gradient_factor: 1 / count turns the sum's derivative into the mean's.
        pixel_weight: Factor of a pixel's gradient. [H, W, 1]
        ssim_map: Receives S, 0 in the margin. [planes, H, W, channels]
        map_gradient: Weight of each S in what is derived (not in the sum). [planes, H, W, channels]

    Raises:
        MemoryError: No memory left for the rows in work.
    """
    planes, height, width, channels = x.shape
    total = ctypes.c_double()
    tensors = (map_gradient, pixel_weight)
    failed = library().s2d_image_loss(
        x.data_ptr(),
        y.data_ptr(),
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        planes,
        height,
        width,
        channels,
        margin,
        l1_factor,
        ssim_factor,
        gradient_factor,
        native_build.num_threads(),
        ctypes.byref(total),
        *(None if tensor is None else tensor.data_ptr() for tensor in (ssim_map, gradient)),
    )
    if failed:
        raise MemoryError(f"fused_ssim: no memory left for images {list(x.shape)}.")
    return total.value
