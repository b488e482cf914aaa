"""What every CUDA kernel takes of a GPU, for each architecture: compiled here without one, and as committed in cuda_usage.json.

Reads   third_party/*/*/csrc/cuda/*.cu
Writes  tests/third_party/cuda_usage.json, which test_cuda_compile.py compares with

Example
    python tests/third_party/cuda_usage.py     # after a change of the kernels that is meant to take more
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

from native_build.cuda import compile, nvrtc

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = Path(__file__).with_name("cuda_usage.json")
# Turing, Ampere (data centre, desktop), Ada, Hopper, Blackwell (data centre, desktop).
ARCHS = (75, 80, 86, 89, 90, 100, 120)
FIELDS = ("registers", "shared_bytes", "stack_bytes", "spill_bytes")


def sources() -> list[Path]:
    return sorted((ROOT / "third_party").glob("*/*/csrc/cuda/*.cu"))


def compiled(source: Path, arch: int) -> compile.Compiled:
    """Compile as at run time; from the cache where that was done before."""
    common = source.parent.parent / "common"
    includes = [common] if common.is_dir() else []
    return compile.compile_cached(source, includes, f"sm_{arch}", nvrtc.choose())


def usage(arch: int) -> Iterator[tuple[str, compile.Usage]]:
    """Each kernel with what it takes."""
    for source in sources():
        for kernel, taken in compiled(source, arch).usage.items():
            yield f"{source.stem}/{kernel}", taken


def main() -> None:
    table: dict[str, dict[str, list[int]]] = {}
    for arch in ARCHS:
        for kernel, taken in usage(arch):
            table.setdefault(kernel, {})[f"sm_{arch}"] = list(astuple(taken))
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table))
    version = ".".join(map(str, nvrtc.choose().version))
    EXPECTED.write_text(
        f'{{\n "nvrtc": "{version}",\n "fields": {json.dumps(FIELDS)},\n "kernels": {{\n{rows}\n }}\n}}\n'
    )


if __name__ == "__main__":
    main()
