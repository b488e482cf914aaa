"""Growth in stage 3: what makes place, when, and which gradient asks for more."""

import importlib
from dataclasses import replace

import pytest
import torch
from blobs import HEIGHT, WIDTH, blobs, camera

from s2d.cameras import Cameras
from s2d.densify import DensifyPolicy, DensifyState
from s2d.gaussians import Gaussians, concatenate
from s2d.optim import LearningRates, create_optimizer
from s2d.rasterize import rasterize
from s2d.strategies.active import ActiveStrategies
from s2d.strategies.evidence import Evidence
from s2d.strategies.recycling import MOST_NOVEL, least_seen
from s2d.strategies.settings import Strategy
from s2d.strategies.view import StrategyView

ASIDE = (4.0, 0.0, 0.5)
ROUND = DensifyPolicy(grad_threshold=1.0, max_gaussians=60)
PLAIN = Strategy(dropout=0, clearance=0)


class Kept:
    """Kept views in memory."""

    def __init__(self, cameras: Cameras) -> None:
        self.cameras = cameras

    def image(self, name: str) -> torch.Tensor:
        return torch.full((HEIGHT, WIDTH, 3), 0.5)


def views(*places, name="view"):
    return Cameras.cat([camera(f"{name}_{k}", place) for k, place in enumerate(places)])


def of(gaussians, mask):
    return Gaussians(**{name: t[mask].clone() for name, t in gaussians.tensors().items()})


def far_away(num=10):
    """Blobs that no camera sees: behind all of them."""
    some = blobs(torch.Generator().manual_seed(8), num)
    some.means = some.means + torch.tensor([0.0, 0.0, -60.0])
    return some


def strategies_of(gaussians, kept, novel=None, **settings):
    settings = replace(PLAIN, **settings)
    evidence = Evidence(Kept(kept), torch.zeros(1, 3), lambda _: None, novel=novel)
    return ActiveStrategies(settings, evidence, gaussians, 1.0, 100, seed=0)


def control(gaussians, strategies, policy=ROUND):
    """One round in which the first ten rows ask for more, and these alone."""
    optimizer = create_optimizer(gaussians, LearningRates(), 1.0)
    state = DensifyState.zeros(gaussians.num)
    state.grad_sum[:10], state.num_views[:] = 2.0, 1.0
    return strategies.control_density(policy, gaussians, optimizer, state, torch.Generator())


# ------------------------------------------------------------------------------------------------------ who makes place


def test_what_is_chosen_changes_the_pictures_least(generator):
    gaussians, cameras = blobs(generator, 40), views((0.0, 0.0, -4.0), ASIDE)
    chosen = least_seen(gaussians, cameras, 10)
    assert chosen.dtype == torch.bool and int(chosen.sum()) == 10

    def change(mask):
        return sum(
            float((rasterize(of(gaussians, ~mask), one).alpha - rasterize(gaussians, one).alpha).abs().sum())
            for one in cameras
        )  # fmt: skip

    others = [torch.randperm(40, generator=generator) < 10 for _ in range(5)]
    assert change(chosen) < 0.6 * min(map(change, others))  # measured 0.54


def test_one_view_is_enough_to_stay(generator):
    """By the largest part in one picture, not by the sum: what the only view from aside shows counts as much as what all others do."""
    gaussians = blobs(generator, 40)
    front = views((0.0, 0.0, -4.0))
    hidden = least_seen(gaussians, front, 10)
    both = least_seen(gaussians, Cameras.cat([front, camera("aside", ASIDE)]), 10)
    assert bool((hidden & ~both).any())
    again = [front, *(camera(f"again_{k}", (0.0, 0.0, -4.0)) for k in range(5))]
    assert torch.equal(least_seen(gaussians, Cameras.cat(again), 10), hidden)
    assert int(least_seen(gaussians, front, 0).sum()) == 0


def test_sizes_may_differ(generator):
    gaussians = blobs(generator, 12)
    found = least_seen(gaussians, [camera(), camera("half").scaled(0.5)], 3)
    assert int(found.sum()) == 3


# ------------------------------------------------------------------------------------------------------------- a round


def test_a_full_budget_goes_on_growing(generator):
    gaussians, cameras = concatenate([blobs(generator, 50), far_away()]), views((0.0, 0.0, -4.0))
    unseen = rasterize(gaussians, cameras).radii[0] == 0
    useless = gaussians.means.detach()[unseen].clone()
    assert len(useless) >= 10
    state = control(gaussians, strategies_of(gaussians, cameras, recycle=0.1))
    # A tenth has gone, of those that nobody sees, and as many of those that ask were cloned or split.
    left = (gaussians.means.detach()[:, None] == useless[None]).all(-1).any(1)
    assert gaussians.num == 60 and int(left.sum()) == len(useless) - 6
    assert len(state.grad_sum) == 60 and not state.grad_sum.any()


