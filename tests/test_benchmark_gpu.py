"""benchmarks/gpu.py as far as it goes without a GPU: a dry run on the CPU, a gsplat made of our kernels, emulated launches."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from diff_gaussian_rasterization import SparseGaussianAdam, rasterize_gaussians_raw
from native_build.cuda import compile, nvrtc

from benchmarks import gpu, gpu_contestants, gpu_fixer, gpu_kernels, gpu_report
from s2d.fixer import choice, diffusion

HERE = Path(__file__).parent
SMALL = ["--device", "cpu", "--gaussians", "60", "--sizes", "48x32", "--repeats", "2"]


class StandInAdam(torch.optim.Adam):
    """gsplat's SelectiveAdam, called as its trainer calls it."""

    def __init__(self, params, eps, betas):
        super().__init__(params, eps=eps, betas=betas)
        self.inner = SparseGaussianAdam(self.param_groups, lr=0.0, eps=eps)

    def step(self, visibility):
        assert visibility.dtype == torch.bool
        self.inner.step(visibility)


@pytest.fixture
def gsplat(monkeypatch):
    """Its two functions by our kernels, with its own conventions: activated parameters, one tensor of coefficients."""
    calls = []

    def rasterization(*, means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options):  # fmt: skip
        calls.append(options)
        assert options.keys() == {"near_plane", "sh_degree", "packed"}
        probe = torch.zeros(1, len(means), 2).requires_grad_()
        out = rasterize_gaussians_raw(
            means, scales.log(), quats, opacities.logit(), colors[:, :1], colors[:, 1:], viewmats, Ks, width, height, means2d_probe=probe
        )  # fmt: skip
        radii = out.radii[..., None].expand(-1, -1, 2)
        info = {"radii": radii, "means2d": probe}
        if options["packed"]:
            ids = out.radii[0].nonzero()[:, 0]
            info = {"gaussian_ids": ids, "means2d": Packed.apply(probe, ids)}
        return out.rgb, out.alpha, info

    module = types.ModuleType("gsplat")
    module.rasterization = rasterization
    module.optimizers = types.ModuleType("gsplat.optimizers")
    module.optimizers.SelectiveAdam = StandInAdam
    monkeypatch.setitem(sys.modules, "gsplat", module)
    monkeypatch.setitem(sys.modules, "gsplat.optimizers", module.optimizers)
    return calls


class Packed:
    """Stands for the rows of visible Gaussians; its gradient is taken from the whole."""

    @staticmethod
    def apply(probe, ids):
        class Rows:
            retain_grad = staticmethod(probe.retain_grad)
            grad = property(lambda self: probe.grad[0, ids])

        return Rows()


def run(tmp_path, *arguments):
    folder = gpu.main(["--output-dir", str(tmp_path), *SMALL, *arguments])
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_everybody_trains_the_same_way(gsplat):
    task = gpu_contestants.made_up_task(80, 48, 32, torch.device("cpu"), 2)
    found, missing = gpu_contestants.usable(lambda _: True)
    assert len(found) == 4 and missing == []
    start = gpu_contestants.Ours(task).parameters
    ends = {}
    for contestant in found:
        one = contestant(task)
        for step in range(3):
            one.step(step % 2)
        ends[contestant.name] = ({k: v.detach() for k, v in one.parameters.items()}, one.statistics)
    truth, statistics = ends.pop("s2d")
    assert all(not torch.equal(truth[name], start[name]) for name in truth)
    assert (statistics[1] > 0).any()
    for name, (parameters, (grad_sum, num_views)) in ends.items():
        for key, value in parameters.items():
            # The stand-in goes through exp and log: measured 3e-6.
            assert torch.allclose(value, truth[key], rtol=1e-3, atol=2e-5), (name, key)
        assert torch.equal(num_views, statistics[1]), name
        assert torch.allclose(grad_sum, statistics[0], rtol=1e-3, atol=1e-6), name
    assert {call["packed"] for call in gsplat} == {False, True}


