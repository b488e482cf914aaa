"""Random sample drop: the achieved share of kept views, and sampler states that can be restored."""

from collections import Counter

import pytest

from s2d.sampling import ViewSampler

NUM_DRAWS = 20_000


def make_sampler(num_kept, num_fixed, alpha=0.7, sample_drop="normalised", seed=0):
    kept = [f"kept{i}" for i in range(num_kept)]
    fixed = [f"fixed{i}" for i in range(num_fixed)]
    return ViewSampler(kept, fixed, alpha, sample_drop, seed)


def achieved_share(sampler):
    for _ in range(NUM_DRAWS):
        sampler.draw()
    return sampler.kept_share


@pytest.mark.parametrize(("num_kept", "num_fixed"), [(6, 300), (6, 6), (3, 14), (300, 6)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_normalised_drop_reaches_the_target_share(num_kept, num_fixed, alpha):
    share = achieved_share(make_sampler(num_kept, num_fixed, alpha))
    assert share == pytest.approx(
        alpha, abs=0.012
    )  # 3.5 standard deviations of 20,000 Bernoulli draws


def test_literal_formula_misses_its_target_as_published():
    # Acceptance is clipped at 1: the share can only rise by dropping novel views it has drawn.
    assert achieved_share(make_sampler(6, 300, sample_drop="literal")) == pytest.approx(
        0.06, abs=0.01
    )
    assert achieved_share(make_sampler(6, 6, sample_drop="literal")) == pytest.approx(
        0.58, abs=0.015
    )
    # Too many kept views it drops only mildly, since the share is already that of what was accepted.
    assert achieved_share(make_sampler(300, 6, sample_drop="literal")) == pytest.approx(
        0.972, abs=0.005
    )


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_literal_formula_ends_at_the_ends_of_the_range(alpha):
    assert achieved_share(make_sampler(2, 50, alpha, "literal")) == alpha


@pytest.mark.parametrize("sample_drop", ["normalised", "literal"])
def test_every_view_of_a_class_is_drawn_equally_often(sample_drop):
    sampler = make_sampler(3, 5, sample_drop=sample_drop)
    counts = Counter(sampler.draw() for _ in range(2000))
    for is_kept, num_views in ((True, 3), (False, 5)):
        of_class = [count for (kept, _), count in counts.items() if kept is is_kept]
        assert len(of_class) == num_views
        assert max(of_class) - min(of_class) <= 1  # stacks are emptied before they are reshuffled


def test_no_fixed_views_means_only_kept_ones():
    sampler = make_sampler(3, 0)
    assert {sampler.draw() for _ in range(30)} == {
        (True, "kept0"),
        (True, "kept1"),
        (True, "kept2"),
    }
    assert sampler.kept_share == 1.0


@pytest.mark.parametrize("sample_drop", ["normalised", "literal"])
def test_restored_sampler_continues_the_same_sequence(sample_drop):
    sampler = make_sampler(3, 7, sample_drop=sample_drop)
    for _ in range(25):
        sampler.draw()
    restored = make_sampler(3, 7, sample_drop=sample_drop, seed=99)
    restored.load_state_dict(sampler.state_dict())
    assert [sampler.draw() for _ in range(50)] == [restored.draw() for _ in range(50)]


def test_same_seed_same_sequence_other_seed_another():
    first, again, other = (make_sampler(5, 5, seed=seed) for seed in (1, 1, 2))
    sequences = [[sampler.draw() for _ in range(40)] for sampler in (first, again, other)]
    assert sequences[0] == sequences[1] != sequences[2]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="no kept views"):
        make_sampler(0, 5)
    with pytest.raises(ValueError, match=r"share of kept views: expected 0 to 1, got 1\.7"):
        make_sampler(2, 5, alpha=1.7)
