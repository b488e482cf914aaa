"""The rules of the capture check: from numbers to what is wrong with which photo, and what to do about it.

Every threshold leaves ten good captures without a warning; how near they come, and what damage is found: docs/capture.md.
A *note* is something to know, a *warning* makes the result worse, a *problem* leaves photos out of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from s2d.capture.pairs import Pair
from s2d.capture.photos import Capture, Photo

Level = Literal["note", "warning", "problem"]

LEVELS: tuple[Level, ...] = ("problem", "warning", "note")

FEW_PHOTOS, MANY_PHOTOS = 3, 30
SMALL_SIDE = 480  # pixels
# σ in working pixels: the good scenes have at most 0.49, and a Gaussian of 1.5 pixels gives 0.71 or more.
MIN_BLUR = 0.65
MORE_BLUR = 0.4  # than the set's median, or else the whole set is soft
# Steps of light to the photos that share most with a photo. Five times the set's usual step are allowed beside the first number,
# between the other two: sceaux changes by 0.75 from photo to photo, fern by 0.05.
EXPOSURE_STOPS = (0.3, 0.5, 0.9)
EXPOSURE_NOTE = 0.4
# Stops of one channel to the mean of all: at most 0.34 in the good scenes.
COLOUR_STOPS, COLOUR_NOTE = 0.45, 0.3
NUM_NEIGHBOURS = 4
WEAK_MATCHES = 20  # the good scenes hold together by 27 or more
# Shares of matches that a turn, or one plane, explains: every photo of the good scenes has a pair below 0.36, or 0.81.
TURNED_SHARE, FLAT_SHARE = 0.85, 0.95
MIN_ANGLE = 0.7  # degrees; every photo of the good scenes has a pair above 2.0
# Of the longer side: a copy of half the size gives 0.0008, the good scenes' most alike frames are 0.0022 apart.
SAME_SHIFT = 0.0012
SAME_SHARE = 0.3  # of the features that match
FEW_FEATURES = 60
OTHER_LENS = 1.1  # ratio of focal lengths


@dataclass(frozen=True)
class Finding:
    """One thing to know, with what to do about it."""

    kind: str
    level: Level
    photos: tuple[str, ...]  # whom it concerns; empty: the whole set
    text: str


def judge(photos: list[Photo], pairs: list[Pair]) -> list[Finding]:
    """Apply every rule to photos that could be read, and to the pairs of them that have something in common."""
    rules = (
        number_of_photos,
        connections,
        duplicates,
        parallax,
        sharpness,
        exposure,
        sizes_and_lenses,
    )
    return [finding for rule in rules for finding in rule(photos, pairs)]


# ----------------------------------------------------------------------------------------------------------------- files


def unreadable_formats(capture: Capture) -> list[Finding]:
    """Files of the folder that S2D does not read."""
    if not capture.unreadable_formats:
        return []
    text = f"{shorten(capture.unreadable_formats)} cannot be read and will be left out. Export as JPEG (films: as single frames)."
    return [Finding("format", "warning", (), text)]


def same_stems(names: Sequence[str]) -> list[Finding]:
    """Photos that later stages could not tell apart."""
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(Path(name).with_suffix("").as_posix(), []).append(name)
    findings = []
    for same in by_stem.values():
        if len(same) > 1:
            text = f"{' and '.join(same)} differ in their suffix only, and every stage writes <name>.png. Rename or remove one."
            findings.append(Finding("names", "problem", tuple(same), text))
    return findings


def number_of_photos(photos: list[Photo], pairs: list[Pair]) -> list[Finding]:
    """Too few to see depth, or more than S2D is made for."""
    if len(photos) < 2:
        text = f"{len(photos)} readable photo{'s' * (len(photos) != 1)}: no depth without two, and S2D wants {FEW_PHOTOS} or more. Take more from other places."
        return [Finding("number", "problem", (), text)]
    if len(photos) < FEW_PHOTOS:
        text = "Two photos show depth only where both look. Take at least one more, a step to the side."
        return [Finding("number", "warning", (), text)]
    if len(photos) > MANY_PHOTOS:
        text = f"{len(photos)} photos: S2D is made for {FEW_PHOTOS} to {MANY_PHOTOS}. Keep some (--keep-count 12); with this many, plain 3DGS does well too."
        return [Finding("number", "note", (), text)]
    return []


def sizes_and_lenses(photos: list[Photo], pairs: list[Pair]) -> list[Finding]:
    """Photos that cannot share one camera, and small ones."""
    findings = []
    small = [photo.name for photo in photos if max(photo.size) < SMALL_SIDE]
    if small:
        text = (
            f"Smaller than {SMALL_SIDE} pixels: {shorten(small)}. Use the originals, not previews."
        )
        findings.append(Finding("small", "note", tuple(small), text))
    cameras: dict[tuple, list[str]] = {}
    for photo in photos:
        key = (photo.camera, tuple(sorted(photo.size)), _lens_group(photo, photos))
        cameras.setdefault(key, []).append(photo.name)
    if len(cameras) > 1:
        shown = "; ".join(
            f"{max(size)} × {min(size)} pixels{f', {model}' if model else ''}{f', {focal:.0f} mm' if focal else ''}: {shorten(names)}"
            for (model, size, focal), names in cameras.items()
        )
        text = (
            f"Photos of {len(cameras)} kinds: {shown}. Fine if their cameras are known; else take all with one camera, "
            "without zooming or cropping: one lens is estimated better than several."
        )
        findings.append(Finding("mixed", "note", (), text))
    return findings


def _lens_group(photo: Photo, photos: list[Photo]) -> float:
    """The focal length that stands for a photo's: the shortest of the set that is about the same."""
    if not photo.focal_35mm:
        return 0.0
    known = [other.focal_35mm for other in photos if other.focal_35mm]
    return min(focal for focal in known if photo.focal_35mm / focal < OTHER_LENS)


