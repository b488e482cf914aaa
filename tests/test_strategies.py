"""Strategies as functions of tensors: each against numbers by hand, a closed form, or an invariance."""

import math

import pytest
import torch
from blobs import FOCAL, HEIGHT, WIDTH, blobs, camera

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.geometry import quat_to_rotation
from s2d.optim import LearningRates, create_optimizer
from s2d.rasterize import rasterize
from s2d.strategies import mcmc, smoothing
from s2d.strategies.averaging import Average
from s2d.strategies.blend_weights import blend_weights
from s2d.strategies.bounds import bound_scales
from s2d.strategies.floaters import floaters
from s2d.strategies.opacity_decay import decay_opacity
from s2d.strategies.residual import most_wanted, residual_scores
from s2d.strategies.settings import Strategy
from s2d.strategies.support import LEVELS, Support, draw_support

# ---- settings --------------------------------------------------------------------------------------------------------


def test_plain_training_is_not_active_and_every_strategy_switches_on():
    assert not Strategy(dropout=0, clearance=0, isolation=0).active
    # Numbers of ordinary training.
    assert not Strategy(
        dropout=0, clearance=0, isolation=0, sh_by_views=True, densify_from=10
    ).active
    assert Strategy().active and not Strategy().chosen and not Strategy(densify_from=10).chosen
    for change in (
        {"dropout": 0.1},
        {"clearance": 0.3},
        {"isolation": 0.3},
        {"grow": "mcmc"},
        {"smoothing": True},
        {"prune_support": 1.0},
    ):
        assert Strategy(**change).chosen
        assert Strategy(**{"dropout": 0, "clearance": 0, "isolation": 0, **change}).active
    Strategy().check()


@pytest.mark.parametrize(
    "wrong",
    [
        {"dropout": 1.0},
        {"opacity_decay": 1.1},
        {"opacity_decay": 0.0},
        {"depth_weight": -1.0},
        {"max_elongation": 0.5},
        {"average_last": 1.5},
        {"densify_every": 0},
    ],
)
def test_values_without_sense_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Strategy(**wrong).check()


def test_dropout_follows_the_number_of_photos_unless_given():
    assert [Strategy().for_views(num).dropout for num in (1, 2, 3)] == pytest.approx(
        [0.2, 0.2, 0.2]
    )
    assert [Strategy().for_views(num).dropout for num in (6, 12)] == pytest.approx([0.1, 0.05])
    assert Strategy(dropout=0.3).for_views(12).dropout == 0.3
    assert Strategy(dropout=0).for_views(3).dropout == 0


def test_sh_degree_follows_the_number_of_photos():
    strategy = Strategy(sh_by_views=True)
    assert [strategy.sh_degree(3, num) for num in (2, 3, 4, 6, 7, 12, 13)] == [0, 0, 1, 1, 2, 2, 3]
    assert strategy.sh_degree(1, 100) == 1
    assert Strategy().sh_degree(3, 2) == 3


# ---- decay, bounds ---------------------------------------------------------------------------------------------------


def test_opacity_decays_by_the_factor_and_stays_a_number():
    logits = torch.tensor([-30.0, -2.0, 0.0, 3.0, 40.0])
    before = torch.sigmoid(logits)
    decay_opacity(logits, 0.9)
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(torch.sigmoid(logits), (0.9 * before).clamp(min=1e-6))


def test_bounds_hold_size_and_needles_and_let_discs_be():
    scales = torch.tensor([[8.0, 0.1, 0.2], [1.0, 1.0, 0.001], [0.3, 0.2, 0.1], [9.0, 9.0, 9.0]])
    logs = scales.log()
    bound_scales(logs, math.log(2.0), 4.0)
    expected = [[0.8, 0.1, 0.2], [1.0, 1.0, 0.001], [0.3, 0.2, 0.1], [2.0, 2.0, 2.0]]
    torch.testing.assert_close(logs.exp(), torch.tensor(expected))
    same = scales.log()
    bound_scales(same, None, 0.0)
    assert torch.equal(same, scales.log())


