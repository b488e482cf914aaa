"""Mug, teapot, fruit basket and tea tin. Metres; the desk top is z = 0."""

import numpy as np
import prints
import textures
from parts import BRASS, Material, Part
from shapes import ball, box, box_faces, curve, join, lathe, quad, ring, tube

WIRE = Material((0.60, 0.45, 0.34), finish="metal", roughness=0.32)


def fruit_basket() -> list[Part]:
    """Thin copper wires round oranges, lemons and a lime."""
    levels = [(0.085, 0.010), (0.118, 0.042), (0.140, 0.082), (0.152, 0.120)]
    rings = [ring(r, z, 0.0022 if z < 0.12 else 0.0035) for r, z in levels]
    spokes = []
    for angle in np.arange(28) * 2 * np.pi / 28:
        path = curve(
            [(r * np.cos(angle), r * np.sin(angle), z) for r, z in [(0.02, 0.008), *levels]], 16
        )
        spokes.append(tube(path, 0.0014, 6, caps=False))
    foot = ring(0.075, 0.004, 0.003)
    orange = Material(
        texture=textures.citrus("orange", (248, 156, 40), (222, 104, 18)),
        finish="glazed",
        roughness=0.35,
    )
    lemon = Material(
        texture=textures.citrus("lemon", (250, 222, 84), (226, 180, 40)),
        finish="glazed",
        roughness=0.35,
    )
    lime = Material(
        texture=textures.citrus("lime", (136, 170, 60), (82, 124, 34)),
        finish="glazed",
        roughness=0.35,
    )

    def lemon_shape(points, _angle):
        return 1 - 0.18 * np.abs(points[..., 2] / 0.036) ** 3

    oranges = [
        (0.045, 0.035, 0.050, 20, 30),
        (-0.050, 0.030, 0.050, 75, -20),
        (0.0, -0.052, 0.052, 10, 140),
    ]
    lemons = [
        (0.068, -0.038, 0.088, 70, 20),
        (-0.062, -0.038, 0.092, 80, -65),
        (0.006, 0.062, 0.106, 85, 95),
    ]
    ball_orange, ball_lemon = ball(0.040), ball(0.031, lemon_shape)
    parts = [
        Part("basket", join(*rings, *spokes, foot), WIRE),
        Part(
            "oranges",
            join(*(ball_orange.moved((x, y, z), yaw, pitch) for x, y, z, pitch, yaw in oranges)),
            orange,
        ),
        Part(
            "lemons",
            join(*(ball_lemon.moved((x, y, z), yaw, pitch) for x, y, z, pitch, yaw in lemons)),
            lemon,
        ),
        Part("lime", ball(0.028).moved((0.004, 0.0, 0.098), 40, 50), lime),
    ]
    return [Part(p.name, p.mesh.moved((0.33, -0.15, 0.006)), p.material) for p in parts]


def mug() -> list[Part]:
    """A glazed mug with a painted band, half full of tea."""
    outside = [
        (0.0405, 0.094),
        *curve([(0.0415, 0.092), (0.042, 0.06), (0.041, 0.02), (0.036, 0.003)], 20),
        (0.030, 0.0),
    ]
    inside = [
        *curve([(0.0405, 0.094), (0.0390, 0.0945), (0.0380, 0.092)], 6),
        (0.0375, 0.05),
        (0.034, 0.012),
        (0.0, 0.01),
    ]
    handle = curve(
        [
            (0.040, 0, 0.078),
            (0.058, 0, 0.083),
            (0.074, 0, 0.062),
            (0.066, 0, 0.034),
            (0.040, 0, 0.022),
        ],
        40,
    )
    cream = Material((0.79, 0.73, 0.62), finish="glazed", roughness=0.12)
    tea = Material((0.16, 0.055, 0.012), finish="glazed", roughness=0.06)
    surface = lathe([(0.0, 0.0), (0.0376, 0.0)], 48).moved((0, 0, 0.078))
    parts = [
        Part(
            "mug",
            lathe(outside, 96),
            Material(texture=prints.mug_glaze(), finish="glazed", roughness=0.12),
        ),
        Part("mug inside", join(lathe(inside, 96), tube(handle, 0.0058, 14)), cream),
        Part("tea", surface, tea),
    ]
    return [Part(p.name, p.mesh.moved((0.035, -0.20, 0.0), -35), p.material) for p in parts]


