"""Things made of shapes: boxes, balls, posts, plants, tables, signs. Each stands on a place: the middle of its foot, world.

A `Maker` holds what the things of one scene share: its textures, how glossy it is, and its randomness.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from s2d.pairs.synthetic import textures
from s2d.pairs.synthetic.shapes import Material, Shape

UP = np.array([0.0, 0.0, 1.0])


def turned(yaw: float) -> np.ndarray:
    """Axes turned about z, as columns. [3, 3]"""
    cosine, sine = np.cos(yaw), np.sin(yaw)
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])


def tilted(rng: np.random.Generator, angle: float) -> np.ndarray:
    """A small rotation about a random horizontal axis. [3, 3]"""
    yaw = rng.uniform(0, 2 * np.pi)
    cosine, sine = np.cos(angle), np.sin(angle)
    about_x = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    return turned(yaw) @ about_x @ turned(-yaw)


class Maker:
    """Makes things; every call draws other ones."""

    def __init__(self, rng: np.random.Generator, photos: Sequence[Path], is_glossy: bool):
        self.rng = rng
        self.is_glossy = is_glossy
        make_photo = lambda share: (  # noqa: E731
            textures.photo_texture(rng, photos, share) if photos else textures.pattern_texture(rng)
        )
        self.large = [make_photo(rng.uniform(0.6, 1.0)) for _ in range(5)]
        self.small = [make_photo(rng.uniform(0.15, 0.5)) for _ in range(12)]
        self.made = [textures.pattern_texture(rng) for _ in range(5)]
        self.plain = [textures.plain_texture(rng) for _ in range(5)]

    # materials --------------------------------------------------------------------------------------------------

    def material(self, width: float, height: float, **changes) -> Material:
        """For a surface of this size in metres: mostly a piece of a photo, at times a pattern or paint."""
        rng = self.rng
        kind = rng.choice(4, p=(0.28, 0.4, 0.17, 0.15))
        texture = (self.large, self.small, self.made, self.plain)[kind]
        texture = texture[rng.integers(len(texture))]
        # Pictures are about as large as what they show would be: a wall takes several.
        picture = (2.5, 1.0, 0.8, 1.0)[kind] * rng.uniform(0.7, 1.4)
        repeat = (width / picture, height / picture * texture.width / texture.height)
        if max(repeat) < 1:
            repeat = tuple(np.array(repeat) / max(repeat) * rng.uniform(0.6, 1.0))
        gloss = rng.choice([0.0, rng.uniform(0.03, 0.5)]) if self.is_glossy else 0.0
        values = {
            "texture": texture,
            "offset": tuple(rng.uniform(0, 2, 2)),
            "repeat": repeat,
            "gloss": gloss,
            "shininess": rng.uniform(8, 80),
        }
        return Material(**{**values, **changes})

    def whole_picture(self, **changes) -> Material:
        """A picture once over the surface, upright."""
        texture = self.large[self.rng.integers(len(self.large))]
        return Material(texture, **changes)

    # shapes -----------------------------------------------------------------------------------------------------

    def quad(self, center, right, down, material: Material | None = None, **changes) -> Shape:
        """A flat piece from its middle and the halves of its edges."""
        center, right, down = (np.asarray(v, float) for v in (center, right, down))
        normal = np.cross(right, down)
        axes = np.stack([right, down, normal / np.linalg.norm(normal)], 1)
        size = (2 * np.linalg.norm(right), 2 * np.linalg.norm(down))
        return Shape("quad", center, axes, material or self.material(*size, **changes))

    def tube(self, start, end, radius: float, taper=0.0, span=np.pi, yaw=0.0, **changes) -> Shape:
        """A round bar, a pipe or a bent sheet from start to end."""
        start, end = np.asarray(start, float), np.asarray(end, float)
        half = (end - start) / 2
        across = np.cross(half, [0.577, 0.577, 0.577])
        across /= np.linalg.norm(across)
        other = np.cross(half, across) / np.linalg.norm(half)
        x = np.cos(yaw) * across + np.sin(yaw) * other
        y = np.cos(yaw) * other - np.sin(yaw) * across
        material = self.material(2 * span * radius, 2 * np.linalg.norm(half), **changes)
        axes = np.stack([x * radius, y * radius, half], 1)
        if span == np.pi:  # the picture meets itself at the back
            material = _joined(material)
        return Shape("tube", (start + end) / 2, axes, material, taper, span)

    def ball(self, center, radii, turn=None) -> Shape:
        """An ellipsoid."""
        axes = (np.eye(3) if turn is None else turn) * np.asarray(radii, float)
        material = self.material(2 * np.pi * np.mean(radii), np.pi * np.mean(radii))
        return Shape("ellipsoid", np.asarray(center, float), axes, _joined(material))

    def box(self, center, half, turn, same: bool = False) -> list[Shape]:
        """Six sides, each with a material of its own or all alike."""
        half = np.asarray(half, float)
        material = self.material(2 * half.max(), 2 * half.max()) if same else None
        sides = []
        for axis in range(3):
            right, down = (1, 2) if axis == 0 else ((0, 2) if axis == 1 else (0, 1))
            for sign in (-1.0, 1.0):
                middle = center + sign * half[axis] * turn[:, axis]
                sides.append(self.quad(middle, turn[:, right] * half[right], -turn[:, down] * half[down], material))  # fmt: skip
        return sides

    # things on a place ------------------------------------------------------------------------------------------

    def thing(self, place: np.ndarray, size: float) -> list[Shape]:
        """One of all kinds, about as large as `size`."""
        kinds = (
            self.crate, self.crate, self.stack, self.vase, self.can, self.stone, self.sheet, self.sheet,
            self.bent_sheet, self.posts, self.plant, self.plant, self.lattice, self.twigs, self.table, self.sign,
        )  # fmt: skip
        return kinds[self.rng.integers(len(kinds))](place, size)

    def small_thing(self, place: np.ndarray, size: float) -> list[Shape]:
        """What may stand on a table."""
        kinds = (self.crate, self.stack, self.vase, self.can, self.stone, self.sheet, self.plant)
        return kinds[self.rng.integers(len(kinds))](place, size)

    def crate(self, place, size):
        half = size * self.rng.uniform(0.18, 0.5, 3)
        turn = turned(self.rng.uniform(0, np.pi))
        return self.box(place + half[2] * UP, half, turn, self.rng.random() < 0.5)

    def stack(self, place, size):
        """Books or parcels on one another."""
        shapes, top = [], np.array(place, float)
        for _ in range(self.rng.integers(2, 6)):
            half = size * np.array([*self.rng.uniform(0.2, 0.4, 2), self.rng.uniform(0.03, 0.12)])
            turn = turned(self.rng.uniform(0, np.pi) if size < 0.3 else self.rng.normal(0, 0.3))
            shapes += self.box(top + half[2] * UP, half, turn, self.rng.random() < 0.5)
            top += 2 * half[2] * UP
        return shapes

    def vase(self, place, size):
        """Two cones, foot to foot."""
        height, radius = size * self.rng.uniform(0.3, 0.5), size * self.rng.uniform(0.15, 0.3)
        middle, narrow = place + height * UP, self.rng.uniform(0.2, 0.6)
        top = middle + height * self.rng.uniform(0.5, 1.2) * UP
        return [self.tube(middle, place, radius, narrow), self.tube(middle, top, radius, narrow)]

    def can(self, place, size):
        height, radius = size * self.rng.uniform(0.3, 1.0), size * self.rng.uniform(0.12, 0.4)
        top = place + height * UP
        lid = self.quad(top, [radius, 0, 0], [0, radius, 0], mask=textures.disc_mask())
        return [self.tube(place, top, radius, yaw=self.rng.uniform(0, 6)), lid]

    def stone(self, place, size):
        radii = size * self.rng.uniform(0.2, 0.5, 3)
        turn = tilted(self.rng, self.rng.uniform(0, 0.6)) @ turned(self.rng.uniform(0, 6))
        return [self.ball(place + 0.85 * radii[2] * UP, radii, turn)]

    def sheet(self, place, size):
        """A board that leans, at times with a torn outline."""
        rng = self.rng
        turn = turned(rng.uniform(-1.2, 1.2)) @ tilted(rng, abs(rng.normal(0, 0.45)))
        half = size * rng.uniform(0.25, 0.6, 2)
        middle = place + 1.02 * half[1] * UP
        mask = textures.blob_mask(rng) if rng.random() < 0.3 else None
        changes = {"mask": mask, "translucency": 0.2 * rng.random()}
        if rng.random() < 0.4:
            return [self.quad(middle, turn[:, 0] * half[0], -turn[:, 2] * half[1], self.whole_picture(**changes))]  # fmt: skip
        return [self.quad(middle, turn[:, 0] * half[0], -turn[:, 2] * half[1], **changes)]

    def bent_sheet(self, place, size):
        rng = self.rng
        radius, height = size * rng.uniform(0.3, 0.7), size * rng.uniform(0.5, 1.2)
        lean = tilted(rng, rng.normal(0, 0.25))[:, 2]
        return [self.tube(place, place + height * lean, radius, span=rng.uniform(0.5, 1.8), yaw=rng.uniform(0, 6))]  # fmt: skip

    def posts(self, place, size):
        """A few thin bars, upright, leaning or across."""
        rng, shapes = self.rng, []
        for _ in range(rng.integers(2, 7)):
            foot = place + size * np.append(rng.normal(0, 0.35, 2), 0)
            lean = tilted(rng, rng.normal(0, 0.3))[:, 2]
            radius = size * rng.choice([rng.uniform(0.005, 0.012), rng.uniform(0.015, 0.05)])
            shapes.append(self.tube(foot, foot + size * rng.uniform(0.6, 1.8) * lean, radius))
        return shapes

    def plant(self, place, size):
        """Leaves on stems that start at one place."""
        rng, shapes = self.rng, []
        looks = [self.material(0.3, 0.2, mask=textures.leaf_mask(), translucency=0.5) for _ in range(2)]  # fmt: skip
        for _ in range(rng.integers(4, 9)):
            aim = tilted(rng, abs(rng.normal(0.25, 0.35)))[:, 2]
            tip = place + size * rng.uniform(0.5, 1.2) * aim
            shapes.append(self.tube(place, tip, size * 0.008))
            for _ in range(rng.integers(3, 6)):
                middle = place + (tip - place) * rng.uniform(0.35, 1.05) + rng.normal(0, 0.05 * size, 3)  # fmt: skip
                turn = turned(rng.uniform(0, 6)) @ tilted(rng, rng.normal(0, 0.9))
                half = size * rng.uniform(0.07, 0.16)
                shapes.append(self.quad(middle, turn[:, 0] * half, turn[:, 1] * half * rng.uniform(0.3, 0.6), looks[rng.integers(2)]))  # fmt: skip
        return shapes

    def tree(self, place, size):
        """A stem and a crown of leafy pieces."""
        rng = self.rng
        top = place + size * np.array([rng.normal(0, 0.06), rng.normal(0, 0.06), 0.6])
        shapes = [self.tube(place, top, size * rng.uniform(0.03, 0.06), 0.4)]
        looks = [self.material(1.0, 1.0, mask=textures.blob_mask(rng), translucency=0.4) for _ in range(2)]  # fmt: skip
        for _ in range(rng.integers(14, 30)):
            middle = top + size * rng.normal(0, 1, 3) * [0.2, 0.2, 0.16]
            turn = turned(rng.uniform(0, 6)) @ tilted(rng, rng.uniform(0, 1.5))
            half = size * rng.uniform(0.06, 0.14)
            shapes.append(self.quad(middle, turn[:, 0] * half, turn[:, 1] * half, looks[rng.integers(2)]))  # fmt: skip
        return shapes

    def lattice(self, place, size):
        """A fence, a trellis, a window frame: what is behind shows through."""
        rng = self.rng
        turn, half = turned(rng.uniform(-0.9, 0.9)), size * rng.uniform(0.4, 0.9, 2)
        mask = textures.bars_mask(rng) if rng.random() < 0.5 else textures.lattice_mask(rng)
        return [self.quad(place + half[1] * UP, turn[:, 0] * half[0], -half[1] * UP, mask=mask)]

    def twigs(self, place, size):
        """Bare branches in two crossing planes."""
        shapes, half = [], size * self.rng.uniform(0.4, 0.8)
        for yaw in self.rng.uniform(0, 1.5) + np.array([0, np.pi / 2]):
            mask = textures.twig_mask(self.rng)
            shapes.append(self.quad(place + half * UP, turned(yaw)[:, 0] * half, -half * UP, mask=mask))  # fmt: skip
        return shapes

    def table(self, place, size):
        """A board on four legs, with small things on it."""
        rng = self.rng
        half = size * np.array([rng.uniform(0.5, 0.8), rng.uniform(0.35, 0.6), 0.02])
        height, turn = size * rng.uniform(0.5, 0.8), turned(rng.uniform(-0.5, 0.5))
        shapes = self.box(place + height * UP, half, turn, True)
        for x, y in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            foot = place + turn @ (half * [0.92 * x, 0.92 * y, 0])
            shapes.append(self.tube(foot, foot + height * UP, 0.02 * size))
        for _ in range(rng.integers(1, 5)):
            spot = turn @ (half * [*rng.uniform(-0.75, 0.75, 2), 0])
            shapes += self.small_thing(place + (height + half[2]) * UP + spot, size * rng.uniform(0.2, 0.4))  # fmt: skip
        return shapes

    def sign(self, place, size):
        """A picture on a post."""
        rng = self.rng
        top, turn = place + size * rng.uniform(1.0, 1.8) * UP, turned(rng.uniform(-0.6, 0.6))
        half = size * rng.uniform(0.2, 0.5, 2)
        board = self.quad(top - 0.02 * size * turn[:, 1], turn[:, 0] * half[0], -half[1] * UP, self.whole_picture())  # fmt: skip
        return [self.tube(place, top, 0.025 * size), board]


def _joined(material: Material) -> Material:
    """The material with a whole even number of pictures along u: mirrored ones then meet."""
    values = {**vars(material), "repeat": (2 * max(1, round(material.repeat[0] / 2)), material.repeat[1])}  # fmt: skip
    return Material(**values)
