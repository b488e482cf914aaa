"""What the capture check finds and misses: real captures that must pass, and the same with one photo damaged.

Reads   $S2D_DATA/scenes/*, $S2D_DATA/photos/* (or --data-dir)
Writes  the table of docs/capture.md to stdout

Example
    python benchmarks/capture.py                     # some ten minutes on one core
    python benchmarks/capture.py --scenes fern --photos 1
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import cv2
import numpy as np
from rich.table import Table

from benchmarks.tables import Printer
from s2d.capture.pairs import Pair, compare
from s2d.capture.photos import WORKING_SIDE, Photo, find_photos, read_photo
from s2d.capture.report import MAX_FEATURES
from s2d.capture.rules import Finding, judge
from s2d.config import run_script
from s2d.log import logger, progress

Picture = np.ndarray  # [H, W, 3] uint8, BGR
NUM_TURNED = 5  # photos in a set that is made of one


@dataclass(frozen=True)
class Config:
    """Count hits and false alarms of the capture check."""

    scenes: tuple[str, ...] = ()
    """Names of captures; all without."""
    photos: int = 2
    """How many photos of each capture are damaged in turn."""
    data_dir: Path | None = None
    """Folder with scenes/ and photos/; $S2D_DATA if not given."""


@dataclass(frozen=True)
class Damage:
    """One way to spoil a photo, and the finding that it should give."""

    name: str
    strength: str
    kinds: tuple[str, ...]
    apply: Callable[[Picture], Picture]
    added: bool = False
    """The spoiled picture is one more, beside the photo."""
    quality: int = 92
    """JPEG's."""


def main(cfg: Config) -> Path:
    """Measure; returns the folder that was read."""
    data_dir = cfg.data_dir or Path(os.environ.get("S2D_DATA", ""))
    folders = [
        path
        for path in (*sorted(data_dir.glob("scenes/*")), *sorted(data_dir.glob("photos/*")))
        if not cfg.scenes or path.name in cfg.scenes
    ]
    if not folders:
        raise FileNotFoundError(
            f"No captures in {data_dir.resolve()}. Set S2D_DATA to a folder with scenes/, or pass --data-dir."
        )
    captures = {f"{path.parent.name}/{path.name}": look_at(path) for path in folders}
    printer = Printer(markdown=True)
    printer.table(good_table(captures))
    printer.table(damage_table(captures, cfg.photos))
    return data_dir


@dataclass(frozen=True)
class Looked:
    """A capture, read and compared once."""

    paths: list[Path]
    photos: list[Photo]
    pairs: list[Pair]


def look_at(folder: Path) -> Looked:
    capture = find_photos(folder)
    paths = [capture.root / name for name in capture.names]
    photos = [read_photo(path, path.name, MAX_FEATURES) for path in paths]
    return Looked(paths, photos, all_pairs(photos))


