"""The benchmarks: do they do the work they time, are their shares and scales what they say, does every command run?"""

import dataclasses
import itertools
import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import native_build
import pytest
import torch
from rich.table import Table

from benchmarks import kernel_model, kernels, machine, scaling, training_curve, workloads
from benchmarks.kernel_model import Counts
from benchmarks.machine import Limits
from benchmarks.plot import Line, plot_svg
from benchmarks.tables import markdown_text
from s2d import training
from s2d.gaussians import Gaussians
from tools import benchmark

LIMITS = Limits(2, 16, 250e9, 400e9, {16: 250e9}, 30e9, 40e9, 170e9, 300e9)
COUNTS = Counts(
    gaussians=1000,
    visible=800,
    instances=2000,
    pixels=10_000,
    coefficients=9,
    degree=2,
    blended=2e5,
    forward=4e5,
    backward=3e5,
    listed=9e5,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark") / "out"


@pytest.fixture(scope="module")
def curve(tiny_scene, model_dir):
    """Stages 0 and 1 with every fourth step or so evaluated; leaves a finished stage 1 in model_dir."""
    config = training_curve.Config(
        source=tiny_scene, model_dir=model_dir, keep_count=4, sample_iteration=40, every=0.02
    )
    return training_curve.main(config)


@pytest.fixture
def workload():
    torch.manual_seed(0)
    camera = workloads.front_camera(64, 48)
    return workloads.made_up_workload("tiny", workloads.synthetic_gaussians(300), camera)


# ---- machine ---------------------------------------------------------------------------------------------------------


def test_machine_tests_do_the_work_that_they_are_timed_on():
    """Ten times the work takes about ten times as long: a compiler that drops it would show a rate that grows with it."""
    lib = machine._library()
    for rate in (
        lambda times: lib.s2d_machine_peak(4, 1, times * 100_000),
        lambda times: lib.s2d_machine_copy(1 << 20, 1, times * 20),
    ):
        few, many = (max(rate(times) for _ in range(3)) for times in (1, 10))
        assert many < 4 * few
        assert 1e8 < many < 4e12  # between a pocket calculator and any core's cache


def test_limits_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SECONDS", 0.005)
    monkeypatch.setattr(machine, "REPEATS", 2)
    monkeypatch.setattr(machine, "LARGE", 4 << 20)
    machine.main(machine.Machine(json=tmp_path / "machine.json"))
    found = json.loads((tmp_path / "machine.json").read_text())
    assert found["threads"] == native_build.num_threads()
    assert found["peak_one"] == found["peak_by_width"][str(found["lanes"])]
    # Wide margins: other tests run beside this one.
    assert 0.2 < found["thread_ratio"] < 3 * found["threads"]
    assert found["machine"]["cpu"] and found["compiler"]


# ---- the model of operations and bytes -------------------------------------------------------------------------------


def test_work_of_a_step_by_hand():
    work = kernel_model.step_work(COUNTS)
    assert work["forward"].flop == 4e5 * 37
    assert work["backward_tiles"].flop == 3e5 * 59
    # 11 raw numbers and 27 of colour; value and two moments, in and out, 4 bytes each; the splat, two sums of statistics; slots.
    assert work["backward_project"].bytes == 800 * (38 * 6 * 4 + 64 + 16) + COUNTS.instances * 64
    assert work["loss"].bytes == 10_000 * 3 * 3 * 4
    assert work["forward"].bytes == 2000 * 12 + 800 * 64 + 10_000 * 28
    assert work["bin"].flop == 0


def test_work_grows_in_proportion_to_the_counts():
    twice = {
        name: 2 * value
        for name, value in dataclasses.asdict(COUNTS).items()
        if name not in ("coefficients", "degree")
    }
    larger = kernel_model.step_work(dataclasses.replace(COUNTS, **twice))
    for name, work in kernel_model.step_work(COUNTS).items():
        assert larger[name].flop == pytest.approx(2 * work.flop)
        assert larger[name].bytes == pytest.approx(2 * work.bytes)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def measured(**changes):
    phases = {name: [1.0, 2.0, 9.0] for name in [*kernel_model.step_work(COUNTS), "rest", "step"]}
    values = {
        "name": "made up",
        "size": "100x100",
        "counts": COUNTS,
        "steps": [9.0, 10.0, 30.0],
        "phases": phases,
        "limits": LIMITS,
        "bandwidth": 20e9,
    }
    return kernels.Measured(**{**values, **changes})


def test_steps_per_second_are_scaled_by_the_measured_peak():
    rates = kernels.to_json(measured())
    assert rates["steps_per_second"] == pytest.approx(100)  # the median, not the mean
    assert rates["steps_per_second_at_2x100_gflops"] == pytest.approx(50)  # 200 of 400 GFLOP/s


def test_share_of_the_peak_in_the_tile_passes():
    # 32.5 MFLOP in 2 + 2 ms, of 400 GFLOP/s.
    assert kernels.tile_pass_share(measured()) == pytest.approx(32.5e6 / 4e-3 / 400e9)


def test_a_phase_is_bound_by_the_slower_of_arithmetic_and_memory():
    work = kernel_model.Work(flop=400e6, bytes=10e6, items=1, unit="")
    assert kernels.limit_seconds(work, measured()) == (1e-3, "arithmetic")
    work = dataclasses.replace(work, bytes=40e6)
    assert kernels.limit_seconds(work, measured()) == (2e-3, "memory")


def test_phases_of_a_step_add_up_and_leave_no_trace(workload):
    loss_function, step = training.photometric_loss, workload.run.step
    times = kernels.timed_step(workload)
    assert set(times) >= {
        "project",
        "forward",
        "backward_tiles",
        "loss",
        "backward_project",
        "rest",
    }
    assert times["step"] == pytest.approx(sum(v for k, v in times.items() if k != "step"))
    assert all(value > 0 for value in times.values())
    assert training.photometric_loss is loss_function
    assert workload.run.step == step + 1


def test_timed_and_plain_steps_train_alike(workload):
    before = {name: t.detach().clone() for name, t in workload.run.gaussians.tensors().items()}
    copy = Gaussians(**{name: tensor.clone() for name, tensor in before.items()})
    run = training.start_run(copy, kernels.LearningRates(), 1.0, workload.run.sampler, seed=0)
    plain = dataclasses.replace(workload, run=run)
    for _ in range(3):
        kernels.timed_step(workload)
        kernels.take_step(plain)
    for name, tensor in workload.run.gaussians.tensors().items():
        assert torch.equal(tensor, copy.tensors()[name]), name
        assert not torch.equal(tensor, before[name]), name


def test_counts_are_means_over_the_views(workload):
    one = kernels.count(workload)
    away = workload.cameras.viewmats.clone()
    away[:, 2, 3] = -100.0  # everything is behind this camera
    blind = dataclasses.replace(workload.cameras, viewmats=away, names=("away.png",))
    both = dataclasses.replace(workload, cameras=type(blind).cat([workload.cameras, blind]))
    half = kernels.count(both)
    assert half.blended == one.blended / 2 > 0
    assert half.visible == one.visible / 2 > 0
    assert half.pixels == one.pixels == 64 * 48


# ---- whole commands --------------------------------------------------------------------------------------------------


def test_kernels_command_on_a_finished_model(curve, model_dir, tmp_path, monkeypatch):
    before = sorted(path for path in model_dir.rglob("*") if path.is_file())
    arguments = ["--model-dir", str(model_dir), "--steps", "2", "--json", str(tmp_path / "k.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "kernels", *arguments])
    monkeypatch.setattr(machine, "SECONDS", 0.002)
    benchmark.main()
    (model,) = json.loads((tmp_path / "k.json").read_text())["models"]
    assert model["name"] == "out"
    assert model["counts"]["gaussians"] == curve[-1].num_gaussians
    assert 0 < model["counts"]["blended"] < model["counts"]["forward"]
    # How large the share is depends on who else is busy; that it is this model's own is exact.
    rates = model["steps_per_second"], model["steps_per_second_at_2x100_gflops"]
    peak = kernels.REFERENCE_PEAK * rates[0] / rates[1]
    passes = [("forward", kernels.FORWARD_PAIR), ("backward", kernels.BACKWARD_PAIR)]
    flop = sum(model["counts"][name] * sum(pair.values()) for name, pair in passes)
    seconds = sum(1e-3 * model["phases"][p]["median_ms"] for p in ("forward", "backward_tiles"))
    assert model["tile_passes_share_of_peak"] == pytest.approx(flop / seconds / peak, rel=1e-9)
    assert sorted(path for path in model_dir.rglob("*") if path.is_file()) == before


def test_kernels_without_a_model_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "kernels", "--model-dir", str(tmp_path)])
    monkeypatch.setattr(machine, "SECONDS", 0.002)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2
    assert re.search(r"no chkpnt_stage1.*Run stages 0 and 1", capsys.readouterr().err)


def test_step_command(monkeypatch, capsys):
    arguments = ["--num-gaussians", "200", "--width", "48", "--height", "36", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "step", *arguments])
    benchmark.main()
    out = capsys.readouterr().out
    assert "200 Gaussians" in out and "loss + gradient" in out
    assert re.search(r"PyTorch twin, 200 Gaussians at 84x63: render \+ backward", out)


