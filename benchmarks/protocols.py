"""The sparse-view papers' protocols: their scenes, sizes, kept and scored views, with their numbers beside ours.

A protocol is a file in configs/protocols/. Its data sets are not part of S2D: --data-dir names a folder with one folder per scene, COLMAP
cameras each. What is finished is not run again; the table holds every scene that is there.

Reads   DATA_DIR/<scene>, configs/protocols/<name>.yaml or --protocol FILE.yaml
Writes  OUT_DIR/<scene>_<views>_s<seed>/, a model folder each; the table (--table FILE, else printed)

Example
    python tools/benchmark.py protocol --protocol llff --data-dir data/nerf_llff_data --seeds 0 1 2
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import yaml

from benchmarks.results import markdown, run_stages
from s2d.checks import check_range
from s2d.config import CONFIG_DIR
from s2d.files import atomic_write_json, atomic_write_text
from s2d.images import image_info, list_images
from s2d.log import logger
from s2d.split import make_split

PROTOCOLS = CONFIG_DIR / "protocols"


@dataclass(frozen=True)
class Protocols:
    """Run a paper's protocol on its data set and print our numbers beside the published ones."""

    protocol: str
    """A name in configs/protocols/ (llff, mipnerf360_12_24, mipnerf360_reconfusion, dl3dv, dtu), or a file of your own."""
    data_dir: Path
    """Folder with a folder per scene."""
    out_dir: Path = Path("out/protocols")
    """Folder for the model folders."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; the table shows the mean and the spread."""
    views: tuple[int, ...] = ()
    """Only these numbers of kept views. Default: all of the protocol."""
    weights: Path | None = None
    """Compact weights. Default: the analytic mix, which has seen no data set."""
    preset: str | None = None
    """Preset of the stages."""
    table: Path | None = None
    """Also write the table here, as Markdown."""


@dataclass(frozen=True)
class Protocol:
    """What a file in configs/protocols/ says."""

    title: str
    scenes: tuple[str, ...] | Literal["all"]
    views: tuple[int, ...]
    split: Literal["every", "file", "uniform", "listed"]
    """every: test is every `test_every`-th photo, kept are spread among the others; uniform: kept are spread among all, test is every
    `test_every`-th of the others; listed: the first of `kept`, test is all others but `left_out`; file: `split_file` says."""
    published_from: str
    published: Mapping[str, Mapping[int, Sequence[float]]]
    """Method → kept views → PSNR, and where they are known SSIM and LPIPS."""
    lpips: Literal["vgg", "alex"] = "vgg"
    downscale: float | None = None
    """How far photos are scaled down; else `max_side`."""
    max_side: int | None = None
    test_every: int = 8
    kept: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    split_file: str = ""
    """In a scene's folder; {views} stands for the number of kept views."""
    mask_dir: str = ""
    """In a scene's folder; empty: all pixels are scored."""


