"""Posed scenes as training data: overlap, depth ranges and samples, against the exact geometry of the tiny scene."""

import shutil

import numpy as np
import pytest
import torch
from tiny_scene import NAMES, cameras, cast, tiny_model

from s2d.geometry import invert_rigid, project, unproject
from s2d.guidance.matches import SparsePoints
from s2d.hier.data import posed
from s2d.hier.data.index import Pick
from s2d.hier.data.overlap import (
    PairRule,
    PairSampler,
    evaluation_pairs,
    measure_overlaps,
)
from s2d.hier.data.posed import PosedScenes, load_posed
from s2d.hier.data.samples import (
    TrainingSamples,
    as_batch,
    as_views,
    frame_sample,
    mirrored,
    with_unit_baseline,
)
from s2d.hier.kept_views import depth_range
from s2d.scene import load_scene

RULE = PairRule(min_overlap=0.3, min_angle=1.0, max_angle=60.0)


@pytest.fixture(scope="module")
def capture(tiny_scene, tmp_path_factory):
    (found,) = load_posed([tiny_scene], tmp_path_factory.mktemp("cache"))
    return found


@pytest.fixture(scope="module")
def samples(capture):
    return make_samples(capture)


def make_samples(capture, **changes):
    source = PosedScenes("tiny", [capture], PairSampler(RULE))
    settings = {"sources": [source], "shares": [1.0], "size": (32, 32), "samples_per_step": 2}
    return TrainingSamples(**(settings | {"num_targets": 2, "with_depth": True} | changes))


# --- overlap ---------------------------------------------------------------------------------------------------------------


def test_overlap_and_angle_are_those_of_the_arc(capture):
    overlaps = capture.overlaps
    assert torch.allclose(overlaps.overlap.diagonal(), torch.ones(8))
    # The cameras stand on an arc of 70 degrees: 10 degrees from one to the next, seen from the box.
    step = overlaps.angle.diagonal(1)
    assert ((step > 5) & (step < 13)).all()  # points behind the box see less, measured 6.0 to 10.6
    assert (overlaps.angle[0, 1:].diff() > 0).all()
    assert (overlaps.overlap[0, 1] > overlaps.overlap[0, 7]) and overlaps.overlap[0, 7] < 0.8
    centers = capture.cameras.centers
    assert overlaps.distance[2, 5] == pytest.approx(
        float((centers[2] - centers[5]).norm()), rel=1e-5
    )


def test_pairs_keep_to_the_rule_and_between_is_between(capture):
    rule = PairRule(min_overlap=0.3, min_angle=12.0, max_angle=30.0)
    pairs = capture.overlaps.pairs(rule)
    assert pairs and all(i < j for i, j in pairs)
    for i, j in pairs:
        assert 12 <= float(capture.overlaps.angle[i, j]) <= 30
        between = capture.overlaps.between(i, j, rule)
        assert between == list(range(i + 1, j)), "on an arc, what is nearer to both lies between"
    assert (0, 1) not in pairs and (0, 7) not in pairs


def test_opposite_sides_are_no_pair():
    """Cameras that look at each other through the same points see nothing alike."""
    viewmats, _ = cameras()
    model = tiny_model()
    front = viewmats[4].float()
    turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    scene_cameras = posed.Cameras(
        torch.stack([front, front @ turn]),
        torch.tensor([[[43.2, 0, 24], [0, 43.2, 18], [0, 0, 1]]]).repeat(2, 1, 1),
        ((48, 36),) * 2,
        ("a", "b"),
    )
    points = torch.from_numpy(model.points).float()
    overlaps = measure_overlaps(scene_cameras, [points, points])
    assert overlaps.overlap.min() > 0.2
    assert overlaps.pairs(PairRule(min_overlap=0.2)) == []
    assert overlaps.pairs(PairRule(min_overlap=0.2, max_angle=180.0)) == [(0, 1)]


def test_evaluation_pairs_are_spread_and_have_targets(capture):
    picks = evaluation_pairs(capture.overlaps, RULE, max_pairs=3, max_targets=2)
    assert len(picks) == 3 and len(set(picks)) == 3
    for pick in picks:
        i, j = pick.context
        assert 1 <= len(pick.target) <= 2
        assert all(i < row < j for row in pick.target)
    assert picks == evaluation_pairs(capture.overlaps, RULE, 3, 2)
    assert len(evaluation_pairs(capture.overlaps, RULE, 1000, 1)) > 3


