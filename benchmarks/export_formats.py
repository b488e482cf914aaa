"""What each format of tools/export.py costs: size, and PSNR of renders of what comes back against renders of the model.

Everything that splat-transform reads is read by it, also what we wrote; glb, which it only writes, by the reader below.

Reads   OUT of a run (-m): its newest point_cloud.ply and kept cameras; needs bash tools/build_viewer.sh
Writes  a Markdown table to stdout (docs/export.md)

Example
    python benchmarks/export_formats.py -m out/demo --width 320
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import numpy as np
import torch
from torch import Tensor
from tyro.conf import arg

from s2d.config import no_effect, run_script
from s2d.export import FORMATS, kept_cameras, load_model, write_splats
from s2d.export.splats import run_splat_transform
from s2d.gaussians import Gaussians
from s2d.log import logger
from s2d.metrics import psnr
from s2d.rasterize import rasterize

GLB_TYPES = {5126: "<f4"}


@dataclass(frozen=True)
class Config:
    """Measure what each export format costs."""

    model_dir: Annotated[Path, arg(aliases=["-m"])] = no_effect()
    """Output folder of a run."""
    width: int = 320
    """Width of the renders that are compared."""


def main(cfg: Config) -> Path:
    """Print the table; returns the model folder."""
    gaussians, kept = load_model(cfg.model_dir), kept_cameras(cfg.model_dir)
    cameras = kept.scaled(cfg.width / kept.sizes[0][0])
    print(f"| format | MB | share of the PLY | PSNR over {len(cameras)} kept views, mean (worst) |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="s2d-formats-") as folder:
        whole = None
        for name, (suffix, _) in FORMATS.items():
            logger.info("%s ...", name)
            path = write_splats(gaussians, Path(folder) / f"scene{suffix}", name)
            size = path.stat().st_size
            whole = whole or size
            scores = compare(gaussians, read_back(path, name), cameras)
            mean = float(np.mean(scores))
            loss = (
                "exact (same bits)"
                if min(scores) >= 100
                else f"{mean:.1f} dB ({min(scores):.1f} dB)"
            )
            print(f"| {name} | {size / 1e6:.2f} | {size / whole:.0%} | {loss} |", flush=True)
    return cfg.model_dir


def read_back(path: Path, format: str) -> Gaussians:
    """Read an exported file by a program that did not write it, where there is one."""
    if format == "glb":
        return read_glb(path)
    target = path.with_name(f"{format}-back.ply")
    run_splat_transform(path, target)
    gaussians = Gaussians.load_ply(target)
    # An opacity of 255 in 8 bits comes back as an infinite logit, which the rasteriser leaves out.
    return replace(gaussians, opacity_logits=gaussians.opacity_logits.clamp(-20.0, 20.0))


def compare(gaussians: Gaussians, other: Gaussians, cameras) -> list[float]:
    """PSNR per camera of 8-bit renders, at most 100."""
    scores = []
    for camera in cameras:
        pictures = []
        for model in (gaussians, other):
            rgb = rasterize(model.detached(), camera).rgb[0].clamp(0, 1)
            pictures.append((rgb * 255).round() / 255)
        scores.append(psnr(*pictures))
    return scores


def read_glb(path: Path) -> Gaussians:
    """Read a GLB with one primitive of KHR_gaussian_splatting: opacities in (0, 1), linear sizes, quaternions xyzw, y up."""
    content = path.read_bytes()
    (json_bytes,) = struct.unpack_from("<I", content, 12)
    header = json.loads(content[20 : 20 + json_bytes])
    body = content[20 + json_bytes + 8 :]
    (primitive,) = header["meshes"][0]["primitives"]
    assert "KHR_gaussian_splatting" in primitive["extensions"]

    def read(name: str) -> Tensor:
        accessor = header["accessors"][primitive["attributes"][name]]
        view = header["bufferViews"][accessor["bufferView"]]
        width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        dtype, count = GLB_TYPES[accessor["componentType"]], accessor["count"]
        start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
        values = np.frombuffer(body, dtype, count * width, start)
        return torch.from_numpy(values.reshape(count, width).copy())

    def splat(name: str) -> Tensor:
        return read(f"KHR_gaussian_splatting:{name}")

    places = [(d, i) for d in (1, 2, 3) for i in range(2 * d + 1)]
    names = [f"SH_DEGREE_{d}_COEF_{i}" for d, i in places]
    present = [f"KHR_gaussian_splatting:{n}" in primitive["attributes"] for n in names]
    # glTF is y up, 3DGS y down: the writer has turned the world by half a turn about z, and what is odd in (x, y) changed its sign.
    signs = [(-1) ** (i - d) for d, i in places]
    rest = [sign * splat(n) for n, sign, there in zip(names, signs, present, strict=True) if there]
    means = read("POSITION") * torch.tensor([-1.0, -1.0, 1.0])
    x, y, z, w = splat("ROTATION").T
    return Gaussians(
        means=means,
        log_scales=splat("SCALE").log(),
        quats=torch.stack([-z, -y, x, w], 1),
        opacity_logits=torch.logit(splat("OPACITY")[:, 0], eps=1e-7),
        sh0=splat("SH_DEGREE_0_COEF_0")[:, None],
        shN=torch.stack(rest, 1) if rest else torch.zeros(len(means), 0, 3),
    )


if __name__ == "__main__":
    run_script(main, Config, "export_formats")