def test_a_dry_run_without_gsplat(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gsplat", None)
    results, text = run(tmp_path, "--only", "step", "kernels")
    rows = [row for row in results["steps"] if "missing" not in row]
    assert [row["contestant"] for row in rows] == ["s2d", "s2d, autograd"]
    assert all(row["step_ms"] > 0 and row["image_difference"] < 1e-6 for row in rows)
    assert "60 Gaussians, 48x32" in text and "Not measured: gsplat" in text
    assert results["machine"]["device"] == "cpu" and results["kernels"] == []


def test_a_contestant_that_fails_is_a_row_and_the_others_go_on(tmp_path, gsplat, monkeypatch):
    def broken(**_):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(sys.modules["gsplat"], "rasterization", broken)
    results, text = run(tmp_path, "--only", "step")
    failed = [row for row in results["steps"] if "failed" in row]
    assert [row["contestant"] for row in failed] == ["gsplat", "gsplat, packed"]
    assert "| gsplat | RuntimeError: no kernel image is available |" in text
    assert sum("step_ms" in row for row in results["steps"]) == 2


def test_another_image_is_no_contest(gsplat, monkeypatch):
    task = gpu_contestants.made_up_task(60, 48, 32, torch.device("cpu"))
    wrong = gpu_contestants.Ours(task).render(0) + 0.01
    with pytest.raises(ValueError, match=r"the image differs by .* from ours"):
        gpu.race(gpu_contestants.Ours, task, wrong, 1, torch.device("cpu"))


def test_kernel_times_and_floors_on_emulated_launches(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "cuda_emulation"))
    monkeypatch.syspath_prepend(str(HERE / "third_party"))
    from emulated_driver import emulated_gpu

    with emulated_gpu():
        task = gpu_contestants.made_up_task(40, 32, 24, torch.device("cpu"))
        row = gpu.kernel_row(task, gpu_kernels.Limits(flops=1e12, bytes=1e11), repeats=2)
        counts = gpu_kernels.count(task)
    assert row["kernels"].keys() == {
        "project_forward", "emit_instances_16", "tile_ranges_16", "rasterize_forward", "ssim_forward", "ssim_gradient",
        "rasterize_backward", "project_update", "sorting and the rest", "step",
    }  # fmt: skip
    for name, values in row["kernels"].items():
        assert values["ms"] > 0
        assert ("memory_floor_ms" in values) == (name not in ("sorting and the rest", "step"))
    assert counts.gaussians == 40 and 0 < counts.visible <= 40 and counts.pixels == 32 * 24
    assert counts.instances >= counts.visible
    # By hand: image size 3 floats, each pixel read twice, three partial images written.
    floor = 1e3 * 32 * 24 * 3 * 4 * 5 / 1e11
    assert row["kernels"]["ssim_forward"]["memory_floor_ms"] == pytest.approx(floor)
    text = gpu_report.kernels({"gaussians": 40, "width": 32, "height": 24, **row})
    assert text.count("\n") == 3 + len(row["kernels"])


def test_the_peak_test_compiles():
    if not nvrtc.available():
        pytest.skip("no NVRTC: pip install -r requirements-dev.txt")
    source = Path(gpu_kernels.__file__).with_name("gpu_peak.cu")
    made = compile.compile_source(source, [], "sm_90", nvrtc.choose())
    assert made.warnings == [] and made.usage["fma_peak"].stack_bytes == 0


def test_the_fixer(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_fixer, "NETWORKS", ("compact",))
    results, text = run(tmp_path, "--only", "fixer", "--frame", "60x40")
    (row,) = results["fixer"]
    assert row["frame_ms"].keys() == {"1 at a time"} and row["precision"] == "fp32"
    assert row["frame_ms"]["1 at a time"] > 0
    assert "| compact | 60x40 | 1 at a time |" in text


def test_the_fixer_runs_as_stage_2_runs_it(monkeypatch):
    """A GPU's number format, its views at a time and what is compiled."""
    asked = []
    monkeypatch.setattr(choice, "default_precision", lambda _: "bf16")
    monkeypatch.setattr(diffusion, "views_that_fit", lambda *given: asked.append(given[1:]) or 3)
    row = gpu_fixer.measure("compact", (60, 40), 1, torch.device("cpu"))
    ((pixels, dtype, _),) = asked
    assert pixels >= 60 * 40 and dtype == torch.bfloat16 and row["precision"] == "bf16"
    assert list(row["frame_ms"]) == ["1 at a time", "3 at a time"]


def test_the_large_network_has_the_size_of_sd_turbo():
    """The published UNet has 865.9 million parameters, the VAE 83.65 million; our skips are half a million more."""
    from s2d.fixer.network.model import MultiViewUNet, SkipAutoencoder

    with torch.device("meta"):
        unet = MultiViewUNet(**gpu_fixer.UNET)
        vae = SkipAutoencoder(1.0, 1e-5, **gpu_fixer.VAE)
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(865.9e6, rel=1e-4)
    assert sum(p.numel() for p in vae.parameters()) == pytest.approx(84.15e6, rel=1e-3)


def test_factors_are_against_the_best_of_gsplat():
    def row(contestant, step, fps, peak):
        return {"gaussians": 10, "width": 4, "height": 3, "contestant": contestant, "step_ms": step, "step_best_ms": step, "render_fps": fps, "peak_bytes": peak}  # fmt: skip

    rows = [row("s2d", 2.0, 300, 50e6), row("gsplat", 5.0, 100, 100e6), row("gsplat, packed", 4.0, 80, 80e6)]  # fmt: skip
    (table,) = gpu_report.steps(rows)
    assert "| s2d | 2.00 | 2.00 | 2.00 | 300 | 3.00 | 50 | 0.62 |" in table


def test_a_size_that_is_none(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--output-dir", "x", "--sizes", "1920"])
    assert "expected WIDTHxHEIGHT such as 1920x1080, got '1920'" in capsys.readouterr().err