# ---- blending weights, residual, support ----------------------------------------------------------------------------


def test_blending_weights_add_up_to_alpha(generator):
    gaussians = blobs(generator)
    weights = torch.rand(HEIGHT, WIDTH, 3, generator=generator)
    sums = blend_weights(gaussians, camera(), weights)
    alpha = rasterize(gaussians, camera()).alpha[0]
    torch.testing.assert_close(sums.sum(0), (alpha * weights).sum((0, 1)))


def test_a_blending_weight_is_what_a_colour_change_changes(generator):
    gaussians = blobs(generator)
    gaussians.shN.zero_()
    gaussians.sh0.clamp_(min=0.0)  # no colour is clamped at black
    sums = blend_weights(gaussians, camera(), torch.ones(HEIGHT, WIDTH, 3))
    before = rasterize(gaussians, camera()).rgb.sum()
    for row in (0, 7, 19):
        brighter = Gaussians(**{name: t.clone() for name, t in gaussians.tensors().items()})
        brighter.sh0[row] += 1.0 / 0.28209479177387814
        change = rasterize(brighter, camera()).rgb.sum() - before
        # Three channels by 1 each; measured 3e-6.
        assert float(change / 3) == pytest.approx(float(sums[row, 0]), rel=5e-5)


def test_the_residual_names_those_who_draw_the_wrong_part(generator):
    gaussians = blobs(generator, 2)
    gaussians.means = torch.tensor([[-0.8, 0.0, 0.0], [0.8, 0.0, 0.0]])
    photo = rasterize(gaussians, camera()).rgb[0]
    assert float(residual_scores(gaussians, [(camera(), photo)]).max()) < 1e-5
    wrong = photo.clone()
    wrong[:, WIDTH // 2 :] += 0.5
    scores = residual_scores(gaussians, [(camera(), photo), (camera(), wrong)])
    assert scores[1] > 10 * scores[0] and scores[1] > 0.5


def test_growth_keeps_to_the_share_and_the_budget():
    scores = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0, 0.5, 0.1, 0.2, 0.3, 0.4])
    assert most_wanted(scores, 0.2, 100).nonzero()[:, 0].tolist() == [1, 3]
    assert most_wanted(scores, 0.2, 11).nonzero()[:, 0].tolist() == [1]
    assert not bool(most_wanted(scores, 0.2, 5).any())
    assert int(most_wanted(scores, 1.0, 100).sum()) == 8  # never one without any error


def test_support_counts_views_and_the_share_of_kept_weight(generator):
    gaussians = blobs(generator, 2)
    gaussians.means = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -8.0]])  # the second: behind a
    gaussians.opacity_logits = torch.tensor([3.0, 3.0])
    a, b = camera("a"), camera("b", (0.3, 0.0, -4.0))
    support = Support(2)
    assert support.of(gaussians, Cameras.cat([a, b])).tolist() == [2.0, 0.0]
    support.add(gaussians, a, True, None)
    support.add(gaussians, a, False, torch.full((HEIGHT, WIDTH, 1), 0.5))
    values = support.of(gaussians, Cameras.cat([a, b]))
    assert values.tolist() == pytest.approx([2 * 1 / 1.5, 0.0], rel=1e-5)
    support.follow(torch.tensor([0, 0, 1]))
    assert torch.equal(support.weights[0], support.weights[1])
    assert support.weights.shape == (3, 2)


