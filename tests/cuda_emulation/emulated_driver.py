"""The packages' own Python on emulated kernels: what they allocate, sort and launch on a GPU, run on the CPU.

Within `emulated_gpu()` tensors on the CPU count as tensors on a GPU. Memory that is not written yet is not a number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import emulation
import torch
from fake_cuda import FakeDriver, Launch
from native_build.cuda import module


class EmulatedDriver(FakeDriver):
    """Runs each launch to its end, and writes it down."""

    def launch(
        self,
        device: int,
        stream: int,
        function: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        arguments: Sequence[Any],
    ) -> None:
        assert shared == 0 and block[1:] == (1, 1), "the emulator knows neither"
        values = [argument.value for argument in arguments]
        self.launches.append(Launch(function, grid, block, shared, stream, values))
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        described = emulation._Launch((ctypes.c_uint32 * 3)(*grid), block[0], 0)
        library = emulation._library()
        if getattr(library, f"emulate_{function}")(pointers, ctypes.byref(described)):
            raise emulation.EmulationError(f"{function}: {library.emulated_error().decode()}")

    @property
    def order(self) -> list[str]:
        """The kernels launched so far."""
        return [launch.kernel for launch in self.launches]


@contextmanager
def emulated_gpu() -> Iterator[EmulatedDriver]:
    """Let all kernels run emulated until the block ends. Nothing is compiled for a GPU."""
    driver = EmulatedDriver()
    before = torch.are_deterministic_algorithms_enabled()
    with (
        mock.patch.dict(module._settings, driver=driver, device_type="cpu"),
        mock.patch.object(module.Kernels, "_load", lambda *_: "emulated"),
    ):
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
        try:
            yield driver
        finally:
            torch.use_deterministic_algorithms(before)
