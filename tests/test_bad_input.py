"""What users get wrong: each case ends in one clear message, exit code 2, and no half-written stage."""

import importlib
import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pycolmap
import pytest
from plane_scene import write_plane_scene

from s2d import config
from s2d.config import run_script

ROOT = Path(__file__).resolve().parent.parent
STAGE0, STAGE1, STAGE2, STAGE3 = STAGES = (
    "stage0_point_guidance",
    "stage1_3dgs_init",
    "stage2_artifact_fix",
    "stage3_3dgs_mixed_opt",
)
SHORT = {  # flags that make a stage take a second
    STAGE0: ["--keep-count", "3"],
    STAGE1: ["--sample-iteration", "12", "--max-init-points", "100"],
    STAGE2: [],
    STAGE3: ["--iterations", "18"],
}


@pytest.fixture
def scene(tmp_path):
    return write_plane_scene(tmp_path / "scene")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def one_message_not_a_traceback(monkeypatch):
    monkeypatch.delenv("S2D_DEBUG", raising=False)
    monkeypatch.setattr(logging.getLogger("s2d"), "handlers", [])


def run(script, *argv):
    module = importlib.import_module(script)
    run_script(module.main, module.Config, script, [str(argument) for argument in argv])


def refusal(capsys, script, *argv):
    """Run a script that must refuse; returns its one message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(script, *argv)
    assert caught.value.code == 2
    return one_error(capsys.readouterr().err)


def one_error(stderr):
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if " error: " in line]
    assert len(lines) == 1, stderr
    assert stderr.rstrip().endswith(lines[0]), (
        "the error is the last thing that is said, on one line"
    )
    return lines[0].split(" error: ", 1)[1]


def assert_no_half_stage(out):
    """Whatever stage folder there is, is complete, and nothing that cannot be continued lies about."""
    for folder in out.glob("stage*"):
        if folder.name.endswith(".partial"):
            left = [
                path for path in folder.rglob("*") if path.is_file() and path.name != "key.json"
            ]
            assert all("scratch" in path.parts for path in left), left
        else:
            assert (folder / "manifest.json").is_file(), folder
    assert not list(out.glob("*.old"))


# --- the scene ---------------------------------------------------------------------------------------------------------


def test_a_missing_scene(capsys, tmp_path, out):
    text = refusal(capsys, STAGE0, "-s", tmp_path / "nowhere", "-m", out)
    assert (
        text
        == f"No such scene: {tmp_path / 'nowhere'}. Expected a folder with images/ and sparse/0, or a transforms.json."
    )
    assert_no_half_stage(out)


def test_an_empty_scene(capsys, tmp_path, out):
    (tmp_path / "empty").mkdir()
    text = refusal(capsys, STAGE0, "-s", tmp_path / "empty", "-m", out)
    assert text.startswith(
        f"{tmp_path / 'empty'} has no photos. Expected a folder with images/ and sparse/0"
    )
    assert_no_half_stage(out)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_images_bin(capsys, scene, out, share):
    model = pycolmap.Reconstruction(str(scene / "sparse/0"))
    for path in (scene / "sparse/0").iterdir():
        path.unlink()
    model.write_binary(str(scene / "sparse/0"))
    path = scene / "sparse/0/images.bin"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    text = refusal(capsys, STAGE0, "-s", scene, "-m", out)
    assert str(path) in text
    assert "Copy the model again" in text
    assert_no_half_stage(out)


@pytest.mark.parametrize("content", [b"", b"not a photo", b"\x89PNG\r\n\x1a\n", "cut"])
def test_a_photo_that_is_not_an_image(capsys, scene, out, content):
    path = scene / "images/view_0.png"  # kept: the first always is
    path.write_bytes(path.read_bytes()[:900] if content == "cut" else content)
    text = refusal(capsys, STAGE0, "-s", scene, "-m", out, "--keep-count", "3")
    assert text.startswith(f"{path} is not an image, or is cut off")
    assert_no_half_stage(out)


def test_names_that_do_not_match(capsys, scene, out):
    for name in (1, 4):
        (scene / f"images/view_{name}.png").rename(scene / f"images/VIEW_{name}.png")
    text = refusal(capsys, STAGE0, "-s", scene, "-m", out)
    assert text.startswith(
        "2 of 6 images in sparse/0/ are missing from images/ (first: view_1.png)."
    )
    assert_no_half_stage(out)


def test_a_photo_of_another_size_than_its_camera(capsys, scene, out):
    path = scene / "sparse/0/cameras.txt"
    path.write_text(path.read_text().replace("48 36", "50 30"))
    text = refusal(capsys, STAGE0, "-s", scene, "-m", out, "--keep-count", "3")
    assert "48 x 36" in text
    assert "50 x 30" in text
    assert_no_half_stage(out)


# --- the choice of views -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep-count", "1"], "1 of the 6 views would be kept. Expected at least 2"),
        (["--keep-every", "100"], "1 of the 6 views would be kept. Expected at least 2"),
        (["--keep-count", "0"], "--keep-count must be positive, got 0"),
        (["--keep-every", "0"], "--keep-every must be positive, got 0"),
        (["--keep-indices", "2"], "1 of the 6 views would be kept. Expected at least 2"),
        (["--keep-indices", "0,99"], "--keep-indices 99 is out of range: there are 6 views"),
        (["--keep-indices", "-7,0"], "--keep-indices -7 is out of range: there are 6 views"),
        (["--keep-count", "3", "--keep-every", "2"], "Choose one way to select the kept views"),
        (["--eval", "--test-every", "1"], "--test-every must be at least 2"),
    ],
)
def test_a_choice_that_cannot_be_made(capsys, scene, out, flags, words):
    assert words in refusal(capsys, STAGE0, "-s", scene, "-m", out, *flags)
    assert_no_half_stage(out)


# --- the order of the stages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "first"),
    [(STAGE1, STAGE0), (STAGE2, STAGE0), (STAGE2, STAGE1), (STAGE3, STAGE0), (STAGE3, STAGE1)],
)
def test_a_stage_before_its_predecessor(capsys, finished, scene, out, script, first):
    stages = [name[:6] for name in STAGES[: STAGES.index(first)]]
    if stages:
        copy_finished(finished, out, stages)
    text = refusal(capsys, script, "-s", scene, "-m", out)
    assert re.match(
        rf"stage\d is not finished: no manifest.json in .*Run: python \S+ -s SCENE -m {re.escape(str(out))}$",
        text,
    )
    assert first in text
    assert_no_half_stage(out)


def test_stage_3_before_stage_2(capsys, finished, out):
    copy_finished(finished, out, ["stage0", "stage1"])
    text = refusal(capsys, STAGE3, "-s", finished / "scene", "-m", out)
    assert STAGE2 in text
    assert_no_half_stage(out)


def test_the_evaluation_of_nothing(out):
    done = subprocess.run(
        [sys.executable, ROOT / "tools/evaluate.py", "-m", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Run: python stage0_point_guidance.py" in one_error(done.stderr)
    assert not (out / "results.json").exists()


# --- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", STAGES)
def test_a_typo_in_a_flag(capsys, scene, out, script):
    with pytest.raises(SystemExit) as caught:
        run(script, "-s", scene, "-m", out, "--overwrit")
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    assert "--overwrit" in stderr
    assert not out.exists()


@pytest.mark.parametrize("script", STAGES)
def test_a_typo_in_a_preset(capsys, scene, out, script, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path)
    path = tmp_path / script / "fast.yaml"
    path.parent.mkdir()
    path.write_text("overwrit: true\n")
    text = refusal(capsys, script, "-s", scene, "-m", out, "--preset", "fast")
    assert text.startswith(f"{path}: unknown key overwrit. Known keys: ")
    assert "overwrite" in text
    assert not out.exists()


def test_another_preset_than_there_is(capsys, scene, out):
    text = refusal(capsys, STAGE1, "-s", scene, "-m", out, "--preset", "fats")
    assert "preset fats not found" in text
    assert "Known presets:" in text


@pytest.mark.parametrize(
    ("script", "flag"),
    [(STAGE1, "--sample-iteration"), (STAGE3, "--iterations")],
)
def test_zero_or_fewer_steps(capsys, finished, out, script, flag):
    copy_finished(finished, out, ["stage0", "stage1", "stage2"][: 1 if script == STAGE1 else 3])
    text = refusal(capsys, script, "-s", finished / "scene", "-m", out, flag, "-5")
    assert "-5" in text
    assert_no_half_stage(out)


# --- the output folder -------------------------------------------------------------------------------------------------


def test_an_output_folder_below_a_file(capsys, scene, tmp_path):
    (tmp_path / "file").write_text("precious")
    text = refusal(
        capsys, STAGE0, "-s", scene, "-m", tmp_path / "file" / "out", "--keep-count", "3"
    )
    assert text.startswith(f"Not a directory: {tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "precious"


def can_mount():
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "mount",
        "-t",
        "tmpfs",
        "tmpfs",
        "/tmp",
    ]
    return (
        shutil.which("unshare")
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


needs_mount = pytest.mark.skipif(
    not can_mount(), reason="no private mounts (unshare --user --mount) on this machine"
)


def in_private_mount(mount, *commands):
    """Run shell commands with a small file system of its own at `mount`, which vanishes with them."""
    mount.mkdir()
    text = "\n".join([f"mount -t tmpfs -o size=64m tmpfs {shlex.quote(str(mount))}", *commands])
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", text],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def command_of(script, scene, out):
    arguments = [sys.executable, ROOT / f"{script}.py", "-s", scene, "-m", out, *SHORT[script]]
    return shlex.join(map(str, arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of all stages, in processes as users start them; `scene` is in there too."""
    folder = tmp_path_factory.mktemp("finished")
    write_plane_scene(folder / "scene")
    for script in STAGES:
        subprocess.run(
            command_of(script, folder / "scene", folder), shell=True, check=True, timeout=300
        )
    return folder