def test_support_is_painted_by_level(generator):
    gaussians = blobs(generator, 1)
    gaussians.means.zero_()
    gaussians.log_scales.fill_(1.0)  # fills the picture
    gaussians.opacity_logits.fill_(12.0)
    none, one, more = (torch.tensor(colour) for _, colour in LEVELS)
    expected = {
        0.0: none,
        0.5: (none + one) / 2,
        1.0: one,
        1.25: 0.75 * one + 0.25 * more,
        5.0: more,
    }
    for value, colour in expected.items():
        image = draw_support(gaussians, torch.tensor([value]), camera())
        # The rasteriser's largest opacity is 0.99.
        torch.testing.assert_close(image[HEIGHT // 2, WIDTH // 2], colour, atol=0.02, rtol=0)


# ---- floaters --------------------------------------------------------------------------------------------------------


def test_floaters_stand_where_more_photos_see_through():
    a, b = camera("a"), camera("b", (4.0, 0.0, 0.0))  # at a right angle
    wall = torch.full((HEIGHT, WIDTH), 4.0)
    ones, zeros = torch.ones(HEIGHT, WIDTH), torch.zeros(HEIGHT, WIDTH)
    means = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -2.0], [0.0, 0.0, 2.0], [0.0, 9.0, 0.0]])
    gaussians = Gaussians(
        means,
        torch.full((4, 3), -5.0),
        torch.tensor([1.0, 0, 0, 0]).repeat(4, 1),
        torch.zeros(4),
        torch.zeros(4, 1, 3),
        torch.zeros(4, 0, 3),
    )
    # At the surface, in front of it, behind it, out of view.
    assert floaters(gaussians, [(a, wall, ones)]).tolist() == [False, True, False, False]
    assert not bool(floaters(gaussians, [(a, wall, zeros)]).any())
    assert not bool(floaters(gaussians, [(a, 0 * wall, ones)]).any())
    # b sees the second one at its surface: more confident than a's contradiction, or less.
    assert not bool(floaters(gaussians, [(a, wall, 0.4 * ones), (b, wall, ones)])[1])
    assert bool(floaters(gaussians, [(a, wall, ones), (b, wall, 0.4 * ones)])[1])
    gaussians.log_scales[1] = math.log(1.0)  # reaches the wall
    assert not bool(floaters(gaussians, [(a, wall, ones)])[1])


# ---- MCMC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("opacity", "copies"), [(0.3, 2), (0.9, 3), (0.99, 12), (0.05, 5)])
def test_copies_together_have_the_profile_integral_of_one(opacity, copies):
    new, factor = mcmc.shared_shape(torch.tensor([opacity]), torch.tensor([copies]))
    x = torch.linspace(-20, 20, 40001, dtype=torch.float64)
    one = opacity * torch.exp(-0.5 * x**2)
    profile = new.double() * torch.exp(-0.5 * (x / factor.double()) ** 2)
    together = 1 - (1 - profile) ** copies
    # Opacity in the centre and integral; measured 2e-7, the float32 of the result.
    assert float(1 - (1 - new) ** copies) == pytest.approx(opacity, rel=2e-6)
    assert float(together.sum() / one.sum()) == pytest.approx(1.0, rel=2e-6)


def test_one_copy_is_the_same():
    new, factor = mcmc.shared_shape(torch.tensor([0.2, 0.9]), torch.tensor([1, 1]))
    torch.testing.assert_close(new, torch.tensor([0.2, 0.9]))
    torch.testing.assert_close(factor, torch.ones(2))


def test_relocation_moves_the_dead_and_grows_to_the_budget(generator):
    gaussians = blobs(generator, 40)
    gaussians.opacity_logits = torch.full((40,), 1.0)
    gaussians.opacity_logits[:5] = -8.0
    old = Gaussians(**{name: t.clone() for name, t in gaussians.tensors().items()})
    optimizer = create_optimizer(gaussians, LearningRates(), 1.0)
    for tensor in gaussians.tensors().values():
        ones = torch.ones_like(tensor)
        optimizer.state[tensor] = {
            "step": torch.tensor(3.0),
            "exp_avg": ones.detach().clone(),
            "exp_avg_sq": ones.detach().clone(),
        }
    state = mcmc.relocate_and_grow(gaussians, optimizer, 0.25, 46, generator)
    parents = state.parents
    assert gaussians.num == 46 == len(parents)  # 50 were wanted
    assert torch.equal(parents[5:40], torch.arange(5, 40))
    assert bool((parents[:5] >= 5).all())
    assert torch.equal(gaussians.means.detach(), old.means[parents])
    copies = parents.bincount(minlength=40)
    alone = (copies == 1) & (torch.arange(40) >= 5)
    moments = optimizer.state[gaussians.means]["exp_avg"]
    assert bool((moments[:40][alone] == 1).all()) and not bool(moments[40:].any())
    assert torch.equal(gaussians.log_scales.detach()[:40][alone], old.log_scales[alone])
    # The picture hardly changes: copies look like their original.
    # Measured 0.016 at most; without the correction 0.15.
    before, after = rasterize(old, camera()).rgb, rasterize(gaussians.detached(), camera()).rgb
    assert float((before - after).abs().max()) < 0.05


