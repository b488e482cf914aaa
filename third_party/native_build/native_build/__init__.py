# SPDX-License-Identifier: Apache-2.0
"""Compile plain C++17 with a C ABI on first use, cache the library, load it with ctypes.

    lib = native_build.load("simple_knn", [Path("knn.cpp")])
    lib.knn(...)

The user needs no build step: whichever C++ compiler is there does the work, else the pip package `ziglang`. A library is
cached by everything that can change it (sources, headers, flags, compiler, CPU), so a cached load compiles nothing.

Environment: `S2D_CACHE_DIR` (where libraries are kept), `S2D_COMPILER=system|zig`, `CXX`, `S2D_NUM_THREADS`,
`OMP_NUM_THREADS`.
"""

import ctypes
import functools
import logging
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from native_build import cache, compilers

__all__ = ["include_dir", "load", "num_threads", "set_num_threads"]

_log = logging.getLogger("s2d")
_loaded: dict[Path, ctypes.CDLL] = {}
_load_lock = threading.Lock()
_settings: dict[str, int | None] = {"num_threads": None}


def include_dir() -> Path:
    """Return the folder of the shared headers (`parallel.h`, `abi.h`); always on the include path of `load`."""
    return Path(__file__).parent / "include"


def load(
    name: str,
    sources: Sequence[Path],
    include_dirs: Sequence[Path] = (),
    extra_flags: Sequence[str] = (),
) -> ctypes.CDLL:
    """Compile `sources` into a shared library, unless a cached one fits, and load it.

    Args:
        name: Prefix of the cached file; letters, digits, underscores.
        sources: C++17 files that export `extern "C"` functions.
        include_dirs: Folders of their headers. All `.h` files there and beside the sources count for the cache key.
        extra_flags: Compiler flags after the standard ones (`compilers.FLAGS`).

    Returns:
        The library. The same object for the same key in one process.

    Raises:
        RuntimeError: No compiler works, or the sources do not compile; the message has the compiler's words.
    """
    sources = [Path(source).resolve() for source in sources]
    missing = [str(source) for source in sources if not source.is_file()]
    if missing:
        raise FileNotFoundError(
            f"native_build: the sources of {name} are incomplete: {', '.join(missing)}. "
            "Reinstall the package that contains them."
        )
    includes = [include_dir(), *(Path(folder).resolve() for folder in include_dirs)]
    with _load_lock:
        tried: list[str] = []
        for compiler in compilers.candidates(tried):
            path = cache.library_path(name, sources, includes, extra_flags, compiler)
            if path in _loaded:
                return _loaded[path]
            library = cache.open_cached(path)
            if library is None:
                if (problem := compilers.probe(compiler)) is not None:
                    tried.append(f"{compiler.label}: {problem}")
                    continue
                _log.info("compiling %s with %s (%s)", name, compiler.label, compiler.reason)
                cache.build(path, sources, includes, extra_flags, compiler)
                library = cache.open_cached(path)
                if library is None:
                    raise RuntimeError(
                        f"native_build: {path} was written but does not load. "
                        "Check that the disk is not full, or set S2D_CACHE_DIR to another folder."
                    )
            else:
                _log.debug("loaded %s from the cache (%s)", name, path)
            _loaded[path] = library
            return library
        raise RuntimeError(compilers.no_compiler_message(tried))


def set_num_threads(count: int | None) -> None:
    """Fix the number of threads that kernels use in this process; None goes back to the environment's choice."""
    if count is not None and count < 1:
        raise ValueError(f"set_num_threads: expected a count >= 1 or None, got {count}.")
    _settings["num_threads"] = count


def num_threads() -> int:
    """Return how many threads a kernel should use.

    In this order: `set_num_threads`, `S2D_NUM_THREADS`, `OMP_NUM_THREADS`, else the CPUs that this process may use. Not torch's
    count: a training loop is fastest with one torch thread and all CPUs for the kernels, because torch's OpenMP workers keep
    spinning for milliseconds after each operation.
    """
    fixed = _settings["num_threads"]
    if fixed is not None:
        return fixed
    for name in ("S2D_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "").strip()
        if text.isdigit() and int(text) > 0:
            return int(text)
        if text and name == "S2D_NUM_THREADS":
            raise ValueError(
                f"{name}: expected a whole number >= 1, got {text!r}. Unset it to use all CPUs."
            )
    return _available_cpus()


@functools.cache
def _available_cpus() -> int:
    """Count the CPUs that this process may use: affinity, and the quota of its control group (containers)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, math.ceil(int(quota) / int(period))))
