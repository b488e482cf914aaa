# SPDX-License-Identifier: Apache-2.0
"""What `--device auto|cpu|cuda|cuda:1` means on this machine, and why; and what happens when the GPU fails later.

    choice = choose_device(cfg.device)
    return run_on(choice, lambda device: main_on(cfg, device))

Only `auto` ever falls back to the CPU. Whoever asks for `cuda` gets it, or one message that says what is wrong and what to do.
`FORCE_CPU=1` makes `auto` the CPU.
"""

import contextlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from native_build.cuda import compile, module, nvrtc
from native_build.cuda.driver import DriverError, DriverMissing
from native_build.cuda.nvrtc import CompileError, NvrtcMissing

_log = logging.getLogger("s2d")
_said: set[str] = set()
_Result = TypeVar("_Result")


class DeviceUnusable(ValueError):
    """The device that was asked for cannot be used, or not any more; the message says why and what to do."""


class NotEnoughMemory(RuntimeError):
    """Work was refused before it began, because it would not fit on the GPU; the message says what would help."""


_GPU_FAILURES = (
    torch.OutOfMemoryError,
    torch.AcceleratorError,  # what a kernel did is told by a later call of torch
    DriverError,
    CompileError,
    NotEnoughMemory,
    DeviceUnusable,  # what a process that works for this one says of its GPU
)
# torch's libraries fail with a RuntimeError like any other: CUBLAS_STATUS_ALLOC_FAILED, cuDNN error: …
_LIBRARIES = re.compile("CUDA|CUBLAS|CUDNN|cuDNN|CUSOLVER|cusolver")


@dataclass(frozen=True)
class Choice:
    """Where to compute."""

    device: torch.device
    reason: str
    asked: str
    """What the user wrote."""


def choose_device(asked: str = "auto", *, kernels: bool = True, number: int = 0) -> Choice:
    """Decide where to compute, and log it with its reason, once.

    Args:
        asked: `auto`: a GPU if one can be used, else the CPU. `cpu`. `cuda` or `cuda:N`: that GPU or an error.
        kernels: Whether our kernels must run there; without them, as for a network, torch's own suffice.
        number: Of this process among those that share the machine; where no GPU is named, they take them in turn.

    Raises:
        DeviceUnusable: The GPU that was asked for cannot be used.
        ValueError: Another word.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", asked)
    if not found:
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {asked!r}.")
    if asked == "cpu":
        return _logged(Choice(torch.device("cpu"), "asked for", asked))
    if found.group(1) is None:
        index = number % max(torch.cuda.device_count(), 1)
    else:
        index = int(found.group(1))
    problem = cuda_problem(index, kernels)
    if problem is None:
        reason = describe_gpu(index) if kernels else torch.cuda.get_device_name(index)
        return _logged(Choice(torch.device("cuda", index), reason, asked))
    if asked == "auto":
        return _logged(Choice(torch.device("cpu"), problem, asked))
    raise DeviceUnusable(
        f"--device {asked} cannot be used. {problem} Or pass --device cpu; --device auto takes it by itself."
    )


def cuda_problem(index: int = 0, kernels: bool = True) -> str | None:
    """Say what keeps torch, and with `kernels` ours, from a GPU, in sentences that end with the cure; None where nothing does."""
    try:
        version = module.driver().version()
    except DriverMissing as error:
        return f"{error}"
    except DriverError as error:
        return f"There is no GPU that the NVIDIA driver can use ({error}) Look at nvidia-smi and CUDA_VISIBLE_DEVICES."
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA: install its CUDA build to use a GPU."
        )
    needed = int(torch.version.cuda.split(".")[0])
    if version[0] < needed:
        return (
            f"The NVIDIA driver is too old: it runs CUDA up to {version[0]}.{version[1]}, and torch {torch.__version__} is built for "
            f"{torch.version.cuda}. Update the driver, or install a torch that is built for CUDA {version[0]}."
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        return f"torch sees {count} GPUs here, so there is none of number {index}: look at nvidia-smi and CUDA_VISIBLE_DEVICES."
    if not kernels:
        return None
    try:
        compile.target(module.driver().capability(index), nvrtc.choose(version).archs)
    except (NvrtcMissing, ValueError) as error:
        return f"{error}"
    return None


def describe_gpu(index: int) -> str:
    """Name a usable GPU and what its kernels are compiled with."""
    version = module.driver().version()
    compiler = nvrtc.choose(version)
    arch = compile.target(module.driver().capability(index), compiler.archs)
    return (
        f"{torch.cuda.get_device_name(index)}, driver for CUDA {version[0]}.{version[1]}, "
        f"kernels for {arch} by NVRTC {compiler.version[0]}.{compiler.version[1]}"
    )


def run_on(choice: Choice, work: Callable[[torch.device], _Result]) -> _Result:
    """Do work on the chosen device; with `auto`, do it again on the CPU when the GPU fails.

    Args:
        choice: From `choose_device`.
        work: Starts anew, or from what it has saved, on the device that it is given.

    Raises:
        DeviceUnusable: The GPU ran out of memory or failed, and was asked for by name.
    """
    try:
        return work(choice.device)
    except (*_GPU_FAILURES, RuntimeError) as error:
        if choice.device.type != "cuda" or not _of_the_gpu(error):
            raise
        problem = _failure(choice.device, error)
        if choice.asked != "auto":
            raise DeviceUnusable(problem) from error
        _log.warning("%s Going on on the CPU, since --device auto was asked for.", problem)
    # Outside of the handler, whose traceback would keep the GPU's tensors alive.
    with contextlib.suppress(
        torch.AcceleratorError
    ):  # after some errors the GPU takes no call any more
        torch.cuda.empty_cache()
    return work(torch.device("cpu"))


def _of_the_gpu(error: Exception) -> bool:
    return isinstance(error, _GPU_FAILURES) or bool(_LIBRARIES.search(str(error)))


def _failure(device: torch.device, error: Exception) -> str:
    if isinstance(error, NotEnoughMemory | DeviceUnusable):
        return str(error)
    if not isinstance(error, torch.OutOfMemoryError):
        return f"{device} failed: {error} Pass --device cpu, and report this."
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"Out of memory on {device}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free. Close what else uses it, or use smaller photos "
        "(--max-side), fewer Gaussians (--max-gaussians) or --device cpu."
    )


def _logged(choice: Choice) -> Choice:
    text = f"device: {choice.device} ({choice.reason.rstrip('.')})"
    if text not in _said:
        _said.add(text)
        _log.info("%s", text)
    return choice
