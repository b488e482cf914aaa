"""The stage contract under interruption, change and failure: each case asserts the words and what lies on the disk."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from s2d import stage_io
from s2d.config import no_effect
from s2d.files import (
    atomic_torch_save,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    content_hash,
)
from s2d.stage_io import open_stage, require_stage

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    num_steps: int = 7000
    seed: int = 3
    overwrite: bool = no_effect(False)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.png").write_text(f"photo {name}")
    return folder


def build(out, cfg=Config(), inputs=None, text="result", extra=None, error=None, name="stage1"):
    """Run a small stage; `error` is raised after a checkpoint and half of the results were written."""
    with open_stage(out, name, cfg, inputs or {}, cfg.overwrite) as stage:
        if stage.up_to_date:
            return stage
        (stage.dir / "renders").mkdir()
        (stage.dir / "renders" / "a.png").write_text(text)
        if extra:
            stage.extra_path(extra).write_text(text)
        if error:
            atomic_write_json(stage.scratch / "run.json", {"step": 500})
            raise error
        stage.info["num_gaussians"] = 12
        with stage.timer("optimise"):
            pass
    return stage


def listing(folder):
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".s2d.lock"
    )


# --- a complete stage --------------------------------------------------------------------------------------------------


def test_a_complete_stage_has_a_manifest_that_tells_all(out, photos):
    stage = build(
        out,
        inputs={"photos": photos, "names": ["a"]},
        extra="point_cloud/iteration_5/point_cloud.ply",
    )
    assert stage.dir == out / "stage1"
    assert listing(out) == [
        "point_cloud/iteration_5/point_cloud.ply",
        "stage1/config.yaml",
        "stage1/manifest.json",
        "stage1/renders/a.png",
    ]
    manifest = require_stage(out, "stage1")
    assert manifest.config["num_steps"] == 7000
    assert manifest.info == {"num_gaussians": 12}
    assert manifest.extras == (out / "point_cloud/iteration_5/point_cloud.ply",)
    assert set(manifest.timings) == {"optimise", "total"}
    data = manifest.data
    assert data["format"] == 1
    assert data["seed"] == 3
    assert data["outputs"]["renders"] == {"files": 1, "bytes": 6}
    assert data["outputs"]["point_cloud"] == {"files": 1, "bytes": 6}
    assert data["inputs"]["photos"]["path"] == str(photos)
    assert len(data["inputs"]["photos"]["sha256"]) == len(data["config_hash"]) == 64
    assert data["peak_rss_mb"] > 10
    assert {"python", "torch", "numpy", "s2d"} <= data["versions"].keys()


def test_the_same_again_is_up_to_date_and_touches_nothing(out, photos, caplog):
    build(out, inputs={"photos": photos})
    before = (out / "stage1" / "manifest.json").stat().st_mtime_ns
    caplog.set_level(logging.INFO, logger="s2d")
    caplog.clear()
    stage = build(out, inputs={"photos": photos}, text="other")
    assert stage.up_to_date
    assert stage.dir == out / "stage1"
    assert (out / "stage1" / "manifest.json").stat().st_mtime_ns == before
    assert (stage.dir / "renders" / "a.png").read_text() == "result"
    assert caplog.messages == [f"stage1 is up to date: {out / 'stage1'}"]


def test_fields_without_effect_do_not_make_a_stage_stale(out):
    build(out)
    assert require_stage(out, "stage1").config["overwrite"] is False
    assert build(out, Config(overwrite=False)).up_to_date


# --- stale -------------------------------------------------------------------------------------------------------------


def test_other_settings_are_named_with_both_values(out):
    build(out)
    with pytest.raises(ValueError) as caught:
        build(out, Config(num_steps=30000))
    assert str(caught.value) == (
        f"{out / 'stage1'} was made with other settings or inputs (num_steps: 7000, now 30000). "
        "Pass --overwrite to rebuild it, or -m with another folder to keep both."
    )
    assert listing(out) == ["stage1/config.yaml", "stage1/manifest.json", "stage1/renders/a.png"]


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_a_change_of_an_input_folder_is_noticed(out, photos, change):
    build(out, inputs={"photos": photos})
    if change == "edit":
        (photos / "a.png").write_text("photo A")  # same length
    elif change == "add":
        (photos / "c.png").write_text("")
    elif change == "remove":
        (photos / "a.png").unlink()
    else:
        (photos / "a.png").rename(photos / "0.png")
    with pytest.raises(ValueError, match="the content of photos changed"):
        build(out, inputs={"photos": photos})


def test_a_touched_but_equal_input_is_up_to_date(out, photos):
    build(out, inputs={"photos": photos})
    (photos / "a.png").write_text("photo a")
    os.utime(photos / "b.png", (1, 1))
    assert build(out, inputs={"photos": photos}).up_to_date


def test_a_list_of_files_depends_on_those_only(out, photos):
    build(out, inputs={"kept": [photos / "a.png"]})
    (photos / "b.png").write_text("changed")
    assert build(out, inputs={"kept": [photos / "a.png"]}).up_to_date
    with pytest.raises(ValueError, match="the content of kept changed"):
        build(out, inputs={"kept": [photos / "a.png", photos / "b.png"]})


def test_plain_values_and_new_inputs_are_named(out):
    build(out, inputs={"names": ["a"]})
    with pytest.raises(ValueError, match=r"names: \['a'\], now \['b'\]; cloud: None, now 5"):
        build(out, inputs={"names": ["b"], "cloud": 5})


def test_a_missing_input_is_named(out, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"photos not found: .*nowhere\. Check the path\."):
        build(out, inputs={"photos": tmp_path / "nowhere"})
    assert listing(out) == []


def test_redoing_an_earlier_stage_makes_the_later_one_stale(out):
    build(out, name="stage0")
    build(out, inputs={"stage0": require_stage(out, "stage0")})
    build(out, Config(overwrite=True), name="stage0", text="result")
    assert build(out, inputs={"stage0": require_stage(out, "stage0")}).up_to_date, (
        "same result, nothing to do"
    )
    build(out, Config(overwrite=True), name="stage0", text="another")
    with pytest.raises(ValueError, match="the content of stage0 changed"):
        build(out, inputs={"stage0": require_stage(out, "stage0")})


def test_a_hand_made_change_of_an_earlier_result_is_noticed(out):
    build(out, name="stage0", extra="chkpnt5.pth")
    build(out, inputs={"stage0": require_stage(out, "stage0")})
    (out / "chkpnt5.pth").write_text("by hand")
    with pytest.raises(ValueError, match="the content of stage0 changed"):
        build(out, inputs={"stage0": require_stage(out, "stage0")})


def test_overwrite_replaces_the_result_and_its_extra_files(out):
    build(out, extra="chkpnt7000.pth")
    (out / "chkpnt1.pth").write_text("somebody else's")
    build(out, Config(num_steps=10, overwrite=True), text="new", extra="chkpnt10.pth")
    assert listing(out) == [
        "chkpnt1.pth",
        "chkpnt10.pth",
        "stage1/config.yaml",
        "stage1/manifest.json",
        "stage1/renders/a.png",
    ]
    assert (out / "stage1/renders/a.png").read_text() == "new"


def test_a_lost_extra_file_is_named(out):
    build(out, extra="chkpnt5.pth")
    (out / "chkpnt5.pth").unlink()
    with pytest.raises(
        ValueError, match=r"chkpnt5\.pth is gone\. It belongs to .*stage1\. Pass --overwrite"
    ):
        build(out, extra="chkpnt5.pth")


# --- interrupted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), ValueError("bad")])
def test_an_interrupted_stage_keeps_its_checkpoint_and_nothing_else_counts(out, error, caplog):
    with pytest.raises(type(error)):
        build(out, error=error)
    assert not (out / "stage1").exists()
    caplog.set_level(logging.INFO, logger="s2d")
    with open_stage(out, "stage1", Config(), {}) as stage:
        assert stage.resuming
        assert json.loads((stage.scratch / "run.json").read_text()) == {"step": 500}
        assert not (stage.dir / "renders").exists(), "half-written results must not survive"
    assert "going on from an interrupted run" in caplog.text
    assert listing(out) == ["stage1/config.yaml", "stage1/manifest.json"]
    assert require_stage(out, "stage1").data["resumed"] is True


def test_a_checkpoint_of_other_settings_is_removed_with_a_word(out, caplog):
    with pytest.raises(KeyboardInterrupt):
        build(out, error=KeyboardInterrupt())
    caplog.set_level(logging.INFO, logger="s2d")
    with open_stage(out, "stage1", Config(num_steps=5), {}) as stage:
        assert not stage.resuming
        assert not (stage.scratch / "run.json").exists()
    assert "cannot be continued" in caplog.text


def test_a_failure_without_a_checkpoint_leaves_nothing(out):
    with pytest.raises(RuntimeError), open_stage(out, "stage1", Config(), {}) as stage:
        (stage.dir / "half.png").write_text("x")
        raise RuntimeError("bug")
    assert listing(out) == []
    assert not (out / "stage1.partial").exists()


def test_a_failing_overwrite_leaves_the_old_result_as_it_was(out):
    build(out, extra="chkpnt5.pth", text="old")
    with pytest.raises(RuntimeError):
        build(
            out,
            Config(num_steps=5, overwrite=True),
            text="new",
            extra="chkpnt5.pth",
            error=RuntimeError("bug"),
        )
    assert (out / "stage1/renders/a.png").read_text() == "old"
    assert (out / "chkpnt5.pth").read_text() == "old"
    assert build(out, extra="chkpnt5.pth").up_to_date


def test_a_damaged_key_means_start_over(out):
    with pytest.raises(KeyboardInterrupt):
        build(out, error=KeyboardInterrupt())
    (out / "stage1.partial/scratch/key.json").write_text('{"for')
    with open_stage(out, "stage1", Config(), {}) as stage:
        assert not stage.resuming


@pytest.mark.parametrize("step", ["manifest", "moved aside", "renamed", "extra moved"])
def test_a_kill_within_the_commit_is_completed_by_the_next_run(out, step, monkeypatch):
    """The process dies after a given step of the commit: old or new is there, never a mixture, and new after the next look."""
    build(out, text="old", extra="chkpnt5.pth")

    class Killed(BaseException):
        pass

    def die_after(original, when):
        def wrapped(source, target):
            original(source, target)
            if when(str(source), str(target)):
                raise Killed

        return wrapped

    conditions = {
        "manifest": ("replace", lambda source, target: target.endswith("manifest.json")),
        "moved aside": ("rename", lambda source, target: target.endswith("stage1.old")),
        "renamed": ("rename", lambda source, target: target.endswith("stage1")),
        "extra moved": ("replace", lambda source, target: target.endswith("out/chkpnt5.pth")),
    }
    kind, when = conditions[step]
    # Nothing that a dying process could not do may tidy up behind it.
    monkeypatch.setattr(stage_io, "leave_partial", lambda partial, error: None)
    monkeypatch.setattr(os, kind, die_after(getattr(os, kind), when))
    with pytest.raises(Killed):
        build(out, Config(num_steps=5, overwrite=True), text="new", extra="chkpnt5.pth")
    monkeypatch.undo()

    manifest = require_stage(out, "stage1")
    assert manifest.config["num_steps"] == 5
    assert (out / "chkpnt5.pth").read_text() == "new"
    assert (out / "stage1/renders/a.png").read_text() == "new"
    assert listing(out) == [
        "chkpnt5.pth",
        "stage1/config.yaml",
        "stage1/manifest.json",
        "stage1/renders/a.png",
    ]
    assert build(out, Config(num_steps=5), extra="chkpnt5.pth").up_to_date


def test_a_kill_between_moving_the_old_aside_and_a_complete_new_one_brings_the_old_back(out):
    build(out, text="old")
    (out / "stage1").rename(out / "stage1.old")
    assert require_stage(out, "stage1").config["num_steps"] == 7000
    assert listing(out) == ["stage1/config.yaml", "stage1/manifest.json", "stage1/renders/a.png"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from s2d.config import no_effect
    from s2d.files import atomic_write_json
    from s2d.stage_io import open_stage
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        num_steps: int = 7000
        seed: int = 3
        overwrite: bool = no_effect(False)

    with open_stage(Path({out!r}), "stage1", Config(), {{}}) as stage:
        (stage.dir / "half.png").write_text("half")
        atomic_write_json(stage.scratch / "run.json", {{"step": 500}})
        {end}
"""


