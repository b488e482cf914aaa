# SPDX-License-Identifier: Apache-2.0
"""The compiled core: its C structures, its loading, and the reuse of its workspaces."""

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import native_build
from torch import Tensor

CSRC = Path(__file__).parent / "csrc"
SOURCES = (
    "project",
    "bin",
    "forward",
    "backward_tiles",
    "backward_project",
    "count",
    "adam",
    "update",
    "api",
)
PHASES = ("project", "bin", "forward", "backward_tiles", "backward_project")
MAX_IDLE_FRAMES = 4

_P = ctypes.c_void_p


def _struct(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


# Mirrors of the structures in csrc/cpu/frame.h.
SceneArgs = _struct(
    "SceneArgs",
    ("n", ctypes.c_int64),
    ("num_coeffs", ctypes.c_int32),
    ("degree", ctypes.c_int32),
    ("activated", ctypes.c_int32),
    ("scale_modifier", ctypes.c_float),
    *((name, _P) for name in ("means", "log_scales", "quats", "opacity_logits", "sh0", "shN")),
    ("colors", _P),
    ("covars", _P),
)
CameraArgs = _struct(
    "CameraArgs",
    ("viewmat", ctypes.c_float * 16),
    *((name, ctypes.c_float) for name in ("fx", "fy", "cx", "cy")),
    ("width", ctypes.c_int32),
    ("height", ctypes.c_int32),
    ("background", ctypes.c_float * 3),
    ("inverse_depth", ctypes.c_int32),
    ("antialiasing", ctypes.c_int32),
)
ImageArgs = _struct(
    "ImageArgs", *((name, _P) for name in ("rgb", "alpha", "depth", "radii", "means2d_offset"))
)
CotangentArgs = _struct(
    "CotangentArgs",
    *((name, _P) for name in ("rgb", "alpha", "depth")),
    ("lengths", ctypes.c_int32),
)
GradientArgs = _struct(
    "GradientArgs",
    *((name, _P) for name in ("means", "log_scales", "quats", "opacity_logits", "sh0", "shN")),
    *((name, _P) for name in ("colors", "covars", "means2d", "lengths", "viewmat", "intrinsics")),
    ("accumulate", ctypes.c_int32),
)
# Mirrors of the structures in csrc/cpu/adam.h.
AdamTensor = _struct(
    "AdamTensor",
    *((name, _P) for name in ("param", "grad", "exp_avg", "exp_avg_sq")),
    ("width", ctypes.c_int64),
    *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps")),
)
AdamArgs = _struct(
    "AdamArgs",
    ("n", ctypes.c_int64),
    ("num_tensors", ctypes.c_int64),
    ("tensors", _P),
    ("visible", _P),
    ("visible_bytes", ctypes.c_int64),
)
UpdateArgs = _struct(
    "UpdateArgs",
    *((name, _P) for name in ("tensors", "radii", "opacity_slope")),
    *((name, ctypes.c_float) for name in ("opacity_penalty", "scale_x", "scale_y")),
    ("lengths", ctypes.c_int32),
    *((name, _P) for name in ("grad_sum", "num_views", "viewmat", "intrinsics")),
)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled core; compiles it on the first call ever."""
    return load_library()


def load_library(extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile (or find in the cache) and load the core. Extra flags: the tests build it for lesser CPUs."""
    sources = [CSRC / "cpu" / f"{name}.cpp" for name in SOURCES]
    includes = [CSRC / "common", CSRC / "cpu"]
    lib = native_build.load("gaussian_rasterizer", sources, includes, extra_flags)
    lib.s2d_last_error.restype = ctypes.c_char_p
    lib.s2d_frame_new.restype = _P
    lib.s2d_frame_free.argtypes = [_P]
    lib.s2d_frame_free.restype = None
    lib.s2d_frame_stats.argtypes = [_P, _P, _P]
    lib.s2d_frame_stats.restype = None
    lib.s2d_frame_memory.argtypes = [_P, _P]
    lib.s2d_frame_memory.restype = None
    return lib


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a contiguous tensor's data; None stays None."""
    return None if tensor is None else tensor.data_ptr()


class Frame:
    """The workspace of one render, from its forward to its backward pass.

    Memory is kept when a Frame is garbage: the next one takes it over, so training allocates nothing in steady state.
    """

    _idle: list[int] = []  # noqa: RUF012 - shared on purpose, under _lock
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.lib = library()
        with Frame._lock:
            self.handle = Frame._idle.pop() if Frame._idle else None
        if self.handle is None:
            self.handle = self.lib.s2d_frame_new()
        if not self.handle:
            raise MemoryError("rasterize: out of memory for a new frame.")

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)
        if not handle:
            return
        with Frame._lock:
            if self.lib is library() and len(Frame._idle) < MAX_IDLE_FRAMES:
                Frame._idle.append(handle)
                return
        self.lib.s2d_frame_free(handle)

    def call(self, function: Callable[..., int], *args: Any) -> None:
        """Run a phase of the core on this workspace."""
        structures = [ctypes.byref(arg) for arg in args]
        code = function(_P(self.handle), *structures, ctypes.c_int32(native_build.num_threads()))
        if code:
            raise RuntimeError(f"rasterize: {self.lib.s2d_last_error().decode()}")
        last_stats.update(self.stats())

    def stats(self) -> dict[str, float]:
        """Return milliseconds by phase, and how many Gaussians and (Gaussian, tile) pairs were visible."""
        seconds, counts = (ctypes.c_double * len(PHASES))(), (ctypes.c_int64 * 2)()
        self.lib.s2d_frame_stats(self.handle, seconds, counts)
        times = {name: 1e3 * value for name, value in zip(PHASES, seconds, strict=True)}
        return {**times, "visible": counts[0], "instances": counts[1]}

    def pairs(self) -> dict[str, int]:
        """Count the (pixel, Gaussian) pairs of the last forward pass; see csrc/cpu/count.cpp. For benchmarks.

        Returns:
            "blended": those that any renderer must blend; "forward", "backward": those that the passes compute; "listed": those
            of all blocks in the tile lists, as if no pixel were ever finished.
        """
        counts = (ctypes.c_int64 * 4)()
        self.call(self.lib.s2d_frame_pairs, counts)
        return dict(zip(("blended", "forward", "backward", "listed"), counts, strict=True))

    def memory(self) -> dict[str, int]:
        """Return the bytes that this workspace holds, by what they grow with. For benchmarks."""
        sizes = (ctypes.c_int64 * 3)()
        self.lib.s2d_frame_memory(self.handle, sizes)
        return dict(zip(("gaussians", "instances", "image"), sizes, strict=True))


# Of the last call in this process; for benchmarks.
last_stats: dict[str, float] = {}
