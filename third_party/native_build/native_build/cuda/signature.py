# SPDX-License-Identifier: Apache-2.0
"""What a kernel takes, read from its source: so that every launch is checked against it, on any machine.

    extern "C" __global__ void __launch_bounds__(256) fill(float* __restrict__ out, int64_t n)

A launch passes addresses and numbers without types; one argument too few, or an int where a float is expected, would
corrupt memory or compute nonsense. Parameters are pointers to plain types, numbers, or structures by value.
"""

import ctypes
import re
from dataclasses import dataclass
from typing import Any

import torch

# Numbers that can be passed, by the names that C++ has for them.
NUMBERS: dict[str, Any] = {
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
    "int": ctypes.c_int32,
    "int32_t": ctypes.c_int32,
    "unsigned": ctypes.c_uint32,
    "unsigned int": ctypes.c_uint32,
    "uint32_t": ctypes.c_uint32,
    "long long": ctypes.c_int64,
    "int64_t": ctypes.c_int64,
    "unsigned long long": ctypes.c_uint64,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_uint64,
}
# Tensors that a pointer may point into. torch has no operations on unsigned numbers wider than a byte: kernels read signed ones as such.
_INTEGERS = {
    **dict.fromkeys(("int", "int32_t", "unsigned", "unsigned int", "uint32_t"), torch.int32),
    **dict.fromkeys(("long long", "int64_t", "unsigned long long", "uint64_t"), torch.int64),
    **dict.fromkeys(("short", "int16_t", "unsigned short", "uint16_t"), torch.int16),
    "char": torch.int8,
    "int8_t": torch.int8,
}
POINTEES: dict[str, tuple[torch.dtype, ...]] = {
    **{name: (dtype,) for name, dtype in _INTEGERS.items()},
    **dict.fromkeys(("float", "float2", "float3", "float4"), (torch.float32,)),
    **dict.fromkeys(("int2", "int4", "uint2", "uint4"), (torch.int32,)),
    "double": (torch.float64,),
    **dict.fromkeys(("half", "__half", "half2", "__half2"), (torch.float16,)),
    "bool": (torch.bool, torch.uint8),
    **dict.fromkeys(("unsigned char", "uint8_t"), (torch.uint8, torch.bool)),
}
_BOUNDS = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
_KERNEL = re.compile(
    rf'extern\s+"C"\s+__global__\s+{_BOUNDS}void\s+{_BOUNDS}(\w+)\s*\(([^)]*)\)\s*[{{;]'
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel."""

    name: str
    type: str
    """As the source says it, without const, restrict and `*`."""
    pointer: bool
    const: bool
    """Of a pointer: what it points to is only read."""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of a pointer: the tensors that it may point into; none where the type is a structure or void, which takes any."""
        return POINTEES.get(self.type, ())

    def __str__(self) -> str:
        return (
            f"{'const ' if self.const else ''}{self.type}{'*' if self.pointer else ''} {self.name}"
        )


def kernels_in(source: str) -> dict[str, tuple[Parameter, ...]]:
    """Find the kernels of a source file and what they take.

    Raises:
        ValueError: There is a `__global__` that is not understood: not `extern "C"`, a template, a macro in its place.
    """
    plain = _COMMENT.sub(" ", source)
    matches = _KERNEL.findall(plain)
    all_of_them = len(re.findall(r"\b__global__\b", plain))
    if len(matches) != all_of_them:
        raise ValueError(
            f"{all_of_them} kernels in the source, of which {len(matches)} are understood ({', '.join(dict(matches))}). "
            'Expected `extern "C" __global__ void __launch_bounds__(…) name(type name, …)`.'
        )
    return {
        name: tuple(map(_parameter, filter(None, (text.strip() for text in inside.split(",")))))
        for name, inside in matches
    }


def _parameter(text: str) -> Parameter:
    """Parse `const float* __restrict__ means`."""
    *_, name = re.findall(r"\w+", text)
    kind = re.sub(r"\b(__restrict__|__grid_constant__|struct)\b", " ", text[: text.rindex(name)])
    pointer, const = "*" in kind, bool(re.search(r"\bconst\b", kind))
    kind = " ".join(re.sub(r"\bconst\b|\*", " ", kind).split()).removeprefix("s2d::")
    return Parameter(name, kind, pointer, const)
