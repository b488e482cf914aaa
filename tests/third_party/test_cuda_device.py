"""What --device means on machines that this one is not: a fake driver and a fake torch.cuda say what is there."""

import logging
import re

import pytest
import torch
from fake_cuda import fake_driver  # noqa: F401 - a fixture
from native_build.cuda import device, module, nvrtc
from native_build.cuda.driver import DriverError, DriverMissing
from native_build.cuda.nvrtc import CompileError, NvrtcMissing
from test_cuda_launch import FakeNvrtc


@pytest.fixture
def machine(fake_driver, monkeypatch):  # noqa: F811
    """A machine with one GPU that everything fits to; tests take something away."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(nvrtc, "available", lambda: (FakeNvrtc(),))
    monkeypatch.setattr(device, "_said", set())
    return fake_driver


def no_driver():
    raise DriverMissing("There is no NVIDIA driver (libcuda.so.1 cannot be loaded). Install one to use a GPU.")  # fmt: skip


def no_gpu():
    raise DriverError("CUDA error 100 while cuInit: no CUDA-capable device is detected.")


BROKEN = {
    "no driver": r"There is no NVIDIA driver .* Install one",
    "no gpu": r"There is no GPU that the NVIDIA driver can use \(CUDA error 100 .* nvidia-smi",
    "force cpu": r"FORCE_CPU=1 is set.*Unset it",
    "torch without cuda": r"torch .* is built without CUDA: install its CUDA build",
    "driver too old": r"driver is too old: it runs CUDA up to 12.2, and torch .* built for 13.0. Update the driver",
    "hidden": r"torch sees 0 GPUs .* CUDA_VISIBLE_DEVICES",
    "gpu too old": r"GPU is too old: it has compute capability 7.0, and the kernels need 7.5 .*--device cpu",
    "no nvrtc": r"NVRTC.* was not found.* pip install nvidia-cuda-nvrtc",
    "nvrtc too new": r"driver is too old for this NVRTC: it runs CUDA up to 13.0, .* by NVRTC 14.1. Update .*nvidia-cuda-nvrtc-cu13",
}  # fmt: skip


@pytest.fixture(params=BROKEN)
def broken(request, machine, monkeypatch):
    """One thing is wrong; the message that says so."""
    what = request.param
    if what in ("no driver", "no gpu"):
        monkeypatch.setattr(module, "driver", no_driver if what == "no driver" else no_gpu)
    elif what == "force cpu":
        monkeypatch.setenv("FORCE_CPU", "1")
    elif what == "torch without cuda":
        monkeypatch.setattr(torch.version, "cuda", None)
    elif what == "driver too old":
        machine.cuda_version = (12, 2)
    elif what == "hidden":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif what == "gpu too old":
        machine.arch = 70
    elif what == "no nvrtc":
        monkeypatch.setattr(nvrtc, "available", lambda: ())
    else:
        monkeypatch.setattr(nvrtc, "available", lambda: (FakeNvrtc(version=(14, 1)),))
    return BROKEN[what]


def test_a_gpu_that_works_is_taken_and_named_once(machine, caplog):
    caplog.set_level(logging.INFO, logger="s2d")
    for _ in range(2):
        choice = device.choose_device("auto")
    assert choice.device == torch.device("cuda", 0)
    assert [record.message for record in caplog.records] == [
        "device: cuda:0 (GPU 0, driver for CUDA 13.0, kernels for sm_90 by NVRTC 13.0)"
    ]
    assert device.choose_device("cuda").device == torch.device("cuda", 0)
    assert device.choose_device("cpu").device == torch.device("cpu")


def test_auto_takes_the_cpu_and_says_why(broken, caplog):
    caplog.set_level(logging.INFO, logger="s2d")
    assert device.choose_device("auto").device == torch.device("cpu")
    (record,) = caplog.records
    assert record.message.startswith("device: cpu (")
    assert re.search(broken, record.message)


def test_asking_for_a_gpu_that_cannot_be_used_is_one_clear_error(broken):
    with pytest.raises(device.DeviceUnusable, match=f"--device cuda cannot be used. .*{broken}"):
        device.choose_device("cuda")


def test_a_gpu_that_is_not_there_and_words_that_are_none(machine):
    with pytest.raises(
        device.DeviceUnusable, match="torch sees 1 GPUs here, so there is none of number 3"
    ):
        device.choose_device("cuda:3")
    with pytest.raises(ValueError, match="expected auto, cpu, cuda or cuda:N, got 'gpu'"):
        device.choose_device("gpu")


def test_an_older_nvrtc_beside_one_that_is_too_new_is_taken(machine, monkeypatch):
    both = (FakeNvrtc(version=(14, 0)), FakeNvrtc(version=(13, 2)))
    monkeypatch.setattr(nvrtc, "available", lambda: both)
    assert nvrtc.choose((13, 0)).version == (13, 2)
    assert nvrtc.choose(None).version == (14, 0)
    with pytest.raises(NvrtcMissing, match=r"by NVRTC 14\.0, 13\.2"):
        nvrtc.choose((12, 8))


FAILURES = {
    "later": (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "cuda:0 failed: CUDA error: an illegal"),
    "plan": (device.NotEnoughMemory("Training would take 9 GiB. Pass --device cpu."), "^Training would take 9 GiB"),
    "memory": (torch.OutOfMemoryError("CUDA out of memory."), r"Out of memory on cuda:0: 1.0 of 8.0 GiB are free.*--max-gaussians.*--device cpu"),
    "launch": (DriverError("CUDA error 700 while launching: illegal address."), r"cuda:0 failed: CUDA error 700.*--device cpu"),
    "library": (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "cuda:0 failed: cuDNN error"),
    "worker": (device.DeviceUnusable("Out of memory on cuda:0: 0.1 GiB."), "^Out of memory on cuda:0: 0.1 GiB"),
    "compile": (CompileError("NVRTC cannot compile x.cu"), r"cuda:0 failed: NVRTC cannot compile"),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_only_auto_goes_on_on_the_cpu(machine, caplog, failure):
    error, message = FAILURES[failure]
    tried = []

    def work(where):
        tried.append(where.type)
        if where.type == "cuda":
            raise error
        return "done"

    with pytest.raises(device.DeviceUnusable, match=message) as raised:
        device.run_on(device.choose_device("cuda"), work)
    assert raised.value.__cause__ is error
    assert tried == ["cuda"]
    assert device.run_on(device.choose_device("auto"), work) == "done"
    assert tried == ["cuda", "cuda", "cpu"]
    assert "Going on on the CPU" in caplog.text


def test_other_errors_and_those_of_the_cpu_pass_through(machine):
    for error in (ValueError("not a number"), RuntimeError("tensors on cuda:0 and cpu")):

        def work(where, error=error):
            raise error

        with pytest.raises(type(error), match=str(error)):
            device.run_on(device.choose_device("auto"), work)

    def no_memory(where):
        raise torch.OutOfMemoryError("on the CPU")

    with pytest.raises(torch.OutOfMemoryError):
        device.run_on(device.choose_device("cpu"), no_memory)


def test_a_network_needs_no_kernels_and_processes_share_the_gpus(machine, monkeypatch):
    monkeypatch.setattr(nvrtc, "available", lambda: ())
    assert device.choose_device("auto").device == torch.device("cpu")
    assert device.choose_device("auto", kernels=False).device == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for asked, number, expected in (("auto", 3, 1), ("cuda", 2, 0), ("cuda:1", 2, 1)):
        choice = device.choose_device(asked, kernels=False, number=number)
        assert choice.device == torch.device("cuda", expected)
