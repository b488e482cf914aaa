"""Where tensors are computed, and how they get there and back without the host waiting. The one importer of `native_build.cuda`.

`--device auto|cpu|cuda|cuda:N` means the same to every script: `choose_device` decides and says why, `run_on` does the work there, and only
`auto` goes on on the CPU where a GPU cannot be used or fails.

A training step on a GPU may not ask it for a number: the host would wait for all that was asked before, and then the GPU for the host. So the step
uses no `.item()`, `float(tensor)`, `nonzero` or boolean index, makes no tensor on the GPU from Python numbers, and copies by `to_device`.
tests/test_device_step.py holds it to that.
"""

from typing import Any, Literal

import torch
from native_build.cuda import on_gpu, to_gpu
from native_build.cuda.device import (
    Choice,
    DeviceUnusable,
    NotEnoughMemory,
    choose_device,
    run_on,
)
from torch import Tensor

__all__ = [
    "DTYPES",
    "Choice",
    "DeviceUnusable",
    "NotEnoughMemory",
    "Precision",
    "choose_device",
    "generator_on",
    "on_gpu",
    "run_on",
    "to_cpu",
    "to_device",
]

Precision = Literal["fp32", "bf16", "fp16"]
"""What a network computes in; weights that are trained stay in float32."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a copy from the CPU to a GPU goes through pinned memory, and nobody waits for it."""
    return to_gpu(tensor, device)


def generator_on(device: torch.device, source: torch.Generator) -> torch.Generator:
    """A source of random numbers on a device: a new one there, with a seed that `source`, on the CPU, draws; on the CPU `source` itself.

    As many numbers as there are Gaussians take the CPU longer than all else takes a GPU. What must be saved of a run is `source` alone.
    """
    if device.type == "cpu":
        return source
    seed = int(torch.randint(2**62, (), generator=source))
    return torch.Generator(device).manual_seed(seed)


def to_cpu(values: Any) -> Any:
    """Copy every tensor in nested dicts, lists and tuples to the CPU; what is there already, and all else, is handed on."""
    if isinstance(values, Tensor):
        return values.cpu()
    if isinstance(values, dict):
        return {key: to_cpu(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(to_cpu(value) for value in values)
    return values


def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU that this process can still have, with what torch's allocator holds unused; and all."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused, total
