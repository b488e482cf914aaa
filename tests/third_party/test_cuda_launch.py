"""How kernels get from source to a launch, without a GPU: signatures, checks of arguments, the cache, streams. The driver is a fake."""

import ctypes
import dataclasses

import pytest
import torch
from fake_cuda import FakeDriver, fake_driver  # noqa: F401 - a fixture
from native_build import cache, cuda
from native_build.cuda import compile, module, nvrtc, signature

SOURCE = """
// __global__ in a comment is no kernel
#include "scale.h"
struct Box { float low, high; };
extern "C" __global__ void __launch_bounds__(256) scale(
    const float* __restrict__ in, float* __restrict__ out, long long n, float factor, bool flip, const Box box) { }
extern "C" __global__ void count(const unsigned char* mask, int* __restrict__ total, const void *anything, s2d::Table const table) {}
"""


@dataclasses.dataclass
class FakeNvrtc:
    """Makes "machine code" that says what it was made of."""

    version: tuple[int, int] = (13, 0)
    archs: tuple[int, ...] = (75, 80, 86, 90, 100)
    path: str = "fake"
    calls: list = dataclasses.field(default_factory=list)

    def compile(self, source, name, options):
        self.calls.append((name, options))
        return f"ELF of {name}".encode(), "ptxas info    : fake log"


class Box(ctypes.Structure):
    _fields_ = (("low", ctypes.c_float), ("high", ctypes.c_float))


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("S2D_CACHE_DIR", str(tmp_path / "cache"))
    fake = FakeNvrtc()
    monkeypatch.setattr(nvrtc, "available", lambda: (fake,))
    return fake


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "csrc" / "cuda"
    source.mkdir(parents=True)
    (source / "scale.cu").write_text(SOURCE)
    (tmp_path / "csrc" / "common").mkdir()
    (tmp_path / "csrc" / "common" / "scale.h").write_text("// nothing\n")
    return tmp_path / "csrc"


def kernels(folder):
    return cuda.Kernels("demo", [folder / "cuda" / "scale.cu"], [folder / "common"])


def good(n=6):
    return [torch.ones(n), torch.zeros(n), n, 0.5, True, Box(1, 2)]


def test_signatures_are_read_from_the_source():
    found = signature.kernels_in(SOURCE)
    assert list(found) == ["scale", "count"]
    assert [str(p) for p in found["scale"]] == [
        "const float* in",
        "float* out",
        "long long n",
        "float factor",
        "bool flip",
        "const Box box",
    ]
    assert [(p.type, p.pointer, p.const) for p in found["count"]] == [
        ("unsigned char", True, True),
        ("int", True, False),
        ("void", True, True),
        ("Table", False, True),
    ]


@pytest.mark.parametrize(
    "source",
    ["__global__ void f(int n) {}", 'template <int K> extern "C" __global__ int f(int n) {}'],
)
def test_a_kernel_that_cannot_be_called_by_its_name_is_an_error(source):
    with pytest.raises(ValueError, match=r'1 kernels .* 0 are understood .* Expected `extern "C"'):
        signature.kernels_in(source)


def test_a_launch_hands_over_addresses_and_numbers(fake_driver, compiler, folder):  # noqa: F811
    arguments = good()
    kernels(folder).launch("scale", (3, 2), 128, *arguments, shared=64)
    launch = fake_driver.named("scale")
    assert (launch.grid, launch.block, launch.shared) == ((3, 2, 1), (128, 1, 1), 64)
    assert launch.stream == fake_driver.stream
    expected = [arguments[0].data_ptr(), arguments[1].data_ptr(), 6, 0.5, True, arguments[5]]
    assert launch.arguments == expected
    kernels(folder).launch("scale", 1, 32, None, *good()[1:])
    assert fake_driver.launches[1].arguments[0] is None


def test_an_empty_grid_is_no_launch_and_compiles_nothing(fake_driver, compiler, folder):  # noqa: F811
    kernels(folder).launch("scale", cuda.blocks(0, 256), 256, *good(0))
    assert fake_driver.launches == [] and compiler.calls == []


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.ones(6, dtype=torch.float64), "float. in expects torch.float32, got a tensor of torch.float64"),
        (0, torch.ones(12)[::2], "expects a contiguous tensor or None, got a tensor of .* strides"),
        (0, 3, "expects a contiguous tensor or None, got 3"),
        (2, 2**63, "long long n expects a number that it can hold"),
        (2, 6.0, "long long n expects a whole number, got 6.0"),
        (3, torch.ones(1), "float factor expects a number, got a tensor"),
        (5, (1, 2), "Box box expects a ctypes structure named Box, got tuple"),
    ],
)  # fmt: skip
def test_an_argument_that_does_not_fit_is_named(
    fake_driver: FakeDriver,  # noqa: F811
    compiler,
    folder,
    place,
    value,
    message,
):
    arguments = good()
    arguments[place] = value
    with pytest.raises(ValueError, match=f"scale: .*{message}"):
        kernels(folder).launch("scale", 1, 32, *arguments)
    assert fake_driver.launches == []


