"""Procedural textures of the demo scene: numpy and OpenCV only, nothing downloaded.

Every function returns an sRGB image, uint8 [H, W, 3], row 0 at the top, and is a pure function of its arguments: its
random generator is seeded by its own name, so that changing one texture leaves the others alone.
"""

import itertools
import zlib

import cv2
import numpy as np


def seeded(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def fractal_noise(rng, height, width, cells=(4, 4), octaves=5, persistence=0.55):
    """Sum of smoothly enlarged random grids, normalised to [0, 1]. cells: the coarsest grid, (rows, columns)."""
    total = np.zeros((height, width), np.float32)
    amplitude = 1.0
    for octave in range(octaves):
        rows = min(cells[0] * 2**octave + 1, height)
        cols = min(cells[1] * 2**octave + 1, width)
        grid = rng.random((rows, cols), dtype=np.float32) - 0.5
        total += amplitude * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        amplitude *= persistence
    return (total - total.min()) / (total.max() - total.min())


def mix(low, high, t):
    """Blend two colours (0-255) by t [H, W] in [0, 1]. Returns float [H, W, 3]."""
    t = t[..., None]
    return np.asarray(low, np.float32) * (1 - t) + np.asarray(high, np.float32) * t


def as_uint8(image):
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


# wood, stone, ground ---------------------------------------------------------------------------------------------


def wood(name, height=1024, width=1024, planks=5, light=(190, 140, 92), dark=(118, 74, 40), gap=2):
    """Planks that run along the width, each with its own grain, tint and, here and there, a knot."""
    rng = seeded(f"wood {name}")
    image = np.zeros((height, width, 3), np.float32)
    edges = np.linspace(0, height, planks + 1).astype(int)
    for top, bottom in itertools.pairwise(edges):
        rows = bottom - top
        yy, xx = np.mgrid[0:rows, 0:width].astype(np.float32)
        warp = fractal_noise(rng, rows, width, (1, 5), 4) * 1.1
        rings = yy / rows * rng.uniform(2.0, 4.0) + warp * rng.uniform(2.0, 3.5)
        for _ in range(rng.integers(0, 3)):
            knot_x, knot_y = rng.uniform(0, width), rng.uniform(0.2, 0.8) * rows
            distance = np.hypot((xx - knot_x) / 3.5, yy - knot_y)
            rings += 2.2 * np.exp(-distance / (rows * 0.10))
        grain = 0.5 + 0.5 * np.sin(2 * np.pi * rings)
        fibres = fractal_noise(rng, rows, width, (rows // 6 + 1, 6), 3, 0.7)
        streaks = fractal_noise(rng, rows, width, (rows // 2 + 1, 10), 2, 0.8)
        tone = (
            0.20 * grain
            + 0.32 * fibres
            + 0.26 * streaks
            + 0.22 * fractal_noise(rng, rows, width, (2, 3), 3)
        )
        plank = mix(dark, light, np.clip(1.9 * (tone - 0.5) + 0.5 + rng.uniform(-0.12, 0.12), 0, 1))
        if gap:
            plank[:gap] *= 0.45
        image[top:bottom] = plank
    return as_uint8(image)


def plaster(name, colour, height=512, width=512, strength=0.05):
    """Nearly plain wall paint: what stereo cannot match."""
    rng = seeded(f"plaster {name}")
    tone = 1 + strength * (fractal_noise(rng, height, width, (3, 3), 7, 0.7) - 0.5)
    return as_uint8(np.asarray(colour, np.float32) * tone[..., None])


def speckled(name, base, spots, height=512, width=1024, count=900, radius=(1, 3)):
    """A glaze with spots."""
    rng = seeded(f"speckled {name}")
    tone = 0.94 + 0.10 * fractal_noise(rng, height, width, (2, 4), 4)
    image = as_uint8(np.asarray(base, np.float32) * tone[..., None])
    for _ in range(count):
        center = (int(rng.uniform(0, width)), int(rng.uniform(0, height)))
        cv2.circle(
            image, center, int(rng.integers(radius[0], radius[1] + 1)), spots, -1, cv2.LINE_AA
        )
    return image


def terracotta(height=512, width=1024):
    rng = seeded("terracotta")
    tone = fractal_noise(rng, height, width, (3, 6), 6, 0.65)
    rows = fractal_noise(rng, height, width, (60, 1), 2)
    image = mix((150, 78, 50), (214, 136, 98), np.clip(0.7 * tone + 0.3 * rows, 0, 1))
    lime = np.clip(fractal_noise(rng, height, width, (4, 8), 6, 0.7) - 0.62, 0, 1) * 2.5
    return as_uint8(image * (1 - lime[..., None]) + np.float32((224, 206, 188)) * lime[..., None])


def soil():
    rng = seeded("soil")
    return as_uint8(mix((28, 18, 12), (92, 66, 46), fractal_noise(rng, 256, 256, (24, 24), 4, 0.8)))


def tiles(height=512, width=512, count=4):
    """Painted tiles with a star in each, for the trivet and the window sill."""
    rng = seeded("tiles")
    image = np.full((height, width, 3), (236, 230, 216), np.uint8)
    size = height // count
    for row in range(count):
        for col in range(width // size):
            cx, cy = int((col + 0.5) * size), int((row + 0.5) * size)
            blue = tuple(int(c) for c in np.float32((38, 82, 140)) * rng.uniform(0.85, 1.15))
            angles = np.arange(16) * np.pi / 8
            radii = np.where(np.arange(16) % 2, 0.16, 0.42) * size
            star = np.stack([cx + radii * np.cos(angles), cy + radii * np.sin(angles)], -1)
            cv2.fillPoly(image, [star.astype(np.int32)], blue, cv2.LINE_AA)
            cv2.circle(image, (cx, cy), size // 12, (226, 168, 60), -1, cv2.LINE_AA)
            for sx in (-1, 1):
                for sy in (-1, 1):
                    corner = (cx + sx * size // 2, cy + sy * size // 2)
                    cv2.circle(image, corner, size // 5, (190, 92, 58), 2, cv2.LINE_AA)
            cv2.rectangle(
                image,
                (cx - size // 2, cy - size // 2),
                (cx + size // 2, cy + size // 2),
                (150, 144, 132),
                2,
            )
    return image


# fabric ----------------------------------------------------------------------------------------------------------


def _weave(rng, height, width, period=4):
    """Brightness of over-and-under threads, [H, W] around 1."""
    yy, xx = np.mgrid[0:height, 0:width]
    over = ((xx // period + yy // period) % 2).astype(np.float32)
    threads = 0.86 + 0.14 * over
    uneven = fractal_noise(rng, height, width, (height // 8, 2), 2) + fractal_noise(
        rng, height, width, (2, width // 8), 2
    )
    return threads * (0.90 + 0.10 * uneven)


def gingham(height=1024, width=1024, checks=14, colour=(176, 44, 42)):
    """A checked kitchen cloth with a border stripe."""
    rng = seeded("gingham")
    cols = (np.arange(width) * checks // width) % 2
    rows = (np.arange(height) * checks // height) % 2
    share = (cols[None] + rows[:, None]) / 2.0
    image = mix((240, 234, 222), colour, share.astype(np.float32))
    for inset in (20, 44):
        for edge in (inset, height - inset - 6):
            image[edge : edge + 6] = (60, 70, 110)
        for edge in (inset, width - inset - 6):
            image[:, edge : edge + 6] = (60, 70, 110)
    return as_uint8(image * _weave(rng, height, width)[..., None])


def linen_print(height=1024, width=1024):
    """The curtain: sprigs of leaves printed on linen."""
    rng = seeded("linen print")
    image = np.full((height, width, 3), (232, 222, 200), np.uint8)
    step = 128
    for row in range(-1, height // step + 1):
        for col in range(-1, width // step + 1):
            x = (col + 0.5 + 0.5 * (row % 2)) * step + rng.uniform(-8, 8)
            y = (row + 0.5) * step + rng.uniform(-8, 8)
            green = tuple(int(c) for c in np.float32((92, 122, 84)) * rng.uniform(0.8, 1.2))
            sprig(image, x, y, rng.uniform(-0.5, 0.5), 44, green)
            cv2.circle(image, (int(x + 30), int(y - 34)), 9, (206, 110, 80), -1, cv2.LINE_AA)
            cv2.circle(image, (int(x + 30), int(y - 34)), 4, (240, 200, 110), -1, cv2.LINE_AA)
    return as_uint8(image * _weave(rng, height, width, 3)[..., None])


def sprig(image, x, y, lean, size, colour):
    """A stem with four pairs of leaves; grows upwards from (x, y + size)."""
    stem = np.array([x + np.sin(lean) * size * 2, y - size])
    root = np.array([x, y + size])
    cv2.line(image, root.astype(int).tolist(), stem.astype(int).tolist(), colour, 2, cv2.LINE_AA)
    for k in range(1, 5):
        base = root + (stem - root) * k / 5
        for side in (-1, 1):
            center = base + np.array([side * size * 0.28, -size * 0.14])
            angle = float(np.degrees(lean)) - side * 28
            axes = (int(size * 0.28), int(size * 0.11))
            cv2.ellipse(
                image, center.astype(int).tolist(), axes, angle, 0, 360, colour, -1, cv2.LINE_AA
            )


def rug(height=1024, width=1024):
    """Concentric borders and diamonds in wool colours."""
    rng = seeded("rug")
    palette = np.float32(
        [(120, 36, 38), (212, 176, 120), (44, 62, 92), (168, 74, 48), (226, 210, 180)]
    )
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    border = np.minimum(np.minimum(xx, width - 1 - xx), np.minimum(yy, height - 1 - yy))
    index = (border // 36).astype(int) % 5
    field = border > 180
    diamonds = ((np.abs((xx % 128) - 64) + np.abs((yy % 128) - 64)) // 22).astype(int) % 5
    image = palette[np.where(field, diamonds, index)]
    zigzag = (np.abs((xx + yy) % 64 - 32) < 9) & (border > 72) & (border < 108)
    image[zigzag] = palette[4]
    return as_uint8(image * _weave(rng, height, width, 3)[..., None] * 0.9)


def wallpaper(height=1024, width=1024):
    """Quiet leaves, tone in tone, for the side wall."""
    rng = seeded("wallpaper")
    image = np.full((height, width, 3), (206, 208, 190), np.uint8)
    step = 102.4
    for row in range(-1, 11):
        for col in range(-1, 11):
            x, y = (col + 0.5 * (row % 2) + 0.5) * step, (row + 0.5) * step
            sprig(image, x, y, 0.35 if row % 2 else -0.35, 36, (182, 190, 166))
    tone = 1 + 0.06 * (fractal_noise(rng, height, width, (2, 2), 6) - 0.5)
    return as_uint8(image * tone[..., None])


# plants and fruit ------------------------------------------------------------------------------------------------


def leaf(name="leaf", light=(120, 168, 70), dark=(42, 96, 44), height=256, width=512):
    """One leaf, base at the left, tip at the right; the mesh gives the outline."""
    rng = seeded(name)
    tone = fractal_noise(rng, height, width, (3, 5), 5, 0.6)
    image = as_uint8(mix(dark, light, 0.15 + 0.6 * tone))
    vein = tuple(int(c) for c in np.minimum(np.float32(light) * 1.35, 255))
    middle = height // 2
    cv2.line(image, (0, middle), (width, middle), vein, 6, cv2.LINE_AA)
    for x in range(20, width - 40, 44):
        for side in (-1, 1):
            cv2.line(image, (x, middle), (x + 80, middle + side * middle), vein, 2, cv2.LINE_AA)
    return image


def citrus(name, light, dark, height=256, width=512):
    """Peel with pores; v = 0 is the stalk."""
    rng = seeded(f"citrus {name}")
    tone = 0.7 * fractal_noise(rng, height, width, (3, 6), 4) + 0.3 * fractal_noise(
        rng, height, width, (60, 120), 1
    )
    image = mix(dark, light, np.clip(1.3 * tone - 0.1, 0, 1))
    stalk = np.exp(-((np.arange(height) / (0.05 * height)) ** 2))[:, None, None].astype(np.float32)
    return as_uint8(image * (1 - stalk) + np.float32((92, 104, 50)) * stalk)


def foliage(name, light, dark, leaves=0, size=10, height=1024, width=1024):
    """Green seen from afar; with `leaves`, that many dabs of `size` pixels, the lit ones on top of the shaded ones."""
    rng = seeded(f"foliage {name}")
    tone = 0.6 * fractal_noise(rng, height, width, (24, 24), 4, 0.75) + 0.4 * fractal_noise(
        rng, height, width, (3, 3), 3
    )
    image = as_uint8(mix(dark, light, np.clip(2.0 * (tone - 0.5) + (0.2 if leaves else 0.5), 0, 1)))
    places = np.stack([rng.uniform(0, width, leaves), rng.uniform(0, height, leaves)], -1).astype(
        int
    )
    clump = tone[places[:, 1], places[:, 0]] if leaves else tone[:0, 0]
    brightness = np.clip(2.2 * (clump - 0.5) + 0.5 + rng.normal(0, 0.18, leaves), 0, 1)
    for k in np.argsort(brightness):
        colour = np.float32(dark) * (1 - brightness[k]) + np.float32(light) * brightness[k]
        axes = (max(2, int(size * rng.uniform(0.6, 1.1))), max(1, int(size * 0.42)))
        cv2.ellipse(
            image,
            places[k].tolist(),
            axes,
            rng.uniform(0, 180),
            0,
            360,
            colour.tolist(),
            -1,
            cv2.LINE_AA,
        )
    return image


def sky(height=512, width=1024, sun=None, sun_radiance=0.0):
    """The environment of the scene, linear radiance, float32 [H, W, 3], latitude (row) by longitude (column).

    The half behind the window wall is a sky with clouds over a far tree line; the half behind the photographer is what a
    white room sends back; `sun` [3] is the direction to a disc of 1.2 degrees, to which `sun_radiance` is added.
    """
    rng = seeded("sky")
    direction = environment_directions(height, width)
    up = direction[..., 2]
    clouds = np.clip(fractal_noise(rng, height, width, (6, 8), 6, 0.55) * 2.6 - 1.25, 0, 1)[
        ..., None
    ]
    blend = np.clip(up * 2.2, 0, 1)[..., None]
    outside = np.float32((0.95, 1.15, 1.35)) * (1 - blend) + np.float32((0.50, 0.80, 1.4)) * blend
    outside = outside * (1 - 0.75 * clouds) + np.float32((1.9, 1.85, 1.8)) * 0.75 * clouds
    outside = np.where(up[..., None] < 0, np.float32((0.16, 0.2, 0.1)), outside)
    inside = np.float32((0.80, 0.74, 0.66)) * (0.75 + 0.5 * np.clip(up, -0.6, 1.0))[..., None]
    share = 1 / (1 + np.exp(-14 * direction[..., 1:2]))
    image = outside * share + inside * (1 - share)
    if sun is not None:
        sun = np.asarray(sun, np.float32) / np.linalg.norm(sun)
        image[direction @ sun > np.cos(np.radians(1.2))] += (
            np.float32((1.0, 0.84, 0.62)) * sun_radiance
        )
    return image.astype(np.float32)


def environment_directions(height, width):
    """World direction (z up) of each pixel of the environment, float32 [H, W, 3]; column 0 looks along -y... +x."""
    theta = (np.arange(height, dtype=np.float32) + 0.5) / height * np.pi
    phi = (np.arange(width, dtype=np.float32) + 0.5) / width * 2 * np.pi
    theta, phi = np.meshgrid(theta, phi, indexing="ij")
    # Mitsuba's map has y up and looks along (sin phi, cos theta, -cos phi); the scene turns it by +90 degrees about x.
    return np.stack([np.sin(theta) * np.sin(phi), np.sin(theta) * np.cos(phi), np.cos(theta)], -1)
