# SPDX-License-Identifier: Apache-2.0
"""The search on a GPU: the launches of csrc/cuda/knn.cu in the order that it documents."""

import functools
from pathlib import Path

import torch
from native_build import cuda
from torch import Tensor

LEAF = 16  # points
MOST_POINTS = 2**30 - 1


@functools.cache
def kernels() -> cuda.Kernels:
    """The kernels; compiled when the first is launched."""
    return cuda.Kernels("simple_knn", [Path(__file__).parent / "csrc" / "cuda" / "knn.cu"])


def search(
    points: Tensor,  # [N, 3]
    ids: Tensor,  # [N, k] int32
    distances2: Tensor,  # [N, k]
) -> None:
    """Find the k nearest other points of every point, 1 <= k < N; writes `ids` and `distances2`.

    Raises:
        ValueError: More points than the tree can number.
    """
    n, k = ids.shape
    if n > MOST_POINTS:
        raise ValueError(
            f"knn: {n} points are too many for a GPU's tree. Expected up to {MOST_POINTS}: pass points.cpu()."
        )
    leaves = 1 << (cuda.blocks(n, LEAF) - 1).bit_length()
    low, high = points.amin(0), points.amax(0)
    codes = torch.empty(n, dtype=torch.int64, device=points.device)
    run = kernels().launch
    run("morton_codes", cuda.blocks(n, 256), 256, n, points, low, high, codes)
    order = codes.sort().indices
    ordered = points.new_empty(n, 4)
    boxes = points.new_empty(2 * leaves, 6)
    blocks = cuda.blocks(leaves, 256)
    run("leaf_boxes", blocks, 256, n, leaves, points, order, ordered, boxes)
    first = leaves // 2
    while first:
        run("merge_boxes", cuda.blocks(first, 256), 256, first, boxes)
        first //= 2
    run("search", cuda.blocks(n, 128), 128, n, leaves, k, ordered, boxes, ids, distances2)
