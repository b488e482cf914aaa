"""Gaussians in the formats of other programs.

`.ply` and `.splat` are written here; all others by PlayCanvas' splat-transform, which `tools/build_viewer.sh` installs from npm. What each
format keeps, and what the loss costs in dB: docs/export.md.
"""

import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from s2d.files import atomic_write_bytes
from s2d.gaussians import Gaussians
from s2d.log import logger
from s2d.sh import sh0_to_rgb

ROOT = Path(__file__).resolve().parents[2]
SPLAT_TRANSFORM = "node_modules/@playcanvas/splat-transform/bin/cli.mjs"
WEB_DIR = ROOT / "build" / "web"  # where tools/build_viewer.sh installs

# Format → (suffix, further flags of splat-transform; None: written here).
FORMATS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "ply": (".ply", None),
    "splat": (".splat", None),
    "compressed-ply": (".compressed.ply", ()),
    "spz": (".spz", ("--spz-version", "3")),  # version 4 is newer than most readers
    "glb": (".glb", ()),
    "sog": (".sog", ()),
}
SPLAT_RECORD = np.dtype(
    [("means", "<f4", 3), ("scales", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)]
)  # 32 bytes


def write_splats(gaussians: Gaussians, path: Path, format: str) -> Path:
    """Write Gaussians in one of `FORMATS`, all or nothing.

    Args:
        gaussians: N Gaussians.
        path: The file; its suffix is up to the caller, other programs expect that of `FORMATS`.
        format: A key of `FORMATS`.

    Returns:
        The path.

    Raises:
        ValueError: unknown format.
        FileNotFoundError: the converter is not installed.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}. Expected one of: {', '.join(FORMATS)}.")
    if format == "ply":
        return gaussians.save_ply(path)
    if format == "splat":
        atomic_write_bytes(path, _splat_bytes(gaussians))
        return path
    with tempfile.TemporaryDirectory(prefix="s2d-export-") as folder:
        # Readers of a PLY normalise rotations; some of those of other formats take them as they are.
        unit = replace(gaussians.detached(), quats=F.normalize(gaussians.quats.detach(), dim=1))
        source = unit.save_ply(Path(folder) / "scene.ply")
        suffix, flags = FORMATS[format]
        target = Path(folder) / f"out{suffix}"  # splat-transform goes by the suffix
        try:
            run_splat_transform(*flags, source, target)
        except ValueError:
            if format != "sog":
                raise
            # It clusters colours on a GPU by WebGPU, and does not look for another way where there is none.
            logger.info(
                "sog: no GPU that splat-transform can use; the CPU takes minutes for 50,000 Gaussians"
            )
            run_splat_transform("--gpu", "cpu", source, target)
        atomic_write_bytes(path, target.read_bytes())
    return path


def run_splat_transform(*arguments: object) -> str:
    """Run splat-transform with arguments as on its command line; returns what it printed.

    Raises:
        FileNotFoundError: node or the package is missing.
        ValueError: it failed, with what it said.
    """
    node, script = shutil.which("node"), WEB_DIR / SPLAT_TRANSFORM
    if node is None or not script.is_file():
        missing = (
            "node is not installed" if node is None else f"splat-transform is not in {WEB_DIR}"
        )
        raise FileNotFoundError(
            f"This format needs PlayCanvas' splat-transform: {missing}. Install node 20 or newer with npm, then run: "
            "bash tools/build_viewer.sh. The formats ply and splat need neither."
        )
    done = subprocess.run(
        [node, str(script), "--overwrite", "--quiet", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-500:]
        raise ValueError(
            f"splat-transform failed (exit code {done.returncode}): {said}. "
            "Convert the .ply by hand, or update the package in web/package.json."
        )
    return done.stdout + done.stderr


def _splat_bytes(gaussians: Gaussians) -> bytes:
    """32 bytes a Gaussian: linear sizes, colours without view dependence, 8-bit opacity and rotation; largest first."""
    gaussians = gaussians.detached().to("cpu")
    importance = F.logsigmoid(gaussians.opacity_logits) + gaussians.log_scales.sum(1)
    order = importance.argsort(descending=True, stable=True)
    opacities = torch.sigmoid(gaussians.opacity_logits)
    rgba = torch.cat([sh0_to_rgb(gaussians.sh0[:, 0]), opacities[:, None]], 1)
    quats = F.normalize(gaussians.quats, dim=1)
    records = np.empty(gaussians.num, SPLAT_RECORD)
    records["means"] = gaussians.means[order].numpy()
    records["scales"] = gaussians.log_scales.exp()[order].numpy()
    records["rgba"] = (rgba.clamp(0, 1) * 255).round()[order].numpy()
    records["quats"] = (quats * 128 + 128).round().clamp(0, 255)[order].numpy()
    return records.tobytes()
