"""Multi-view stereo against scenes whose depth is known exactly."""

import copy
from pathlib import Path

import cv2
import native_build
import numpy as np
import pytest
import torch
from synthetic_stereo import BACKGROUND, FOREGROUND, SLANTED, exact_planes, photograph, viewmat

from s2d.cameras import Cameras
from s2d.guidance import mvs
from s2d.guidance.depth_filter import (
    CONTINUED_CONFIDENCE,
    believable,
    continue_planes,
    without_speckles,
)
from s2d.guidance.kernels import View, check_consistency, fuse, patchmatch
from s2d.guidance.matches import fundamental, match_sparse
from s2d.scene import Scene

POSES = [
    viewmat((-0.5, 0.0, 0.0), 0.05),
    viewmat((0.0, 0.1, 0.1)),
    viewmat((0.5, -0.05, 0.0), -0.05),
]


def as_scene(views: list[View]) -> Scene:
    """A scene of photos that exist in memory only."""
    names = tuple(f"{row}.png" for row in range(len(views)))
    cameras = Cameras(
        torch.tensor(np.stack([view.viewmat for view in views])),
        torch.tensor(np.stack([view.K for view in views])),
        tuple((view.width, view.height) for view in views),
        names,
    )
    photos = {name: torch.from_numpy(view.rgb) for name, view in zip(names, views, strict=True)}
    return Scene("synthetic", cameras, tuple(Path(name) for name in names), None, photos)


@pytest.fixture(scope="module")
def slanted() -> tuple[list[View], list[np.ndarray]]:
    return tuple(map(list, zip(*(photograph(pose, [SLANTED]) for pose in POSES), strict=True)))


@pytest.fixture(scope="module")
def occluded() -> tuple[list[View], list[np.ndarray]]:
    return tuple(
        map(list, zip(*(photograph(pose, [BACKGROUND, FOREGROUND]) for pose in POSES), strict=True))
    )


def errors(
    found: mvs.Reconstruction, truths: list[np.ndarray], margin: int = 0
) -> tuple[float, float, float]:
    """Median relative error, share of pixels with a depth, share of those that are off by more than 2 %; `margin` pixels
    beside edges of the true depth left out.
    """
    depth = np.stack([depth_map.depth for depth_map in found.depth_maps.values()])
    truth = np.stack(truths)
    counted = np.ones(truth.shape, bool)
    if margin:
        kernel = np.ones((2 * margin + 1, 2 * margin + 1))
        counted = np.stack(
            [cv2.dilate(one, kernel) < 1.1 * cv2.erode(one, kernel) for one in truth]
        )
    has_depth = (depth > 0) & counted
    relative = np.abs(depth - truth)[has_depth] / truth[has_depth]
    return (
        float(np.median(relative)),
        float(has_depth.sum() / counted.sum()),
        float((relative > 0.02).mean()),
    )


def test_slanted_plane(slanted):
    views, truths = slanted
    median, complete, wrong = errors(mvs.reconstruct(as_scene(views)), truths)
    assert median < 0.001  # measured 0.00040
    assert complete > 0.94  # measured 0.968; the rest is at the borders, where one photo sees it
    assert wrong < 0.004  # measured 0.0008


def test_occluding_foreground(occluded):
    views, truths = occluded
    found = mvs.reconstruct(as_scene(views))
    median, complete, wrong = errors(found, truths)
    assert median < 0.0015  # measured 0.0007
    assert complete > 0.88  # measured 0.925
    assert wrong < 0.024  # measured 0.016: patches that hold an edge
    _, complete, wrong = errors(found, truths, margin=5)
    assert complete > 0.9  # measured 0.942
    assert wrong < 0.012  # measured 0.0066


def test_exposure_does_not_matter(slanted):
    views, truths = copy.deepcopy(slanted)
    for view, gain in zip(views, (1.0, 0.6, 0.8), strict=True):
        view.rgb *= gain
        view.grey *= gain
    median, complete, wrong = errors(mvs.reconstruct(as_scene(views)), truths)
    assert median < 0.001  # measured 0.00043
    assert complete > 0.94  # measured 0.968
    assert wrong < 0.006  # measured 0.0005


