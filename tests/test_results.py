"""The results command: what it runs, what it skips, and the table it writes."""

import json
import subprocess

import pytest

from benchmarks import results
from benchmarks.results import Config, Setting


def run_results(psnr: float, seconds: float = 100.0) -> dict:
    def metrics(offset):
        return {
            "psnr": psnr + offset,
            "ssim": 0.5,
            "lpips_vgg": 0.4,
            "lpips_alex": None,
            "num_views": 3,
        }

    def stage(offset, num_gaussians):
        return {"test": metrics(offset), "novel": metrics(offset + 0.25), "num_gaussians": num_gaussians, "seconds": 1.0, "peak_rss_mb": 1000.0}  # fmt: skip

    return {
        "stages": {"stage1": stage(0, 1000), "stage2": {**stage(0.5, None), "test": None}, "stage3": stage(1, 2500)},
        "guidance": {"test": {"coverage": 0.75, "psnr_covered": 20.0}, "novel": None, "seconds": 33.0, "peak_rss_mb": 1500.0},
        "total_seconds": seconds,
    }  # fmt: skip


@pytest.fixture
def config(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "scenes" / name).mkdir(parents=True)

    def make(**options):
        defaults = {"scenes": ("a", "b"), "keep": (3,), "data_dir": tmp_path / "scenes", "out_dir": tmp_path / "out", "table": tmp_path / "t.md"}  # fmt: skip
        return Config(**{**defaults, **options})

    return make


@pytest.fixture
def calls(monkeypatch):
    """Stand in for the scripts: evaluation leaves a results.json whose PSNR depends on scene, kept count and seed."""
    made = []

    def run(script, *arguments):
        made.append((script.name, [str(argument) for argument in arguments]))
        folder = arguments[arguments.index("-m") + 1]
        folder.mkdir(parents=True, exist_ok=True)
        if script.name == "evaluate.py":
            scene, keep, seed = folder.name.split("_")
            psnr = {"a": 20.0, "b": 10.0}[scene] + int(keep) + int(seed[1:]) * 2
            (folder / "results.json").write_text(json.dumps(run_results(psnr)))
            if "--sheet" in arguments:
                (folder / "test").mkdir(exist_ok=True)
                (folder / "test" / "sheet.png").write_bytes(b"picture")

    monkeypatch.setattr(results, "run", run)
    return made


def cells_of(text: str, *start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {' | '.join(start)} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_scene_is_repaired_with_weights_that_have_not_seen_it(config, calls):
    weights = ("w/one.safetensors:b", "w/other.safetensors:a")
    results.main(config(weights=weights))
    repairs = [given for name, given in calls if name == "stage2_artifact_fix.py"]
    taken = [given[given.index("--weights") + 1] for given in repairs]
    assert taken == ["w/other.safetensors", "w/one.safetensors"]
    assert all("--expected-gain" in given for given in repairs)
    calls.clear()
    results.main(config(weights=weights))
    assert not calls
    results.main(config())  # another fixer, another run
    assert ["analytic" in given for name, given in calls if "stage2" in name] == [True, True]
    calls.clear()
    with pytest.raises(ValueError, match="none for b"):
        results.main(config(weights=weights[1:]))
    assert not calls


def test_all_stages_run_with_the_protocol_of_the_table(config, calls):
    results.main(config(scenes=("a",), keep=(6,), seeds=(4,)))
    names = [name for name, _ in calls]
    assert names == [f"{stage}.py" for stage in results.STAGES] + ["evaluate.py"]
    arguments = dict(calls)
    assert "--eval" in arguments["stage0_point_guidance.py"]
    assert (
        arguments["stage0_point_guidance.py"][
            arguments["stage0_point_guidance.py"].index("--keep-count") + 1
        ]
        == "6"
    )
    for stage in ("stage1_3dgs_init.py", "stage3_3dgs_mixed_opt.py"):
        assert arguments[stage][arguments[stage].index("--seed") + 1] == "4"


def test_the_table_has_every_number(config, calls):
    text = results.main(config()).read_text()
    assert text.startswith("# Results")
    assert "python benchmarks/results.py" in text
    assert cells_of(text, "a", "3", "stage 1")[3:] == [
        "23.00",
        "0.500",
        "0.400",
        "–",
        "1,000",
        "",
        "",
    ]
    assert cells_of(text, "b", "3", "final")[3:] == [
        "14.00",
        "0.500",
        "0.400",
        "–",
        "2,500",
        "1 min 40 s",
        "1.5 GB",
    ]
    assert cells_of(text, "**mean**", "3", "stage 1")[3] == "18.00"
    novel = text.split("## Novel views")[1]
    assert cells_of(novel, "a", "3", "fixed")[3] == "23.75"
    assert cells_of(novel, "**mean**", "3", "final")[3] == "19.25"
    assert cells_of(text.split("## Point guidance")[1], "a", "3")[2:] == ["0.750", "20.00", "33 s"]


def test_several_seeds_give_mean_and_deviation(config, calls):
    text = results.main(config(seeds=(0, 1))).read_text()
    assert cells_of(text, "a", "3", "stage 1")[3] == "24.00 ± 1.41"  # 23 and 25
    assert cells_of(text, "**mean**", "3", "stage 1")[3] == "19.00 ± 1.41"


def test_finished_runs_are_skipped_until_the_settings_change(config, calls):
    results.main(config())
    num = len(calls)
    results.main(config())
    assert len(calls) == num
    results.main(config(sheets=True))
    assert len(calls) == 2 * num
    results.main(config(sheets=True, overwrite=True))
    assert "--overwrite" in dict(calls)["stage0_point_guidance.py"]


def test_sheets_are_collected(config, calls, tmp_path):
    results.main(config(scenes=("a",), sheets=True))
    assert (tmp_path / "out" / "sheets" / "a_3_s0.png").read_bytes() == b"picture"


def test_a_failed_run_does_not_stop_the_others(config, calls, monkeypatch):
    working = results.run

    def run(script, *arguments):
        if "a_3_s0" in str(arguments) and script.name.startswith("stage1"):
            raise subprocess.CalledProcessError(2, [script, *arguments])
        working(script, *arguments)

    monkeypatch.setattr(results, "run", run)
    cfg = config()
    with pytest.raises(ValueError, match="1 of 2 runs failed: a_3_s0"):
        results.main(cfg)
    text = cfg.table.read_text()
    assert "| b | 3 | final |" in text
    assert "| a |" not in text


def test_all_takes_every_folder_and_unknown_scenes_are_refused(config, calls):
    results.main(config(scenes=("all",)))
    assert {
        arguments[arguments.index("-s") + 1][-1]
        for name, arguments in calls
        if name.startswith("stage0")
    } == {"a", "b"}
    with pytest.raises(FileNotFoundError, match="No scene zebra in"):
        results.main(config(scenes=("a", "zebra")))


def test_without_scenes_the_message_says_what_to_set(config, monkeypatch):
    monkeypatch.delenv("S2D_DATA", raising=False)
    with pytest.raises(ValueError, match="S2D_DATA is not set"):
        results.main(config(data_dir=None))


def test_setting_folder_names_are_unique(tmp_path):
    folders = {
        Setting(scene, keep).folder(tmp_path, seed)
        for scene in "ab"
        for keep in (3, 6)
        for seed in (0, 1)
    }
    assert len(folders) == 8
