"""Confidence of stage 0's depth: what it is made of, and that it says how often a depth is right."""

import copy

import numpy as np
import pytest
from synthetic_stereo import BACKGROUND, FOREGROUND, SLANTED, exact_planes, photograph, viewmat

from s2d.guidance.depth_filter import (
    COEFFICIENTS,
    FEATURES,
    RIGHT,
    Evidence,
    believable,
    features_of,
    gather_evidence,
    plane_support,
    probability,
    texture,
)

POSES = [
    viewmat((-0.5, 0.0, 0.0), 0.05),
    viewmat((0.0, 0.1, 0.1)),
    viewmat((0.5, -0.05, 0.0), -0.05),
]


def evidence(**changes: float) -> Evidence:
    """One pixel that much speaks for, with changes."""
    ordinary = {
        "cost": 0.1,
        "agree": 2.0,
        "through": 0.0,
        "angle": 0.1,
        "colour_error": 0.01,
        "depth_difference": 0.003,
        "support": 1.0,
        "texture": 0.08,
    }
    return Evidence(
        **{key: np.full((1, 1), value, np.float32) for key, value in (ordinary | changes).items()}
    )


def sure(**changes: float) -> float:
    return probability(features_of(evidence(**changes), 500.0)).item()


@pytest.mark.parametrize(
    "worse",
    [
        {"agree": 1.0},
        {"angle": 0.02},
        {"colour_error": 0.1},
        {"depth_difference": 0.015},
        {"support": 0.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_speaks_against_a_depth_lowers_its_confidence(worse):
    assert sure(**worse) < sure() - 0.005


def test_parallax_counts_in_pixels():
    """Twice the focal length makes up for half the angle: the same photo at another size is the same evidence."""
    near, far = (
        features_of(evidence(angle=angle), focal) for angle, focal in ((0.1, 400.0), (0.05, 800.0))
    )
    np.testing.assert_allclose(near, far, rtol=1e-6)


def test_probability_is_the_logistic_function_of_the_features():
    random = np.random.default_rng(0)
    features = random.normal(size=(5, len(FEATURES))).astype(np.float32)
    by_hand = [1 / (1 + np.exp(-float(np.dot(row, COEFFICIENTS)))) for row in features]
    np.testing.assert_allclose(probability(features), by_hand, atol=1e-6)
    assert probability(np.zeros((1, len(FEATURES)), np.float32)) == pytest.approx(0.5)


def test_support_of_exact_planes_and_of_a_naive_loop():
    view, depth = photograph(POSES[0], [SLANTED])
    planes = exact_planes(view, depth)
    assert (plane_support(planes)[8:-8, 8:-8] == 1).all()
    random = np.random.default_rng(1)
    planes[..., 0] *= random.uniform(0.98, 1.02, depth.shape).astype(np.float32)
    planes[random.uniform(size=depth.shape) < 0.2] = 0
    found = plane_support(planes)
    for x, y in ((20, 30), (71, 50), (150, 100)):
        votes = []
        for dy in (-3, 0, 3):
            for dx in (-3, 0, 3):
                if (dx, dy) != (0, 0):
                    w, gx, gy = planes[y + dy, x + dx]
                    own = planes[y, x, 0]
                    votes.append(w > 0 and abs(w - gx * dx - gy * dy - own) < 0.01 * own)
        assert found[y, x] == np.mean(votes)


def test_texture_is_the_standard_deviation_of_grey():
    view, _ = photograph(POSES[0], [SLANTED])
    found = texture(view.rgb)
    for x, y in ((20, 30), (71, 50), (150, 100)):
        patch = view.grey[y - 3 : y + 4, x - 3 : x + 4].astype(np.float64)
        # Measured 3e-7: the mean of squares minus the square of the mean, in float32.
        assert found[y, x] == pytest.approx(patch.std(), abs=1e-5)
    assert texture(np.full((20, 20, 3), 0.5, np.float32)).max() < 1e-3


def test_confidence_is_higher_where_depth_is_right():
    found = [photograph(pose, [BACKGROUND, FOREGROUND]) for pose in POSES]
    views, truths = [view for view, _ in found], [truth for _, truth in found]
    random = np.random.default_rng(2)
    for view, truth in zip(views, truths, strict=True):
        view.planes = exact_planes(view, truth)
        view.planes[..., 1:] = 0
        # Depth that is off by up to 6 % in blocks of 20 pixels.
        error = random.uniform(0.94, 1.06, (6, 8)).repeat(20, 0).repeat(20, 1)
        view.planes[..., 0] *= error.astype(np.float32)
    costs = [np.full((120, 160), 0.1, np.float32)] * 3
    before = [view.planes.copy() for view in views]
    confidences = believable(views, costs)
    assert all(
        np.array_equal(view.planes, planes) for view, planes in zip(views, before, strict=True)
    )
    right, wrong = [], []
    for view, truth, confidence in zip(views, truths, confidences, strict=True):
        error = np.abs(view.depth / truth - 1)
        right.append(confidence[error < RIGHT])
        wrong.append(confidence[error > 2 * RIGHT])
    # Measured 1.45: the blocks agree within themselves, so that much speaks for them.
    assert np.concatenate(right).mean() > 1.25 * np.concatenate(wrong).mean()


def test_evidence_of_a_reconstruction_is_within_its_ranges():
    found = [photograph(pose, [SLANTED]) for pose in POSES]
    views = [copy.deepcopy(view) for view, _ in found]
    for view, (_, truth) in zip(views, found, strict=True):
        view.planes = exact_planes(view, truth)
    for one in gather_evidence(views, [np.full((120, 160), 0.1, np.float32)] * 3):
        assert all(array.shape == (120, 160) and np.isfinite(array).all() for array in one)
        assert one.agree.max() <= 2 and one.support.max() <= 1 and one.colour_error.max() <= 1