def test_same_bits_with_any_number_of_threads_and_other_bits_with_another_seed(occluded):
    views, _ = occluded

    def run(threads: int, seed: int) -> mvs.Reconstruction:
        native_build.set_num_threads(threads)
        try:
            return mvs.reconstruct(as_scene(copy.deepcopy(views)), seed)
        finally:
            native_build.set_num_threads(None)

    one, three, other = run(1, 0), run(3, 0), run(3, 1)
    assert torch.equal(one.cloud.points, three.cloud.points)
    assert torch.equal(one.cloud.rgbs, three.cloud.rgbs)
    assert torch.equal(one.cloud.confidence, three.cloud.confidence)
    for name, depth_map in one.depth_maps.items():
        assert np.array_equal(depth_map.depth, three.depth_maps[name].depth)
    assert not np.array_equal(one.depth_maps["0.png"].depth, other.depth_maps["0.png"].depth)


def test_photos_without_a_common_surface_are_an_error():
    left, _ = photograph(viewmat((0, 0, 0), 1.4), [BACKGROUND])
    right, _ = photograph(viewmat((0, 0, 0), -1.4), [BACKGROUND])
    with pytest.raises(ValueError, match="--keep-count"):
        mvs.reconstruct(as_scene([left, right]))


def test_matching_cost_prefers_the_true_plane(slanted):
    views, truths = copy.deepcopy(slanted)
    costs = []
    for factor in (1.0, 1.05):
        views[0].planes = (exact_planes(views[0], truths[0]) * factor).astype(np.float32)
        cost, _ = patchmatch(
            views[0], views[1:], (0.05, 1.0), geometric_weight=0, num_random=0, num_passes=0, seed=0
        )
        costs.append(float(np.median(cost[10:-10, 10:-10])))
    assert costs[0] < 0.02 < 0.1 < costs[1]  # measured 0.004 and 0.20


def test_matching_cost_equals_the_correlation_of_equal_photos():
    """Oracle by construction: a source that is the reference itself, in another exposure, correlates perfectly at any depth."""
    view, truth = photograph(POSES[0], [SLANTED])
    view.planes = exact_planes(view, truth)
    twin = View(view.width, view.height, view.K, view.viewmat, grey=0.5 * view.grey + 0.2)
    opposite = View(view.width, view.height, view.K, view.viewmat, grey=1.0 - view.grey)
    cost, _ = patchmatch(
        view, [twin], (0.05, 1.0), geometric_weight=0, num_random=0, num_passes=0, seed=0
    )
    assert (
        np.percentile(cost, 99) < 0.06
    )  # measured 0.03: the twin is rounded to 8 bits, and patches may be nearly plain
    cost, _ = patchmatch(
        view, [opposite], (0.05, 1.0), geometric_weight=0, num_random=0, num_passes=0, seed=0
    )
    assert np.percentile(cost, 1) > 1.95


def test_consistency_of_exact_depth(occluded):
    views, truths = copy.deepcopy(occluded)
    for view, truth in zip(views, truths, strict=True):
        view.planes = exact_planes(view, truth)
        view.planes[..., 1:] = 0  # both rectangles face the cameras nearly
    lonely = views[1].planes.copy()
    found = check_consistency(views, 1, 1.5, 0.02)
    # The middle view shares everything but the strips beside the foreground with at least one other view.
    assert (found.agree >= 1).mean() > 0.9
    assert found.through.mean() < 0.01
    assert np.median(found.colour_error[found.agree > 0]) < 0.01
    lonely[50:60, 20:30, 0] = 1 / 1.5  # a floating patch: both other views look through it
    views[1].planes = lonely
    found = check_consistency(views, 1, 1.5, 0.02)
    assert (found.agree[52:58, 22:28] == 0).all()
    assert (found.through[52:58, 22:28] >= 1).all()