def child(out, end):
    code = textwrap.dedent(KILLED).format(root=str(ROOT), out=str(out), end=end)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_kill_9_leaves_a_resumable_stage(out):
    process = child(out, "os.kill(os.getpid(), signal.SIGKILL)")
    assert process.wait(60) == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="stage1 was interrupted"):
        require_stage(out, "stage1")
    with open_stage(out, "stage1", Config(), {}) as stage:  # the dead process holds no lock
        assert stage.resuming
        assert not (stage.dir / "half.png").exists()
    assert require_stage(out, "stage1").dir == out / "stage1"


def test_two_runs_in_one_folder_the_second_is_told_so(out):
    process = child(out, "print('ready', flush=True); sys.stdin.read(); signal.pause()")
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(ValueError, match=r"is in use by another run\. Wait until it has ended"):
            build(out, name="stage2")
    finally:
        process.kill()
        process.communicate()
    build(out, name="stage2")


# --- missing, damaged --------------------------------------------------------------------------------------------------


def test_a_missing_stage_says_what_to_run(out):
    with pytest.raises(FileNotFoundError) as caught:
        require_stage(out, "stage0")
    assert str(caught.value) == (
        f"stage0 is not finished: no manifest.json in {out / 'stage0'}. Run: python stage0_point_guidance.py -s SCENE -m {out}"
    )
    assert not out.exists(), "looking must not make folders"


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format"'])
def test_a_damaged_manifest_is_named(out, text):
    build(out)
    (out / "stage1/manifest.json").write_text(text)
    for look in (lambda: require_stage(out, "stage1"), lambda: build(out)):
        with pytest.raises(
            ValueError, match=r"manifest\.json is damaged.*Remove .*stage1 and run the stage again"
        ):
            look()


