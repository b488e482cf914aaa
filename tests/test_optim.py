"""The parameter table and the schedules."""

import copy
from dataclasses import asdict

import pytest
import torch

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.optim import (
    ADAM_EPS,
    LearningRates,
    active_sh_degree,
    create_optimizer,
    decayed_rate,
    scene_extent,
    set_means_rate,
    stage1_steps,
)


def some_gaussians(num=5, sh_degree=1):
    generator = torch.Generator().manual_seed(0)
    return Gaussians(
        means=torch.randn(num, 3, generator=generator),
        log_scales=torch.zeros(num, 3),
        quats=torch.randn(num, 4, generator=generator),
        opacity_logits=torch.zeros(num),
        sh0=torch.zeros(num, 1, 3),
        shN=torch.zeros(num, (sh_degree + 1) ** 2 - 1, 3),
    )


def rate_of(optimizer, name):
    return next(group["lr"] for group in optimizer.param_groups if group["name"] == name)


def test_every_tensor_has_its_group_and_the_published_rate():
    gaussians = some_gaussians()
    optimizer = create_optimizer(gaussians, LearningRates(), scene_extent=2.0)
    assert [group["name"] for group in optimizer.param_groups] == list(gaussians.tensors())
    assert all(tensor.requires_grad for tensor in gaussians.tensors().values())
    assert rate_of(optimizer, "means") == pytest.approx(3.2e-4)
    assert rate_of(optimizer, "shN") == pytest.approx(rate_of(optimizer, "sh0") / 20)


def test_factor_leaves_the_centres_alone():
    assert asdict(LearningRates.of_flags(1.6e-4, 1.0)) == pytest.approx(asdict(LearningRates()))
    plain, fast = LearningRates(), LearningRates.of_flags(3e-4, 2.5)
    assert (fast.means, fast.means_final) == (3e-4, pytest.approx(3e-6))
    for name in ("log_scales", "quats", "opacity_logits", "sh0", "shN"):
        assert getattr(fast, name) == pytest.approx(2.5 * getattr(plain, name))


def test_position_rate_decays_exponentially_and_scales_with_the_scene():
    assert decayed_rate(1e-2, 1e-4, 0.0) == pytest.approx(1e-2)
    assert decayed_rate(1e-2, 1e-4, 0.5) == pytest.approx(1e-3)
    assert decayed_rate(1e-2, 1e-4, 1.0) == pytest.approx(1e-4)
    assert decayed_rate(1e-2, 1e-4, 7.0) == pytest.approx(1e-4)
    optimizer = create_optimizer(some_gaussians(), LearningRates(), 3.0)
    set_means_rate(optimizer, LearningRates(), 3.0, 0.5)
    assert rate_of(optimizer, "means") == pytest.approx(3.0 * 1.6e-5)
    assert rate_of(optimizer, "quats") == 1e-3


def rig(offsets):
    viewmats = torch.eye(4).repeat(len(offsets), 1, 1)
    viewmats[:, 0, 3] = -torch.tensor(offsets)
    K = torch.tensor([[50.0, 0.0, 16.0], [0.0, 50.0, 12.0], [0.0, 0.0, 1.0]])
    names = tuple(f"{row}.png" for row in range(len(offsets)))
    return Cameras(viewmats, K.repeat(len(offsets), 1, 1), ((32, 24),) * len(offsets), names)


def test_extent_is_the_rig_or_half_the_depth_of_a_narrow_one():
    points = torch.tensor([[0.0, 0.0, 10.0], [1.0, 0.0, 8.0], [0.0, 2.0, 12.0], [0.0, 0.0, -99.0]])
    assert scene_extent(rig([-0.1, 0.1]), points) == pytest.approx(5.0)
    assert scene_extent(rig([-20.0, 20.0]), points) == pytest.approx(20.0)
    assert scene_extent(rig([-3.0, 3.0]), points[:0]) == pytest.approx(
        3.0
    )  # no points: the rig alone
    assert scene_extent(rig([0.0]), points[:0]) > 0
    # Its unit is the world's: a scene twice as large has twice the extent.
    assert scene_extent(rig([-0.2, 0.2]), 2 * points) == pytest.approx(10.0)


def test_steps_follow_the_photos():
    assert [stage1_steps(num) for num in (1, 3, 4, 6, 7, 12)] == [
        2500,
        2500,
        3000,
        4000,
        4000,
        4000,
    ]


def test_sh_degree_rises_one_by_one():
    assert [active_sh_degree(step, 1000, 2) for step in (0, 999, 1000, 2500, 9000)] == [
        0,
        0,
        1,
        2,
        2,
    ]
    assert active_sh_degree(0, 0, 3) == 3


def with_gradients(gaussians, value):
    for tensor in gaussians.tensors().values():
        tensor.grad = torch.full_like(tensor, value)
    return gaussians


def test_a_step_changes_every_tensor_by_at_most_its_rate():
    gaussians = some_gaussians()
    optimizer = create_optimizer(gaussians, LearningRates(), 1.0)
    before = {name: tensor.detach().clone() for name, tensor in gaussians.tensors().items()}
    with_gradients(gaussians, 1e-9)  # as small as real ones: eps must not damp it
    optimizer.step()
    for name, tensor in gaussians.tensors().items():
        # Adam's first step is lr·sign(gradient).
        assert torch.allclose(
            before[name] - tensor.detach(), torch.tensor(rate_of(optimizer, name)), rtol=2e-2
        )


def test_radii_say_who_takes_part():
    gaussians = some_gaussians()
    optimizer = create_optimizer(gaussians, LearningRates(), 1.0)
    before = {name: tensor.detach().clone() for name, tensor in gaussians.tensors().items()}
    with_gradients(gaussians, 1e-9)
    optimizer.step(torch.tensor([4, 0, 1, 0, 0], dtype=torch.int32))
    for name, tensor in gaussians.tensors().items():
        moved = (tensor.detach() != before[name]).reshape(5, -1)
        assert moved.all(1).tolist() == moved.any(1).tolist()
        assert moved.all(1).tolist() == [True, False, True, False, False], name


def test_a_checkpoint_of_the_former_optimiser_goes_on_as_it_would_have():
    """Checkpoints of version 1 hold the state of torch's fused Adam."""
    old, new = some_gaussians(), some_gaussians()
    groups = create_optimizer(old, LearningRates(), 1.0).param_groups
    former = torch.optim.Adam(
        [{key: group[key] for key in ("name", "lr", "params")} for group in groups],
        lr=0.0,
        eps=ADAM_EPS,
        fused=True,
    )
    for value in (1e-6, -3e-6):
        step_with(former, old, value)
    optimizer = create_optimizer(new, LearningRates(), 1.0)
    optimizer.load_state_dict(copy.deepcopy(former.state_dict()))
    with torch.no_grad():
        for one, other in zip(new.tensors().values(), old.tensors().values(), strict=True):
            one.copy_(other)
    for value in (2e-6, 1e-6):
        step_with(former, old, value)
        step_with(optimizer, new, value)
    for name, tensor in old.tensors().items():
        # Measured 2e-9; a parameter moves by 1e-4 and more.
        assert torch.allclose(new.tensors()[name], tensor, rtol=1e-6, atol=1e-7), name


def step_with(optimizer, gaussians, value):
    with_gradients(gaussians, value)
    optimizer.step()


def test_degree_zero_has_an_empty_tensor_that_can_be_stepped():
    gaussians = some_gaussians(sh_degree=0)
    optimizer = create_optimizer(gaussians, LearningRates(), 1.0)
    for tensor in gaussians.tensors().values():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    assert gaussians.shN.shape == (5, 0, 3)