def test_without_it_a_full_budget_stays_as_it_is(generator):
    gaussians = concatenate([blobs(generator, 50), far_away()])
    before = gaussians.means.detach().clone()
    control(gaussians, strategies_of(gaussians, views((0.0, 0.0, -4.0)), smoothing=True))
    assert torch.equal(gaussians.means.detach(), before)


def test_while_there_is_room_nobody_goes(generator):
    gaussians = concatenate([blobs(generator, 50), far_away()])
    strategies = strategies_of(gaussians, views((0.0, 0.0, -4.0)), recycle=0.1)
    control(gaussians, strategies, replace(ROUND, max_gaussians=100))
    assert gaussians.num == 70
    disabled = concatenate([blobs(generator, 50), far_away()])
    strategies = strategies_of(disabled, views((0.0, 0.0, -4.0)), recycle=0.1)
    control(disabled, strategies, replace(ROUND, enabled=False))
    assert disabled.num == 60


def test_novel_views_have_a_say_and_not_all_of_them(generator, monkeypatch):
    gaussians = concatenate([blobs(generator, 50), far_away()])
    asked = []
    module = importlib.import_module("s2d.strategies.recycling")
    weights = module.blend_weights
    monkeypatch.setattr(
        module, "blend_weights", lambda *given: asked.append(given[1].names[0]) or weights(*given)
    )
    novel = views(*[(0.1 * k, 0.0, -66.0) for k in range(25)], name="novel")
    strategies = strategies_of(gaussians, views((0.0, 0.0, -4.0)), novel, recycle=0.1, support=True)
    seen_by_novel = gaussians.means.detach()[50:].clone()
    control(gaussians, strategies)
    assert asked[0] == "view_0" and len(asked) == 1 + MOST_NOVEL and len(set(asked)) == len(asked)
    left = (gaussians.means.detach()[:, None] == seen_by_novel[None]).all(-1).any(1)
    assert int(left.sum()) > 4  # behind the kept camera, before the novel ones
    assert len(strategies.support.weights) == gaussians.num


# ----------------------------------------------------------------------------------------------------- what is the default


def test_stage_3_grows_by_lengths_and_recycles_unless_told():
    final = Strategy().for_final_scene(True)
    assert (final.grow, final.recycle) == ("absgrad", 0.05)
    assert Strategy(grow="gradient").for_final_scene(True).grow == "gradient"
    assert Strategy(recycle=0.0).for_final_scene(True).recycle == 0
    # On kept photos alone it is as in stage 1, but for what stands alone in the open.
    alone = Strategy().for_final_scene(False)
    assert alone == Strategy(isolation=0.2) and alone.recycle is None
    assert Strategy(recycle=0.1).for_final_scene(False).recycle == 0.1
    mcmc = Strategy(grow="mcmc").for_final_scene(True)
    assert mcmc.recycle is None
    mcmc.check()
    assert Strategy().grow is None and Strategy().recycle is None
    # What names plain 3DGS's way is nothing, in stage 1 and for layers.
    assert not replace(PLAIN, grow="gradient", recycle=0.0).active
    assert replace(PLAIN, grow="absgrad").active and replace(PLAIN, recycle=0.1).active
    for grow in ("mcmc", "residual"):
        with pytest.raises(ValueError, match=f"--recycle: no effect with --grow {grow}"):
            Strategy(grow=grow, recycle=0.1).check()
    with pytest.raises(ValueError, match="recycle must be in"):
        Strategy(recycle=1.0).check()


def test_lengths_have_twice_the_threshold():
    assert Strategy(grow="absgrad").densify_policy(True, 2e-4, 9).grad_threshold == 4e-4
    assert Strategy().densify_policy(True, 2e-4, 9).grad_threshold == 2e-4


@pytest.mark.parametrize("smoothing", [False, True])
def test_a_step_counts_the_lengths(generator, smoothing):
    """In the fused step and by autograd: at least as long as the gradient, and longer where it cancels."""
    target = torch.rand(HEIGHT, WIDTH, 3, generator=generator)
    sums = {}
    for grow in ("absgrad", "gradient"):
        gaussians = blobs(torch.Generator().manual_seed(3))
        optimizer = create_optimizer(gaussians, LearningRates(), 1.0)
        strategies = strategies_of(gaussians, views((0.0, 0.0, -4.0)), grow=grow, smoothing=smoothing)  # fmt: skip
        view = strategies.render(gaussians, camera(), 1, None, 0)
        assert isinstance(view, StrategyView) == smoothing
        (view.rgb - target).abs().mean().backward()
        state = DensifyState.zeros(gaussians.num)
        counted = (state.grad_sum, state.num_views)
        view.update(optimizer, statistics=counted, lengths=strategies.counts_lengths)
        sums[grow] = state.grad_sum
    assert bool((sums["absgrad"] >= 0.999 * sums["gradient"]).all())
    assert float(sums["absgrad"].sum()) > 1.5 * float(sums["gradient"].sum())