def test_the_depth_range_holds_what_is_seen(capture):
    viewmats, _ = cameras()
    for row in range(8):
        K, size = capture.cameras.Ks[row].double(), capture.cameras.sizes[row]
        c2w = invert_rigid(viewmats[row])
        grid = unproject(torch.ones(size[1], size[0]).double(), K, viewmats[row])
        surface = cast(c2w[:3, 3].expand_as(grid), grid - c2w[:3, 3])
        depth = project(surface.reshape(-1, 3), K, viewmats[row])[1]
        inside = (depth > capture.near[row]) & (depth < capture.far[row])
        assert inside.double().mean() > 0.98  # measured 1.0
        assert capture.far[row] < 3 * depth.max() and capture.near[row] > 0.4 * depth.min()
    assert depth_range(torch.tensor([1.0, 2.0])) is None


# --- loading ---------------------------------------------------------------------------------------------------------------


def test_points_are_matched_once_where_there_is_no_sparse_model(tiny_scene, tmp_path, monkeypatch):
    calls = []

    def match(views):
        calls.append([(view.width, view.height) for view in views])
        model = tiny_model()
        return SparsePoints(model.points, np.tile([0, 1], (len(model.points), 1)))

    monkeypatch.setattr(posed, "match_sparse", match)
    monkeypatch.setattr(posed, "MIN_POINTS_PER_VIEW", 10**6)
    scene = load_scene(tiny_scene)
    found = [posed.posed_capture("x", scene, tmp_path) for _ in range(2)]
    pairs = posed._pairs_to_match(scene.cameras)
    assert len(calls) == len(pairs) < 8 * 7 / 2
    assert all(i < j for i, j in pairs) and {i for pair in pairs for i in pair} == set(range(8))
    partners = sum(2 in pair for pair in pairs)
    assert len(found[1].seen_points(2)) == partners * len(tiny_model().points)
    assert torch.equal(found[0].near, found[1].near)
    (tmp_path / "x.npz").unlink()
    posed.posed_capture("x", scene, tmp_path)
    assert len(calls) == 2 * len(pairs)


def test_a_view_without_points_gets_the_widest_range(capture):
    points = capture.seen_points(0)
    none = torch.zeros(0, 3)
    near, far = posed.view_ranges(capture.cameras[[0, 3, 4]], [points, points * 1.5, none])
    assert near[2] == near[:2].min() and far[2] == far[:2].max() and near[0] != near[1]


def test_a_scene_that_nobody_can_measure_says_so(tiny_scene, tmp_path, monkeypatch):
    nothing = SparsePoints(np.zeros((0, 3)), np.zeros((0, 2), int))
    monkeypatch.setattr(posed, "match_sparse", lambda views: nothing)
    monkeypatch.setattr(posed, "MIN_POINTS_PER_VIEW", 10**6)
    with pytest.raises(ValueError, match=r"enough points .*Leave this scene out"):
        posed.posed_capture("x", load_scene(tiny_scene), tmp_path)


def test_photos_are_read_once_per_size(capture, monkeypatch):
    reads = []
    read = posed.read_image
    monkeypatch.setattr(
        posed, "read_image", lambda path, **k: reads.append(path.name) or read(path, **k)
    )
    pictures = [capture.picture(6, (20, 20), place)[0] for place in ((0, 0.5), (1, 0.5), (0, 0.5))]
    assert reads == [NAMES[6]]
    assert torch.equal(pictures[0], pictures[2]) and not torch.equal(pictures[0], pictures[1])


# --- samples ---------------------------------------------------------------------------------------------------------------


def reprojected(sample, row, role):
    """Known depths of the first context view, seen from another view of the sample: [P, 2] pixels and [P] depths."""
    depth, K = sample["context_depth"][0].double(), sample["context_Ks"][0].double()
    points = unproject(depth, K, sample["context_viewmats"][0].double())[depth > 0]
    K, viewmat = (sample[f"{role}_{name}"][row].double() for name in ("Ks", "viewmats"))
    return project(points, K, viewmat)


def colours_at(image, xy):
    grid = 2 * xy / torch.tensor([image.shape[2], image.shape[1]]) - 1
    return torch.nn.functional.grid_sample(
        image[None].double(), grid[None, None], align_corners=False
    )[0, :, 0].T


