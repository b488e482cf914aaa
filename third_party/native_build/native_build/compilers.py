# SPDX-License-Identifier: Apache-2.0
"""Which compiler builds the kernels, how it is called, and the words when there is none."""

import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Contraction lets a*b+c become one FMA. The -fno-* pair drops errno and trap bookkeeping, which blocks vectorisation. NaN and
# inf keep their meaning (no -ffast-math): the kernels detect poisoned values with them.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
)
LINK_FLAGS = ("-shared", "-pthread")
PROBE_SOURCE = '#include <thread>\n#include <vector>\nextern "C" int s2d_probe() { std::vector<int> v(3); return (int)v.size(); }\n'


@dataclass(frozen=True)
class Compiler:
    """One way to compile C++."""

    command: tuple[str, ...]
    kind: str  # "system" or "zig"
    version: str  # first line of its version output; part of the cache key
    reason: str  # why it was chosen, for the log

    @property
    def label(self) -> str:
        return f"{' '.join(self.command)} [{self.version}]"


def candidates(problems: list[str]) -> Iterator[Compiler]:
    """Yield the compilers to try, best first; append to `problems` why others were passed over."""
    forced = os.environ.get("S2D_COMPILER", "").strip().lower()
    if forced not in ("", "system", "zig"):
        raise ValueError(
            f"S2D_COMPILER: expected system or zig, got {forced!r}. Unset it for automatic."
        )
    why = f"forced by S2D_COMPILER={forced}" if forced else ""
    if forced != "zig":
        yield from _system_compilers(problems, why)
    if forced != "system":
        if importlib.util.find_spec("ziglang") is not None:
            command = (sys.executable, "-m", "ziglang")
            version = _first_line((*command, "version"))
            if version is not None:
                reason = why or "no system compiler works; using the pip package ziglang"
                yield Compiler((*command, "c++"), "zig", f"zig {version}", reason)
            else:
                problems.append("ziglang: installed, but `python -m ziglang version` fails")
        else:
            problems.append("ziglang: not installed")


def _system_compilers(problems: list[str], why: str) -> Iterator[Compiler]:
    asked = os.environ.get("CXX", "").strip()
    names = ([("named by CXX", asked)] if asked else []) + [
        ("found on PATH", name) for name in ("c++", "g++", "clang++")
    ]
    found = False
    for reason, name in names:
        command = tuple(shlex.split(name))
        if shutil.which(command[0]) is None:
            if asked == name:
                problems.append(f"CXX={asked}: not found")
            continue
        version = _first_line((*command, "--version"))
        if version is None:
            problems.append(f"{name}: `{name} --version` fails")
            continue
        found = True
        yield Compiler(command, "system", version, why or reason)
    if not found:
        problems.append("c++, g++, clang++: none on PATH")


@functools.cache
def _first_line(command: tuple[str, ...]) -> str | None:
    """Return the first line that a command prints, or None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


@functools.cache
def probe(compiler: Compiler) -> str | None:
    """Compile a three-line library. Return None if that works, else the compiler's words.

    A compiler can be present and unusable (no libstdc++ headers, no linker); then the next candidate gets its turn.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE_SOURCE)
        command = [*compiler.command, *FLAGS, *LINK_FLAGS, str(source), "-o", f"{folder}/probe.so"]
        return run(command, compiler)


def run(command: list[str], compiler: Compiler) -> str | None:
    """Run one compiler command. Return None if it succeeds, else what it printed."""
    env = dict(os.environ)
    if compiler.kind == "zig":
        # zig builds its C++ runtime once into a cache of its own; keep it beside ours, where writing is known to work.
        from native_build import cache

        env.setdefault("ZIG_GLOBAL_CACHE_DIR", str(cache.cache_dir() / "zig"))
        env.setdefault("ZIG_LOCAL_CACHE_DIR", str(cache.cache_dir() / "zig"))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=env, check=False
        )
    except OSError as error:
        return str(error)
    return (
        None
        if done.returncode == 0
        else (done.stderr or done.stdout or f"exit code {done.returncode}")
    )


def no_compiler_message(problems: list[str]) -> str:
    """Say that nothing can compile the kernels, what was tried, and the one-line cure."""
    tried = "\n  ".join(problems) or "nothing"
    return (
        "native_build: no C++ compiler works, and the kernels are compiled on first use. Tried:\n  "
        f"{tried}\nInstall one without root rights: {sys.executable} -m pip install ziglang"
    )
