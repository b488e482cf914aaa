"""Photos with exactly known depth for the tests of stage 0: textured rectangles, ray-cast in numpy, four samples per pixel."""

from typing import NamedTuple

import numpy as np

from s2d.guidance.kernels import View


class Rectangle(NamedTuple):
    """A textured parallelogram corner + a * u + b * v, 0 <= a, b <= 1."""

    corner: tuple[float, float, float]
    u: tuple[float, float, float]
    v: tuple[float, float, float]
    texture: int  # seed


BACKGROUND = Rectangle((-4, -3, 6), (8, 0, 0), (0, 6, 0), 1)
SLANTED = Rectangle(
    (-4, -4, 3), (11, 0, 6.6), (0, 9, 0.8), 2
)  # turned by about 31 degrees, tilted a little; fills the pictures
FOREGROUND = Rectangle((-0.7, -0.6, 3.0), (1.4, 0, 0), (0, 1.2, 0), 3)


def texture(seed: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A smooth random pattern of about 6 to 60 waves per unit, different in each channel. [..., 3] in [0, 1]"""
    random = np.random.default_rng(seed)
    colour = np.zeros((*a.shape, 3))
    for _ in range(24):
        frequency, angle = random.uniform(6, 60), random.uniform(0, 2 * np.pi)
        wave = np.sin(
            frequency * (np.cos(angle) * a + np.sin(angle) * b) + random.uniform(0, 2 * np.pi)
        )
        colour += wave[..., None] * random.uniform(0.3, 1.0, 3)
    return 0.5 + 0.5 * np.tanh(colour / 3.5)


def viewmat(center: tuple[float, float, float], yaw: float = 0.0) -> np.ndarray:
    """A camera at `center` that looks along +z, turned by `yaw` radians about the vertical axis."""
    rotation = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
    result = np.eye(4)
    result[:3, :3] = rotation
    result[:3, 3] = -rotation @ np.array(center)
    return result


def cast(
    K: np.ndarray, pose: np.ndarray, xy: np.ndarray, rectangles: list[Rectangle]
) -> tuple[np.ndarray, np.ndarray]:
    """Colour [..., 3] and depth [...] (0: nothing hit) along the rays through pixel positions [..., 2]."""
    rays = np.concatenate([xy, np.ones((*xy.shape[:-1], 1))], -1) @ np.linalg.inv(K).T  # z = 1
    origin, directions = -pose[:3, :3].T @ pose[:3, 3], rays @ pose[:3, :3]
    depth, colour = np.full(xy.shape[:-1], np.inf), np.zeros((*xy.shape[:-1], 3))
    for corner, u, v, seed in rectangles:
        # origin + t d = corner + a u + b v
        system = np.stack(
            [*np.broadcast_arrays(np.array(u, float), np.array(v, float), -directions)], -1
        )
        a, b, t = np.linalg.solve(
            system, np.broadcast_to(origin - np.array(corner), directions.shape)[..., None]
        )[..., 0].transpose(-1, *range(xy.ndim - 1))
        hit = (a >= 0) & (a <= 1) & (b >= 0) & (b <= 1) & (t > 1e-6) & (t < depth)
        colour[hit] = texture(seed, a[hit] * np.linalg.norm(u) / 4, b[hit] * np.linalg.norm(v) / 4)
        depth[hit] = t[hit]
    return colour, np.where(np.isfinite(depth), depth, 0)


def photograph(
    pose: np.ndarray, rectangles: list[Rectangle], width: int = 160, height: int = 120
) -> tuple[View, np.ndarray]:
    """A view with rgb and grey, 8-bit as photos are, and its exact depth at the pixel centres. [H, W]"""
    K = np.array([[150.0, 0, width / 2 + 3.3], [0, 152.0, height / 2 - 2.1], [0, 0, 1]])
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(float)
    samples = [
        cast(K, pose, grid + offset, rectangles)[0]
        for offset in ([0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75])
    ]
    rgb = (np.round(np.mean(samples, 0) * 255) / 255).astype(np.float32)
    grey = np.ascontiguousarray(rgb @ np.array([0.299, 0.587, 0.114], np.float32))
    return View(width, height, K, pose, rgb=rgb, grey=grey), cast(K, pose, grid + 0.5, rectangles)[
        1
    ]


def exact_planes(view: View, depth: np.ndarray) -> np.ndarray:
    """Planes of a view whose inverse depth is linear in the pixel, as on one rectangle: slopes by central differences. [H, W, 3]"""
    inverse = np.divide(1.0, depth, out=np.zeros_like(depth), where=depth > 0)
    slope_y, slope_x = np.gradient(inverse)
    return np.ascontiguousarray(np.stack([inverse, slope_x, slope_y], -1), np.float32)