def test_difference_of_depth_is_the_mean_over_the_views_that_agree(slanted):
    """Two oracles: planes scaled by a known factor, and the definition written out in numpy for some pixels."""
    views, truths = copy.deepcopy(slanted)
    for view, truth in zip(views, truths, strict=True):
        view.planes = exact_planes(view, truth)
    exact = check_consistency(views, 1, 1.5, 0.02)
    agrees = exact.agree > 0
    assert np.median(exact.depth_difference[agrees]) < 1e-4
    assert (exact.depth_difference[~agrees] == 1).all()
    views[1].planes /= 1.004
    found = check_consistency(views, 1, 1.5, 0.02)
    both = found.agree == 2
    assert np.median(found.depth_difference[both]) == pytest.approx(0.004, rel=0.15)
    view, depth = views[1], views[1].depth
    for x, y in ((40, 30), (80, 60), (100, 90)):
        ray = np.linalg.inv(view.K) @ [x + 0.5, y + 0.5, 1.0]
        point = view.viewmat[:3, :3].T @ (ray * depth[y, x] - view.viewmat[:3, 3])
        differences = []
        for other in (views[0], views[2]):
            there = other.viewmat[:3, :3] @ point + other.viewmat[:3, 3]
            u, v = (other.K @ there)[:2] / there[2]
            w, gx, gy = other.planes[int(v), int(u)]
            surface = 1 / (w + gx * (u - int(u) - 0.5) + gy * (v - int(v) - 0.5))
            differences.append(abs(there[2] / surface - 1))
        assert found.agree[y, x] == 2
        assert found.depth_difference[y, x] == pytest.approx(np.mean(differences), abs=1e-5)


def test_a_floating_patch_is_not_believed(occluded):
    views, truths = copy.deepcopy(occluded)
    for view, truth in zip(views, truths, strict=True):
        view.planes = exact_planes(view, truth)
        view.planes[..., 1:] = 0
    views[1].planes[50:60, 20:30, 0] = 1 / 1.5
    confidences = believable(views, [np.full((120, 160), 0.1, np.float32)] * 3)
    assert (confidences[1][50:60, 20:30] == 0).all()
    assert (confidences[1] > 0).mean() > 0.85


def test_fused_points_lie_on_the_plane_once(slanted):
    views, truths = copy.deepcopy(slanted)
    for view, truth in zip(views, truths, strict=True):
        view.planes = exact_planes(view, truth)
        view.confidence = (truth > 0).astype(np.float32)
    points, rgbs, confidence, normals, steps = fuse(views, 1.5, 0.02)
    u, v = np.array(SLANTED.u), np.array(SLANTED.v)
    normal = np.cross(u, v) / np.linalg.norm(np.cross(u, v))
    distance = (points - np.array(SLANTED.corner)) @ normal
    assert np.abs(distance).max() < 1e-3
    # Each surface point is taken once, not once per photo: three photos that share most of the plane.
    assert len(points) < 0.6 * sum((truth > 0).sum() for truth in truths)
    assert np.abs(np.abs(normals @ normal) - 1).max() < 1e-2
    assert (
        (normals * points).sum(1) < 0
    ).all()  # they face the cameras, which stand around the origin
    assert (confidence == 1).all() and rgbs.min() >= 0 and rgbs.max() <= 1
    # A step is one pixel: depth / focal length, longer where the plane is slanted.
    lengths = np.linalg.norm(steps, axis=-1)
    assert (lengths > 0.85 * points[:, 2:] / 152).all() and (
        lengths < 3 * points[:, 2:] / 150
    ).all()


def test_upsampled_planes_continue_a_plane_exactly():
    y, x = np.mgrid[0:24, 0:32] + 0.5
    fine = 0.1 + 0.003 * x - 0.002 * y
    coarse = np.stack([0.1 + 0.003 * x[:12, :16] * 0, 0 * x[:12, :16], 0 * x[:12, :16]], -1)
    coarse[..., 0] = 0.1 + 0.003 * 2 * x[:12, :16] - 0.002 * 2 * y[:12, :16]
    coarse[..., 1], coarse[..., 2] = 0.006, -0.004
    planes = mvs.upsample_planes(coarse.astype(np.float32), 32, 24)
    np.testing.assert_allclose(planes[..., 0], fine, atol=1e-6)
    np.testing.assert_allclose(
        planes[..., 1:], np.broadcast_to([0.003, -0.002], (24, 32, 2)), atol=1e-7
    )


