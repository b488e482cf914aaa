# SPDX-License-Identifier: Apache-2.0
"""The NVIDIA driver: loading machine code and launching kernels. A thin layer, so that tests can put a stand-in in its place.

`Driver` is what the rest needs; `CudaDriver` calls the C API of libcuda, which every driver installs. torch owns the memory,
the streams and the device's context (the primary one), and this joins it.
"""

import ctypes
import functools
import sys
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_P = ctypes.c_void_p
_NAMES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
# CUdevice_attribute, CUfunction_attribute and CUresult in cuda.h; the numbers are part of the binary interface.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MAX_SHARED_PER_BLOCK = 75, 76, 97
_MAX_DYNAMIC_SHARED = 8
_DEFAULT_SHARED = 48 << 10  # bytes of dynamic shared memory that a launch may have without asking
_OUT_OF_MEMORY = 2
_WRONG_IMAGE = {
    200: "the image is invalid",  # also what a driver says of machine code from a newer toolkit
    209: "no code for this GPU",
    222: "the PTX is of a newer toolkit",
}


class DriverError(RuntimeError):
    """The driver refused a call."""


class DriverMissing(RuntimeError):
    """There is no NVIDIA driver."""


class Driver(Protocol):
    """What is needed of a driver. Devices are numbered as torch numbers them."""

    def version(self) -> tuple[int, int]:
        """The CUDA version that it supports, (major, minor)."""

    def capability(self, device: int) -> int:
        """The compute capability of a GPU, as in sm_90: 90."""

    def current_stream(self, device: int) -> int:
        """The handle of torch's current stream on a GPU."""

    def record(self, tensor: Tensor) -> None:
        """Tell torch's allocator that its current stream uses a tensor."""

    def load(self, device: int, code: bytes, name: str) -> Any:
        """Load machine code or PTX; the name is for messages."""

    def function(self, module: Any, name: str) -> Any:
        """Find a kernel in loaded code."""

    def launch(
        self,
        device: int,
        stream: int,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        arguments: Sequence[Any],
    ) -> None:
        """Put a kernel on a stream; arguments are ctypes objects in the order of its parameters."""


