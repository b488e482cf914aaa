# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels without a build step: compiled on first use by NVRTC, kept in the cache, launched through the driver.

Nothing here is loaded before the first kernel is: importing works without a GPU, a driver or NVRTC. What it takes is a CUDA build of
torch, which brings NVRTC, and the driver: ctypes calls both, so there is no package whose version would have to fit theirs.
"""

from native_build.cuda.module import (
    Kernels,
    belongs_to_stream,
    blocks,
    current_stream,
    on_gpu,
    to_gpu,
)

__all__ = ["Kernels", "belongs_to_stream", "blocks", "current_stream", "on_gpu", "to_gpu"]