def all_pairs(photos: list[Photo]) -> list[Pair]:
    found = []
    with progress(len(photos) * (len(photos) - 1) // 2, "pairs") as bar:
        for done, (a, b) in enumerate(combinations(range(len(photos)), 2), start=1):
            found.append(compare(a, b, photos))
            bar.update(done)
    return [pair for pair in found if pair is not None]


def alarms(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level != "note"]


# --------------------------------------------------------------------------------------------------------- good captures


def good_table(captures: dict[str, Looked]) -> Table:
    """All photos of each capture, and 6 and 3 evenly spaced ones of them."""
    table = Table(title="Captures as they are: warnings and problems")
    table.add_column("capture")
    for heading in ("photos", "all", "6", "3"):
        table.add_column(heading, justify="right" if heading == "photos" else "left")
    for name, looked in captures.items():
        cells = []
        for count in (len(looked.photos), 6, 3):
            rows = np.rint(np.linspace(0, len(looked.photos) - 1, count)).astype(int).tolist()
            found = alarms(judge(*part(looked, rows)))
            cells.append("; ".join(describe(finding) for finding in found) or "–")
        table.add_row(name, str(len(looked.photos)), *cells)
    return table


def part(looked: Looked, rows: list[int]) -> tuple[list[Photo], list[Pair]]:
    new = {row: number for number, row in enumerate(rows)}
    pairs = [
        replace(pair, a=new[pair.a], b=new[pair.b])
        for pair in looked.pairs
        if pair.a in new and pair.b in new
    ]
    return [looked.photos[row] for row in rows], pairs


def describe(finding: Finding) -> str:
    return f"{finding.kind} ({len(finding.photos)} photo{'s' * (len(finding.photos) != 1)})"


# --------------------------------------------------------------------------------------------------------------- damage


def damages(others: list[Path]) -> list[Damage]:
    """Every damage; `others` are photos of another place."""
    foreign = others[0] if others else None
    return [
        *(Damage("Gaussian blur", f"σ {s:g} px", ("blur",), gaussian(s)) for s in (0.7, 1, 1.5, 2, 3)),
        *(Damage("motion blur", f"{n} px", ("blur",), motion(n)) for n in (3, 5, 9, 15)),
        *(Damage("light × ", f"{g:g}", ("exposure",), gain(g, g, g)) for g in (0.5, 0.7, 0.85, 1.2, 1.4, 2)),
        Damage("red × 1.2, blue ÷ 1.2", "", ("white balance",), gain(1 / 1.2, 1, 1.2)),
        Damage("red × 1.6, blue ÷ 1.6", "", ("white balance",), gain(1 / 1.6, 1, 1.6)),
        *(Damage("same photo, JPEG", f"quality {q}", ("duplicate",), same, True, q) for q in (92, 60, 30)),
        Damage("same photo, half as large", "", ("duplicate",), half, True),
        *([Damage("photo of another place", "", ("overlap",), lambda _: cv2.imread(str(foreign)), True)] if foreign else []),
        Damage("black photo with noise", "", ("overlap",), darkness),
    ]  # fmt: skip


def gaussian(sigma: float) -> Callable[[Picture], Picture]:
    return lambda picture: cv2.GaussianBlur(picture, (0, 0), sigma * enlargement(picture))


def motion(length: int) -> Callable[[Picture], Picture]:
    def apply(picture: Picture) -> Picture:
        reach = (round(length * enlargement(picture)) - 1) / 2
        middle, step = int(reach), np.array([np.cos(0.4), np.sin(0.4)]) * reach
        kernel = np.zeros((2 * middle + 1, 2 * middle + 1), np.float32)
        ends = [tuple(np.rint(middle + sign * step).astype(int).tolist()) for sign in (-1, 1)]
        cv2.line(kernel, *ends, 1.0)
        return cv2.filter2D(picture, -1, kernel / kernel.sum())

    return apply


def enlargement(picture: Picture) -> float:
    """Pixels of a picture per working pixel."""
    return max(1.0, max(picture.shape) / WORKING_SIDE)


def gain(blue: float, green: float, red: float) -> Callable[[Picture], Picture]:
    """Factors on linear light, through sRGB's curve; what gets too bright is cut off."""

    def apply(picture: Picture) -> Picture:
        value = picture.astype(np.float64) / 255
        linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
        linear = np.clip(linear * [blue, green, red], 0, 1)
        value = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
        return np.rint(value * 255).astype(np.uint8)

    return apply


def same(picture: Picture) -> Picture:
    return picture


def half(picture: Picture) -> Picture:
    return cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def darkness(picture: Picture) -> Picture:
    noise = np.random.default_rng(0).normal(4, 3, picture.shape)
    return np.clip(noise, 0, 255).astype(np.uint8)


def turned(picture: Picture, flat: bool) -> list[Picture]:
    """Pictures of a camera that turns on the spot before a photo, or (flat) that moves along it as along a poster."""
    height, width = picture.shape[:2]
    K = np.array([[1.2 * width, 0, width / 2], [0, 1.2 * width, height / 2], [0, 0, 1]])
    views = []
    for k in range(NUM_TURNED):
        angle = np.radians(4.0 * (k - NUM_TURNED // 2))
        R = cv2.Rodrigues(np.array([0.3 * angle, angle, 0.2 * angle]))[0]
        if flat:  # the plane z = 1 seen from a place to the side
            R = R @ (np.eye(3) - np.outer([np.tan(angle), 0.3 * np.tan(2 * angle), 0], [0, 0, 1]))
        # A little nearer, so that the picture reaches the edges.
        zoomed = K @ np.diag([1.6, 1.6, 1]) @ R @ np.linalg.inv(K)
        views.append(cv2.warpPerspective(picture, zoomed, (width, height), flags=cv2.INTER_CUBIC))
    return views


def damage_table(captures: dict[str, Looked], num_photos: int) -> Table:
    """Damage each photo in turn; a hit is the right finding for it, a false alarm any for another photo."""
    table = Table(title="One photo damaged")
    for heading in ("damage", "strength", "found", "as a note", "of", "others blamed", "missed in"):
        left = heading in ("damage", "strength", "missed in")
        table.add_column(heading, justify="left" if left else "right")
    scores: dict[tuple[str, str], list[Outcome]] = {}
    names = list(captures)
    for number, (name, looked) in enumerate(captures.items()):
        logger.info("damaging photos of %s (%d of %d)", name, number + 1, len(captures))
        # scenes/sceaux and photos/sceaux are one place.
        elsewhere = [other for other in names if Path(other).name != Path(name).name]
        foreign = captures[elsewhere[number % len(elsewhere)]].paths if elsewhere else []
        rows = np.rint(np.linspace(0, len(looked.photos) - 1, num_photos + 2)).astype(int)[1:-1]
        for damage in damages(foreign):
            for row in rows.tolist():
                outcome = try_damage(name, looked, row, damage)
                scores.setdefault((damage.name, damage.strength), []).append(outcome)
        for kinds, flat in (({"parallax"}, False), ({"parallax", "flat"}, True)):
            what = ("all photos of one poster", "") if flat else ("all photos from one spot", "")
            for row in rows.tolist():
                hit = try_turned(looked.paths[row], kinds, flat)
                scores.setdefault(what, []).append(Outcome(name, hit))
    for (name, strength), results in scores.items():
        missed = sorted({Path(one.capture).name for one in results if not one.found})
        counts = (
            sum(one.found for one in results),
            sum(one.noted for one in results),
            len(results),
            sum(one.others for one in results),
        )
        shown = ", ".join(missed) if len(missed) <= 4 else f"{len(missed)} captures"
        table.add_row(name, strength, *map(str, counts), shown)
    return table


@dataclass(frozen=True)
class Outcome:
    """What the check said about one damage."""

    capture: str
    found: bool
    """The damaged photo got the right warning."""
    noted: bool = False
    """It got the right note instead."""
    others: int = 0
    """Photos that got a warning though nothing was done to them."""


def try_damage(name: str, looked: Looked, row: int, damage: Damage) -> Outcome:
    """Damage a photo, compare it anew, and judge."""
    picture = damage.apply(cv2.imread(str(looked.paths[row])))
    photos = list(looked.photos)
    place = len(photos) if damage.added else row
    spoiled = "damaged.jpg"
    photos[place : place + 1] = [photo_of(picture, spoiled, damage.quality)]
    pairs = [pair for pair in looked.pairs if place not in (pair.a, pair.b)]
    for other in range(len(photos)):
        if other != place and (pair := compare(*sorted((other, place)), photos)) is not None:
            pairs.append(pair)
    said = [
        finding
        for finding in judge(photos, pairs)
        if spoiled in finding.photos and finding.kind in damage.kinds
    ]
    found = bool(alarms(said))
    before = blamed(judge(looked.photos, looked.pairs))
    others = {photo for _, photo in blamed(judge(photos, pairs)) - before} - {spoiled}
    return Outcome(name, found, bool(said) and not found, len(others))


def blamed(findings: list[Finding]) -> set[tuple[str, str]]:
    """Which photos get which warning."""
    return {(finding.kind, photo) for finding in alarms(findings) for photo in finding.photos}


def try_turned(path: Path, kinds: set[str], flat: bool) -> bool:
    pictures = turned(cv2.imread(str(path)), flat)
    photos = [photo_of(picture, f"{k}.jpg", 92) for k, picture in enumerate(pictures)]
    return bool(kinds & {finding.kind for finding in alarms(judge(photos, all_pairs(photos)))})


def photo_of(picture: Picture, name: str, quality: int) -> Photo:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
        return read_photo(path, name, MAX_FEATURES)


if __name__ == "__main__":
    run_script(main, Config, "capture")
