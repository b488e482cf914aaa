"""The emulator finds what it is for: kernels with one mistake each, and what it must not complain about."""

from pathlib import Path

import emulation
import pytest
import torch
from native_build.cuda import signature

KERNELS = Path(__file__).with_name("mistakes.cu")


@pytest.fixture(scope="module")
def mistakes():
    """Launch a kernel of mistakes.cu."""
    library = emulation.load_library("cuda_mistakes", [KERNELS])
    parameters = signature.kernels_in(KERNELS.read_text())
    memory = emulation.Memory(library)

    def launch(name: str, count: int, *arguments, threads: int = 64, backwards: bool = False):
        out = memory.full(count, value=0.0)
        options = {"library": library, "parameters": parameters[name], "backwards": backwards}
        emulation.launch(name, 1, threads, out, *arguments, **options)
        memory.check()
        return out

    return launch


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("write_behind", r"thread 64 .* at byte 256 of a buffer of 256 bytes"),
        ("read_before", r"thread 0 .* at byte -4000 of a buffer"),
        ("unaligned", "at no multiple of the size"),
        ("exit_before_barrier", r"__syncthreads.*thread 40 .* has ended"),
        ("barrier_in_branch", r"wait for one another.*__syncthreads in line"),
        ("exit_before_shuffle", r"a shuffle.*thread 7 .* has ended"),
        ("ballot_of_another", "not in its own mask"),
    ],
)
def test_mistakes_are_found(mistakes, kernel: str, words: str) -> None:
    with pytest.raises(emulation.EmulationError, match=words):
        mistakes(kernel, 64, threads=96)


def test_a_few_bytes_behind_the_end_are_noticed(mistakes) -> None:
    """Buffers start on 16 bytes, so up to 12 may lie between the end and the guarded page."""
    with pytest.raises(emulation.EmulationError, match="written beside it"):
        mistakes("write_behind", 33, threads=34)


@pytest.mark.parametrize("kernel", ["missing_barrier", "barrier_of_the_warp_alone"])
def test_a_missing_barrier_shows_in_another_order(mistakes, kernel: str) -> None:
    results = [mistakes(kernel, 64, backwards=backwards) for backwards in (False, True)]
    assert not torch.equal(*results)


@pytest.mark.parametrize("backwards", [False, True])
def test_what_threads_do_together(mistakes, backwards: bool) -> None:
    out = mistakes("together", 64, backwards=backwards)
    lanes = torch.arange(64) % 32
    expected = 3 * 32 + (lanes ^ 5) + 100 * 8 + 10000 * (63 - torch.arange(64))
    assert out.tolist() == expected.tolist()