@pytest.mark.parametrize("change", ["none", "mirrored", "unit baseline", "both"])
def test_points_of_one_view_have_their_colour_in_the_others(capture, change):
    """Colour is a function of the place in the tiny scene: the test of pictures, cameras and depth at once."""
    sample = frame_sample(capture, Pick((3, 4), (5,)), (36, 36), (0.3, 0.5), with_depth=True)
    right = dict(sample)
    if change in ("mirrored", "both"):
        sample = mirrored(sample)
    if change in ("unit baseline", "both"):
        sample = with_unit_baseline(sample)
        centers = invert_rigid(sample["context_viewmats"])[:, :3, 3]
        assert float((centers[0] - centers[1]).norm()) == pytest.approx(1.0, abs=1e-5)
        ratio = sample["target_near"] / right["target_near"]
        assert torch.allclose(sample["context_far"] / right["context_far"], ratio)
    errors, wrong = [], []
    for row, role in ((1, "context"), (0, "target")):
        xy, z = reprojected(sample, row, role)
        image = sample[f"{role}_images"][row]
        inside = (z > 0) & ((xy > 1) & (xy < 35)).all(-1)
        assert inside.sum() > 15
        depth = sample["context_depth"][0]
        truth = sample["context_images"][0][:, depth > 0].T.double()[inside]
        errors.append((colours_at(image, xy[inside]) - truth).abs().median())
        back = xy[inside] * torch.tensor([-1.0, 1.0]) + torch.tensor([36.0, 0.0])
        wrong.append((colours_at(image, back) - truth).abs().median())
    # Measured 0.01 (half a pixel of texture), and 0.1 for pictures that are mirrored without their cameras.
    assert max(errors) < 0.035, errors
    assert min(wrong) > 2 * max(errors), (wrong, errors)


def test_a_sample_is_a_function_of_seed_and_number(capture, samples):
    again = make_samples(capture)
    for number in (5, 0, 3):
        one, other = samples[number], again[number]
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    other_seed = make_samples(capture, seed=1)
    assert not torch.equal(samples[0]["context_images"], other_seed[0]["context_images"])
    assert not torch.equal(samples[0]["context_images"], samples[1]["context_images"])


def test_samples_are_what_the_model_takes(samples):
    batch = as_batch(samples[0])
    context, target = as_views(batch, "context"), as_views(batch, "target")
    assert context.images.shape == (1, 2, 3, 32, 32) and target.images.shape == (1, 2, 3, 32, 32)
    assert batch["context_depth"].shape == (1, 2, 32, 32)
    known = batch["context_depth"][0, 0]
    known = known[known > 0]
    assert len(known) > 10 and known.min() > context.near[0, 0] and known.max() < context.far[0, 0]


def test_all_samples_of_a_step_have_as_many_context_views(capture):
    samples = make_samples(capture, num_context=(2, 3), with_depth=False)
    counts = [len(samples[number]["context_images"]) for number in range(16)]
    assert counts[::2] == counts[1::2] and set(counts) == {2, 3}


def test_shares_are_kept(capture, tiny_scene, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_scene, other)
    (second,) = load_posed([other], tmp_path / "cache")
    seen = []
    sources = [
        PosedScenes(name, [c], PairSampler(RULE)) for name, c in (("a", capture), ("b", second))
    ]
    for source in sources:
        source.is_usable = lambda c, name=source.name: seen.append(name) or True
    samples = make_samples(capture, sources=sources, shares=[3.0, 1.0], size=(16, 16))
    for number in range(80):
        samples[number]
    assert seen.count("a") == pytest.approx(60, abs=12)  # three standard deviations


def test_rows_of_another_data_set_are_refused(capture):
    with pytest.raises(ValueError, match=r"has 8 views and no view 9.*--index"):
        frame_sample(capture, Pick((0, 9), (1,)), (16, 16))


def test_captures_without_a_pair_are_an_error_that_says_what_to_change(capture):
    samples = make_samples(
        capture, sources=[PosedScenes("a", [capture], PairSampler(PairRule(0.999)))]
    )
    with pytest.raises(ValueError, match="none of 50 scenes has 2 context views"):
        samples[0]
    with pytest.raises(ValueError, match="no scene to train on"):
        make_samples(capture, sources=[])