# --------------------------------------------------------------------------------------------------------------- one photo


def sharpness(photos: list[Photo], pairs: list[Pair]) -> list[Finding]:
    """Photos that are blurred, beside sharper ones; or a set that is soft as a whole."""
    if not photos:
        return []
    usual = float(np.median([photo.blur for photo in photos]))
    if usual > MIN_BLUR:
        text = (
            f"All photos are soft (σ about {usual:.1f} pixels once scaled to 640). Use the originals, wipe the lens, "
            "or take them with a shorter exposure."
        )
        findings = [Finding("blur", "warning", (), text)]
    else:
        findings = []
    for photo in photos:
        if photo.blur > max(MIN_BLUR, usual + MORE_BLUR):
            text = f"{photo.name} is blurred (σ {photo.blur:.1f} pixels once scaled to 640; the others {usual:.1f}). Take it again with a steady hand, or leave it out."
            findings.append(Finding("blur", "warning", (photo.name,), text))
    return findings


def exposure(photos: list[Photo], pairs: list[Pair]) -> list[Finding]:
    """Photos that are brighter, darker or of another tint than the photos that show the same things."""
    steps = {row: step for row in range(len(photos)) if (step := _step(row, pairs)) is not None}
    if not steps:
        return []
    usual = float(np.median([abs(step.mean()) for step in steps.values()]))
    first, least, most = EXPOSURE_STOPS
    limit = float(np.clip(first + 5 * usual, least, most))
    findings = []
    for row, step in steps.items():
        name = photos[row].name
        stops = float(step.mean())
        tint = step - stops
        channel = int(np.abs(tint).argmax())
        if abs(stops) > EXPOSURE_NOTE:
            level: Level = "warning" if abs(stops) > limit else "note"
            text = f"{name} is {abs(stops):.1f} stops {'brighter' if stops > 0 else 'darker'} than the photos beside it. Lock the exposure, or correct it before training."
            findings.append(Finding("exposure", level, (name,), text))
        if abs(tint[channel]) > COLOUR_NOTE:
            level = "warning" if abs(tint[channel]) > COLOUR_STOPS else "note"
            colour = ("red", "green", "blue")[channel]
            text = f"{name} has {'more' if tint[channel] > 0 else 'less'} {colour} than the photos beside it. Lock the white balance, or correct it before training."
            findings.append(Finding("white balance", level, (name,), text))
    return findings


def _step(row: int, pairs: list[Pair]) -> np.ndarray | None:
    """By how many stops a photo is brighter than those beside it, per channel; None where nothing tells. [3]"""
    steps = [
        pair.stops * (1 if pair.b == row else -1)
        for pair in nearest(row, pairs)
        if not np.isnan(pair.stops).any()
    ]
    return np.median(steps, axis=0) if steps else None


def nearest(row: int, pairs: list[Pair]) -> list[Pair]:
    """The pairs by which a photo shares most with others."""
    own = [pair for pair in pairs if row in (pair.a, pair.b)]
    return sorted(own, key=lambda pair: -pair.num_matches)[:NUM_NEIGHBOURS]


# ------------------------------------------------------------------------------------------------------------- all photos