def copy_finished(finished, out, stages):
    """The state of OUT after some stages: their folders and what else they left in OUT."""
    out.mkdir(parents=True, exist_ok=True)
    for name in stages:
        shutil.copytree(finished / name, out / name)
        manifest = importlib.import_module("s2d.stage_io").require_stage(out, name)
        for path in manifest.extras:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(finished / path.relative_to(out), path)


@needs_mount
@pytest.mark.parametrize("script", STAGES)
def test_a_read_only_output_folder(finished, tmp_path, script):
    before = STAGES[: STAGES.index(script)]
    copy_finished(finished, tmp_path / "before", [name[:6] for name in before])
    mount = tmp_path / "out"
    done = in_private_mount(
        mount,
        f"cp -r {tmp_path / 'before'}/. {mount}",
        f"mount -o remount,ro {mount}",
        command_of(script, finished / "scene", mount),
    )
    assert done.returncode == 2, done.stderr
    text = one_error(done.stderr)
    assert "Read-only file system" in text
    assert str(mount) in text
    assert "-m" in text


@needs_mount
@pytest.mark.parametrize("room_kb", [0, 12, 48])
@pytest.mark.parametrize("script", STAGES)
def test_a_full_disk(finished, tmp_path, script, room_kb):
    """Nothing or a little room is left; afterwards there is room again and the same command completes."""
    before = STAGES[: STAGES.index(script)]
    copy_finished(finished, tmp_path / "before", [name[:6] for name in before])
    mount = tmp_path / "out"
    command = command_of(script, finished / "scene", mount)
    done = in_private_mount(
        mount,
        f"cp -r {tmp_path / 'before'}/. {mount}",
        f"cat /dev/zero >{mount}/fill 2>/dev/null; truncate -s -{room_kb}K {mount}/fill",
        command,
        "code=$?",
        f"rm {mount}/fill; cp -r {mount} {tmp_path / 'state'}",
        f"{command} >&2 2>{tmp_path / 'second.log'} || exit 99",
        f"cp -r {mount} {tmp_path / 'healed'}",
        "exit $code",
    )
    assert done.returncode == 2, (done.returncode, done.stderr)
    text = one_error(done.stderr)
    assert "No space left on device" in text
    assert str(mount) in text
    assert "Free some space" in text
    assert_no_half_stage(tmp_path / "state")
    assert not (tmp_path / "state" / script[:6]).exists()
    assert (tmp_path / "healed" / script[:6] / "manifest.json").is_file()