def load_protocol(name: str) -> Protocol:
    """Read a protocol by name or file.

    Raises:
        FileNotFoundError: There is none of that name.
        ValueError: A key is missing or unknown, or two contradict each other.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROTOCOLS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in PROTOCOLS.glob("*.yaml")))
        raise FileNotFoundError(f"No protocol {name}. Known: {known}; or give a .yaml file.")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    try:
        protocol = Protocol(**values)
    except TypeError as error:
        known = ", ".join(entry.name for entry in fields(Protocol))
        raise ValueError(f"{path}: {error}. Known keys: {known}.") from error
    if (protocol.downscale is None) == (protocol.max_side is None):
        raise ValueError(f"{path}: give one of downscale and max_side.")
    if protocol.split == "listed" and max(protocol.views) > len(protocol.kept):
        raise ValueError(
            f"{path}: {max(protocol.views)} views are wanted, but kept lists {len(protocol.kept)}. Lengthen the list."
        )
    return protocol


def main(cfg: Protocols) -> None:
    """Run what is missing and print the table."""
    for views in cfg.views:
        check_range("views", views, low=2)
    protocol = load_protocol(cfg.protocol)
    counts = cfg.views or protocol.views
    scenes = find_scenes(protocol, cfg.data_dir)
    found: dict[int, list[list[float]]] = {count: [] for count in counts}
    failed = []
    for count in counts:
        for seed in cfg.seeds:
            rows = []
            for scene in scenes:
                folder = cfg.out_dir / f"{scene.name}_{count}_s{seed}"
                flags = ["--max-side", longest_side(protocol, scene)]
                flags += view_flags(protocol, scene, count, folder)
                scoring = ["--lpips", protocol.lpips]
                scoring += ["--mask-dir", scene / protocol.mask_dir] if protocol.mask_dir else []
                repair = ["--weights", cfg.weights] if cfg.weights else ["--fixer", "analytic"]
                try:
                    run_stages(scene, folder, seed, flags, scoring, repair, cfg.preset)
                except subprocess.CalledProcessError:
                    failed.append(folder.name)
                    continue
                rows.append(read_scores(folder, protocol.lpips))
            if rows:
                found[count].append(
                    [statistics.fmean(column) for column in zip(*rows, strict=True)]
                )
    text = table(protocol, [scene.name for scene in scenes], found)
    print(text)
    if cfg.table is not None:
        atomic_write_text(cfg.table, text)
    if failed:
        raise ValueError(f"{len(failed)} runs failed: {', '.join(failed)}. See the messages above.")


def find_scenes(protocol: Protocol, data_dir: Path) -> list[Path]:
    """Folders of the protocol's scenes that are there; the others are named.

    Raises:
        FileNotFoundError: None is there.
    """
    wanted = protocol.scenes
    if wanted == "all":
        wanted = sorted(path.name for path in data_dir.glob("*") if path.is_dir())
    scenes = [data_dir / name for name in wanted if (data_dir / name).is_dir()]
    if not scenes:
        raise FileNotFoundError(
            f"{data_dir} holds no scene of {protocol.title} ({', '.join(wanted) or 'it has no folders'}). Pass --data-dir."
        )
    if missing := [name for name in wanted if not (data_dir / name).is_dir()]:
        logger.warning(
            "%s: %s not there; the means are over %d scenes and do not compare with the published ones",
            data_dir,
            ", ".join(missing),
            len(scenes),
        )
    return scenes


def longest_side(protocol: Protocol, scene: Path) -> int:
    """Stage 0's --max-side."""
    if protocol.max_side is not None:
        return protocol.max_side
    photo = scene / "images" / list_images(scene / "images")[0]
    return round(max(image_info(photo).oriented_size) / protocol.downscale)


def view_flags(protocol: Protocol, scene: Path, count: int, folder: Path) -> list[object]:
    """Stage 0's flags that choose the views; a list of them is written to `folder`."""
    if protocol.split == "every":
        return ["--eval", "--test-every", protocol.test_every, "--keep-count", count]
    if protocol.split == "file":
        return ["--split-file", scene / protocol.split_file.format(views=count)]
    names = sorted(list_images(scene / "images"))
    if protocol.split == "uniform":
        kept = list(make_split(names, keep_count=count).kept)
        test = [name for name in names if name not in kept][:: protocol.test_every]
    else:
        kept = [names[row] for row in protocol.kept[:count]]
        unused = {*protocol.kept, *protocol.left_out}
        test = [name for row, name in enumerate(names) if row not in unused]
    path = folder / "protocol_split.json"
    atomic_write_json(path, {"train_ids": kept, "test_ids": test})
    return ["--split-file", path]


def read_scores(folder: Path, lpips: str) -> list[float]:
    """PSNR, SSIM and LPIPS of the final model's test views; NaN for what could not be had."""
    scores = json.loads((folder / "results.json").read_text("utf-8"))["stages"]["stage3"]["test"]
    values = (scores[key] for key in ("psnr", "ssim", f"lpips_{lpips}"))
    return [float("nan") if value is None else value for value in values]


def table(
    protocol: Protocol, scenes: Sequence[str], found: Mapping[int, Sequence[Sequence[float]]]
) -> str:
    """Published numbers and ours, PSNR / SSIM / LPIPS per number of kept views; ours with the spread over seeds."""
    head = ["method", *(f"{count} views" for count in found)]
    rows = [
        [method, *(" / ".join(shown(values.get(count, ()))) or "–" for count in found)]
        for method, values in protocol.published.items()
    ]
    ours = []
    for seeds in found.values():
        means = [statistics.fmean(column) for column in zip(*seeds, strict=True)]
        spread = (
            f" ± {statistics.stdev([row[0] for row in seeds]):.2f} dB" if len(seeds) > 1 else ""
        )
        ours.append(" / ".join(shown(means)) + spread if means else "–")
    rows.append([f"**S2D**, {len(scenes)} scenes", *ours])
    text = f"## {protocol.title}\n\nPSNR / SSIM / LPIPS ({protocol.lpips}), means over scenes. Published: {protocol.published_from}. "
    return f"{text}Scenes: {', '.join(scenes)}.\n\n{markdown(head, rows)}\n"


def shown(values: Sequence[float]) -> list[str]:
    """PSNR with two digits, SSIM and LPIPS with three; a dash for what could not be had."""
    return [
        "–" if math.isnan(value) else f"{value:.{digits}f}"
        for value, digits in zip(values, (2, 3, 3), strict=False)
    ]