def teapot() -> list[Part]:
    """Speckled enamel on a tiled trivet, with a spout, a bow handle and a knob."""
    body = curve(
        [
            (0.034, 0.128),
            (0.060, 0.118),
            (0.084, 0.085),
            (0.090, 0.055),
            (0.078, 0.022),
            (0.055, 0.004),
        ],
        48,
    )
    lid = curve(
        [(0.004, 0.147), (0.012, 0.1455), (0.030, 0.139), (0.037, 0.129), (0.036, 0.127)], 20
    )
    spout_path = curve(
        [(0.070, 0, 0.045), (0.105, 0, 0.060), (0.120, 0, 0.095), (0.142, 0, 0.122)], 30
    )
    spout = tube(spout_path, np.linspace(0.021, 0.0085, 30), 24)
    bow = curve([(-0.062, 0, 0.112), (-0.072, 0, 0.165), (-0.030, 0, 0.212), (0.030, 0, 0.212), (0.072, 0, 0.165), (0.062, 0, 0.112)], 60)  # fmt: skip
    enamel = Material(
        texture=textures.speckled("enamel", (38, 104, 118), (214, 226, 220), 512, 1024, 800),
        finish="glazed",
        roughness=0.1,
    )
    tile = box_faces((-0.095, -0.095, 0.0), (0.095, 0.095, 0.010))
    parts = [
        Part("teapot", join(lathe(body, 96), lathe(lid, 64), spout), enamel),
        Part("teapot rim", join(ring(0.0365, 0.1275, 0.0022), tube(bow, 0.0045, 12)), BRASS),
        Part(
            "teapot knob",
            ball(0.011, rows=16, segments=24).moved((0, 0, 0.156)),
            Material((0.05, 0.022, 0.01), finish="glazed"),
        ),
    ]
    parts = [Part(p.name, p.mesh.moved((0, 0, 0.010), 28), p.material) for p in parts]
    parts.append(
        Part(
            "trivet",
            join(tile["top"]),
            Material(texture=textures.tiles(512, 512, 3), finish="glazed", roughness=0.15),
        )
    )
    parts.append(
        Part(
            "trivet edge",
            join(*(tile[k] for k in ("left", "right", "front", "back"))),
            Material((0.55, 0.26, 0.15)),
        )
    )
    return [Part(p.name, p.mesh.moved((0.06, 0.13, 0.0), 12), p.material) for p in parts]


def tea_tin() -> list[Part]:
    """A box of tea with a printed label all round."""
    label = prints.tea_label()
    w, d, h = 0.052, 0.036, 0.125
    sides = [
        quad((-w, -d, h), (w, -d, h), (-w, -d, 0), u=(0.0, 0.5)),
        quad((w, -d, h), (w, d, h), (w, -d, 0), u=(0.42, 0.58)),
        quad((w, d, h), (-w, d, h), (w, d, 0), u=(0.5, 1.0)),
        quad((-w, d, h), (-w, -d, h), (-w, d, 0), u=(0.42, 0.58)),
    ]
    lid = join(box((-w - 0.001, -d - 0.001, h), (w + 0.001, d + 0.001, h + 0.014)))
    place = dict(translation=(0.60, -0.12, 0.0), yaw=-24)
    return [
        Part(
            "tea tin",
            join(*sides).moved(**place),
            Material(texture=label, finish="glazed", roughness=0.3),
        ),
        Part(
            "tea tin lid",
            lid.moved(**place),
            Material((0.62, 0.42, 0.16), finish="metal", roughness=0.3),
        ),
    ]