def test_where_all_are_dead_or_nothing_is_to_be_done_rows_stay(generator):
    gaussians = blobs(generator, 6)
    optimizer = create_optimizer(gaussians, LearningRates(), 1.0)
    for logits, growth in ((-9.0, 0.5), (2.0, 0.0)):
        gaussians.opacity_logits.data.fill_(logits)
        state = mcmc.relocate_and_grow(gaussians, optimizer, growth, 100, generator)
        assert state.parents.tolist() == [0, 1, 2, 3, 4, 5] and gaussians.num == 6


def test_noise_moves_the_faint_only(generator):
    gaussians = blobs(generator, 20)
    gaussians.opacity_logits = torch.where(torch.arange(20) < 10, -7.0, 0.0)
    before = gaussians.means.clone()
    mcmc.add_noise(gaussians, 1e-4, 1.0, generator)
    moved = (gaussians.means - before).norm(dim=1) > 0
    assert moved.tolist() == [True] * 10 + [False] * 10


# ---- smoothing, averaging --------------------------------------------------------------------------------------------


def test_the_filter_is_a_fifth_of_the_squared_pixel_of_the_nearest_photo():
    means = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [500.0, 0.0, 0.0]])
    near, far = camera("near"), camera("far", (0.0, 0.0, -8.0))
    variances = smoothing.filter_variances(means, Cameras.cat([near, far]))
    expected = [0.2 * (4 / FOCAL) ** 2, 0.2 * (5 / FOCAL) ** 2, 0.2 * (4 / FOCAL) ** 2]
    assert variances.tolist() == pytest.approx(expected, rel=1e-5)


def test_filtering_adds_to_the_covariance_and_keeps_the_mass(generator):
    gaussians = blobs(generator, 10)
    variances = torch.full((10,), 0.01)
    scales, logits = smoothing.filtered(gaussians.log_scales, gaussians.opacity_logits, variances)
    rotation = quat_to_rotation(gaussians.quats)

    def covariance(log_scales):
        return rotation @ torch.diag_embed((2 * log_scales).exp()) @ rotation.mT

    before, after = covariance(gaussians.log_scales), covariance(scales)
    torch.testing.assert_close(after, before + 0.01 * torch.eye(3), atol=1e-6, rtol=1e-5)
    factor = (torch.linalg.det(before) / torch.linalg.det(after)).sqrt()
    expected = torch.sigmoid(gaussians.opacity_logits) * factor
    torch.testing.assert_close(torch.sigmoid(logits), expected, rtol=1e-4, atol=1e-6)
    back = smoothing.unfiltered(scales, logits, variances)
    # Measured 1e-7 and 5e-7.
    torch.testing.assert_close(back[0], gaussians.log_scales, rtol=0, atol=5e-6)
    torch.testing.assert_close(back[1], gaussians.opacity_logits, rtol=0, atol=5e-6)


def test_the_average_is_the_mean_and_starts_anew_with_other_rows(generator):
    samples = [blobs(generator, 5) for _ in range(3)]
    average = Average()
    average.add(blobs(generator, 4))
    for sample in samples:
        average.add(sample)
    result = blobs(generator, 5)
    average.write_to(result)
    for name, tensor in result.tensors().items():
        mean = torch.stack([sample.tensors()[name] for sample in samples]).mean(0)
        torch.testing.assert_close(tensor, mean)
    other = blobs(generator, 6)
    before = other.means.clone()
    average.write_to(other)
    assert torch.equal(other.means, before)
