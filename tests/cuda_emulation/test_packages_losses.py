"""fused_ssim and simple_knn as users call them, with tensors on an emulated GPU, against the kernels for CPUs."""

import contextlib

import fused_ssim
import oracles
import pytest
import torch
from emulated_driver import emulated_gpu
from simple_knn import knn
from simple_knn._C import distCUDA2

ON = {"cpu": contextlib.nullcontext, "gpu": emulated_gpu}


def images(*shape):
    g = torch.Generator().manual_seed(2)
    x = torch.rand(*shape, generator=g)
    return x, (x + 0.2 * torch.randn(*shape, generator=g)).clamp(0, 1)


def on_both(function, *tensors):
    """Value and gradient by the first tensor, by place, for an upstream gradient that is not 1; and the kernels in order."""
    results = {}
    for where, place in ON.items():
        with place() as driver:
            leaf = tensors[0].clone().requires_grad_()
            value = function(leaf, *tensors[1:])
            g = torch.Generator().manual_seed(4)
            upstream = torch.randn(value.shape, generator=g)
            (gradient,) = torch.autograd.grad(value, leaf, upstream)
            results[where] = (value.detach(), gradient)
    return results, driver.order


def assert_same(results):
    for ours, truth in zip(results["gpu"], results["cpu"], strict=True):
        assert ours.shape == truth.shape and ours.dtype == truth.dtype
        assert oracles.relative_l2(ours, truth) < 5e-6  # measured 1.2e-6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [(24, 17, 3), (70, 65, 1)])
def test_the_training_loss(size, weighted):
    x, y = images(*size)
    weight = torch.rand(*size[:2], 1) if weighted else None
    results, order = on_both(lambda a, b: fused_ssim.photometric_loss(a, b, 0.3, weight), x, y)
    assert order == ["ssim_forward", "ssim_gradient"]
    assert_same(results)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_mean_and_map(padding):
    x, y = images(2, 3, 20, 33)
    assert_same(on_both(lambda a, b: fused_ssim.fused_ssim(a, b, padding), x, y)[0])
    results, order = on_both(lambda a, b: fused_ssim.ssim_map(a, b, padding), x, y)
    assert order == ["ssim_forward", "ssim_forward", "ssim_gradient"]
    assert_same(results)


def test_a_value_alone_takes_one_launch_and_prepares_nothing():
    x, y = images(1, 3, 20, 20)
    with emulated_gpu() as driver:
        fused_ssim.fused_ssim(x.requires_grad_(), y, train=False)
        with torch.no_grad():
            fused_ssim.photometric_loss(x[0].permute(1, 2, 0), y[0].permute(1, 2, 0))
    assert driver.order == ["ssim_forward"] * 2
    assert [launch.arguments[-1] for launch in driver.launches] == [None, None]  # partials


def test_what_a_grid_cannot_hold_and_devices_that_differ():
    from fused_ssim import _cuda

    with emulated_gpu(), pytest.raises(ValueError, match="65536 image planes are too many"):
        _cuda._grid(torch.empty(65536, 1, 1, 1))
    with pytest.raises(ValueError, match="must be on the CPU or on one GPU, got cpu and meta"):
        fused_ssim.photometric_loss(torch.ones(4, 4, 3), torch.ones(4, 4, 3, device="meta"))


@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 4), (16, 3), (17, 3), (300, 3), (100, 20)])
def test_neighbours(n, k):
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) * torch.tensor(
        [3, 1, 0.1]
    )
    points[n // 2] = points[0]  # a duplicate
    found = {}
    for where, place in ON.items():
        with place() as driver:
            found[where] = (*knn(points, k), distCUDA2(points))
    assert {"morton_codes", "leaf_boxes", "search"} <= set(driver.order)
    for ours, truth in zip(found["gpu"][1:], found["cpu"][1:], strict=True):
        assert torch.allclose(ours, truth, rtol=1e-6)  # measured 1.4e-7
    ids, distances2, _ = found["gpu"]
    again = (points[:, None] - points[ids]).square().sum(-1)
    assert torch.allclose(again, distances2, rtol=1e-5, atol=1e-7)
    assert not (ids == torch.arange(n)[:, None]).any()


def test_one_point_has_no_neighbour():
    with emulated_gpu() as driver:
        assert knn(torch.ones(1, 3), 3)[0].shape == (1, 0)
        assert distCUDA2(torch.ones(1, 3)).tolist() == [0.0]
    assert driver.order == []
