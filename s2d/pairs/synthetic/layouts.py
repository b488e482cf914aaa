"""Whole scenes: a rig of cameras, a closed surrounding, things around what the cameras look at, and a light."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from s2d.pairs.synthetic import textures
from s2d.pairs.synthetic.rigs import Rig, random_rig
from s2d.pairs.synthetic.shapes import Material, Shape
from s2d.pairs.synthetic.things import UP, Maker, turned

RIGS = ("grid", "arc", "walk")
TRIES = 20  # to find a free place for a thing


@dataclass(frozen=True, eq=False)
class Light:
    """A round lamp and light from everywhere; linear, 1 is what white paint needs to look white."""

    position: np.ndarray  # [3] world
    radius: float
    lamp: np.ndarray  # [3] RGB
    ambient: np.ndarray  # [3] RGB
    reach: float  # how far away things dim the ambient light


class Layout(NamedTuple):
    """A scene before its photos are taken."""

    rig: Rig
    shapes: list[Shape]
    light: Light


def random_layout(
    rng: np.random.Generator, photos: Sequence[Path], width: int, height: int
) -> Layout:
    """Make up a scene.

    Args:
        rng: All its randomness.
        photos: Files that textures are cut from; none: patterns take their place.
        width, height: Of the photos to be taken, pixels.
    """
    rig = random_rig(rng, RIGS[rng.choice(3, p=(0.4, 0.35, 0.25))], width, height)
    maker = Maker(rng, photos, is_glossy=rng.random() < 0.6)
    is_room = rng.random() < (0.25 if rig.kind == "walk" else 0.55)
    shapes = _room(maker, rig) if is_room else _outdoors(maker, rig)
    if rig.kind == "walk":
        shapes += _roadside(maker, rig, is_room)
    else:
        shapes += _clutter(maker, rig)
    return Layout(rig, shapes, _light(rng, rig, is_room, shapes))


def _light(rng: np.random.Generator, rig: Rig, is_room: bool, shapes: list[Shape]) -> Light:
    tint = 1 + rng.normal(0, 0.05) * np.array([1.0, 0.2, -1.0])
    yaw, height = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(30, 75))
    aside = np.array([np.cos(yaw) * np.cos(height), np.sin(yaw) * np.cos(height), np.sin(height)])
    if is_room:
        ceiling = max(shape.center[2] for shape in shapes[:6])
        position = aside * 0.6 * rig.distance
        position[2] = ceiling - 0.2
        return Light(position, 0.15, rng.uniform(0.5, 0.9) * tint, rng.uniform(0.35, 0.6) / tint, 0.8)  # fmt: skip
    far = 60.0
    radius = far * rng.choice([0.01, 0.1, 0.3])  # sun, haze, cloud
    return Light(far * aside, radius, rng.uniform(0.5, 1.1) * tint, rng.uniform(0.3, 0.55) / tint, 1.2)  # fmt: skip


# surroundings ---------------------------------------------------------------------------------------------------


def _room(maker: Maker, rig: Rig) -> list[Shape]:
    """Floor, ceiling and four walls that hold all cameras and what they look at; pictures on the walls. The six come first."""
    rng = maker.rng
    inside = np.concatenate([rig.centers, rig.target[None] - 0.2, rig.target[None] + 0.2])
    low = inside.min(0) - rng.uniform(0.7, 0.5 + 0.5 * rig.distance, 3)
    high = inside.max(0) + rng.uniform(0.7, 0.5 + 0.5 * rig.distance, 3)
    if rig.kind == "walk":
        high[1] += rig.distance
    low[2], high[2] = 0.0, inside[:, 2].max() + rng.uniform(0.7, 1.6)
    center, half = (low + high) / 2, (high - low) / 2
    shapes = [replace(side, casts=False) for side in maker.box(center, half, np.eye(3))]
    for wall in shapes[:4]:
        inward, along = np.sign(center - wall.center) * (np.abs(center - wall.center) > 1e-6), wall.axes[:, 0]  # fmt: skip
        for _ in range(rng.integers(1, 5)):
            size = rng.uniform(0.2, 0.7, 2)
            spot = wall.center + along * rng.uniform(-0.8, 0.8) + inward * rng.uniform(0.01, 0.06)
            spot = spot + UP * half[2] * rng.uniform(-0.3, 0.5)
            right = along / np.linalg.norm(along) * size[0]
            shapes.append(maker.quad(spot, right, -UP * size[1], maker.whole_picture()))
    return shapes


def _outdoors(maker: Maker, rig: Rig) -> list[Shape]:
    """Sky, ground to the horizon, and something large behind: house fronts, hills, a hedge."""
    rng = maker.rng
    sky = Material(textures.sky_texture(rng), repeat=(2.0, 1.0), is_lit=False)
    near = 4 * rig.distance + 6
    ground = maker.material(5.0, 5.0)
    far_ground = replace(ground, repeat=tuple(np.array(ground.repeat) * 24))
    ground = replace(ground, repeat=tuple(np.array(ground.repeat) * near / 2.5))
    shapes = [
        Shape("ellipsoid", np.zeros(3), np.eye(3) * 90.0, sky, casts=False),
        maker.quad(np.array([0, 0, -0.05]), [60.0, 0, 0], [0, -60.0, 0], far_ground),
        maker.quad(np.zeros(3), [near, 0, 0], [0, -near, 0], ground),
    ]
    shapes = [replace(shape, casts=False) for shape in shapes]
    depth = rig.distance * rng.uniform(0.9, 2.2) + 1.0
    around = np.pi * (0.35 if rig.kind != "arc" else 0.8)
    for angle in np.arange(-around, around, rng.uniform(0.3, 0.6)):
        away = depth * rng.uniform(1.0, 1.8)
        place = away * np.array([np.sin(angle), np.cos(angle), 0])
        turn = turned(-angle + rng.normal(0, 0.2))
        half = np.array([away * rng.uniform(0.2, 0.4), rng.uniform(0.3, 1.0), rng.uniform(0.8, 3.0)])  # fmt: skip
        kind = rng.choice(4, p=(0.45, 0.15, 0.25, 0.15))
        if kind == 0:  # a house
            front = maker.whole_picture() if rng.random() < 0.6 else None
            middle = place + half[2] * UP
            shapes += maker.box(middle, half, turn)
            shapes.append(maker.quad(middle - 1.01 * half[1] * turn[:, 1], turn[:, 0] * half[0], -half[2] * UP, front))  # fmt: skip
        elif kind == 1:  # a hill
            shapes.append(maker.ball(place, half * [1.3, 1.5, 0.6]))
        elif kind == 2:
            shapes += maker.tree(place, rng.uniform(1.5, 4.0))
        else:  # a hoarding
            shapes.append(maker.quad(place + half[2] * UP, turn[:, 0] * half[0], -half[2] * UP, maker.whole_picture()))  # fmt: skip
    return _clear_of(shapes[3:], rig, 0.8, shapes[:3])


# things ---------------------------------------------------------------------------------------------------------


def _clutter(maker: Maker, rig: Rig) -> list[Shape]:
    """Things before and behind what the cameras look at, dense in the middle; some on a platform at its height, some in the air."""
    rng, unit = maker.rng, rig.distance
    shapes: list[Shape] = []
    level = 0.0
    if rng.random() < 0.5:  # a large table that the cameras look down on
        level = rig.target[2] * rng.uniform(0.4, 0.8)
        half = np.array([unit * rng.uniform(0.35, 0.5), unit * rng.uniform(0.25, 0.4), 0.04])
        shapes += maker.box((level - half[2]) * UP, half, np.eye(3), True)
        for x, y in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            foot = half * [0.9 * x, 0.9 * y, 0]
            shapes.append(maker.tube(foot, foot + (level - 2 * half[2]) * UP, 0.04))
        for _ in range(rng.integers(6, 14)):
            spot = half * [*rng.uniform(-0.85, 0.85, 2), 0] + level * UP
            _add(shapes, maker.small_thing(spot, unit * rng.uniform(0.08, 0.22)), rig)
    for _ in range(rng.integers(16, 30)):
        size = unit * rng.uniform(0.1, 0.45)
        for _ in range(TRIES):
            place = unit * np.array([rng.normal(0, 0.5), rng.normal(0.35, 0.6), 0.0])
            if place[1] < 0:  # near the cameras of a grid: nothing that hides all the rest
                size = min(size, 0.22 * unit)
            if _add(shapes, maker.thing(place, size), rig):
                break
    for _ in range(rng.integers(0, 4)):  # wires and hanging boards
        place = unit * np.array([rng.normal(0, 0.5), rng.uniform(-0.3, 0.8), 0]) + rig.target[2] * rng.uniform(0.8, 1.6) * UP  # fmt: skip
        if rng.random() < 0.5:
            reach = unit * np.array([1.5, rng.normal(0, 0.3), rng.normal(0, 0.1)])
            _add(shapes, [maker.tube(place - reach, place + reach, unit * rng.uniform(0.002, 0.008))], rig)  # fmt: skip
        else:
            _add(shapes, maker.sheet(place, 0.3 * unit), rig)
    return shapes


def _roadside(maker: Maker, rig: Rig, is_room: bool) -> list[Shape]:
    """Things on both sides of the way, a few at its end, and behind them rows of fronts."""
    rng, shapes = maker.rng, []
    start, end = rig.centers[:, 1].min(), rig.centers[:, 1].max()
    for side in (-1, 1) if not is_room else ():
        y, aside = start, rng.uniform(1.6, 3.5)
        while y < end + 3 * rig.distance and rng.random() < 0.96:
            half = np.array([rng.uniform(0.2, 0.8), rng.uniform(0.6, 2.2), rng.uniform(0.8, 2.5)])
            middle = np.array(
                [side * (aside + half[0] + rng.uniform(0, 0.4)), y + half[1], half[2]]
            )
            if _add(shapes, maker.box(middle, half, np.eye(3)), rig):
                inner = middle - [side * 1.01 * half[0], 0, 0]
                shapes.append(maker.quad(inner, [0, side * half[1], 0], -half[2] * UP, maker.whole_picture()))  # fmt: skip
            y += 2 * half[1] + rng.choice([0.0, rng.uniform(0.2, 1.5)])
    for _ in range(rng.integers(40, 60)):
        size = rng.uniform(0.3, 1.6)
        for _ in range(TRIES):
            y = rng.uniform(start + 0.5, end + 1.7 * rig.distance)
            x = rng.choice([-1, 1]) * (rng.uniform(0.3, 1.0) + abs(rng.normal(0, 0.8)))
            if y > end + 0.8 * rig.distance:
                x *= rng.random()
            thing = maker.tree if rng.random() < 0.1 else maker.thing
            if _add(shapes, thing(np.array([x, y, 0.0]), size), rig):
                break
    return shapes


def _add(shapes: list[Shape], thing: list[Shape], rig: Rig) -> bool:
    """Add a thing unless it stands in a camera's way."""
    if len(_clear_of(thing, rig, 0.22 * rig.distance)) < len(thing):
        return False
    shapes += thing
    return True


def _clear_of(
    shapes: list[Shape], rig: Rig, clearance: float, before: Sequence[Shape] = ()
) -> list[Shape]:
    """Leave out shapes that come closer than `clearance` to a camera (their boxes do), with `before` in front."""
    kept = list(before)
    for shape in shapes:
        local = shape.to_local(rig.centers - shape.center)
        outside = shape.axes @ (local - np.clip(local, -1, 1)).T  # for boxes that are not skewed
        if np.linalg.norm(outside, axis=0).min() > clearance:
            kept.append(shape)
    return kept
