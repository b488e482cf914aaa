"""Plants in pots, trees and shrubs: stems are thin tubes, every leaf is a mesh."""

import numpy as np
import textures
from parts import Material, Part
from shapes import curve, join, lathe, leaf_blade, tube

GROUND = -1.04  # the lawn outside, metres below the desk top


def plant(name, place, pot_radius, stems, length, width, spread, seed, texture) -> list[Part]:
    """A pot with arching stems, each with leaves in turn and one at its end."""
    rng = np.random.default_rng(seed)
    r = pot_radius
    height = 1.75 * r
    pot = lathe([(0.90 * r, height - 0.004), (r, height), (1.06 * r, height - 0.004), (1.06 * r, 0.78 * height), (0.98 * r, 0.76 * height), (0.72 * r, 0.0)], 64)  # fmt: skip
    inner = lathe([(0.88 * r, 0.86 * height), (0.90 * r, height)], 48)
    earth = lathe([(0.0, 0.88 * height), (0.89 * r, 0.86 * height)], 48)
    saucer = lathe([(1.02 * r, 0.014), (1.05 * r, 0.016), (1.08 * r, 0.014), (0.95 * r, 0.0)], 48)
    stalks, blades = [], []
    for k in range(stems):
        azimuth = 2 * np.pi * (k + rng.uniform(-0.3, 0.3)) / stems
        out = np.array((np.cos(azimuth), np.sin(azimuth), 0.0))
        reach = spread * rng.uniform(0.35, 1.0)
        rise = length * rng.uniform(0.65, 1.15)
        root = 0.35 * r * out + (0, 0, 0.86 * height)
        path = curve([root, root + 0.25 * reach * out + (0, 0, 0.5 * rise), root + 0.65 * reach * out + (0, 0, 0.85 * rise), root + reach * out + (0, 0, rise)], 24)  # fmt: skip
        stalks.append(tube(path, np.linspace(0.0032, 0.0014, 24), 8))
        for turn, at in enumerate(np.linspace(8, 23, 6).astype(int)):
            side = 0.0 if at == 23 else (55 if turn % 2 else -55)
            size = rng.uniform(0.75, 1.1) * (0.75 if at < 12 else 1.0)
            blade = leaf_blade(width * 2.6 * size, width * size, rng.uniform(0.4, 1.3))
            yaw = np.degrees(azimuth) + side + rng.uniform(-15, 15)
            blades.append(blade.moved(path[at], yaw, rng.uniform(-25, 25), -rng.uniform(10, 45)))
    clay = Material(texture=textures.terracotta())
    parts = [
        Part(f"{name} pot", join(pot, inner, saucer), clay),
        Part(f"{name} earth", earth, Material(texture=textures.soil())),
        Part(f"{name} stems", join(*stalks), Material((0.16, 0.22, 0.07))),
        Part(
            f"{name} leaves",
            join(*blades),
            Material(texture=texture, finish="thin", roughness=0.35),
        ),
    ]
    return [Part(p.name, p.mesh.moved(place), p.material) for p in parts]


def tree(place, height, count, rng, name, light, dark) -> list[Part]:
    """A trunk with boughs and a crown of leaves in clumps."""
    root = np.array((*place, GROUND))
    crown = root + np.array((0, 0, height))
    trunk = tube(
        curve([root, root + np.array((0.06, 0, 0.5 * height)), crown], 16),
        np.linspace(0.10, 0.05, 16),
        12,
    )
    boughs, centers = [], []
    for _ in range(16):
        tip = crown + rng.normal(0, 1, 3) * (0.55, 0.55, 0.38) + (0, 0, 0.25)
        boughs.append(
            tube(
                curve([crown - (0, 0, 0.35), (crown + tip) / 2 + (0, 0, 0.06), tip], 8),
                np.linspace(0.03, 0.008, 8),
                6,
            )
        )
        centers.append(tip + rng.normal(0, 0.17, (count // 16, 3)))
    bark = Material(texture=textures.wood("bark", 256, 256, 6, (120, 96, 76), (60, 46, 36), 2))
    return [
        Part(f"{name} wood", join(trunk, *boughs), bark),
        _leaves(np.concatenate(centers), 0.13, rng, name, light, dark),
    ]


def shrub(place, radius, count, rng, name, light, dark) -> list[Part]:
    """A dome of leaves."""
    direction = rng.normal(0, 1, (count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    centers = direction * radius * rng.uniform(0.75, 1.05, (count, 1)) * (1.1, 1.0, 1.15)
    return [
        _leaves(centers + np.array((*place, GROUND + 0.6 * radius)), 0.085, rng, name, light, dark)
    ]


def _leaves(centers, size, rng, name, light, dark) -> Part:
    blades = []
    for center in centers:
        blade = leaf_blade(size * rng.uniform(0.7, 1.3), size * 0.55, 0.6, rows=3, cols=5)
        blades.append(
            blade.moved(center, rng.uniform(0, 360), rng.uniform(-60, 60), rng.uniform(-50, 50))
        )
    return Part(
        f"{name} leaves",
        join(*blades),
        Material(
            texture=textures.foliage(name, light, dark, 0, 8, 128, 128),
            finish="thin",
            roughness=0.6,
        ),
    )
