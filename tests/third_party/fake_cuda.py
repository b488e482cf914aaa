"""A driver that writes down what it is asked to do instead of doing it; with it, tensors on the CPU count as tensors on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from native_build.cuda import module
from native_build.cuda.driver import DriverError
from torch import Tensor


@dataclass
class Launch:
    """One launch as the driver saw it."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    arguments: list[Any]
    """Addresses and numbers."""


@dataclass
class FakeDriver:
    """`native_build.cuda.driver.Driver` without a GPU."""

    cuda_version: tuple[int, int] = (13, 0)
    arch: int = 90
    stream: int = 7
    kernels: dict[str, Callable[..., None]] = field(default_factory=dict)
    """What some kernels do, given the launch; the others do nothing."""
    fail: dict[str, Exception] = field(default_factory=dict)
    """Kernels that cannot be launched, and why."""
    launches: list[Launch] = field(default_factory=list)
    loaded: list[tuple[int, str, bytes]] = field(default_factory=list)
    recorded: list[Tensor] = field(default_factory=list)

    def version(self) -> tuple[int, int]:
        return self.cuda_version

    def capability(self, device: int) -> int:
        if device:
            raise DriverError(f"CUDA error 101 while looking for GPU {device}: no such device.")
        return self.arch

    def current_stream(self, device: int) -> int:
        return self.stream

    def record(self, tensor: Tensor) -> None:
        self.recorded.append(tensor)

    def load(self, device: int, code: bytes, name: str) -> str:
        self.loaded.append((device, name, code))
        return name

    def function(self, module: str, name: str) -> str:
        return name

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
        if function in self.fail:
            raise self.fail[function]
        values = [getattr(argument, "value", argument) for argument in arguments]
        launch = Launch(function, grid, block, shared, stream, values)
        self.launches.append(launch)
        if function in self.kernels:
            self.kernels[function](launch)

    def named(self, kernel: str) -> Launch:
        """The only launch of this kernel."""
        (launch,) = (launch for launch in self.launches if launch.kernel == kernel)
        return launch


def fill(address: int, values: Sequence[int]) -> None:
    """Write int32 numbers where a kernel would."""
    (ctypes.c_int32 * len(values)).from_address(address)[:] = values


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setitem(module._settings, "driver", driver)
    monkeypatch.setitem(module._settings, "device_type", "cpu")
    monkeypatch.delenv("FORCE_CPU", raising=False)
    return driver