def test_scaling_command(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.002)
    monkeypatch.setattr(scaling, "MANY", 500)
    monkeypatch.setattr(scaling, "FULL_HD", (64, 36))
    monkeypatch.setattr(scaling, "_alone", lambda measure, cfg, value: measure(cfg, value))
    files = {"json": tmp_path / "s.json", "svg": tmp_path / "s.svg"}
    scaling.main(scaling.Scaling(widths=(64, 128), gaussians=(300, 600), seconds=0.01, **files))
    found = json.loads(files["json"].read_text())
    small, large = found["pixels"]
    assert large["counts"]["pixels"] == pytest.approx(4 * small["counts"]["pixels"], rel=0.03)
    # The same Gaussians, seen twice as large: four times the pairs, but for the blur, which widens small ones most.
    assert 2 < large["counts"]["blended"] / small["counts"]["blended"] < 4.1
    assert [row["counts"]["gaussians"] for row in found["gaussians"]] == [300, 600]
    assert [row["state"] for row in found["gaussians"]] == [300 * 59 * 12, 600 * 59 * 12]
    assert found["threads"][0]["threads"] == 1
    assert ElementTree.fromstring(files["svg"].read_text()).tag.endswith("svg")


def test_scaling_measures_each_setting_in_a_fresh_process():
    ballast = torch.ones(64 << 20)  # 256 MB that the other process does not have
    row = scaling._alone(scaling._measure_number, scaling.Scaling(seconds=0.01), 200)
    assert row.peak_rss > row.start_rss > 0
    assert row.start_rss < scaling._peak_rss()
    assert ballast.sum() == 64 << 20


