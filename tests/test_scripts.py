"""The shell scripts: what reaches the stages, how they stop, and a set-up that is idempotent and says what is wrong."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASH = shutil.which("bash")

FAKE_SCRIPT = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)  # as s2d.config.run_script does
name = pathlib.Path(__file__).name
with open(os.environ["RECORD"], "a") as record:
    print(json.dumps([name, *sys.argv[1:]]), file=record)
out = pathlib.Path(sys.argv[sys.argv.index("-m") + 1])
if name == os.environ.get("FAIL"):
    sys.exit(2)
if name == os.environ.get("KILLED"):
    os.kill(os.getpid(), 9)
if name == os.environ.get("SLEEP"):
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        with open(os.environ["RECORD"], "a") as record:
            print(json.dumps([name, "stopped"]), file=record)
        sys.exit(130)
if name.startswith("stage3"):
    for step in (900, 7000):
        folder = out / f"point_cloud/iteration_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "point_cloud.ply").touch()
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of run_pipeline.sh among stand-ins for the set-up and the stages, which note how they were called."""
    root = tmp_path / "check out"  # the blank is on purpose
    (root / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "run_pipeline.sh", root)
    (root / "tools/setup_env.sh").write_text(
        'mkdir -p "$(dirname "$0")/../.venv/bin"; ln -sf "$PYTHON" "$(dirname "$0")/../.venv/bin/python"\n'
    )
    for name in (
        "stage0_point_guidance",
        "stage1_3dgs_init",
        "stage2_artifact_fix",
        "stage3_3dgs_mixed_opt",
        "tools/evaluate",
    ):
        (root / f"{name}.py").write_text(FAKE_SCRIPT)
    for preset in ("stage1_3dgs_init/tiny", "stage3_3dgs_mixed_opt/tiny", "stage1_3dgs_init/fine"):
        (root / f"configs/{preset}.yaml").parent.mkdir(parents=True, exist_ok=True)
        (root / f"configs/{preset}.yaml").touch()
    (root / "demo/study").mkdir(parents=True)
    (tmp_path / "data/my scene").mkdir(parents=True)
    return root


def start(checkout, *argv, **environment):
    environment = {"RECORD": str(checkout / "record"), "PYTHON": sys.executable, **environment}
    return subprocess.Popen(
        [BASH, str(checkout / "run_pipeline.sh"), *argv],
        cwd=checkout.parent,  # not the checkout itself
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(checkout, *argv, **environment):
    process = start(checkout, *argv, **environment)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def record(checkout):
    path = checkout / "record"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_flags_reach_the_stages_that_take_them(checkout):
    code, stdout, stderr = run(
        checkout,
        *shlex.split(
            "--keep_indices 0,5 7 --eval --test-every=4 --novel orbit --seed 3 --device cpu --overwrite "
            "--source 'data/my scene' -m 'out/x y' --preset tiny"
        ),
    )
    assert code == 0, stderr
    scene, common, seed = (
        ["-s", "data/my scene", "-m", "out/x y"],
        ["--device", "cpu", "--overwrite"],
        ["--seed", "3"],
    )
    views = ["--keep-indices", "0,5,7", "--eval", "--test-every", "4", "--novel", "orbit"]
    assert record(checkout) == [
        ["stage0_point_guidance.py", *scene, *views, *seed, *common],
        ["stage1_3dgs_init.py", *scene, *seed, *common, "--preset", "tiny"],
        ["stage2_artifact_fix.py", *scene, *common],
        ["stage3_3dgs_mixed_opt.py", *scene, *seed, *common, "--preset", "tiny"],
        ["evaluate.py", *scene, "--device", "cpu"],
    ]
    assert "out/x y/report.html" in stdout
    assert "out/x y/point_cloud/iteration_7000/point_cloud.ply" in stdout, "the last one by number"


def test_rounds_run_stages_2_and_3_in_turn(checkout):
    code, _, stderr = run(
        checkout, *shlex.split("-s 'data/my scene' -m out --rounds 2 --support --num-novel 9")
    )
    assert code == 0, stderr
    scene, first, last = (
        ["-s", "data/my scene", "-m", "out"],
        ["--round", "1/2"],
        ["--round", "2/2"],
    )
    assert record(checkout) == [
        ["stage0_point_guidance.py", *scene, "--num-novel", "9"],
        ["stage1_3dgs_init.py", *scene, "--support"],
        ["stage2_artifact_fix.py", *scene, *first],
        ["stage3_3dgs_mixed_opt.py", *scene, "--support", *first],
        ["stage2_artifact_fix.py", *scene, *last],
        ["stage3_3dgs_mixed_opt.py", *scene, "--support", *last],
        ["evaluate.py", *scene],
    ]


def test_without_arguments_it_is_the_demo_scene(checkout):
    code, stdout, stderr = run(checkout)
    assert code == 0, stderr
    scene = ["-s", str(checkout / "demo/study"), "-m", str(checkout / "out/demo")]
    assert record(checkout)[0] == ["stage0_point_guidance.py", *scene, "--keep-count", "6"]
    assert str(checkout / "out/demo/report.html") in stdout


def test_the_demo_with_another_number_of_photos(checkout):
    assert run(checkout, "--keep-count", "3")[0] == 0
    assert record(checkout)[0][-2:] == ["--keep-count", "3"]
    assert record(checkout)[0].count("--keep-count") == 1


def test_the_output_folder_is_named_after_the_scene(checkout):
    code, _, stderr = run(checkout, "-s", "data/my scene")
    assert code == 0, stderr
    assert record(checkout)[0] == [
        "stage0_point_guidance.py",
        "-s",
        "data/my scene",
        "-m",
        "out/my scene",
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--keep-cuont", "3"], "unknown argument --keep-cuont"),
        (["data/my scene"], "unknown argument data/my scene"),
        (["-s"], "-s needs a value"),
        (["--keep-count", "--eval"], "--keep-count needs a value"),
        (["--seed="], "--seed needs a value"),
        (["-s", "nowhere"], "no such scene: nowhere"),
        (["--rounds", "0"], "--rounds needs a number from 1 on, got 0"),
        (["--preset", "tyni"], "unknown preset tyni; there is: fine tiny"),
    ],
)
def test_a_mistake_shows_the_usage_and_runs_nothing(checkout, argv, words):
    code, _, stderr = run(checkout, *argv)
    assert code == 2
    assert stderr.startswith(f"error: {words}\n")
    assert "usage: bash run_pipeline.sh" in stderr
    assert record(checkout) == []