def test_a_result_of_another_format_is_stale(out, monkeypatch):
    build(out)
    monkeypatch.setattr(stage_io, "FORMAT", 2)
    with pytest.raises(ValueError, match=r"\(format: 1, now 2\)"):
        build(out)


# --- the disk ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        build(tmp_path / "file" / "out")


def fail_writes(monkeypatch, code, allowed):
    """Let the operating system refuse to write after `allowed` files."""
    calls = []

    def refuse(descriptor, original=os.fsync):
        calls.append(descriptor)
        if len(calls) > allowed:
            raise OSError(code, os.strerror(code))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("allowed", range(8))
def test_a_full_disk_at_any_moment_leaves_no_half_stage(out, monkeypatch, allowed):
    fail_writes(monkeypatch, errno.ENOSPC, allowed)
    with pytest.raises(OSError) as caught:
        build(out, extra="chkpnt5.pth")
    assert caught.value.errno == errno.ENOSPC
    assert str(out) in caught.value.filename
    monkeypatch.undo()
    assert not (out / "stage1").exists() or (out / "stage1/manifest.json").exists()
    build(out, extra="chkpnt5.pth")
    assert listing(out) == [
        "chkpnt5.pth",
        "stage1/config.yaml",
        "stage1/manifest.json",
        "stage1/renders/a.png",
    ]


