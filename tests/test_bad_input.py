"""What users get wrong: each case ends in one clear message, exit code 2, and no half-written stage."""

import importlib
import json
import logging
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
from s2d.stage_io import require_stage

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of all stages; its scene is in there too."""
    folder = tmp_path_factory.mktemp("finished")
    write_plane_scene(folder / "scene")
    for script in STAGES:
        run(script, "-s", folder / "scene", "-m", folder, *SHORT[script])
    return folder


def copy_finished(finished, out, stages):
    """The state of OUT after some stages: their folders and what else they left in OUT."""
    out.mkdir(parents=True, exist_ok=True)
    for name in stages:
        shutil.copytree(finished / name, out / name)
        for path in require_stage(out, name).extras:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(finished / path.relative_to(out), path)


# --- the scene ---------------------------------------------------------------------------------------------------------


def test_a_missing_scene(capsys, tmp_path, out):
    text = refusal(capsys, STAGE0, "-s", tmp_path / "nowhere", "-m", out)
    assert text == f"scene not found: {tmp_path / 'nowhere'}. Check the path."
    assert_no_half_stage(out)


def test_an_empty_scene(capsys, tmp_path, out):
    (tmp_path / "empty").mkdir()
    text = refusal(capsys, STAGE0, "-s", tmp_path / "empty", "-m", out)
    assert text.startswith(
        f"{tmp_path / 'empty'} has no photos. Expected PNG, JPEG, WebP, TIFF or BMP files"
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
        (["--keep-count", "0"], "0 of the 6 views would be kept. Expected at least 2"),
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
    ("script", "done", "first"),
    [
        (STAGE1, 0, STAGE0),
        (STAGE2, 0, STAGE1),
        (STAGE2, 1, STAGE1),
        (STAGE3, 0, STAGE0),
        (STAGE3, 1, STAGE1),
    ],
)
def test_a_stage_before_its_predecessor(capsys, finished, out, script, done, first):
    copy_finished(finished, out, ["stage0", "stage1"][:done])
    text = refusal(capsys, script, "-s", finished / "scene", "-m", out)
    assert text == (
        f"{first[:6]} is not finished: no manifest.json in {out / first[:6]}. Run: python {first}.py -s SCENE -m {out}"
    )
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


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        (STAGE1, "--sample-iteration", "-5"),
        (STAGE1, "--checkpoint-every", "0"),
        (STAGE1, "--sh-degree", "4"),
        (STAGE3, "--checkpoint-every", "0"),
        (STAGE3, "--alpha", "1.5"),
    ],
)
def test_a_number_out_of_its_range(capsys, scene, out, script, flag, value):
    text = refusal(capsys, script, "-s", scene, "-m", out, flag, value)
    assert flag[2:].replace("-", "_") in text
    assert f"got {value}" in text
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


# --- the output folder -------------------------------------------------------------------------------------------------


def test_an_output_folder_below_a_file(capsys, scene, tmp_path):
    (tmp_path / "file").write_text("precious")
    text = refusal(
        capsys, STAGE0, "-s", scene, "-m", tmp_path / "file" / "out", "--keep-count", "3"
    )
    assert text.startswith(f"Not a directory: {tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "precious"


# Runs every stage on a small file system of its own: first without room or writable, then, with the trouble gone, the same again.
ON_A_SMALL_DISK = """
import contextlib, importlib, io, json, pathlib, shutil, subprocess, sys
root, scene, out, report, stages, trouble, room = json.loads(sys.argv[1])
sys.path.insert(0, root)
from s2d.config import run_script
from s2d.stage_io import require_stage

out = pathlib.Path(out)
def run(script, flags):
    module, text = importlib.import_module(script), io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            run_script(module.main, module.Config, script, ["-s", scene, "-m", str(out), *flags])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, text.getvalue()

def remount(how):
    subprocess.run(["mount", "-o", "remount," + how, str(out)], check=True)

