"""The calls into libcuda, made for real: into a stand-in that this test compiles, and that writes down what arrives there."""

import ctypes
import threading
from pathlib import Path

import native_build
import pytest
import torch
from native_build.cuda import driver as driver_module
from native_build.cuda.driver import CudaDriver, DriverError, DriverMissing

CONTEXT = 0xC0FFEE0000000028  # of GPU 0, whose handle is 40
MODULE, FUNCTION = (
    0xB0000000000000B0,
    0xF0000000000000F0,
)  # beyond 32 bits: what ctypes must not cut


@pytest.fixture
def standin(monkeypatch):
    """The stand-in, in libcuda's place."""
    library = native_build.load(
        "standin_libcuda", [Path(__file__).with_name("standin_libcuda.cpp")]
    )
    library.standin_written.restype = ctypes.c_char_p
    library.standin_clear()
    monkeypatch.setattr(driver_module, "_NAMES", (library._name,))
    driver_module._library.cache_clear()
    yield library
    driver_module._library.cache_clear()


def written(library):
    text = library.standin_written().decode()
    library.standin_clear()
    return text.splitlines()


def launch(driver, shared=0, device=0):
    arguments = [
        ctypes.c_void_p(0x7F00112233445566),
        ctypes.c_int64(-(2**40)),
        ctypes.c_float(0.375),
        ctypes.c_int32(-3),
    ]
    function = driver.function(driver.load(device, b"\x7fELF-made-up\0more", "demo"), "scale")
    driver.launch(
        device, 0xABCDEF0123456789, function, (70000, 2, 3), (64, 4, 1), shared, arguments
    )


def test_everything_arrives_as_it_was_meant(standin):
    driver = CudaDriver()
    assert driver.version() == (13, 2)
    assert driver.capability(0) == driver.capability(1) == 90
    launch(driver)
    assert written(standin) == [
        "retain 40",
        f"load \x7fELF-made-up in {CONTEXT:x}",
        f"function scale of {MODULE:x}",
        f"launch {FUNCTION:x} grid 70000,2,3 block 64,4,1 shared 0 stream abcdef0123456789 in {CONTEXT:x}: "
        f"7f00112233445566 {-(2**40)} 0.375 -3 extra 0",
    ]
    assert standin.standin_depth() == 0, "the thread's context is the one before"


def test_each_gpu_has_its_context_and_it_is_taken_once(standin):
    driver = CudaDriver()
    launch(driver, device=0)
    launch(driver, device=1)
    launch(driver, device=0)
    lines = written(standin)
    assert [line for line in lines if line.startswith("retain")] == ["retain 40", "retain 41"]
    contexts = [line.split(" in ")[1][:16] for line in lines if line.startswith("launch")]
    assert contexts == [f"{CONTEXT + device:x}" for device in (0, 1, 0)]


def test_a_thread_that_never_touched_the_gpu_can_launch(standin):
    driver = CudaDriver()
    thread = threading.Thread(target=launch, args=(driver,))
    thread.start()
    thread.join()
    assert sum(line.startswith("launch") for line in written(standin)) == 1
    assert standin.standin_depth() == 0


def test_much_shared_memory_is_asked_for_once(standin):
    driver = CudaDriver()
    for shared in (48 << 10, 100 << 10, 64 << 10, 200 << 10):
        launch(driver, shared=shared)
    asked = [line for line in written(standin) if line.startswith("set")]
    assert asked == [f"set 8 to {size << 10} of {FUNCTION:x}" for size in (100, 200)]
    with pytest.raises(
        DriverError, match=r"needs 245760 bytes .* this GPU has 232448. Pass --device cpu"
    ):
        launch(driver, shared=240 << 10)
    assert standin.standin_depth() == 0


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        ("cuInit=100", DriverError, "CUDA error 100 while cuInit: standin error 100"),
        ("cuModuleLoadData=222", DriverError, r"driver \(CUDA 13.2\) cannot load the kernels of demo: the PTX is of a newer .* update the driver"),
        ("cuModuleLoadData=200", DriverError, r"cannot load the kernels of demo: the image is invalid.*too old for the NVRTC"),
        ("cuModuleLoadData=2", torch.OutOfMemoryError, r"out of memory \(loading the kernels of demo\)"),
        ("cuModuleGetFunction=500", DriverError, "error 500 while looking for the kernel scale"),
        ("cuLaunchKernel=700", DriverError, r"error 700 while launching a kernel with a grid of \(70000, 2, 3\)"),
        ("cuLaunchKernel=2", torch.OutOfMemoryError, "out of memory"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_being_done(standin, monkeypatch, fail, error, message):
    monkeypatch.setenv("STANDIN_FAIL", fail)
    with pytest.raises(error, match=message):
        launch(CudaDriver())
    assert standin.standin_depth() == 0, "also after an error"


def test_a_gpu_that_is_not_there(standin):
    with pytest.raises(DriverError, match="CUDA error 101 while looking for GPU 2"):
        CudaDriver().capability(2)


def test_no_libcuda(monkeypatch):
    monkeypatch.setattr(driver_module, "_NAMES", ("no-such-libcuda.so",))
    driver_module._library.cache_clear()
    with pytest.raises(
        DriverMissing, match=r"no NVIDIA driver \(no-such-libcuda.so cannot be loaded"
    ):
        CudaDriver()