def test_sparse_matches_are_triangulated_on_the_surface(slanted):
    views, _ = slanted
    matches = match_sparse(views)
    normal = np.cross(SLANTED.u, SLANTED.v) / np.linalg.norm(np.cross(SLANTED.u, SLANTED.v))
    distance = np.abs((matches.points - np.array(SLANTED.corner)) @ normal)
    assert len(matches.points) > 50
    assert np.median(distance) < 0.03  # world units at depth 6; measured 0.009


def test_fundamental_matrix_holds_for_projected_points():
    views = [photograph(pose, [SLANTED])[0] for pose in POSES[:2]]
    points = np.random.default_rng(0).uniform([-1, -1, 3], [1, 1, 6], (50, 3))
    pixels = []
    for view in views:
        in_camera = points @ view.viewmat[:3, :3].T + view.viewmat[:3, 3]
        pixels.append(in_camera @ view.K.T / in_camera[:, 2:])
    algebraic = np.einsum("pi,ij,pj->p", pixels[1], fundamental(*views), pixels[0])
    assert np.abs(algebraic).max() < 1e-9


def test_speckles_are_removed_and_large_islands_kept():
    depth = np.full((60, 80), 5.0, np.float32)
    depth[20:24, 20:24] = 3.0  # 16 pixels
    depth[30:45, 40:60] = 3.0  # 300 pixels
    good = without_speckles(depth, np.ones_like(depth, bool))
    assert not good[20:24, 20:24].any()
    assert good.sum() == depth.size - 16


def test_sources_are_the_overlapping_views_with_some_baseline():
    poses = [viewmat((x, 0, 0)) for x in (0, 0.001, 0.4, 0.8, -0.4, -0.8, 1.2)] + [
        viewmat((0, 0, 0), np.pi)
    ]
    views = [
        View(160, 120, np.array([[150.0, 0, 80], [0, 150, 60], [0, 0, 1]]), pose) for pose in poses
    ]
    points = np.random.default_rng(1).uniform([-2, -1, 4], [2, 1, 6], (500, 3))
    chosen = mvs.choose_sources(views, 0, points)
    assert len(chosen) == mvs.MAX_SOURCES
    assert 7 not in chosen  # it looks the other way
    assert 1 in mvs.choose_sources(
        views[:2], 0, points
    )  # and where there is no choice, all are taken


@pytest.fixture
def with_a_hole() -> list[View]:
    """Three photos of one plain grey wall with exact planes; the middle one has a hole of 20 x 20 pixels."""
    views = []
    for pose in POSES:
        view, depth = photograph(pose, [SLANTED])
        view.rgb = np.full_like(view.rgb, 0.5)
        view.planes, view.confidence = exact_planes(view, depth), np.ones_like(depth, np.float32)
        views.append(view)
    views[1].planes[50:70, 70:90] = 0
    views[1].confidence[50:70, 70:90] = 0
    return views


def test_planes_continue_into_plain_areas(with_a_hole):
    truth = photograph(POSES[1], [SLANTED])[1][50:70, 70:90]
    continue_planes(with_a_hole)
    hole = with_a_hole[1].depth[50:70, 70:90]
    assert np.abs(hole / truth - 1).max() < 1e-3
    assert (with_a_hole[1].confidence[50:70, 70:90] == np.float32(CONTINUED_CONFIDENCE)).all()
    assert (with_a_hole[1].confidence[:50] == 1).all()


def test_planes_do_not_continue_over_an_edge_of_colour(with_a_hole):
    with_a_hole[1].rgb[50:70, 70:90] = 0.8
    continue_planes(with_a_hole)
    assert not with_a_hole[1].depth[50:70, 70:90].any()


def test_planes_do_not_continue_where_another_view_looks_through(with_a_hole):
    for row in (0, 2):
        with_a_hole[row].planes /= 3.0  # what these see is far behind
    continue_planes(with_a_hole)
    assert not with_a_hole[1].depth[50:70, 70:90].any()


def test_planes_do_not_continue_where_another_view_has_another_colour(with_a_hole):
    for row in (0, 2):
        with_a_hole[row].rgb[30:90, 50:110] = 0.7
        with_a_hole[row].planes[30:90, 50:110] = 0
    continue_planes(with_a_hole)
    assert not with_a_hole[1].depth[55:65, 75:85].any()
