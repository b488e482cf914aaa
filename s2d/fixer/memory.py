"""How many views go through a network at once, and what an error says that means: too little memory.

Several views at once keep a GPU busy that one does not fill. On a CPU two or four together take as long as one after the other, at
two or four times the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from s2d.device import free_memory

if TYPE_CHECKING:  # diffusers takes seconds to import
    from s2d.fixer.network.model import FixerModel

# Views at once at most: what an interruption costs.
MOST_VIEWS = 8
# Part of the memory that is free. Convolutions take working memory that is counted nowhere, and other programs may want some.
FREE_SHARE = 0.5
# Numbers that a network holds at once per pixel and channel of the VAE's first block, where most of them are: counted on the meta
# device 6.8 for the compact one and 7.4 at SD-Turbo's size (tests/test_fixer_batches.py).
NUMBERS = 8


def view_bytes(model: FixerModel, pixels: int, dtype: torch.dtype) -> int:
    """The memory that a network takes for so many pixels of one view while it repairs them."""
    channels = model.vae.config.block_out_channels[0] / model.config.patch**2
    return int(NUMBERS * channels * pixels * dtype.itemsize)


def views_that_fit(model: FixerModel, pixels: int, dtype: torch.dtype, device: torch.device) -> int:  # fmt: skip
    """How many views of so many pixels to repair at once: on a GPU as many as take half of its free memory, 8 at most; else 1."""
    if device.type != "cuda":
        return 1
    fitting = FREE_SHARE * free_memory(device)[0] / view_bytes(model, pixels, dtype)
    return max(1, min(MOST_VIEWS, int(fitting)))


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whichever device: torch has a type of its own for GPUs alone, and not for what its libraries ask for."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    words = ("allocate memory", "not enough memory", "out of memory", "alloc_failed", "allocation_failed")  # fmt: skip
    return any(word in text for word in words)