def test_too_few_arguments_and_sizes_that_no_gpu_has(fake_driver, compiler, folder):  # noqa: F811
    demo = kernels(folder)
    with pytest.raises(
        ValueError, match=r"scale: expected 6 arguments \(const float\* in, .*, got 5"
    ):
        demo.launch("scale", 1, 32, *good()[:5])
    with pytest.raises(ValueError, match=r"the grid can be up to .* got \(1, 65536, 1\)"):
        demo.launch("scale", (1, 65536), 32, *good())
    with pytest.raises(ValueError, match=r"a block has 1 to 1024 threads, got \(64, 32, 1\)"):
        demo.launch("scale", 1, (64, 32), *good())
    with pytest.raises(ValueError, match="expected tensors on one GPU, got meta"):
        demo.launch("scale", 1, 32, torch.ones(6, device="meta"), None, *good()[2:])
    assert fake_driver.launches == []


def test_a_second_process_takes_the_code_from_the_cache(fake_driver, compiler, folder):  # noqa: F811
    kernels(folder).launch("scale", 1, 32, *good())
    demo = kernels(folder)  # as another process would make it
    demo.load()
    assert [name for name, _ in compiler.calls] == ["scale.cu"]
    assert fake_driver.loaded == 2 * [(0, "demo/scale.cu", b"ELF of scale.cu")]
    options = compiler.calls[0][1]
    assert options[0] == "--gpu-architecture=sm_90"
    assert f"--include-path={folder / 'common'}" in options
    assert not any("fast_math" in option for option in options)


@pytest.mark.parametrize("change", ["source", "header", "arch", "driver", "compiler", "options"])
def test_what_decides_the_code_is_in_the_key(
    fake_driver,  # noqa: F811
    compiler,
    folder,
    monkeypatch,
    change,
):
    kernels(folder).load()
    if change == "source":
        (folder / "cuda" / "scale.cu").write_text(SOURCE + "\n")
    elif change == "header":
        (folder / "common" / "scale.h").write_text("// something\n")
    elif change == "arch":
        fake_driver.arch = 86
    elif change == "driver":
        fake_driver.cuda_version = (13, 1)
    elif change == "compiler":
        compiler.version = (12, 9)
    else:
        monkeypatch.setattr(compile, "OPTIONS", (*compile.OPTIONS, "--fmad=false"))
    kernels(folder).load()
    assert len(compiler.calls) == 2


def test_damaged_code_is_compiled_again(fake_driver, compiler, folder):  # noqa: F811
    kernels(folder).load()
    (path,) = cache.cache_dir().glob("scale-sm_90-*.cubin")
    path.write_bytes(path.read_bytes()[:-1])
    kernels(folder).load()
    assert len(compiler.calls) == 2
    assert fake_driver.loaded[1][2] == b"ELF of scale.cu"
    assert path.with_suffix(".log").read_text() == "ptxas info    : fake log"
    assert not list(cache.cache_dir().glob(".build-*"))


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        (90, (75, 80, 90, 100), "sm_90"),
        (89, (75, 80, 86, 90), "sm_86"),  # the same generation: its code runs
        (120, (75, 80, 90, 100), "compute_100"),  # newer than the compiler: PTX
        (121, (75, 90, 100, 120), "sm_120"),
        (70, (52, 60, 70, 75), "sm_70"),
    ],
)
def test_what_is_compiled_for(capability, archs, expected):
    assert compile.target(capability, archs) == expected


def test_a_gpu_that_cannot_add_doubles_is_too_old():
    with pytest.raises(ValueError, match=r"compute capability 5\.2, and the kernels need 6\.0"):
        compile.target(52, (50, 52, 60, 70))


def test_the_log_says_what_a_kernel_takes():
    """The assembler of CUDA 12.9 and that of 13.0 lay it out differently."""
    log = """
ptxas info    : Compiling entry function 'old' for 'sm_75'
ptxas info    : Function properties for old
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 1024 bytes smem, 372 bytes cmem[0]
ptxas info    : Compiling entry function 'new' for 'sm_90'
ptxas info    : Function properties for new
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""
    assert compile.parse_usage(log) == {
        "old": compile.Usage(72, 1024, 16, 20),
        "new": compile.Usage(12, 0, 0, 0),
    }


def test_memory_of_another_stream_is_held(fake_driver):  # noqa: F811
    tensors = [torch.ones(2), None, torch.ones(3)]
    cuda.belongs_to_stream(tensors, made_on=fake_driver.stream)
    assert fake_driver.recorded == []
    cuda.belongs_to_stream(tensors, made_on=fake_driver.stream + 1)
    assert [len(tensor) for tensor in fake_driver.recorded] == [2, 3]


def test_a_driver_is_opened_once_and_not_with_force_cpu(monkeypatch):
    opened = []
    monkeypatch.setitem(module._settings, "driver", None)
    monkeypatch.setattr(module, "CudaDriver", lambda: opened.append(1) or FakeDriver())
    monkeypatch.setenv("FORCE_CPU", "1")
    with pytest.raises(module.DriverMissing, match="FORCE_CPU=1 is set"):
        module.driver()
    monkeypatch.setenv("FORCE_CPU", "0")
    assert module.driver() is module.driver()
    assert opened == [1]
