"""What is on surfaces: pieces of photos, patterns and plain paint; and the outlines that masks cut out.

A texture is a picture with its mipmaps; positions in it are in pictures, (0, 0) its upper left corner, and beyond (1, 1) it goes on
mirrored, which joins without a seam.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from s2d.images import read_image, resize_image

MAX_PHOTO_SIDE = 1024  # of photos that textures are cut from, pixels
MASK_SIZE = 384
_ROW = 512  # remap takes pictures, not lists of positions: these are laid out in rows


class Texture:
    """A picture that can be looked up at any scale without aliasing."""

    def __init__(self, pixels: np.ndarray):  # [h, w, 3] uint8, sRGB
        self.levels = [np.ascontiguousarray(pixels)]
        while min(self.levels[-1].shape[:2]) > 2:
            height, width = self.levels[-1].shape[:2]
            size = (max(1, width // 2), max(1, height // 2))
            self.levels.append(cv2.resize(self.levels[-1], size, interpolation=cv2.INTER_AREA))

    @property
    def width(self) -> int:
        return self.levels[0].shape[1]

    @property
    def height(self) -> int:
        return self.levels[0].shape[0]

    def sample(self, uv: np.ndarray, texels: np.ndarray) -> np.ndarray:
        """Look colours up, trilinear.

        Args:
            uv: Positions in pictures. [N, 2] float32
            texels: How many of the full picture's pixels one look should average over, along an edge. [N]

        Returns:
            sRGB in [0, 1]. [N, 3] float32
        """
        uv = 1 - np.abs(1 - np.mod(uv, 2))  # mirrored
        level = np.clip(np.log2(np.maximum(texels, 1e-6)), 0, len(self.levels) - 1)
        whole = np.minimum(level.astype(np.int64), len(self.levels) - 2)
        share = (level - whole).astype(np.float32)[:, None]
        colours = np.empty((len(uv), 3), np.float32)
        for k in np.unique(whole):
            rows = np.flatnonzero(whole == k) if whole.min() != whole.max() else slice(None)
            fine, coarse = (look_up(self.levels[step], uv[rows]) for step in (k, k + 1))
            colours[rows] = (fine + (coarse - fine) * share[rows]) / 255
        return colours


def look_up(
    picture: np.ndarray,  # [h, w] or [h, w, C]
    uv: np.ndarray,  # [N, 2]
) -> np.ndarray:
    """Sample between pixel centres, bilinear; beyond the outermost centres the border goes on. [N] or [N, C] float32"""
    height, width = picture.shape[:2]
    rows = -(-len(uv) // _ROW)
    maps = np.zeros((2, rows * _ROW), np.float32)
    maps[0, : len(uv)] = uv[:, 0] * width - 0.5
    maps[1, : len(uv)] = uv[:, 1] * height - 0.5
    found = cv2.remap(
        picture,
        maps[0].reshape(rows, _ROW),
        maps[1].reshape(rows, _ROW),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return found.reshape(rows * _ROW, *picture.shape[2:])[: len(uv)].astype(np.float32)


# Colours are uint8 [h, w, 3] from here on.


@lru_cache(maxsize=24)
def _read_photo(path: Path) -> np.ndarray:
    photo = read_image(path)
    scale = min(1.0, MAX_PHOTO_SIDE / max(photo.shape[:2]))
    small = resize_image(photo, round(photo.shape[1] * scale), round(photo.shape[0] * scale))
    return np.rint(small.numpy() * 255).astype(np.uint8)


def photo_texture(rng: np.random.Generator, photos: Sequence[Path], share: float) -> Texture:
    """Cut a piece out of a random photo, turn it, and change its colours.

    Args:
        rng: Randomness.
        photos: Files to choose from.
        share: Of the photo's sides that the piece has, about.
    """
    photo = _read_photo(photos[rng.integers(len(photos))])
    height, width = photo.shape[:2]
    share_x, share_y = np.clip(share * rng.uniform(0.75, 1.3, 2), 0.08, 1.0)
    size_x, size_y = max(16, int(width * share_x)), max(16, int(height * share_y))
    x, y = rng.integers(0, width - size_x + 1), rng.integers(0, height - size_y + 1)
    piece = np.rot90(photo[y : y + size_y, x : x + size_x], rng.integers(4))
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    return Texture(recolour(rng, piece))


def recolour(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Change hue, saturation, contrast and brightness, mostly a little and at times a lot."""
    wild = rng.random() < 0.15
    hsv = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 0] = np.mod(hsv[..., 0] + rng.normal(0, 40 if wild else 6), 180)
    hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(0.5, 1.5), 0, 255)
    rgb = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB).astype(np.float32) / 255
    rgb = rgb ** rng.uniform(0.7, 1.4) * rng.uniform(0.75, 1.15) * rng.uniform(0.93, 1.07, 3)
    return np.clip(np.rint(rgb * 255), 0, 255).astype(np.uint8)


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """A colour of things: rather dull, seldom bright. [3] float32 in [0, 255]"""
    hsv = np.array([[[rng.uniform(0, 180), 255 * rng.beta(1.3, 2.2), rng.uniform(60, 235)]]])
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def noise(rng: np.random.Generator, size: int, coarsest: int, decay: float = 0.55) -> np.ndarray:
    """Smooth noise of several octaves, the first with `coarsest` cells along an edge. [size, size] in [0, 1]"""
    total, weight = np.zeros((size, size), np.float32), 1.0
    cells = coarsest
    while cells < size:
        grid = rng.random((cells, cells), dtype=np.float32)
        total += weight * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
        cells, weight = cells * 2, weight * decay
    return (total - total.min()) / max(float(np.ptp(total)), 1e-6)


