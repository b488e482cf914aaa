"""Test bodies that run on every device that has kernels.

A module that says `pytestmark = pytest.mark.usefixtures("every_device")` runs its tests for the CPU, for the CUDA kernels on the emulator of
tests/cuda_emulation, and where there is a GPU for `cuda`. The tests themselves stay on the CPU: on a GPU the functions under
test take copies there, and give back what autograd can follow.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))

DEVICES = ["cpu"]
if sys.platform == "linux":  # its way to switch stacks, and to end memory where a buffer ends
    DEVICES.append("emulated")
if torch.cuda.is_available():
    DEVICES.append("cuda")
# What only the CPU's kernels promise: the same bits at any number of threads, other instruction sets.
CPU_ALONE = ("threads", "instruction_sets")
MOVED = (
    "rasterize_gaussians_raw",
    "fused_ssim",
    "ssim_map",
    "photometric_loss",
    "knn",
    "distCUDA2",
)


@pytest.fixture(params=DEVICES)
def every_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    device = request.param
    if device != "cpu" and any(word in request.node.originalname for word in CPU_ALONE):
        pytest.skip("only the kernels for CPUs promise this")
    if device == "emulated":
        from emulated_driver import emulated_gpu

        with emulated_gpu():
            yield device
        return
    if device == "cuda":
        for name in MOVED:
            function = getattr(request.module, name, None)
            if inspect.isfunction(function):
                monkeypatch.setattr(request.module, name, on_gpu(function))
    yield device


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its tensors taken to the GPU and its results brought back; gradients find their way by themselves."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        there = [_moved(value, "cuda") for value in arguments]
        result = function(
            *there, **{name: _moved(value, "cuda") for name, value in options.items()}
        )
        if isinstance(result, tuple):
            moved = [_moved(value, "cpu") for value in result]
            return type(result)(*moved) if hasattr(result, "_fields") else tuple(moved)
        return _moved(result, "cpu")

    return wrapped


def _moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