def test_a_disk_that_fills_up_within_the_commit_costs_no_checkpoint(out, monkeypatch):
    with pytest.raises(OSError), open_stage(out, "stage1", Config(), {}) as stage:
        atomic_write_json(stage.scratch / "run.json", {"step": 7000})
        fail_writes(monkeypatch, errno.ENOSPC, 0)
    monkeypatch.undo()
    with open_stage(out, "stage1", Config(), {}) as stage:
        assert stage.resuming
    assert listing(out) == ["stage1/config.yaml", "stage1/manifest.json"]


def test_an_error_that_hides_a_full_disk_is_unmasked(out, monkeypatch):
    """torch.save says `file write failed`; the user must read `No space left`, and where."""
    with (
        pytest.raises(OSError) as caught,
        open_stage(out, "stage1", Config(), {}),
    ):
        fail_writes(monkeypatch, errno.ENOSPC, 0)
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
    assert caught.value.errno == errno.ENOSPC
    assert str(out) in caught.value.filename
    assert isinstance(caught.value.__cause__, RuntimeError)


# --- files -------------------------------------------------------------------------------------------------------------


def test_atomic_writes_replace_and_make_folders(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    atomic_write_text(path, "one é")
    atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    atomic_write_json(path, {"a": [1]})
    assert path.read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    assert listing(tmp_path) == ["deep/file.txt"]


def test_a_failed_atomic_write_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    atomic_write_text(path, "old")
    fail_writes(monkeypatch, errno.ENOSPC, 0)
    with pytest.raises(OSError) as caught:
        atomic_write_text(path, "new")
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_checkpoints_read_back(tmp_path):
    path = tmp_path / "run.pth"
    atomic_torch_save(path, {"means": torch.arange(3.0), "step": 5})
    state = torch.load(path, weights_only=True)
    assert state["step"] == 5
    assert torch.equal(state["means"], torch.arange(3.0))


def test_content_hash_sees_names_and_contents_but_not_places(tmp_path):
    for folder, names in {"x": ["a", "b"], "y": ["a", "b"], "z": ["a", "c"]}.items():
        for name in names:
            atomic_write_text(tmp_path / folder / "sub" / name, "same")
    assert (
        content_hash(tmp_path / "x") == content_hash(tmp_path / "y") != content_hash(tmp_path / "z")
    )
    files = [tmp_path / "x" / "sub" / "b", tmp_path / "x" / "sub" / "a"]
    assert content_hash(files) == content_hash(files[::-1])
    (tmp_path / "x" / ".DS_Store").write_text("noise")
    assert content_hash(tmp_path / "x") == content_hash(tmp_path / "y")
