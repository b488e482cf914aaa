"""The CUDA kernels on a CPU: the .cu files themselves, compiled as C++ and run thread by thread.

    memory = Memory()
    out = memory.empty(5)
    launch("fill", 1, 32, out, 5)

What a GPU would let pass is an error here: an address outside of a buffer, a vector that is not aligned, a barrier that some threads
never reach. Slow: for images of a few thousand pixels.
"""

import ctypes
import functools
import hashlib
import tempfile
import weakref
from pathlib import Path
from typing import Any

import native_build
import torch
from native_build.cuda import signature
from torch import Tensor

HERE = Path(__file__).parent
THIRD_PARTY = HERE.parents[1] / "third_party"
RASTERIZER = THIRD_PARTY / "diff-gaussian-rasterization" / "diff_gaussian_rasterization" / "csrc"
# -ffp-contract=off: only multiply-adds that the source writes out, so that what must agree between kernels can be seen to.
FLAGS = ("-O2", "-ffp-contract=off", "-Wno-unknown-pragmas")


class EmulationError(RuntimeError):
    """A kernel did what it must not; the message says which thread, where."""


def sources() -> list[Path]:
    """Every CUDA source of the project."""
    return sorted(THIRD_PARTY.glob("*/*/csrc/cuda/*.cu"))


@functools.cache
def kernels() -> dict[str, tuple[signature.Parameter, ...]]:
    """The kernels of the project's sources and what they take."""
    return {k: v for path in sources() for k, v in signature.kernels_in(path.read_text()).items()}


@functools.cache
def _library() -> ctypes.CDLL:
    return load_library("cuda_emulation", sources())


def load_library(name: str, paths: list[Path]) -> ctypes.CDLL:
    """Compile CUDA sources for the emulator, each as a C++ source of its own beside the scheduler's."""
    with tempfile.TemporaryDirectory() as folder:
        written = []
        for path in paths:
            # The path and the hashes stand for what the compiler reads besides: the cache knows a source by its text and the .h files.
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            lines = ['#include "cuda_builtins.h"', f'#include "{path}"  // {digest}']
            lines += [f"EMULATE({kernel})" for kernel in signature.kernels_in(path.read_text())]
            written.append(Path(folder) / f"{path.stem}_cu.cpp")
            written[-1].write_text("\n".join(lines) + "\n")
        written.append(Path(folder) / "scheduler.cpp")
        written[-1].write_text('#include <algorithm>\n#include "scheduler.h"\n')
        includes = [HERE, RASTERIZER / "common", *sorted({path.parent for path in paths})]
        library = native_build.load(name, written, includes, FLAGS)
    library.emulated_memory.restype = ctypes.c_void_p
    library.emulated_memory.argtypes = [ctypes.c_size_t]
    library.emulated_free.argtypes = [ctypes.c_void_p]
    library.emulated_intact.argtypes = [ctypes.c_void_p]
    library.emulated_error.restype = ctypes.c_char_p
    return library


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("backwards", ctypes.c_int32),
    )


class Memory:
    """Buffers that end where the machine stops a thread; garbage until they are filled."""

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self._lib = library or _library()
        self._addresses: list[int] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of garbage: floats are not a number."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        address = self._lib.emulated_memory(size)
        self._addresses.append(address)
        memory = (ctypes.c_char * size).from_address(address)
        weakref.finalize(memory, self._lib.emulated_free, address)  # the tensor holds it
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def full(self, *shape: int, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.empty(*shape, dtype=dtype).fill_(value)

    def copy(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor in such memory; None stays None."""
        if tensor is None:
            return None
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())

    def check(self) -> None:
        """Raise if something was written around a buffer."""
        for number, address in enumerate(self._addresses):
            if not self._lib.emulated_intact(address):
                raise EmulationError(f"buffer {number}: something was written beside it")


def launch(
    name: str,
    grid: int | tuple[int, ...],
    threads: int,
    *arguments: Any,
    backwards: bool = False,
    library: ctypes.CDLL | None = None,
    parameters: tuple[signature.Parameter, ...] | None = None,
) -> None:
    """Run a kernel to its end.

    Args:
        name: Of the kernel.
        grid: Blocks in x, y, z.
        threads: Of a block.
        arguments: Tensors (None is a null pointer) and numbers, in the order of the kernel's parameters.
        backwards: Blocks and threads take their turns from the last to the first: a result that changes was a race.
        library, parameters: From `load_library` and `signature.kernels_in`, for other kernels than the project's.

    Raises:
        EmulationError: A thread went astray.
    """
    parameters = parameters or kernels()[name]
    assert len(arguments) == len(parameters), (
        f"{name} takes {len(parameters)} arguments, not {len(arguments)}"
    )
    values = [
        _argument(name, parameter, argument)
        for parameter, argument in zip(parameters, arguments, strict=True)
    ]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    grid = (grid,) if isinstance(grid, int) else grid
    described = _Launch((ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid))), threads, backwards)
    library = library or _library()
    if getattr(library, f"emulate_{name}")(pointers, ctypes.byref(described)):
        raise EmulationError(f"{name}: {library.emulated_error().decode()}")


def _argument(kernel: str, parameter: signature.Parameter, value: Any) -> Any:
    if not parameter.pointer:
        return signature.NUMBERS[parameter.type](value)
    if value is None:
        return ctypes.c_void_p(None)
    assert value.is_contiguous(), f"{kernel}: {parameter.name} is not contiguous"
    assert not parameter.dtypes or value.dtype in parameter.dtypes, (
        f"{kernel}: {parameter} is given {value.dtype}"
    )
    return ctypes.c_void_p(value.data_ptr())
