# SPDX-License-Identifier: Apache-2.0
"""The kernels of one package: compiled and loaded on first use, launched on torch's current stream, every argument checked.

    kernels = Kernels("gaussian_rasterizer", sorted(folder.glob("*.cu")), [common])
    kernels.launch("project_forward", blocks(n, 256), 256, means, quats, radii, n)

Tensors are passed as their addresses. Their memory may be used again by torch once Python has dropped them, but only by work that
comes later on the same stream: so nothing has to be held until a kernel is done, as long as it is put on the stream on
which its tensors were made. `belongs_to_stream` is for those that were made on another.
"""

import ctypes
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from native_build.cuda import compile, nvrtc, signature
from native_build.cuda.driver import CudaDriver, Driver, DriverMissing
from native_build.cuda.signature import Parameter

Size = int | tuple[int, ...]
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK, MAX_THREADS = (1024, 1024, 64), 1024

# Tests put a stand-in for a driver here, which takes tensors on the CPU.
_settings: dict[str, Any] = {"driver": None, "device_type": "cuda"}
_lock = threading.RLock()


def driver() -> Driver:
    """The driver in use; opened by the first call.

    Raises:
        DriverMissing, DriverError: There is none, it has no GPU, or FORCE_CPU=1 is set.
    """
    if os.environ.get("FORCE_CPU") == "1":
        raise DriverMissing("FORCE_CPU=1 is set, which keeps the kernels off the GPU. Unset it.")
    with _lock:
        if _settings["driver"] is None:
            _settings["driver"] = CudaDriver()
        return _settings["driver"]


def on_gpu(tensor: Tensor) -> bool:
    """Whether the CUDA kernels are the ones for this tensor."""
    return tensor.device.type == _settings["device_type"]