def connections(photos: list[Photo], pairs: list[Pair]) -> list[Finding]:
    """Photos, or groups of them, that share nothing or too little with the largest group."""
    if len(photos) < 2:
        return []
    names = [photo.name for photo in photos]
    groups = components(len(photos), pairs)
    if len(groups[0]) == 1:
        text = "No two photos show enough of the same. Take them closer together: neighbours should share at least two thirds of the picture."
        return [Finding("overlap", "problem", tuple(names), text)]
    findings = []
    for group in groups[1:]:
        own = [names[row] for row in group]
        findings.append(Finding("overlap", "problem", tuple(own), _apart(photos, group, groups[0])))
    # What holds together by a thread only, within the largest group.
    inside = set(groups[0])
    strong = components(len(photos), [pair for pair in pairs if pair.num_matches >= WEAK_MATCHES])
    main = next(group for group in strong if inside.issuperset(group))
    for group in strong:
        if inside.issuperset(group) and group != main:
            near, far = closest(group, main)
            own = [names[row] for row in group]
            text = f"{shorten(own)} shares little with the others. Take a photo between {names[near]} and {names[far]}."
            findings.append(Finding("overlap", "warning", tuple(own), text))
    return findings


def _apart(photos: list[Photo], group: list[int], main: list[int]) -> str:
    """Say why a group is on its own, and what to do."""
    near, far = (photos[row] for row in closest(group, main))
    if len(group) == 1 and len(near.xys) < FEW_FEATURES:
        return f"{near.name} shares nothing with the others: there is next to nothing in it to recognise (a plain wall, sky, darkness). Take in more of the surroundings."
    if len(group) == 1 and near.blur > MIN_BLUR:
        return f"{near.name} shares nothing with the others, most likely because it is blurred. Take it again, or leave it out."
    what = shorten([photos[row].name for row in group])
    verb, it = ("shares", "it shows") if len(group) == 1 else ("share", "they show")
    return f"{what} {verb} nothing with the others: take two photos between {near.name} and {far.name}, or leave out what {it} if that is another place."


def components(num: int, pairs: Sequence[Pair]) -> list[list[int]]:
    """Group the photos that are connected through others: sorted rows, the largest group first."""
    group = list(range(num))
    for pair in pairs:
        old, new = group[pair.b], group[pair.a]
        group = [new if number == old else number for number in group]
    found = [[row for row in range(num) if group[row] == number] for number in dict.fromkeys(group)]
    return sorted(found, key=len, reverse=True)


def closest(group: Sequence[int], others: Sequence[int]) -> tuple[int, int]:
    """Which photo of each is next to the other in name order, which is mostly the order in which they were taken."""
    return min(((a, b) for a in group for b in others), key=lambda rows: abs(rows[0] - rows[1]))


def duplicates(photos: list[Photo], pairs: list[Pair]) -> list[Finding]:
    """Photos that show what another one shows, pixel by pixel."""
    findings, known = [], set()
    for pair in pairs:
        first, second = photos[pair.a], photos[pair.b]
        share = pair.num_matches / max(1, min(len(first.xys), len(second.xys)))
        if pair.shift < SAME_SHIFT and share > SAME_SHARE and pair.b not in known:
            known.add(pair.b)
            text = f"{second.name} is the same picture as {first.name}. Remove one: it adds nothing, and as a test photo it would make the scores look better."
            findings.append(Finding("duplicate", "warning", (second.name,), text))
    return findings


def parallax(photos: list[Photo], pairs: list[Pair]) -> list[Finding]:
    """Photos taken from one spot: however much they overlap, there is no depth to be seen."""
    advice = "Step aside between photos, by a tenth of the distance to what you photograph; don't turn on the spot."
    standing, narrow, flat = [], [], []
    judged = []
    for row, photo in enumerate(photos):
        # The same picture once more is no second look; it has a finding of its own.
        own = [pair for pair in pairs if row in (pair.a, pair.b) and pair.shift >= SAME_SHIFT]
        if not own:
            continue
        judged.append(photo.name)
        if min(pair.rotation_share for pair in own) > TURNED_SHARE:
            standing.append(photo.name)
        elif max(pair.angle for pair in own) < MIN_ANGLE:
            narrow.append(photo.name)
        elif min(pair.plane_share for pair in own) > FLAT_SHARE:
            flat.append(photo.name)
    findings = []
    if standing:
        text = f"{shorten(standing)}: taken from the same spot as {'all photos' if len(standing) == len(judged) else 'each photo'} with which there is overlap, so no depth can be seen. {advice}"
        level: Level = "problem" if len(standing) == len(judged) else "warning"
        findings.append(Finding("parallax", level, tuple(standing), text))
    if narrow:
        text = f"{shorten(narrow)}: the camera hardly moved, so depth will be rough. {advice}"
        findings.append(Finding("parallax", "warning", tuple(narrow), text))
    if flat and len(flat) + len(standing) == len(judged):
        text = "Everything in these photos lies in one plane, or too far away for how little the camera moved. If there is depth, step further aside between photos."
        findings.append(Finding("flat", "warning", tuple(flat), text))
    return findings


def shorten(names: Sequence[str]) -> str:
    """`a.jpg, b.jpg and 5 more`."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]}, {names[1]} and {len(names) - 2} more"