# --- interruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_optimisation_ends_like_an_uninterrupted_one(finished, tmp_path, number):
    flags = ["--sample-iteration", "200", "--checkpoint-every", "20", "--max-init-points", "100"]

    def start(out):
        copy_finished(finished, out, ["stage0"]) if not out.exists() else None
        arguments = [
            sys.executable,
            ROOT / f"{STAGE1}.py",
            "-s",
            finished / "scene",
            "-m",
            out,
            *flags,
        ]
        return subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    whole = tmp_path / "whole"
    assert start(whole).wait(120) == 0

    out = tmp_path / "out"
    process = start(out)
    checkpoint = out / "stage1.partial/scratch/run.pth"
    while not checkpoint.exists():
        assert process.poll() is None, "finished before it could be interrupted"
        time.sleep(0.005)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert (
            one_error(stderr) == "Stopped. Run the same command again to go on from where it was."
        )
    assert_no_half_stage(out)

    process = start(out)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "going on from an interrupted run" in stderr
    for name in ("point_cloud/iteration_200/point_cloud.ply", "stage1/renders/view_1.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_run_again_everything_is_up_to_date(finished, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="s2d")
    for script in STAGES:
        run(script, "-s", finished / "scene", "-m", finished, *SHORT[script])
        assert f"{script[:6]} is up to date" in caplog.text
