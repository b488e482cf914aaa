# SPDX-License-Identifier: Apache-2.0
"""The import that 3DGS code makes: `from simple_knn._C import distCUDA2`. It runs where the points are, on the CPU too."""

import torch
from torch import Tensor

from simple_knn import knn

__all__ = ["distCUDA2"]

_NUM_NEIGHBOURS = 3  # as 3DGS sizes a new splat: about the spacing of a surface sampled evenly


def distCUDA2(
    points: Tensor,  # [N, 3]
) -> Tensor:
    """Average the squared distances to the three nearest other points.

    Args:
        points: Positions, finite, world. [N, 3]

    Returns:
        Mean squared distance in world units², float32; over the neighbours that there are where N < 4, 0 where N = 1. [N]

    Raises:
        ValueError: Wrong shape or device, or non-finite points.
    """
    _, distances2 = knn(points, _NUM_NEIGHBOURS)
    if distances2.shape[1] == 0:
        return torch.zeros(len(points), device=points.device)
    # In float64, where the sum of three finite float32 numbers cannot overflow.
    return distances2.mean(dim=1, dtype=torch.float64).to(torch.float32)
