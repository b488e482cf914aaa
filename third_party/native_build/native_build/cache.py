# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled libraries: keyed by content, written atomically, verified when read.

A library's file ends with a trailer (magic + SHA-256 of what comes before), which dynamic loaders ignore: a truncated or
damaged file is noticed before it is mapped, and compiled again.
"""

import ctypes
import functools
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from native_build import compilers
from native_build.compilers import Compiler

TRAILER_MAGIC = b"\nS2D-SHA256:"
TRAILER_BYTES = len(TRAILER_MAGIC) + 64
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def cache_dir() -> Path:
    """Return the folder for compiled libraries: `$S2D_CACHE_DIR/native`, else `~/.cache/s2d/native`, else a temporary one."""
    asked = os.environ.get("S2D_CACHE_DIR")
    home = Path(asked) if asked else Path(os.path.expanduser("~")) / ".cache" / "s2d"
    return _writable(home / "native")


@functools.cache
def _writable(wanted: Path) -> Path:
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError:
        # Named by user, so that two users of one machine never share (or plant) libraries; mkdir keeps it private.
        private = (
            Path(tempfile.gettempdir())
            / f"s2d-native-{os.getuid() if hasattr(os, 'getuid') else 0}"
        )
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid") and private.stat().st_uid != os.getuid():
            private = Path(tempfile.mkdtemp(prefix="s2d-native-"))
        return private


def library_path(
    name: str,
    sources: Sequence[Path],
    includes: Sequence[Path],
    extra_flags: Sequence[str],
    compiler: Compiler,
) -> Path:
    """Return where the library for exactly these inputs is, or would be."""
    options = [*compilers.FLAGS, *compilers.LINK_FLAGS, *extra_flags, *compiler.command]
    key = content_key(sources, includes, (*options, compiler.version, _cpu()))
    return cache_dir() / f"{name}-{key}{SUFFIX}"


def content_key(sources: Sequence[Path], includes: Sequence[Path], texts: Sequence[str]) -> str:
    """Hash sources, all headers beside them and in `includes`, and `texts`: whatever else decides what a compiler makes."""
    digest = hashlib.sha256()
    folders = {*includes, *(source.parent for source in sources)}
    headers = {header for folder in folders for header in folder.rglob("*.h")}
    for path in [*sources, *sorted(headers)]:
        digest.update(f"\0{path.name}\0".encode())
        digest.update(path.read_bytes())
    for text in texts:
        digest.update(f"\0{text}".encode())
    return digest.hexdigest()[:20]


@functools.cache
def _cpu() -> str:
    """Name the CPU and its instruction sets: -march=native makes libraries that other CPUs may not run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        keep = ("model name", "flags", "Features", "CPU part", "CPU implementer")
        return "\n".join(line for line in lines if line.startswith(keep))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def open_cached(path: Path) -> ctypes.CDLL | None:
    """Load a cached library; None where there is none or the file is damaged."""
    if read_sealed(path) is None:
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def read_sealed(path: Path) -> bytes | None:
    """Read what `sealed` was written to a file; None where there is no file or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    body = data[:-TRAILER_BYTES]
    return body if data == sealed(body) else None


def sealed(body: bytes) -> bytes:
    """Append the trailer."""
    return body + TRAILER_MAGIC + hashlib.sha256(body).hexdigest().encode()


def build(
    path: Path,
    sources: Sequence[Path],
    includes: Sequence[Path],
    extra_flags: Sequence[str],
    compiler: Compiler,
) -> None:
    """Compile into `path`. Two processes may do so at once: each renames a complete file into place."""
    include_flags = [f"-I{folder}" for folder in includes]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        objects = [Path(folder) / f"{i}-{source.stem}.o" for i, source in enumerate(sources)]

        def compile_one(pair: tuple[Path, Path]) -> str | None:
            source, target = pair
            flags = [*compilers.FLAGS, *extra_flags, *include_flags]
            command = [*compiler.command, *flags, "-c", str(source), "-o", str(target)]
            return compilers.run(command, compiler)

        with ThreadPoolExecutor(os.cpu_count()) as executor:
            errors = list(executor.map(compile_one, zip(sources, objects, strict=True)))
        for source, error in zip(sources, errors, strict=True):
            if error is not None:
                raise RuntimeError(_failure(source, error, compiler))
        linked = Path(folder) / path.name
        link = [*compiler.command, *compilers.LINK_FLAGS, *map(str, objects), "-o", str(linked)]
        if (error := compilers.run(link, compiler)) is not None:
            raise RuntimeError(_failure(path, error, compiler))
        linked.write_bytes(sealed(linked.read_bytes()))
        os.replace(linked, path)


def _failure(what: Path, error: str, compiler: Compiler) -> str:
    return (
        f"native_build: {compiler.label} cannot compile {what}:\n{error.strip()[:4000]}\n"
        "Try the other compiler (S2D_COMPILER=zig or S2D_COMPILER=system, or CXX=clang++), and report this message."
    )
