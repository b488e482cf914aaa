# SPDX-License-Identifier: Apache-2.0
"""NVRTC, NVIDIA's compiler as a library: where it is found, and the eight functions of its C API that are needed.

A CUDA build of torch brings it along, as does the pip package nvidia-cuda-nvrtc; neither nvcc nor a C++ compiler is needed, nor a GPU.
"""

import contextlib
import ctypes
import functools
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

# Of the library and of the file beside it that it opens by name alone, which only works if that is loaded before.
_NAME = re.compile(r"(libnvrtc\.so\.\d+|libnvrtc-[\da-f]+\.so\.\d+|nvrtc64_\d+_\d+\.dll)$")
_BUILTINS = ("libnvrtc-builtins*.so.*", "nvrtc-builtins64_*.dll")
_SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll")
PACKAGE = "nvidia-cuda-nvrtc"


class NvrtcMissing(RuntimeError):
    """There is no NVRTC that can be used here."""


class CompileError(RuntimeError):
    """A source does not compile; the message has the compiler's words."""


class Nvrtc:
    """A loaded NVRTC.

    Attributes:
        path: Where it was found.
        version: Of the CUDA toolkit that it belongs to, (major, minor).
        archs: What it can compile for, as in sm_90: 90. Ascending.
    """

    def __init__(self, path: str) -> None:
        for pattern in _BUILTINS:
            for builtins in sorted(Path(path).parent.glob(pattern)):
                with contextlib.suppress(OSError):  # a second set beside it, which is not needed
                    ctypes.CDLL(str(builtins))
        self.path = path
        self._lib = ctypes.CDLL(path)
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)
        count = ctypes.c_int()
        self._check(self._lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        archs = (ctypes.c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(archs))
        self.archs = sorted(archs)

    def compile(self, source: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
        """Compile one source file.

        Args:
            source: CUDA C++.
            name: What messages call it.
            options: Options of NVRTC. `--gpu-architecture=sm_90` gives machine code, `compute_90` the PTX that a driver compiles.

        Returns:
            Machine code (an ELF file) or PTX, and the log.

        Raises:
            CompileError: It does not compile.
        """
        program = ctypes.c_void_p()
        self._check(
            self._lib.nvrtcCreateProgram(
                ctypes.byref(program), source.encode(), name.encode(), 0, None, None
            )
        )
        try:
            arguments = (ctypes.c_char_p * len(options))(*(text.encode() for text in options))
            code = self._lib.nvrtcCompileProgram(program, len(options), arguments)
            log = self._text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if code:
                said = log or self._lib.nvrtcGetErrorString(code).decode()
                raise CompileError(f"NVRTC cannot compile {name}:\n{said[:8000]}")
            virtual = any("=compute_" in text for text in options)
            return self._text(program, "PTX" if virtual else "CUBIN"), log
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, text))
        return text.raw

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"NVRTC: {self._lib.nvrtcGetErrorString(code).decode()}.")


@functools.cache
def available() -> tuple[Nvrtc, ...]:
    """Load every NVRTC that is found, one of each version, newest first."""
    found: dict[tuple[int, int], Nvrtc] = {}
    for path in _paths():
        try:
            nvrtc = Nvrtc(path)
        except (OSError, AttributeError, RuntimeError):  # not there, of another platform, too old
            continue
        found.setdefault(nvrtc.version, nvrtc)
    return tuple(found[version] for version in sorted(found, reverse=True))


def choose(driver_version: tuple[int, int] | None = None) -> Nvrtc:
    """Return the newest NVRTC whose machine code the driver runs: of its major version or an older one.

    Args:
        driver_version: The CUDA version that the driver supports; None where nothing is to be run.

    Raises:
        NvrtcMissing: There is none; the message says what to install.
    """
    found = available()
    for nvrtc in found:
        if driver_version is None or nvrtc.version[0] <= driver_version[0]:
            return nvrtc
    if not found:
        raise NvrtcMissing(
            "NVRTC, which compiles the CUDA kernels, was not found. A CUDA build of torch brings it along; else run: "
            f"{sys.executable} -m pip install {PACKAGE}"
        )
    versions = ", ".join(f"{major}.{minor}" for major, minor in (n.version for n in found))
    major = driver_version[0]
    raise NvrtcMissing(
        f"The NVIDIA driver is too old for this NVRTC: it runs CUDA up to {major}.{driver_version[1]}, and the kernels would be "
        f"compiled by NVRTC {versions}. Update the driver, or run: {sys.executable} -m pip install {PACKAGE}-cu{major}"
    )


def _paths() -> Iterator[str]:
    """Where an NVRTC may be: in pip's packages, beside torch, in a CUDA toolkit, or where the system looks."""
    roots = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    roots |= {Path(entry) for entry in sys.path if entry.endswith("-packages")}
    folders = [root / "torch" / "lib" for root in sorted(roots)]
    for root in sorted(roots):
        for package in sorted((root / "nvidia").glob("c*"), reverse=True):
            folders += [package / "lib", package / "bin", package / "bin" / "x86_64"]
    for variable in ("CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX"):
        if home := os.environ.get(variable):
            folders += [Path(home) / "lib64", Path(home) / "lib", Path(home) / "bin"]
    folders += [Path("/usr/local/cuda/lib64")]
    for folder in folders:
        with contextlib.suppress(OSError):
            yield from sorted(str(path) for path in folder.iterdir() if _NAME.match(path.name))
    yield from _SONAMES
