"""What this machine can do at best: float32 multiply-adds and copied bytes per second, of one core and of all.

Two threads rarely give twice the rate of one: they share clocks, caches, memory, sometimes a core. What two copies of the
peak test give side by side is the most that any kernel can gain, and is printed beside every figure about threads.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import native_build
from diff_gaussian_rasterization import _native
from native_build import compilers
from rich.table import Table

from benchmarks.tables import Printer
from s2d.files import atomic_write_json
from s2d.log import describe_machine

SOURCE = Path(__file__).with_name("machine.cpp")
LARGE = 128 << 20  # bytes an array: several times the last cache of a desktop machine
IN_L2 = 96 << 10  # bytes an array: two of them are beyond the first cache and inside the second
SECONDS = 0.06  # per test: long against the start of a thread, short against a turbo's patience
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """Peak FMA rate, copy bandwidth and the ratio of two copies of the peak test side by side."""

    markdown: bool = False
    """Print Markdown, for docs."""
    json: Path | None = None
    """Also write the numbers to this file."""


@dataclass(frozen=True)
class Limits:
    """Rates of this machine. FLOP: a multiply-add is two. Bytes: read and written ones both count."""

    threads: int
    lanes: int
    """Floats in the vectors of the kernels, with which the peak is measured."""
    peak_one: float
    """FLOP/s of one thread."""
    peak_all: float
    """FLOP/s of all threads at once."""
    peak_by_width: dict[int, float]
    """FLOP/s of one thread by the number of floats in a vector."""
    copy_one: float
    """Bytes/s of one thread copying large arrays."""
    copy_all: float
    l2_one: float
    """Bytes/s of one thread copying within its second-level cache."""
    l2_all: float

    @property
    def thread_ratio(self) -> float:
        """How much more all threads do than one: what "linear" means on this machine."""
        return self.peak_all / self.peak_one


def main(cfg: Machine) -> None:
    """Measure and print."""
    limits = measure_limits()
    Printer(cfg.markdown).table(limits_table(limits))
    if cfg.json is not None:
        atomic_write_json(cfg.json, {**describe(), **limits_json(limits)})


def measure_limits(threads: int | None = None) -> Limits:
    """Measure this machine's limits with as many threads as the kernels use; takes about two seconds."""
    threads = native_build.num_threads() if threads is None else threads
    lanes = _native.library().s2d_lanes()
    widths = [width for width in (4, 8, 16) if width <= lanes]
    by_width = {width: peak(width, 1) for width in widths}
    return Limits(
        threads=threads,
        lanes=lanes,
        peak_one=by_width[lanes],
        peak_all=peak(lanes, threads),
        peak_by_width=by_width,
        copy_one=copy(LARGE, 1),
        copy_all=copy(LARGE, threads),
        l2_one=copy(IN_L2, 1),
        l2_all=copy(IN_L2, threads),
    )


def peak(width: int, threads: int) -> float:
    """Return FLOP/s of `threads` threads at once, with vectors of `width` floats."""
    return _best(
        lambda rounds: _library().s2d_machine_peak(width, threads, rounds),
        work=2.0 * width * threads * 12,
        start=200_000,
    )


def copy(num_bytes: int, threads: int) -> float:
    """Return bytes/s of `threads` threads at once, each copying an array of `num_bytes` to another."""
    return _best(
        lambda repeats: _library().s2d_machine_copy(num_bytes, threads, repeats),
        work=2.0 * num_bytes * threads,
        start=1,
    )


def _best(test: Callable[[int], float], work: float, start: int) -> float:
    """Best of some runs, each made long enough from the rate that a short one shows."""
    repeats = max(1, round(SECONDS * test(start) / work))
    return max(test(repeats) for _ in range(REPEATS))


@functools.cache
def _library() -> ctypes.CDLL:
    lib = native_build.load("machine", [SOURCE])
    lib.s2d_machine_peak.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_int64]
    lib.s2d_machine_copy.argtypes = [ctypes.c_int64, ctypes.c_int32, ctypes.c_int64]
    for function in (lib.s2d_machine_peak, lib.s2d_machine_copy):
        function.restype = ctypes.c_double
    return lib


def describe() -> dict:
    """Name the machine, the compiler of the kernels and their vectors, for a table's title and for JSON."""
    compiler = next(iter(compilers.candidates([])), None)
    return {
        "machine": describe_machine(),
        "compiler": compiler.version if compiler else "none",
        "lanes": _native.library().s2d_lanes(),
        "threads": native_build.num_threads(),
    }


def limits_json(limits: Limits) -> dict:
    """The limits as JSON holds them, in FLOP/s and bytes/s."""
    return {**asdict(limits), "thread_ratio": limits.thread_ratio}


def limits_table(limits: Limits) -> Table:
    """Format the limits for a terminal."""
    about = describe()
    cpu, cores = about["machine"]["cpu"], about["machine"]["cores"]
    table = Table(
        title=f"{cpu}, {cores} cores, {limits.threads} threads, {limits.lanes} lanes, {about['compiler']}",
        title_justify="left",
    )
    for column in ("limit", "one thread", f"{limits.threads} threads", "ratio"):
        table.add_column(column, justify="left" if column == "limit" else "right")
    for width, rate in limits.peak_by_width.items():
        is_peak = width == limits.lanes
        table.add_row(
            f"multiply-adds, {width} floats a vector, GFLOP/s",
            f"{rate / 1e9:.0f}",
            f"{limits.peak_all / 1e9:.0f}" if is_peak else "",
            f"{limits.thread_ratio:.2f}" if is_peak else "",
            style="bold" if is_peak else None,
        )
    for name, one, all_threads in (
        ("copy of large arrays", limits.copy_one, limits.copy_all),
        ("copy in the L2 cache", limits.l2_one, limits.l2_all),
    ):
        row = (f"{one / 1e9:.0f}", f"{all_threads / 1e9:.0f}", f"{all_threads / one:.2f}")
        table.add_row(f"{name}, GB/s (read + written)", *row)
    return table
