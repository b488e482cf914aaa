"""Lengths of the pixels' 2D gradients, added up: `lengths_probe` and the statistics of `TrainingView.update(lengths=True)`."""

import oracles
import pytest
import torch
from diff_gaussian_rasterization import SparseGaussianAdam, TrainingView, rasterize_gaussians_raw
from diff_gaussian_rasterization.reference import rasterize_reference
from torch import Tensor

WIDTH, HEIGHT = 20, 12
HALF_SIZE = torch.tensor([0.5 * WIDTH, 0.5 * HEIGHT], dtype=torch.float64)


def scene_of(**options) -> dict:
    return oracles.make_scene(num_gaussians=25, degree=1, width=WIDTH, height=HEIGHT, **options)


def weights_of(num_cameras: int = 1) -> Tensor:
    """What the loss multiplies rgb, alpha and depth with. [C, H, W, 5]"""
    g = torch.Generator().manual_seed(5)
    return torch.randn(num_cameras, HEIGHT, WIDTH, 5, generator=g, dtype=torch.float64)


def loss_of(out, weights: Tensor, with_depth: bool) -> Tensor:
    images = torch.cat([out.rgb, out.alpha, out.depth], -1)
    channels = 5 if with_depth else 4
    return (images * weights.to(images))[..., :channels].sum()


def lengths_of(scene: dict, weights: Tensor, with_depth: bool = True) -> Tensor:
    """What the kernels make of it. [C, N]"""
    scene = oracles.cast(scene, torch.float32)
    probe = torch.full(scene["means2d_probe"].shape[:2], 7.0, requires_grad=True)
    out = rasterize_gaussians_raw(**scene, lengths_probe=probe)
    loss_of(out, weights, with_depth).backward()
    return probe.grad


def signed_lengths(
    rasterize, scene: dict, weights: Tensor, with_depth: bool, masks: Tensor
) -> Tensor:
    """Length of the gradient of the position, of the loss on each mask's pixels alone [M, H, W]. [M, C, N]"""
    probe = scene["means2d_probe"].clone().requires_grad_()
    out = rasterize(**{**scene, "means2d_probe": probe})
    half_size = HALF_SIZE.to(probe)
    found = []
    for mask in masks:
        loss = loss_of(out, weights * mask[None, :, :, None], with_depth)
        (gradient,) = torch.autograd.grad(loss, probe, retain_graph=True)
        found.append((gradient * half_size).norm(dim=-1))
    return torch.stack(found)


def single_pixels() -> Tensor:
    return torch.eye(HEIGHT * WIDTH, dtype=torch.float64).reshape(-1, HEIGHT, WIDTH)


@pytest.mark.parametrize("with_depth", [True, False])
def test_the_float64_twin_pixel_by_pixel(with_depth):
    scene, weights = scene_of(), weights_of()
    truth = signed_lengths(rasterize_reference, scene, weights, with_depth, single_pixels()).sum(0)
    value = lengths_of(scene, weights, with_depth)
    assert oracles.relative_l2(value, truth) < 1e-6  # measured 2.0e-7
    assert oracles.cosine(value, truth) > 0.999999


def test_two_cameras_and_the_kernels_own_gradients():
    scene, weights = scene_of(num_cameras=2), weights_of(2)
    single = oracles.cast(scene, torch.float32)
    truth = signed_lengths(rasterize_gaussians_raw, single, weights, True, single_pixels()).sum(0)
    value = lengths_of(scene, weights)
    assert value.shape == (2, 25) and oracles.relative_l2(value, truth) < 5e-7  # measured 5.4e-8


def test_what_must_hold_whatever_the_picture():
    scene, weights = scene_of(), weights_of()
    whole = lengths_of(scene, weights)
    # No direction of the loss, no other unit, and no cutting of the picture changes the sum.
    assert torch.equal(lengths_of(scene, -weights), whole)
    assert torch.allclose(lengths_of(scene, 3 * weights), 3 * whole, rtol=1e-5)
    left = torch.zeros(HEIGHT, WIDTH, 1, dtype=torch.float64)
    left[:, :7] = 1
    parts = lengths_of(scene, left * weights) + lengths_of(scene, (1 - left) * weights)
    assert torch.allclose(parts, whole, rtol=1e-5)
    # At least the length of the sum; as much where one pixel is all.
    everything = torch.ones(1, HEIGHT, WIDTH, dtype=torch.float64)
    signed = signed_lengths(rasterize_reference, scene, weights, True, everything)[0]
    seen = signed > 0
    assert int(seen.sum()) > 10
    assert bool((whole >= signed * (1 - 1e-5)).all()) and bool((whole[seen] > 1.2 * signed[seen]).any())  # fmt: skip
    assert not whole[~seen].any()
    pixel = single_pixels()[5 * WIDTH + 11]
    alone = signed_lengths(rasterize_reference, scene, weights, True, pixel[None])[0]
    value = lengths_of(scene, pixel[:, :, None] * weights)
    assert alone.any() and oracles.relative_l2(value, alone) < 2e-6


@pytest.mark.parametrize("with_depth", [True, False])
def test_training_views_count_the_same(with_depth):
    scene, weights = oracles.cast(scene_of(), torch.float32), weights_of()
    scene["background"].zero_()
    expected = lengths_of(scene, weights, with_depth)[0]
    params = {name: scene[name].clone() for name in oracles.PARAMETERS}
    optimizer = SparseGaussianAdam([{"params": [p]} for p in params.values()], lr=0.01, eps=1e-15)
    sums, views = torch.ones(25), torch.zeros(25)
    view = TrainingView(params, scene["viewmats"][0], scene["Ks"][0], WIDTH, HEIGHT)
    loss = (torch.cat([view.rgb, view.alpha], -1) * weights[0, ..., :4].float()).sum()
    if with_depth:
        loss = loss + (view.depth * weights[0, ..., 4:].float()).sum()
    loss.backward()
    view.update(optimizer, statistics=(sums, views), lengths=True)
    assert torch.equal(sums, 1 + expected)
    assert torch.equal(views > 0, view.radii > 0) and not bool((views > 0).all())


def test_a_probe_of_another_shape_is_refused():
    scene = oracles.cast(scene_of(), torch.float32)
    with pytest.raises(ValueError, match=r"lengths_probe must be \[1, 25\], got \[25\]"):
        rasterize_gaussians_raw(**scene, lengths_probe=torch.zeros(25))


def test_nothing_is_counted_without_the_asking():
    scene = oracles.cast(scene_of(), torch.float32)
    probe = torch.zeros(1, 25)  # asks for no gradient
    scene["means"].requires_grad_()
    rasterize_gaussians_raw(**scene, lengths_probe=probe).rgb.sum().backward()
    assert probe.grad is None and scene["means"].grad.any()
