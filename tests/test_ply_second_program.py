"""Our PLY in somebody else's hands: PlayCanvas' splat-transform reads it, counts the same Gaussians, and finds the same values.

Needs node and npm, and the npm registry for the install into a temporary folder; skips with the reason where something is missing.
"""

import csv
import os
import re
import shutil
import subprocess

import pytest
import torch

from s2d.ply_io import write_gaussians_ply

PACKAGE = "@playcanvas/splat-transform@2"
INSTALL_SECONDS = 120


@pytest.fixture(scope="module")
def splat_transform(tmp_path_factory):
    """Path of the installed program's command."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if not (npm and node):
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("npm")
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]
    try:
        done = subprocess.run(
            [npm, "install", *options, PACKAGE],
            check=False,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            cwd=folder,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm install {PACKAGE} took more than {INSTALL_SECONDS} s")
    program = folder / "node_modules" / ".bin" / "splat-transform"
    if done.returncode != 0 or not program.exists():
        pytest.skip(f"npm could not install {PACKAGE}: {done.stderr.strip()[-300:]}")

    def run(*arguments) -> str:
        result = subprocess.run(
            [str(program), *map(str, arguments)],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "NO_COLOR": "1"},
        )
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    return run


@pytest.mark.parametrize("degree", [0, 2, 3])
def test_splat_transform_reads_the_same_gaussians(splat_transform, tmp_path, degree):
    generator = torch.Generator().manual_seed(degree)
    num, num_rest = 123, (degree + 1) ** 2 - 1

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    values = {
        "means": draw(num, 3),
        "log_scales": draw(num, 3) - 4,
        "quats": draw(num, 4),
        "opacity_logits": draw(num),
        "sh0": draw(num, 1, 3),
        "shN": draw(num, num_rest, 3),
    }
    path = write_gaussians_ply(tmp_path / "ours.ply", **values)
    text = splat_transform("-w", path, tmp_path / "theirs.csv")
    assert re.search(rf"\b{num} gaussians\b", text), text
    if degree:
        assert f"{degree} SH bands" in text

    with open(tmp_path / "theirs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == num

    def column(name):
        return torch.tensor([float(row[name]) for row in rows])

    expected = {
        "x": values["means"][:, 0],
        "z": values["means"][:, 2],
        "opacity": values["opacity_logits"],
        "f_dc_1": values["sh0"][:, 0, 1],
        "scale_2": values["log_scales"][:, 2],
        "rot_0": values["quats"][:, 0],
        "rot_3": values["quats"][:, 3],
    }
    if degree:  # channel-major: after all of red comes green's first coefficient
        expected["f_rest_1"] = values["shN"][:, 1, 0]
        expected[f"f_rest_{num_rest}"] = values["shN"][:, 0, 1]
    for name, wanted in expected.items():
        torch.testing.assert_close(
            column(name), wanted, rtol=1e-6, atol=0
        )  # decimal text of float32


def test_splat_transform_agrees_on_what_the_numbers_mean(splat_transform, tmp_path):
    """Its summary shows activated values: opacity by the sigmoid, sizes by exp, colours by 0.5 + C0·f_dc."""
    num = 10
    path = write_gaussians_ply(
        tmp_path / "ours.ply",
        means=torch.arange(3.0 * num).reshape(num, 3),
        log_scales=torch.full((num, 3), -1.5),
        quats=torch.tensor([1.0, 0, 0, 0]).repeat(num, 1),
        opacity_logits=torch.full((num,), 0.75),
        sh0=torch.full((num, 1, 3), 0.5),
        shN=torch.zeros(num, 0, 3),
    )
    text = splat_transform(path, "-m", "null")

    def mean(name):
        cells = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        return float(cells.split("|")[4])

    assert mean("x") == pytest.approx(13.5, rel=1e-4)
    assert mean("f_dc_1") == pytest.approx(0.5 + 0.28209479 * 0.5, rel=1e-4)
    assert mean("opacity") == pytest.approx(float(torch.sigmoid(torch.tensor(0.75))), rel=1e-4)
    assert mean("scale_0") == pytest.approx(float(torch.exp(torch.tensor(-1.5))), rel=1e-4)
