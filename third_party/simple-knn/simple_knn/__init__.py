# SPDX-License-Identifier: Apache-2.0
"""Exact nearest neighbours inside one cloud of 3D points, on the CPU or a GPU.

`simple_knn._C.distCUDA2` is the call that the 3DGS ecosystem imports; `knn` returns the neighbours themselves.
The kernel is compiled on first use.
"""

import ctypes
import functools
from pathlib import Path

import native_build
import torch
from native_build import cuda
from torch import Tensor

__all__ = ["knn"]


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_build.load("simple_knn", [Path(__file__).parent / "csrc" / "knn.cpp"])
    pointer = ctypes.c_void_p
    int32 = ctypes.c_int32
    library.s2d_knn.argtypes = [pointer, int32, int32, int32, pointer, pointer]
    library.s2d_knn.restype = ctypes.c_int
    return library


def knn(
    points: Tensor,  # [N, 3]
    k: int,
) -> tuple[Tensor, Tensor]:
    """Find the k nearest other points of every point.

    A point is never its own neighbour, but a duplicate of it is, at distance zero. Among equally distant points, which ones
    are returned depends on the cloud, not on the number of threads.

    Args:
        points: Positions, finite, computed in float32. [N, 3]
        k: Number of neighbours, at least 1.

    Returns:
        - **ids** [N, min(k, N - 1)] int64, nearest first
        - **distances2** [N, min(k, N - 1)] float32, squared distances, finite

    Raises:
        ValueError: Wrong shape or device, non-finite points, or k < 1.

    Not differentiable. O(N log N): a k-d tree, on a GPU one of boxes along a Morton curve.
    """
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"knn: points must be [N, 3], got {list(points.shape)}.")
    on_gpu = cuda.on_gpu(points)
    if points.device.type != "cpu" and not on_gpu:
        raise ValueError(
            f"knn: points must be on the CPU or an NVIDIA GPU, got {points.device}. Pass points.cpu()."
        )
    if k < 1:
        raise ValueError(f"knn: k must be at least 1, got {k}.")
    points = points.detach().to(torch.float32).contiguous()
    num_bad = int((~torch.isfinite(points)).any(dim=1).sum())
    if num_bad:
        raise ValueError(
            f"knn: {num_bad} of {len(points)} points have non-finite coordinates in float32."
            " Remove them first: points[torch.isfinite(points).all(dim=1)]."
        )
    k = max(0, min(k, len(points) - 1))
    ids = torch.zeros(len(points), k, dtype=torch.int32, device=points.device)
    distances2 = torch.zeros(len(points), k, device=points.device)
    if ids.numel() > 0 and on_gpu:
        from simple_knn import _cuda

        _cuda.search(points, ids, distances2)
    elif ids.numel() > 0:
        failed = _library().s2d_knn(
            points.data_ptr(),
            len(points),
            k,
            native_build.num_threads(),
            ids.data_ptr(),
            distances2.data_ptr(),
        )
        if failed:
            raise MemoryError(f"knn: no memory left for the tree of {len(points)} points.")
    return ids.long(), distances2
