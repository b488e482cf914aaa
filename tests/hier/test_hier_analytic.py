"""Levels without a network: from known depth to pictures that get better level by level."""

import torch
from hier_scenes import wall

from s2d.hier.analytic import analytic_levels, filled_inverse_depth
from s2d.hier.gaussians import render


def test_each_level_lowers_the_error_in_context_and_unseen_views():
    views, depth = wall((-0.3, 0.0, 0.3), 50, 38, tilt=0.3)
    context = views.select([0, 2])
    found = analytic_levels(context, depth[:, [0, 2]], torch.ones_like(depth[:, [0, 2]]))
    for seen in (context, views.select([1])):
        errors = [float((render(level, seen) - seen.images).abs().mean()) for level in found]
        # measured 0.159, 0.086, 0.053
        assert errors[0] > errors[1] > errors[2]
    assert found[2].levels.bincount().tolist() == [2 * 12 * 9, 2 * 25 * 19, 2 * 50 * 38]
    faded = found[2].opacities[:, : found[0].num] / found[0].opacities
    assert faded.min() > 0
    assert faded.max() < 1


def test_one_level_can_be_asked_for():
    views, depth = wall((0.0,), 20, 16)
    (only,) = analytic_levels(views, depth, torch.ones_like(depth), sh_degree=1, levels=(2,))
    assert only.num == 20 * 16
    assert only.sh.shape[2] == 4


def test_holes_are_filled_from_their_surroundings_and_marked_as_guesses():
    depth = torch.full((2, 13, 17), 4.0)
    depth[0, 3:9, 5:11] = 0
    depth[1] = 0  # a view without any
    confidence = torch.ones_like(depth)
    inverse, belief = filled_inverse_depth(
        depth, confidence, torch.rand(2, 3, 13, 17), torch.tensor([10.0, 10.0])
    )
    assert torch.allclose(inverse[0], torch.full((13, 17), 0.25))
    assert torch.allclose(inverse[1], torch.full((13, 17), 0.1))
    assert (belief[0] == 1).sum() == 13 * 17 - 36
    assert belief[0, 5, 7] < 0.01
    assert belief.min() > 0


def test_confident_depth_outweighs_doubtful_depth():
    views, depth = wall((0.0,), 16, 16)
    confidence = torch.ones_like(depth)
    depth[..., 1::2], confidence[..., 1::2] = (
        40.0,
        0.0,
    )  # every second column is wrong, and known to be
    found = analytic_levels(views, depth, confidence)[0]
    assert torch.allclose(found.means[0, :, 2], torch.full((16,), 4.0), atol=0.05)