class CudaDriver:
    """`Driver` by libcuda."""

    def __init__(self) -> None:
        self._lib = _library()
        self._check(self._lib.cuInit(0), "cuInit")
        self._contexts: dict[int, _P] = {}
        self._allowed: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()

    def version(self) -> tuple[int, int]:
        number = ctypes.c_int()
        self._check(self._lib.cuDriverGetVersion(ctypes.byref(number)), "cuDriverGetVersion")
        return number.value // 1000, number.value % 1000 // 10

    def capability(self, device: int) -> int:
        major, minor = (
            self._attribute(which, device) for which in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
        )
        return 10 * major + minor

    def current_stream(self, device: int) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def record(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def load(self, device: int, code: bytes, name: str) -> int:
        module = _P()
        with _Current(self, device):
            result = self._lib.cuModuleLoadData(ctypes.byref(module), code)
        if result in _WRONG_IMAGE:
            major, minor = self.version()
            raise DriverError(
                f"The NVIDIA driver (CUDA {major}.{minor}) cannot load the kernels of {name}: {_WRONG_IMAGE[result]}. "
                "It is too old for the NVRTC that compiled them: update the driver."
            )
        self._check(result, f"loading the kernels of {name}")
        return module.value

    def function(self, module: int, name: str) -> int:
        function = _P()
        result = self._lib.cuModuleGetFunction(ctypes.byref(function), _P(module), name.encode())
        self._check(result, f"looking for the kernel {name}")
        return function.value

    def launch(
        self,
        device: int,
        stream: int,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        arguments: Sequence[Any],
    ) -> None:
        addresses = (_P * len(arguments))(*map(ctypes.addressof, arguments))
        with _Current(self, device):
            if shared > _DEFAULT_SHARED:
                self._allow_shared(device, function, shared)
            result = self._lib.cuLaunchKernel(
                _P(function), *grid, *block, shared, _P(stream), addresses, None
            )
        self._check(result, f"launching a kernel with a grid of {grid} and blocks of {block}")

    def _allow_shared(self, device: int, function: int, shared: int) -> None:
        """More than 48 KiB of dynamic shared memory has to be asked for, once per function."""
        if self._allowed.get((device, function), 0) >= shared:
            return
        most = self._attribute(_MAX_SHARED_PER_BLOCK, device)
        if shared > most:
            raise DriverError(
                f"A kernel needs {shared} bytes of shared memory a block, and this GPU has {most}. Pass --device cpu, and report this."
            )
        result = self._lib.cuFuncSetAttribute(_P(function), _MAX_DYNAMIC_SHARED, shared)
        self._check(result, f"asking for {shared} bytes of shared memory")
        self._allowed[device, function] = shared

    def _attribute(self, which: int, device: int) -> int:
        value, handle = ctypes.c_int(), ctypes.c_int()
        self._check(
            self._lib.cuDeviceGet(ctypes.byref(handle), device), f"looking for GPU {device}"
        )
        result = self._lib.cuDeviceGetAttribute(ctypes.byref(value), which, handle)
        self._check(result, f"asking about GPU {device}")
        return value.value

    def context(self, device: int) -> _P:
        """The primary context of a GPU, which torch works in too; kept for the life of the process, as torch does."""
        with self._lock:
            if device not in self._contexts:
                context, handle = _P(), ctypes.c_int()
                found = self._lib.cuDeviceGet(ctypes.byref(handle), device)
                self._check(found, f"looking for GPU {device}")
                result = self._lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
                self._check(result, f"taking GPU {device} into use")
                self._contexts[device] = context
            return self._contexts[device]

    def _check(self, result: int, doing: str) -> None:
        if not result:
            return
        if result == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"CUDA: out of memory ({doing}).")
        text = ctypes.c_char_p()
        self._lib.cuGetErrorString(result, ctypes.byref(text))
        said = (text.value or b"no description").decode()
        raise DriverError(f"CUDA error {result} while {doing}: {said}.")


class _Current:
    """Makes a GPU's primary context the thread's current one, and afterwards the one before: a thread may never have had one."""

    def __init__(self, driver: CudaDriver, device: int) -> None:
        self._driver, self._context = driver, driver.context(device)

    def __enter__(self) -> None:
        result = self._driver._lib.cuCtxPushCurrent_v2(self._context)
        self._driver._check(result, "entering the context of a GPU")

    def __exit__(self, *_: object) -> None:
        before = _P()
        self._driver._lib.cuCtxPopCurrent_v2(ctypes.byref(before))


@functools.cache
def _library() -> ctypes.CDLL:
    """Load libcuda and declare what is used of it, as cuda.h does: without that, ctypes would cut pointers to 32 bits."""
    for name in _NAMES:
        try:
            lib = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise DriverMissing(
            f"There is no NVIDIA driver ({' and '.join(_NAMES)} cannot be loaded). Install one to use a GPU."
        )
    integer, text, number = ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
    to_pointer, to_integer = ctypes.POINTER(_P), ctypes.POINTER(ctypes.c_int)
    declarations: dict[str, list[Any]] = {
        "cuInit": [number],
        "cuDriverGetVersion": [to_integer],
        "cuDeviceGet": [to_integer, integer],
        "cuDeviceGetAttribute": [to_integer, integer, integer],
        "cuDevicePrimaryCtxRetain": [to_pointer, integer],
        "cuCtxPushCurrent_v2": [_P],
        "cuCtxPopCurrent_v2": [to_pointer],
        "cuModuleLoadData": [to_pointer, text],
        "cuModuleGetFunction": [to_pointer, _P, text],
        "cuFuncSetAttribute": [_P, integer, integer],
        "cuLaunchKernel": [_P, *[number] * 7, _P, to_pointer, to_pointer],
        "cuGetErrorString": [integer, ctypes.POINTER(text)],
    }
    for name, arguments in declarations.items():
        getattr(lib, name).argtypes = arguments
        getattr(lib, name).restype = integer
    return lib