def plain_texture(rng: np.random.Generator) -> Texture:
    """Paint: one colour, hardly uneven."""
    uneven = 1 + rng.uniform(0, 0.06) * (noise(rng, 64, 3)[..., None] - 0.5)
    return Texture(np.clip(random_colour(rng) * uneven, 0, 255).astype(np.uint8))


def pattern_texture(rng: np.random.Generator, size: int = 384) -> Texture:
    """Something made: marbled, striped, tiled, bricked, dotted or grained, with wear."""
    one, other, third = (random_colour(rng) for _ in range(3))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    wobble = noise(rng, size, 4) - 0.5
    kind = rng.integers(6)
    count = rng.integers(3, 12)
    if kind == 0:  # marbled
        share = noise(rng, size, rng.integers(3, 10), rng.uniform(0.5, 0.8))
    elif kind == 1:  # striped
        share = (np.mod((x + 0.1 * wobble) * count, 1) < rng.uniform(0.2, 0.8)).astype(np.float32)
    elif kind == 2:  # tiled
        tiles = rng.random((count, count), dtype=np.float32)
        share = cv2.resize(tiles, (size, size), interpolation=cv2.INTER_NEAREST)
    elif kind == 3:  # bricked
        line = np.floor(y * count)
        along = x * count / 2 + 0.5 * np.mod(line, 2)
        joint = (np.mod(along, 1) < 0.06) | (np.mod(y * count, 1) < 0.12)
        share = np.where(joint, 0, 0.6 + 0.4 * np.mod(np.sin(line * 12.9 + np.floor(along) * 78.2) * 43.7, 1)).astype(np.float32)  # fmt: skip
    elif kind == 4:  # dotted
        away = np.hypot(np.mod(x * count, 1) - 0.5, np.mod(y * count, 1) - 0.5)
        share = (away < rng.uniform(0.15, 0.4)).astype(np.float32)
    else:  # grained like wood
        grain = cv2.resize(noise(rng, size, 6), (size, size * 8))[: size * 8 : 8]
        share = np.mod((x * count + 1.5 * wobble + 0.2 * grain), 1)
    share = cv2.GaussianBlur(share, (0, 0), 0.6)[..., None]
    worn = noise(rng, size, 8, 0.75)[..., None]
    colour = one + (other - one) * share + (third - one) * 0.25 * worn
    colour *= 0.85 + 0.3 * noise(rng, size, 32, 0.9)[..., None]
    return Texture(np.clip(colour, 0, 255).astype(np.uint8))


