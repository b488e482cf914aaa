"""Runs tools/build_viewer.sh once for the tests that need what comes from npm; skips them with the reason where it cannot."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_SECONDS = 240


def built_viewer() -> Path:
    """The folder of the built page."""
    built, problem = _build()
    if built is None:
        pytest.skip(problem)
    return built


@cache  # a machine that npm cannot reach anything from would try anew for every test
def _build() -> tuple[Path | None, str]:
    """The folder, or what keeps it from being built."""
    if not (shutil.which("npm") and shutil.which("node")):
        return None, "node and npm are not installed"
    try:
        done = subprocess.run(
            ["bash", str(ROOT / "tools" / "build_viewer.sh")],
            check=False,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None, f"npm took more than {BUILD_SECONDS} s"
    if done.returncode != 0 and "npm could not install" in done.stderr:
        return None, f"npm could not install: {done.stderr.strip()[-300:]}"
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1]), ""
