"""Rounds: which views each works on, what it starts from, when it stops, and that one round is what it was before there were any."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from s2d.cameras import Cameras
from s2d.config import parse_config
from s2d.fixer.calibration import Calibration
from s2d.fixer.judge import PICTURES, VERDICT, Verdict, publish
from s2d.gaussians import load_checkpoint
from s2d.images import read_image, write_image
from s2d.model_folder import render_name
from s2d.novel.rounds import Round, by_distance, reach_of, take_over_trials
from s2d.split import Split

STEPS, LAST = 30, 50
ARGUMENTS = {
    "stage0_point_guidance": ["--keep-indices", "2,3,4"],
    "stage1_3dgs_init": ["--sample-iteration", str(STEPS)],
    "stage2_artifact_fix": ["--fixer", "analytic", "--trial-views", "0"],
    "stage3_3dgs_mixed_opt": ["--iterations", str(LAST), "--checkpoint-every", "5"],
}


def run(script, scene, out, *flags):
    module = importlib.import_module(script)
    argv = ["-s", str(scene), "-m", str(out), *ARGUMENTS[script], *flags]
    return module.main(parse_config(module.Config, script, argv))


def one_round(scene, out, number, count):
    flags = ["--round", f"{number}/{count}"]
    return [run(script, scene, out, *flags) for script in list(ARGUMENTS)[2:]]


def pictures(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")
    }


@pytest.fixture(scope="module")
def started(tiny_scene, tmp_path_factory) -> Path:
    """OUT after stages 0 and 1: of eight views along an arc the middle three are kept, five are novel."""
    out = tmp_path_factory.mktemp("rounds") / "out"
    for script in list(ARGUMENTS)[:2]:
        run(script, tiny_scene, out)
    return out


@pytest.fixture(scope="module")
def finished(started, tiny_scene, tmp_path_factory) -> Path:
    """OUT after two rounds. Do not change it."""
    out = Path(shutil.copytree(started, tmp_path_factory.mktemp("two") / "out"))
    for number in (1, 2):
        one_round(tiny_scene, out, number, 2)
    return out


def test_a_round_is_read_and_refused():
    assert Round.parse("2/3") == Round(2, 3)
    assert [Round(k, 3).suffix for k in (1, 2, 3)] == ["_round1", "_round2", ""]
    assert [Round(k, 3).last_step(100, 200) for k in (1, 2, 3)] == [133, 166, 200]
    assert Round().last_step(100, 200) == 200
    for text in ("0/2", "3/2", "2", "a/b", "1/2/3", ""):
        with pytest.raises(ValueError, match="such as 1/2 and then 2/2"):
            Round.parse(text)
    with pytest.raises(ValueError, match="--fixed-dir does not go with --round 1/2"):
        Round(1, 2).refuse(layers=(), fixed_dir="x")
    Round().refuse(fixed_dir="x")


def test_groups_go_outward():
    """Cameras along a line, kept ones at 0 and 10: the distance to the nearest one decides."""
    at = torch.tensor([0.0, 10.0, 4.0, 1.0, 12.0, 5.0, 9.5, 16.0])
    viewmats = torch.eye(4).repeat(len(at), 1, 1)
    viewmats[:, 0, 3] = -at
    cameras = Cameras(
        viewmats, torch.eye(3).repeat(len(at), 1, 1), ((8, 8),) * 8, tuple(f"at_{x:g}" for x in at)
    )
    groups = by_distance(cameras[2:], cameras[:2], 3)
    assert groups == [("at_9.5", "at_1"), ("at_12", "at_4"), ("at_5", "at_16")]
    assert by_distance(cameras[2:], cameras[:2], 1)[0][-1] == "at_16"
    assert [len(group) for group in by_distance(cameras[3:], cameras[:2], 2)] == [2, 3]


def test_each_round_goes_further_from_where_the_last_one_ended(finished):
    novel = Split.load(finished / "stage0/split.json").novel
    first = {render_name(name) for name in reach_of(finished, Round(1, 2)).names}
    assert len(first) == 2 and first < {render_name(name) for name in novel}
    assert pictures(finished / "stage2_round1/fixed").keys() == first
    # All novel cameras are rendered: the next round takes its own.
    assert len(pictures(finished / "stage3_round1/renders")) == len(novel)
    assert len(pictures(finished / "stage2/fixed")) == len(novel)
    middle = (STEPS + LAST) // 2
    assert load_checkpoint(finished / f"stage3_round1/chkpnt{middle}.pth").step == middle
    manifests = {
        stage: json.loads((finished / stage / "manifest.json").read_text())
        for stage in ("stage2_round1", "stage3_round1", "stage2", "stage3")
    }
    for stage, folder in (("stage2_round1", "stage1"), ("stage2", "stage3_round1")):
        paths = manifests[stage]["inputs"]["rendered"]["path"]
        assert all(f"/{folder}/renders/" in path for path in paths)
    start = manifests["stage3"]["inputs"]["start_checkpoint"]["path"]
    assert start.endswith(f"stage3_round1/chkpnt{middle}.pth")
    assert manifests["stage3_round1"]["info"]["iteration"] == middle
    assert manifests["stage3"]["info"]["iteration"] == LAST
    # Only the last round leaves a result in OUT.
    assert manifests["stage3_round1"]["extras"] == []
    assert (finished / f"point_cloud/iteration_{LAST}/point_cloud.ply").is_file()


def test_finished_rounds_return_at_once(finished, tiny_scene, monkeypatch):
    monkeypatch.setattr("s2d.training.photometric_loss", pytest.fail)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.*") if path.is_file()}
    for number in (1, 2):
        suffix = Round(number, 2).suffix
        assert one_round(tiny_scene, finished, number, 2) == [
            finished / f"stage2{suffix}",
            finished / f"stage3{suffix}",
        ]
    before.pop(finished / ".s2d.lock", None)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_interrupted_round_ends_with_the_same_bytes(started, finished, tiny_scene, tmp_path, monkeypatch):  # fmt: skip
    out = Path(shutil.copytree(started, tmp_path / "out"))
    script = importlib.import_module("stage3_3dgs_mixed_opt")
    save_run = script.save_run

    def save_and_stop(training_run, path):
        save_run(training_run, path)
        raise KeyboardInterrupt

    for number in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(script, "save_run", save_and_stop)
            with pytest.raises(KeyboardInterrupt):
                one_round(tiny_scene, out, number, 2)
        one_round(tiny_scene, out, number, 2)
    for folder in ("stage2_round1", "stage3_round1", "stage2", "stage3"):
        assert pictures(out / folder) == pictures(finished / folder)
    name = f"point_cloud/iteration_{LAST}/point_cloud.ply"
    assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_another_number_of_rounds_is_another_result(finished, tiny_scene):
    with pytest.raises(ValueError, match=r"round: 2/2, now None.*--overwrite"):
        run("stage3_3dgs_mixed_opt", tiny_scene, finished)


def test_a_round_wants_the_one_before(started, tiny_scene):
    with pytest.raises(FileNotFoundError, match=r"no .*stage3_round1\. Run .* --round 1/2 first"):
        run("stage2_artifact_fix", tiny_scene, started, "--round", "2/2")
    with pytest.raises(ValueError, match="--layers does not go with --round 1/2"):
        run("stage3_3dgs_mixed_opt", tiny_scene, started, "--round", "1/2", "--layers", "2,1")


def test_where_points_end_the_rounds_end(started, tiny_scene, tmp_path):
    """Views behind the edge of the cloud: rounds between are left out, the last one trains on with what was reached."""
    out = Path(shutil.copytree(started, tmp_path / "out"))
    near = reach_of(out, Round(1, 3)).names
    assert reach_of(out, Round(3, 3)).stopped is None
    for name in set(Split.load(out / "stage0/split.json").novel) - set(near):
        path = out / "stage0/coverage" / render_name(name)
        write_image(path, torch.zeros(*read_image(path).shape[:2]))
    reach = reach_of(out, Round(3, 3))
    assert reach.names == near and reach.previous == 1
    assert "the points cover 0% of the next views" in reach.stopped
    for number in (1, 2, 3):
        one_round(tiny_scene, out, number, 3)
    assert not (out / "stage2_round2").exists() and not (out / "stage3_round2").exists()
    assert pictures(out / "stage2/fixed").keys() == {render_name(name) for name in near}
    assert json.loads((out / "stage3/manifest.json").read_text())["info"]["iteration"] == LAST


def test_where_the_fixer_does_not_help_the_rounds_end(started, tmp_path):
    out = Path(shutil.copytree(started, tmp_path / "out"))
    (out / "stage2_round1").mkdir()
    for level, stopped in (("off", "the fixer improves no trial"), ("global", None)):
        summary = {"calibration": calibration(level).to_dict()}
        (out / "stage2_round1" / VERDICT).write_text(json.dumps(summary))
        assert reach_of(out, Round(1, 2)).stopped is None
        assert reach_of(out, Round(2, 2)).stopped == stopped


def test_trials_of_the_first_round_serve_the_others(tmp_path):
    """What `publish` puts into a stage comes back as what `judge` looks for: published again, it is the same."""
    summary = {"trials": [{"name": "dir/a", "picture": "adapted"}], "adaptation": {"used": True}}
    scratch, first, again = (tmp_path / name for name in ("scratch", "stage2_round1", "again"))
    for index, picture in enumerate(PICTURES):
        name = "adapted" if picture == "fixed" else picture
        write_image(scratch / f"trials/dir/a.png/{name}.png", torch.full((2, 2, 3), index / 8))
    (scratch / "adapted.safetensors").write_bytes(b"weights")
    publish(Verdict(None, None, summary), scratch, first)
    take_over_trials(tmp_path, Round(2, 2), tmp_path / "second")
    publish(Verdict(None, None, json.loads((tmp_path / "second" / VERDICT).read_text())), tmp_path / "second", again)  # fmt: skip
    files = {path.relative_to(first): path.read_bytes() for path in first.rglob("*.*")}
    assert len(files) == len(PICTURES) + 2
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*.*")} == files
    take_over_trials(tmp_path, Round(1, 2), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def calibration(level):
    trial = dict.fromkeys(Calibration.__dataclass_fields__, 0.0)
    trial |= {
        "level": level,
        "overlay": None,
        "num_trials": 1,
        "edges": (),
        "shares": (),
        "errors": (),
    }
    return Calibration(**trial)