def sky_texture(rng: np.random.Generator) -> Texture:
    """Sky from the zenith (top) to the horizon and below it (bottom), with some cloud."""
    size = 384
    zenith = np.array([70, 120, 200], np.float32) * rng.uniform(0.7, 1.2)
    horizon = np.array([200, 215, 230], np.float32) * rng.uniform(0.8, 1.08)
    height = np.linspace(0, 2, size, dtype=np.float32)[:, None, None].clip(0, 1)
    cloud = np.clip(noise(rng, size, 4)[..., None] * 2 - rng.uniform(0.6, 1.6), 0, 1)
    colour = (zenith + (horizon - zenith) * height**1.5) * (1 - cloud) + 240 * cloud
    return Texture(np.clip(colour, 0, 255).astype(np.uint8))


# Masks are bool [MASK_SIZE, MASK_SIZE] over uv.


def disc_mask() -> np.ndarray:
    """A disc that touches the edges."""
    y, x = (np.mgrid[0:MASK_SIZE, 0:MASK_SIZE] + 0.5) / MASK_SIZE * 2 - 1
    return x * x + y * y <= 1


def leaf_mask() -> np.ndarray:
    """A leaf, pointed at both ends of u."""
    y, x = (np.mgrid[0:MASK_SIZE, 0:MASK_SIZE] + 0.5) / MASK_SIZE * 2 - 1
    return np.abs(y) <= (1 - x * x) * (0.85 + 0.15 * x)


def blob_mask(rng: np.random.Generator) -> np.ndarray:
    """A torn, wavy outline."""
    y, x = (np.mgrid[0:MASK_SIZE, 0:MASK_SIZE] + 0.5) / MASK_SIZE * 2 - 1
    return x**4 + y**4 + 0.9 * (noise(rng, MASK_SIZE, 5) - 0.3) <= 0.75


def bars_mask(rng: np.random.Generator) -> np.ndarray:
    """A fence: bars along v, and two or three rails."""
    y, x = (np.mgrid[0:MASK_SIZE, 0:MASK_SIZE] + 0.5) / MASK_SIZE
    bars = np.mod(x * rng.integers(5, 16), 1) < rng.uniform(0.12, 0.5)
    rails = np.mod(y * rng.integers(2, 4) + 0.2, 1) < 0.12
    return bars | rails


def lattice_mask(rng: np.random.Generator) -> np.ndarray:
    """A grid: a window, a trellis or a net."""
    y, x = (np.mgrid[0:MASK_SIZE, 0:MASK_SIZE] + 0.5) / MASK_SIZE
    width, columns, rows = rng.uniform(0.08, 0.25), rng.integers(2, 10), rng.integers(2, 8)
    if rng.random() < 0.4:
        x, y = x + y, x - y
    return (np.mod(x * columns + width / 2, 1) < width) | (np.mod(y * rows + width / 2, 1) < width)


def twig_mask(rng: np.random.Generator) -> np.ndarray:
    """Bare branches that grow from the lower edge (v = 1)."""
    canvas = np.zeros((MASK_SIZE, MASK_SIZE), np.uint8)
    tips = [(MASK_SIZE / 2, MASK_SIZE, -np.pi / 2, 0.28 * MASK_SIZE, 9.0)]
    while tips:
        x, y, angle, length, width = tips.pop()
        end = (x + length * np.cos(angle), y + length * np.sin(angle))
        cv2.line(canvas, (int(x), int(y)), (int(end[0]), int(end[1])), 1, max(2, int(width)))
        if width > 2:
            for _ in range(rng.integers(2, 4)):
                tips.append((*end, angle + rng.normal(0, 0.5), length * rng.uniform(0.6, 0.9), width * 0.62))  # fmt: skip
    return canvas > 0
