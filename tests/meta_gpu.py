"""A GPU without memory: tensors on torch's meta device count as tensors on a GPU, and kernels do nothing.

Nothing there has a value, so whatever asks for one fails; operations on tensors of two devices do, too. `NoWaiting` adds what else makes a
host wait. The one exception is the number of instances that binning reads: it is `NUM_INSTANCES`.
"""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent / "third_party"))
from fake_cuda import FakeDriver
from native_build.cuda import module

from s2d.cameras import Cameras

META = torch.device("meta")
NUM_INSTANCES = 5000
aten = torch.ops.aten


class HostWaits(AssertionError):
    """The host would wait for the GPU here."""


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait: while it is on, the host may only put work on the GPU's stream."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is aten._local_scalar_dense.default and args[0].is_meta:
            if _called_by("_bin"):
                return NUM_INSTANCES
            raise HostWaits("a number is read")
        if function is aten._linalg_check_errors.default:
            raise HostWaits("linear algebra reads whether it has failed: use the _ex functions")
        if function in (aten.nonzero.default, aten.equal.default):
            raise HostWaits(f"{function} tells the host something")
        source, device, asynchronous = None, None, False
        if function is aten._to_copy.default:
            source, device = args[0], kwargs.get("device") or args[0].device
            asynchronous = kwargs.get("non_blocking", False)
        elif function is aten.copy_.default:
            source, device = args[1], args[0].device
            asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if source is not None and source.device != device and not asynchronous:
            raise HostWaits(f"a copy from {source.device} to {device} waits: use to_device")
        return function(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Adds up the memory of the meta tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten._local_scalar_dense.default and args[0].is_meta:
            return NUM_INSTANCES
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.count(tensor)
        return out

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _called_by(name: str) -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == name:
            return True
        frame = frame.f_back
    return False


def _not_from_numbers(make):
    def checked(*args, **kwargs):
        made = make(*args, **kwargs)
        if made.is_meta:
            raise HostWaits("numbers of Python are copied to the GPU: make a tensor on the CPU, and use to_device")  # fmt: skip
        return made

    return checked


@contextmanager
def no_waiting() -> Iterator[None]:
    """Refuse what makes the host wait, until the block ends."""
    with (
        mock.patch.object(torch, "tensor", _not_from_numbers(torch.tensor)),
        mock.patch.object(torch.Tensor, "new_tensor", _not_from_numbers(torch.Tensor.new_tensor)),
        NoWaiting(),
    ):
        yield


class CpuGenerator(torch.Generator):
    """There are none for the meta device, which takes one of the CPU."""

    def __new__(cls, *_):
        return super().__new__(cls)


@contextmanager
def meta_gpu() -> Iterator[FakeDriver]:
    """Let tensors on the meta device count as tensors on a GPU until the block ends."""
    driver = FakeDriver()
    with (
        mock.patch.dict(module._settings, driver=driver, device_type="meta"),
        mock.patch.object(module.Kernels, "_load", lambda *_: "nothing"),
        mock.patch.object(Cameras, "_validate", lambda _: None),  # would look at the numbers
        mock.patch.object(torch, "Generator", CpuGenerator),
    ):
        yield driver