def test_help(checkout):
    code, stdout, _ = run(checkout, "--help")
    assert code == 0
    assert "--keep-count K" in stdout


def test_a_failing_stage_ends_the_run_with_its_code(checkout):
    code, _, _ = run(checkout, FAIL="stage1_3dgs_init.py")
    assert code == 2
    assert [call[0] for call in record(checkout)] == [
        "stage0_point_guidance.py",
        "stage1_3dgs_init.py",
    ]


def test_a_stage_that_is_killed_is_named(checkout):
    code, _, stderr = run(checkout, KILLED="stage3_3dgs_mixed_opt.py")
    assert code == 137
    assert (
        "error: stage3_3dgs_mixed_opt.py was ended by signal 9 (9: most likely out of memory)"
        in stderr
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_stage_too_and_says_how_to_go_on(checkout, number):
    process = start(checkout, SLEEP="stage1_3dgs_init.py")
    deadline = time.monotonic() + 30
    while len(record(checkout)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # from its note to its sleep
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Stopped. The same command goes on from where it was." in stderr
    assert record(checkout)[-1] == ["stage1_3dgs_init.py", "stopped"]


# --- set-up ------------------------------------------------------------------------------------------------------------

FAKE_PYTHON = """
#!{bash}
# A python that notes calls of pip instead of installing, and can be told to fail.
case "$*" in
  *"-m venv"*) mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python"; exit 0 ;;
  *"-m pip"*) echo "$*" >>"$RECORD"; sleep "${{PIP_SLEEP:-0}}"; exit "${{PIP_CODE:-0}}" ;;
  "-c import pip") exit 0 ;;
  *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    root = tmp_path / "check out"
    (root / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools/setup_env.sh", root / "tools")
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-cuda.txt"):
        (root / name).write_text("numpy\n")
    (root / "third_party/simple-knn").mkdir(parents=True)
    (root / "third_party/simple-knn/pyproject.toml").write_text("[project]\n")
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(
        textwrap.dedent(FAKE_PYTHON).lstrip().format(bash=BASH, python=sys.executable)
    )
    python.chmod(0o755)
    return root


def set_up(root, *argv, **environment):
    path = f"{root.parent / 'bin'}:/usr/bin:/bin"
    environment = {"RECORD": str(root / "record"), "PATH": path, "FORCE_CPU": "1", **environment}
    return subprocess.Popen(
        [BASH, str(root / "tools/setup_env.sh"), *argv],
        cwd=root.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def installed(root):
    """What pip was asked to install, call by call."""
    path = root / "record"
    calls = path.read_text().replace(str(root), "ROOT").splitlines() if path.exists() else []
    return [
        call.split(" install --no-input --no-warn-conflicts ")[1].removeprefix("-q ")
        for call in calls
    ]


EVERYTHING = [
    "-r ROOT/requirements.txt",
    "--no-deps lpips==0.1.4",
    "--no-build-isolation --no-deps -e ROOT/third_party/simple-knn",
]


def test_set_up_installs_once(setup):
    assert finish(set_up(setup))[0] == 0
    assert installed(setup) == EVERYTHING
    code, stderr = finish(set_up(setup))
    assert (code, stderr) == (0, ""), "nothing to do and nothing to say"
    assert installed(setup) == EVERYTHING


def test_tests_need_more(setup):
    assert finish(set_up(setup, "--dev"))[0] == 0
    assert installed(setup) == [*EVERYTHING, "-r ROOT/requirements-dev.txt"]
    finish(set_up(setup))
    finish(set_up(setup, "--dev"))
    assert len(installed(setup)) == 4


@pytest.mark.parametrize("changed", ["requirements.txt", "third_party/simple-knn/pyproject.toml"])
def test_a_changed_requirement_is_installed(setup, changed):
    finish(set_up(setup))
    with (setup / changed).open("a") as file:
        file.write("# more\n")
    assert finish(set_up(setup))[0] == 0
    assert installed(setup) == EVERYTHING * 2


def test_no_network_is_one_clear_message_and_the_next_run_tries_again(setup):
    code, stderr = finish(set_up(setup, PIP_CODE="1"))
    assert code == 1
    assert "Set-up failed: pip could not install" in stderr
    assert "Is there a network connection?" in stderr
    assert finish(set_up(setup))[0] == 0
    assert installed(setup) == [EVERYTHING[0], *EVERYTHING]


def test_an_interrupted_set_up_is_done_again(setup):
    process = set_up(setup, PIP_SLEEP="1")
    while not installed(setup):
        time.sleep(0.02)
    process.kill()  # its pip lives on and holds the lock until it is done, as a real one would
    process.communicate()
    assert not (setup / ".venv/.setup-stamp").exists()
    assert finish(set_up(setup))[0] == 0
    assert installed(setup) == [EVERYTHING[0], *EVERYTHING]


def test_a_broken_environment_is_made_anew(setup):
    finish(set_up(setup))
    (setup / ".venv/bin/python").unlink()
    (setup / ".venv/leftover").touch()
    code, stderr = finish(set_up(setup))
    assert code == 0, stderr
    assert "Making" in stderr
    assert not (setup / ".venv/leftover").exists()


@pytest.mark.skipif(
    shutil.which("flock", path="/usr/bin:/bin") is None, reason="no flock on this machine"
)
def test_two_set_ups_at_once_take_turns(setup):
    first = set_up(setup, PIP_SLEEP="0.3")
    while not installed(setup):
        time.sleep(0.02)
    code, stderr = finish(set_up(setup))
    assert code == 0
    assert "Another set-up" in stderr
    assert finish(first)[0] == 0
    assert installed(setup) == EVERYTHING, "the second found everything done"


def test_an_old_python_is_refused_with_what_to_do(setup):
    (setup.parent / "bin/python3").write_text("#!/bin/sh\nexit 1\n")
    code, stderr = finish(set_up(setup, PATH=str(setup.parent / "bin") + ":" + minimal_path(setup)))
    assert code == 1
    assert "no Python 3.10 or newer found" in stderr
    assert "PYTHON=/path/to/python3" in stderr


def minimal_path(root):
    """A folder with the tools that the set-up calls and no Python."""
    folder = root.parent / "minimal"
    folder.mkdir()
    for tool in ("bash", "dirname", "mkdir", "find", "rm", "cat", "flock"):
        if shutil.which(tool):
            (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


def test_an_unknown_argument_is_refused(setup):
    code, stderr = finish(set_up(setup, "--devel"))
    assert (code, stderr) == (2, "usage: bash tools/setup_env.sh [--dev]\n")


def test_the_scripts_are_executable_and_parse():
    for name in ("run_pipeline.sh", "run_tests.sh", "tools/setup_env.sh", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), name
        assert subprocess.run([BASH, "-n", ROOT / name], check=False).returncode == 0