def fill(room):
    with contextlib.suppress(OSError), open(out / "fill", "wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    with open(out / "fill", "r+b") as file:
        file.truncate((out / "fill").stat().st_size - room)

records = {}
for script, flags in stages.items():
    remount("ro") if trouble == "read-only" else fill(room)
    code, stderr = run(script, flags)
    left = [path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if path.is_file()]
    remount("rw") if trouble == "read-only" else (out / "fill").unlink()
    again, log = run(script, flags)
    records[script] = {"code": code, "stderr": stderr, "left": left, "again": again, "log": log}
pathlib.Path(report).write_text(json.dumps(records))
"""

TROUBLES = {"read-only": 0, "full disk": 0, "nearly full disk": 12 << 10}


@pytest.fixture(scope="module", params=TROUBLES)
def on_a_small_disk(request, finished, tmp_path_factory):
    """What each stage said and left under one trouble, by script."""
    if shutil.which("unshare") is None:
        pytest.skip("no `unshare` on this machine: no private mounts")
    folder = tmp_path_factory.mktemp("disk")
    out, report = folder / "out", folder / "report.json"
    out.mkdir()
    trouble = request.param
    job = [ROOT, finished / "scene", out, report, SHORT, trouble, TROUBLES[trouble]]
    driver = [sys.executable, "-c", ON_A_SMALL_DISK, json.dumps(job, default=str)]
    mount = f"mount -t tmpfs -o size=32m tmpfs {shlex.quote(str(out))} || exit 77"
    done = subprocess.run(
        [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "bash",
            "-c",
            f"{mount}\nexec {shlex.join(driver)}",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no private mounts on this machine: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return trouble, out, json.loads(report.read_text())


@pytest.mark.parametrize("script", STAGES)
def test_a_disk_that_cannot_be_written_to(on_a_small_disk, script):
    trouble, out, records = on_a_small_disk
    record = records[script]
    assert record["code"] == 2, record
    text = one_error(record["stderr"])
    assert (
        "Read-only file system" if trouble == "read-only" else "No space left on device"
    ) in text
    assert str(out) in text
    assert "with -m" in text
    stage = script[:6]
    half = [
        path
        for path in record["left"]
        if path.startswith(f"{stage}/") or path.startswith(f"{stage}.old/")
    ]
    assert not half
    lost = [
        path
        for path in record["left"]
        if path.startswith(f"{stage}.partial/") and "/scratch/" not in path
    ]
    assert not lost
    assert record["again"] == 0, record["log"]


# --- interruptions -----------------------------------------------------------------------------------------------------

LONG = ["--sample-iteration", "60", "--checkpoint-every", "10", "--max-init-points", "100"]


@pytest.fixture(scope="module")
def uninterrupted(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    copy_finished(finished, out, ["stage0"])
    run(STAGE1, "-s", finished / "scene", "-m", out, *LONG)
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_optimisation_ends_like_an_uninterrupted_one(
    uninterrupted, finished, tmp_path, number, caplog
):
    out = tmp_path / "out"
    copy_finished(finished, out, ["stage0"])
    arguments = ["-s", finished / "scene", "-m", out, *LONG]
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{STAGE1}.py", *arguments], stderr=subprocess.PIPE, text=True
    )
    checkpoint = out / "stage1.partial/scratch/run.pth"
    while not checkpoint.exists():
        assert process.poll() is None, "finished before it could be interrupted"
        time.sleep(0.005)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    if number != signal.SIGKILL:
        assert (
            one_error(stderr) == "Stopped. Run the same command again to go on from where it was."
        )
    assert_no_half_stage(out)

    caplog.set_level(logging.INFO, logger="s2d")
    run(STAGE1, *arguments)
    assert "going on from an interrupted run" in caplog.text
    for name in ("point_cloud/iteration_60/point_cloud.ply", "stage1/renders/view_1.png"):
        assert (out / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_run_again_everything_is_up_to_date(finished, caplog):
    caplog.set_level(logging.INFO, logger="s2d")
    for script in STAGES:
        run(script, "-s", finished / "scene", "-m", finished, *SHORT[script])
        assert f"{script[:6]} is up to date" in caplog.text
