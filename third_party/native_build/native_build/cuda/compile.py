# SPDX-License-Identifier: Apache-2.0
"""From a CUDA source file to machine code for one kind of GPU, kept in the cache, with what the compiler said about it."""

import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from native_build import cache
from native_build.cuda.nvrtc import Nvrtc

# No --use_fast_math: the kernels find poisoned values by NaN and infinity, and agree with the CPU's to the last digits. Where an
# approximation is good enough, a kernel names its intrinsic. The assembler's report (-v) is how spilled registers are noticed.
OLDEST = 60  # the first that can add doubles in memory
OPTIONS = ("--std=c++17", "--ptxas-options=-v")

_log = logging.getLogger("s2d")
_SECTION = re.compile(r"(?:Function properties for|Compiling entry function) '?(\w+)'?")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a multiprocessor. Spills and the stack lie in slow memory."""

    registers: int
    """Of one thread."""
    shared_bytes: int
    """Of one block, without what a launch asks for on top."""
    stack_bytes: int
    """Of one thread."""
    spill_bytes: int
    """Stored and loaded again, of one thread."""


@dataclass(frozen=True)
class Compiled:
    """Machine code (or PTX) and the compiler's log."""

    code: bytes
    log: str

    @property
    def usage(self) -> dict[str, Usage]:
        """What each kernel takes, as the log says."""
        return parse_usage(self.log)

    @property
    def warnings(self) -> list[str]:
        """The lines of the log that warn."""
        return [line for line in self.log.splitlines() if "warning" in line.lower()]


def target(capability: int, archs: Sequence[int]) -> str:
    """Name what to compile for a GPU.

    Args:
        capability: Of the GPU, as in sm_90: 90.
        archs: What the compiler knows.

    Returns:
        `sm_…`, machine code that this GPU runs: its own or that of an older one of the same generation. Else `compute_…`: PTX, which the
        driver of a GPU newer than the compiler makes into machine code when it is loaded.

    Raises:
        ValueError: The GPU is older than what the compiler knows, or than what the kernels need.
    """
    older = [arch for arch in archs if OLDEST <= arch <= capability]
    if not older:
        needed = min(arch for arch in archs if arch >= OLDEST)
        raise ValueError(
            f"The GPU is too old: it has compute capability {capability / 10:.1f}, and the kernels need {needed / 10:.1f} or newer, "
            "as this NVRTC makes them. Pass --device cpu."
        )
    same = max(older)
    return f"{'sm' if same // 10 == capability // 10 else 'compute'}_{same}"


def compile_cached(
    source: Path,
    includes: Sequence[Path],
    arch: str,
    nvrtc: Nvrtc,
    driver_version: tuple[int, int] | None = None,
) -> Compiled:
    """Compile one source file, unless the cache has what would come out.

    Args:
        source: A `.cu` file.
        includes: Folders of headers; its own folder is searched anyway.
        arch: From `target`.
        nvrtc: The compiler.
        driver_version: Part of the key, since a driver may refuse what another made PTX of; None where nothing is to be run.

    Raises:
        CompileError: It does not compile.
    """
    key = cache.content_key(
        [source],
        includes,
        [*OPTIONS, arch, f"NVRTC {nvrtc.version}", f"driver {driver_version}"],
    )
    path = cache.cache_dir() / f"{source.stem}-{arch}-{key}.cubin"
    log_path = path.with_suffix(".log")
    code = cache.read_sealed(path)
    if code is not None:
        try:
            return Compiled(code, log_path.read_text())
        except OSError:  # removed by hand: compile again
            pass
    _log.info(
        "compiling %s for %s with NVRTC %d.%d (%s)",
        source.name,
        arch,
        *nvrtc.version,
        nvrtc.path,
    )
    compiled = compile_source(source, includes, arch, nvrtc)
    _write(log_path, compiled.log.encode())
    _write(path, cache.sealed(compiled.code))
    return compiled


def compile_source(source: Path, includes: Sequence[Path], arch: str, nvrtc: Nvrtc) -> Compiled:
    """Compile one source file; as `compile_cached`, without a cache."""
    folders = [f"--include-path={folder}" for folder in (source.parent, *includes)]
    options = [f"--gpu-architecture={arch}", *OPTIONS, *folders]
    return Compiled(*nvrtc.compile(source.read_text(), source.name, options))


def parse_usage(log: str) -> dict[str, Usage]:
    """Read the assembler's report (`--ptxas-options=-v`) in a log: what each function takes."""
    found: dict[str, dict[str, int]] = {}
    name = None
    for line in log.splitlines():
        if section := _SECTION.search(line):
            name = section.group(1)
            found.setdefault(name, {"registers": 0, "shared_bytes": 0})
        if name is None:
            continue
        if frame := _FRAME.search(line):
            stack, stores, loads = map(int, frame.groups())
            found[name] |= {"stack_bytes": stack, "spill_bytes": stores + loads}
        if registers := _REGISTERS.search(line):
            found[name]["registers"] = int(registers.group(1))
            if shared := _SHARED.search(line):
                found[name]["shared_bytes"] = int(shared.group(1))
    return {name: Usage(**values) for name, values in found.items()}


def _write(path: Path, data: bytes) -> None:
    """Write a file under another name and rename it: two processes may do so at once, and neither leaves half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".build-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
