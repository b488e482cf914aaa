"""The median over planes: what it must keep, what it must mend, and its definition written out."""

import native_build
import numpy as np
import pytest
from synthetic_stereo import SLANTED, exact_planes, photograph, viewmat

from s2d.guidance.kernels import View, smooth_planes
from s2d.guidance.mvs import SMOOTH_COLOUR, SMOOTH_REACH, SMOOTH_SPACING


def smooth(planes: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    view = View(160, 120, np.eye(3), np.eye(4), rgb=rgb, planes=planes)
    return smooth_planes(view, SMOOTH_REACH, SMOOTH_SPACING, SMOOTH_COLOUR)


@pytest.fixture(scope="module")
def wall() -> tuple[np.ndarray, np.ndarray]:
    """Exact planes of a slanted wall, and one colour for all of it."""
    view, depth = photograph(viewmat((0, 0, 0)), [SLANTED])
    return exact_planes(view, depth), np.full((120, 160, 3), 0.5, np.float32)


def test_a_plane_stays_as_it_is(wall):
    planes, rgb = wall
    found = smooth(planes, rgb)
    # Measured 5e-5: slopes are differences of float32 depths.
    assert np.abs(found[..., 0] / planes[..., 0] - 1).max() < 2e-4


def test_chance_matches_are_mended(wall):
    planes, rgb = wall
    random = np.random.default_rng(0)
    noisy = planes.copy()
    chance = random.uniform(size=(120, 160)) < 0.3
    noisy[chance, 0] *= random.uniform(0.7, 1.4, chance.sum()).astype(np.float32)
    error = np.abs(smooth(noisy, rgb)[..., 0] / planes[..., 0] - 1)
    assert (error > 0.005).mean() < 0.01  # before: 0.29


def test_a_step_of_depth_stays_where_the_colour_changes(wall):
    planes, rgb = (array.copy() for array in wall)
    planes[:, 80:] *= 1.5
    rgb[:, 80:] = 0.8
    found = smooth(planes, rgb)
    assert np.abs(found[..., 0] / planes[..., 0] - 1).max() < 2e-4


def test_holes_stay_and_do_not_count(wall):
    planes, rgb = (array.copy() for array in wall)
    planes[40:60, 50:70] = 0
    found = smooth(planes, rgb)
    assert not found[40:60, 50:70].any()
    kept = planes[..., 0] > 0
    assert np.abs(found[kept, 0] / planes[kept, 0] - 1).max() < 2e-4


def test_same_bits_with_any_number_of_threads(wall):
    random = np.random.default_rng(4)
    planes = wall[0] * random.uniform(0.9, 1.1, (120, 160, 1)).astype(np.float32)
    results = []
    for threads in (1, 3):
        native_build.set_num_threads(threads)
        try:
            results.append(smooth(planes, wall[1]))
        finally:
            native_build.set_num_threads(None)
    np.testing.assert_array_equal(*results)


def test_it_is_the_weighted_median(wall):
    random = np.random.default_rng(3)
    planes = wall[0] * random.uniform(0.9, 1.1, (120, 160, 1)).astype(np.float32)
    rgb = random.uniform(0.4, 0.6, (120, 160, 3)).astype(np.float32)
    found = smooth(planes, rgb)
    for x, y in ((0, 0), (31, 32), (80, 64), (159, 119)):
        votes = []
        for dy in range(-SMOOTH_REACH, SMOOTH_REACH + 1, SMOOTH_SPACING):
            for dx in range(-SMOOTH_REACH, SMOOTH_REACH + 1, SMOOTH_SPACING):
                u, v = x + dx, y + dy
                if 0 <= u < 160 and 0 <= v < 120:
                    w = planes[v, u, 0] - planes[v, u, 1] * dx - planes[v, u, 2] * dy
                    colour = np.abs(rgb[v, u] - rgb[y, x]).mean() / SMOOTH_COLOUR
                    near = np.exp(-(dx**2 + dy**2) / (2 * SMOOTH_REACH**2))
                    votes.append((w, near / (1 + colour**2) ** 2, planes[v, u, 1:]))
        votes.sort(key=lambda vote: vote[0])
        below, half = 0.0, sum(weight for _, weight, _ in votes) / 2
        for w, weight, slopes in votes:
            below += weight
            if below >= half:
                assert found[y, x, 0] == pytest.approx(w, rel=1e-6)
                np.testing.assert_array_equal(found[y, x, 1:], slopes)
                break
