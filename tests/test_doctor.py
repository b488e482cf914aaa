"""tools/doctor.py: what it says of this machine, of one where something is missing, and of photos."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from native_build import compilers

from tools import doctor

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "study" / "images"


def machine_json(capsys) -> tuple[int, dict]:
    code = doctor.main(["--json"])
    return code, json.loads(capsys.readouterr().out)


def states(found: dict) -> dict[str, str]:
    return {check["name"]: check["state"] for group in found.values() if isinstance(group, list) for check in group}  # fmt: skip


def test_here_s2d_can_run(capsys):
    code, found = machine_json(capsys)
    assert (code, found["can_run"]) == (0, True)
    state = states(found)
    for name in ("requirements.txt", "compiler", *doctor.KERNEL_TESTS):
        assert state[name] == "ok"
    # Whatever is missing comes with what to do.
    checks = [check for group in doctor_groups(found) for check in group]
    assert all(check["advice"] for check in checks if check["state"] != "ok")


def doctor_groups(found: dict) -> list[list[dict]]:
    return [found[name] for name in ("machine", "packages", "kernels", "weights")]


def test_the_table_says_it_in_words(capsys):
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    for words in ("system", "vectors of", "GB free", "compiler", "LPIPS vgg", "S2D can run here."):
        assert words in said


def test_missing_and_old_packages(capsys, monkeypatch):
    versions = {"plyfile": None, "diffusers": None, "tyro": "0.9.2", "hypothesis": None}
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: versions.get(name, real(name)))
    checks = {check.name: check for check in doctor.packages()}
    assert {name: check.state for name, check in checks.items()} == {
        "plyfile": "broken",
        "tyro": "broken",
        "diffusers": "missing",  # the analytic fixer does without
        "hypothesis": "missing",
    }
    assert checks["tyro"].found.startswith("0.9.2, wanted >=1.0,<2 (")
    assert "setup_env.sh" in checks["plyfile"].advice
    assert "--dev" in checks["hypothesis"].advice
    monkeypatch.setattr(doctor, "kernels", lambda: [])
    monkeypatch.setattr(doctor, "weights", lambda: [])
    code, found = machine_json(capsys)
    assert (code, found["can_run"]) == (1, False)


def test_every_requirement_is_read():
    for file in doctor.REQUIREMENTS:
        lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]  # fmt: skip
        read = [*doctor.requirements(ROOT / file)]
        assert len(read) == len(lines)
        assert all(line.startswith(name + bounds) for line, (name, bounds, _) in zip(lines, read, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("installed", "bounds", "right"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("1.10", ">=1.9,<2", True),  # numbers, not text
        ("2.0", ">=1.9,<2", False),
        ("5.0.0.93", ">=4.10,<6", True),
        ("1.8.9rc1", ">=1.9", False),
    ],
)
def test_versions_within_bounds(monkeypatch, installed, bounds, right):
    monkeypatch.setattr(doctor, "version", lambda name: installed)
    assert doctor.fits("anything", bounds) is right


def test_no_compiler_and_a_kernel_that_fails(monkeypatch):
    def nothing(problems):
        problems.append("c++, g++, clang++: none on PATH")
        return iter(())

    def fails():
        raise RuntimeError("cannot compile\nlong story")

    monkeypatch.setattr(compilers, "candidates", nothing)
    monkeypatch.setattr(doctor, "KERNEL_TESTS", {"rasteriser": fails, "loss": lambda: False})
    checks = {check.name: check for check in doctor.kernels()}
    assert "none on PATH" in checks["compiler"].found
    assert "pip install ziglang" in checks["compiler"].advice
    assert (checks["rasteriser"].state, checks["rasteriser"].found) == ("broken", "cannot compile")
    assert checks["loss"].state == "broken"


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("S2D_CACHE_DIR", str(tmp_path / "file"))
    check = doctor.kernel_cache()
    assert check.state == "missing" and "S2D_CACHE_DIR" in check.advice


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is a real one")
def test_a_gpu_that_torch_cannot_use(monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.86'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    check = doctor.gpu()
    assert check.state == "missing"
    assert check.found == "NVIDIA H100 80GB HBM3 (driver 570.86): not used"
    monkeypatch.setenv("FORCE_CPU", "1")
    kernels = doctor.back_end()
    assert kernels.state == "missing" and kernels.found == "C++ on the CPU, not the GPU"
    assert "FORCE_CPU=1 is set" in kernels.advice


def test_weights_that_are_not_here(monkeypatch, tmp_path):
    for name in ("S2D_WEIGHTS", "TORCH_HOME", "S2D_PI3_ROOT"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(doctor, "hub_cache", lambda: {"nvidia/difix_ref": "/somewhere"})
    monkeypatch.setattr(doctor, "SHIPPED_WEIGHTS", tmp_path / "none")
    checks = {check.name: check for check in doctor.weights()}
    assert {name for name, check in checks.items() if check.state == "ok"} == {"nvidia/difix_ref"}
    assert "S2D_WEIGHTS" in checks["LPIPS vgg"].advice
    (tmp_path / "pi3").mkdir()
    assert {check.name: check.state for check in doctor.weights()}["Pi3 checkout"] == "ok"


def test_lpips_weights_that_are_here(weights_dir):
    state = {check.name: check.state for check in doctor.weights()}
    assert state["LPIPS vgg"] == state["LPIPS alex"] == "ok"


def test_a_python_without_the_packages_is_told_what_to_do():
    command = [sys.executable, "-S", str(ROOT / "tools" / "doctor.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    assert done.returncode == 1
    assert "S2D cannot run with" in done.stderr and "setup_env.sh" in done.stderr
    assert "Traceback" not in done.stderr


def test_photos_exit_codes_and_json(tmp_path, capsys):
    for i in (1, 2, 3):
        shutil.copy(DEMO / f"IMG_{i:04d}.jpg", tmp_path)
    assert doctor.main(["photos", str(tmp_path)]) == 0
    assert "These photos will do." in capsys.readouterr().out
    picture = cv2.imread(str(DEMO / "IMG_0002.jpg"))
    cv2.imwrite(str(tmp_path / "IMG_0002.jpg"), cv2.GaussianBlur(picture, (0, 0), 3))
    assert doctor.main(["photos", str(tmp_path), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["kind"], finding["photos"]) == ("blur", ["IMG_0002.jpg"])
    assert doctor.main(["photos", str(tmp_path / "none")]) == 2