def test_training_curve_starts_before_and_ends_after_the_training(curve):
    steps = [point.step for point in curve]
    assert steps[0] == 1 and steps[-1] == 40
    assert len(steps) > 2 and steps == sorted(set(steps))
    seconds = [point.seconds for point in curve]
    assert seconds == sorted(seconds)
    assert curve[-1].psnr > curve[0].psnr + 1  # measured 11 dB to 16 dB
    assert training_curve.seconds_to_reach(curve, curve[-1].psnr) <= seconds[-1]
    assert training_curve.seconds_to_reach(curve, 90.0) is None


# ---- charts ----------------------------------------------------------------------------------------------------------


def polylines(svg):
    for match in re.findall(r'<polyline points="([^"]*)"', svg):
        yield [tuple(map(float, pair.split(","))) for pair in match.split()]


def test_plot_of_a_power_law_is_straight_where_axes_are_logarithmic():
    xs = [1.0, 3.0, 10.0, 70.0]
    svg = plot_svg("a < b", [Line("square", xs, [x * x for x in xs])], "x", "y", log=True)
    ElementTree.fromstring(svg)  # well formed, although the title has a <
    (points,) = polylines(svg)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert max(slopes) - min(slopes) < 0.01  # measured 0.002: coordinates have one decimal
    assert slopes[0] < 0  # up is up


@pytest.mark.parametrize("ys", [[5.0, 5.0], [0.0, 0.013], [21.3, 24.1], [-3.0, 1e6]])
def test_plot_keeps_all_points_on_the_paper(ys):
    (points,) = polylines(plot_svg("title", [Line("line", [0.0, 100.0], ys)], "x", "y"))
    assert all(64 <= x <= 490 and 36 <= y <= 312 for x, y in points)


def test_plot_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="no points"):
        plot_svg("empty", [Line("none", [], [])], "x", "y")
    with pytest.raises(ValueError, match="values <= 0"):
        plot_svg("zero", [Line("zero", [0.0], [1.0])], "x", "y", log=True)


def test_tables_as_markdown():
    table = Table(title="What it cost")
    table.add_column("phase")
    table.add_column("ms", justify="right")
    table.add_row("forward", "1.50")
    table.add_row("whole", "", style="bold")
    expected = "What it cost\n\n| phase | ms |\n|---|--:|\n| forward | 1.50 |\n| **whole** |  |"
    assert markdown_text(table) == expected