def to_gpu(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor to a GPU without waiting for it; the same tensor where it is there already."""
    if tensor.device == device:
        return tensor
    source = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
    return source.to(device, non_blocking=True)


def blocks(count: int, per_block: int) -> int:
    """How many blocks it takes that each do `per_block` of `count` items."""
    return -(-count // per_block)


def belongs_to_stream(tensors: Sequence[Tensor | None], made_on: int) -> None:
    """Tell torch's allocator that the current stream uses tensors that were made on another.

    That keeps their memory from being used again too early. It does not wait: that is up to whoever changed the stream, as for any
    torch operation.

    Args:
        tensors: On one GPU; None is left out.
        made_on: `current_stream` when they were made.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if present and current_stream(present[0].device) != made_on:
        for tensor in present:
            driver().record(tensor)


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return driver().current_stream(device.index or 0)


class Kernels:
    """The kernels of some source files.

    Args:
        name: For messages.
        sources: `.cu` files; the names of their kernels differ.
        include_dirs: Folders of their headers.
    """

    def __init__(
        self, name: str, sources: Sequence[Path], include_dirs: Sequence[Path] = ()
    ) -> None:
        self.name = name
        self.include_dirs = [Path(folder) for folder in include_dirs]
        self._source_of: dict[str, Path] = {}
        self.parameters: dict[str, tuple[Parameter, ...]] = {}
        for source in sources:
            found = signature.kernels_in(Path(source).read_text())
            if twice := found.keys() & self.parameters.keys():
                raise ValueError(f"{name}: {source} has kernels of a name that is taken: {twice}.")
            self.parameters |= found
            self._source_of |= dict.fromkeys(found, Path(source))
        self._modules: dict[tuple[Path, int], Any] = {}
        self._functions: dict[tuple[str, int], Any] = {}

    def launch(
        self, kernel: str, grid: Size, block: Size, *arguments: Any, shared: int = 0
    ) -> None:
        """Put a kernel on torch's current stream. A grid without blocks does nothing.

        Args:
            kernel: Its name.
            grid: Blocks along x, y, z; those left out are 1.
            block: Threads of a block, likewise.
            arguments: In the order of the kernel's parameters: a contiguous CUDA tensor of the pointed-to type, or None, where there is a
                pointer; a number; a ctypes structure. At least one tensor, and all on one GPU.
            shared: Bytes of dynamic shared memory.

        Raises:
            ValueError: An argument or a size does not fit; nothing was launched.
            DriverError, CompileError, NvrtcMissing: The kernel cannot be compiled, loaded or launched.
        """
        grid, block = _size("grid", grid, MAX_GRID), _size("block", block, MAX_BLOCK)
        if math.prod(block) > MAX_THREADS or 0 in block:
            raise ValueError(
                f"{kernel}: a block has 1 to {MAX_THREADS} threads, got {block}. Split it over more blocks."
            )
        device = _device_of(kernel, arguments)
        values = self._values(kernel, arguments, device)
        if 0 in grid:
            return
        number = device.index or 0
        function = self._function(kernel, number)
        driver().launch(number, current_stream(device), function, grid, block, shared, values)

    def load(self, device: int = 0) -> None:
        """Compile and load all kernels now, so that a long run does not begin with it or fail later."""
        for kernel in self.parameters:
            self._function(kernel, device)

    def _values(self, kernel: str, arguments: Sequence[Any], device: torch.device) -> list[Any]:
        """Turn arguments into what the driver takes the addresses of."""
        parameters = self.parameters[kernel]
        if len(arguments) != len(parameters):
            raise ValueError(
                f"{kernel}: expected {len(parameters)} arguments ({', '.join(map(str, parameters))}), got {len(arguments)}."
            )
        return [
            _value(kernel, parameter, argument, device)
            for parameter, argument in zip(parameters, arguments, strict=True)
        ]

    def _function(self, kernel: str, device: int) -> Any:
        if (kernel, device) not in self._functions:
            with _lock:
                source = self._source_of[kernel]
                if (source, device) not in self._modules:
                    self._modules[source, device] = self._load(source, device)
                module = self._modules[source, device]
                self._functions[kernel, device] = driver().function(module, kernel)
        return self._functions[kernel, device]

    def _load(self, source: Path, device: int) -> Any:
        version = driver().version()
        compiler = nvrtc.choose(version)
        arch = compile.target(driver().capability(device), compiler.archs)
        compiled = compile.compile_cached(source, self.include_dirs, arch, compiler, version)
        return driver().load(device, compiled.code, f"{self.name}/{source.name}")


def _size(what: str, size: Size, most: tuple[int, int, int]) -> tuple[int, int, int]:
    numbers = (size,) if isinstance(size, int) else tuple(size)
    numbers += (1,) * (3 - len(numbers))
    if any(not 0 <= number <= limit for number, limit in zip(numbers, most, strict=True)):
        raise ValueError(
            f"launch: the {what} can be up to {most}, got {numbers}. Use fewer at once."
        )
    return numbers


def _device_of(kernel: str, arguments: Sequence[Any]) -> torch.device:
    devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) != 1 or next(iter(devices)).type != _settings["device_type"]:
        found = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise ValueError(
            f"{kernel}: expected tensors on one GPU, got {found}. Move them there first."
        )
    return devices.pop()


def _value(kernel: str, parameter: Parameter, argument: Any, device: torch.device) -> Any:
    """One argument as the ctypes object that a launch points to."""

    def wrong(expected: str) -> ValueError:
        shown = type(argument).__name__
        if isinstance(argument, Tensor):
            shown = f"a tensor of {argument.dtype}, strides {argument.stride()}"
        elif isinstance(argument, int | float):
            shown = repr(argument)
        return ValueError(f"{kernel}: {parameter} expects {expected}, got {shown}.")

    if parameter.pointer:
        if argument is None:
            return ctypes.c_void_p(None)
        if not isinstance(argument, Tensor) or not argument.is_contiguous():
            raise wrong("a contiguous tensor or None")
        if parameter.dtypes and argument.dtype not in parameter.dtypes:
            raise wrong(" or ".join(map(str, parameter.dtypes)))
        return ctypes.c_void_p(argument.data_ptr())
    convert: Callable[[Any], Any] | None = signature.NUMBERS.get(parameter.type)
    if convert is None:
        if not isinstance(argument, ctypes.Structure) or type(argument).__name__ != parameter.type:
            raise wrong(f"a ctypes structure named {parameter.type}")
        return argument
    whole = convert not in (ctypes.c_float, ctypes.c_double)
    if not isinstance(argument, int if whole else (int, float)):
        raise wrong("a whole number" if whole else "a number")
    value = convert(argument)
    if whole and value.value != argument:
        raise wrong("a number that it can hold")
    return value
