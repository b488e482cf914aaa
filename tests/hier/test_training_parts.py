"""Schedule, losses and scores against other people's definitions and hand numbers; flights; stopping between steps."""

import os
import signal

import numpy as np
import pytest
import torch

from s2d.cameras import Cameras
from s2d.geometry import invert_rigid, pixel_grid
from s2d.hier.config import STRIDES
from s2d.hier.data.samples import as_batch, as_views
from s2d.hier.gaussians import HierGaussians, render
from s2d.hier.judging import flight, judge, mean_scores, score, windowed_ssim, write_sheet
from s2d.hier.training.losses import HierLoss, HierWeights, depth_error
from s2d.hier.training.schedule import rate_factor
from s2d.hier.views import Views
from s2d.images import image_info
from s2d.runs.interrupt import stop_between_steps

SIZE = 16


def views(num=2, seed=0):
    """Cameras side by side before a wall at z = 4, and random pictures."""
    generator = torch.Generator().manual_seed(seed)
    viewmats = torch.eye(4).repeat(1, num, 1, 1)
    viewmats[0, :, 0, 3] = torch.linspace(-0.3, 0.3, num)
    K = torch.tensor([[SIZE, 0, SIZE / 2], [0, SIZE, SIZE / 2], [0, 0, 1]])
    images = torch.rand(1, num, 3, SIZE, SIZE, generator=generator)
    near, far = torch.full((1, num), 1.0), torch.full((1, num), 10.0)
    return Views(images, viewmats, K.repeat(1, num, 1, 1), near, far)


def wall(context, z, levels=(0, 1, 2)):
    """A Gaussian per cell and level at depth z, as the model orders them."""
    means, numbers = [], []
    for level in levels:
        stride = STRIDES[level]
        xy = (pixel_grid(SIZE // stride, SIZE // stride) * stride).reshape(-1, 2)
        rays = torch.cat([(xy - SIZE / 2) / SIZE, torch.ones(len(xy), 1)], 1)
        for viewmat in context.viewmats[0]:
            means.append(rays * z - viewmat[:3, 3])
            numbers += [level] * len(xy)
    means = torch.cat(means)[None]
    num = means.shape[1]
    return HierGaussians(
        means,
        torch.full((1, num, 3), -2.0),
        torch.tensor([1.0, 0, 0, 0]).repeat(1, num, 1),
        torch.full((1, num), 0.9),
        torch.rand(1, num, 1, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor(numbers),
    )


# --- schedule --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warm_up"), [(290, 30), (990, 10)])
def test_the_rate_is_torchs_one_cycle(steps, warm_up):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], lr=2e-4)
    total = steps + 10  # as published
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-4, total_steps=total, pct_start=warm_up / total, cycle_momentum=False
    )
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert 2e-4 * rate_factor(step, "one_cycle", warm_up, steps) == pytest.approx(expected)
        optimizer.step()
        cycle.step()


def test_a_constant_rate_does_not_know_the_end():
    rates = [rate_factor(step, "constant", 5, 100) for step in range(8)]
    assert rates == [rate_factor(step, "constant", 5, 9) for step in range(8)]
    assert rates[:2] == sorted(rates[:2]) and rates[4:] == [1.0] * 4
    assert rate_factor(0, "constant", 0, 9) == 1.0


# --- losses ----------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_over_levels():
    context, target = views(), views(3, seed=1)
    levels = [wall(context, 4.0, (0,)), wall(context, 4.0, (0, 1))]
    found = HierLoss(HierWeights(lpips=0.0), None)(levels, context, target)
    errors = [(render(level, target) - target.images).square().mean() for level in levels]
    for level, error in enumerate(errors):
        assert float(found[f"mse_{level}"]) == pytest.approx(float(error))
    assert float(found["loss"]) == pytest.approx(float(sum(errors)))
    assert set(found) == {"loss", "mse_0", "mse_1"}


def test_depth_error_is_nothing_at_the_truth_and_by_hand_elsewhere():
    context = views()
    depth = torch.zeros(1, 2, SIZE, SIZE)
    depth[0, 0, 3, 5] = depth[0, 1, 12, 9] = 4.0
    assert float(depth_error(wall(context, 4.0), context, depth)) == pytest.approx(0, abs=1e-6)
    wrong = wall(context, 5.0)
    wrong.means.requires_grad_()
    error = depth_error(wrong, context, depth)
    assert float(error.detach()) == pytest.approx((1 / 4 - 1 / 5) / (1 - 1 / 10), rel=1e-5)
    error.backward()
    moved = wrong.means.grad[0].norm(dim=-1) > 0
    assert moved.sum() == 2 * 3, "one Gaussian per level and known point"
    assert (wrong.means.grad[0, moved, 2] > 0).all(), "they are too far away"
    assert depth_error(wrong, context, torch.zeros_like(depth)) == 0


def test_the_nearest_point_of_a_cell_counts():
    context = views()
    depth = torch.zeros(1, 2, SIZE, SIZE)
    depth[0, 0, 4, 4], depth[0, 0, 5, 6] = 4.0, 8.0
    assert float(depth_error(wall(context, 4.0, (0,)), context, depth)) == pytest.approx(
        0, abs=1e-6
    )


def test_depth_errors_of_a_batch_are_the_mean_of_its_samples():
    """So two processes with a sample each have the gradient of one with both, though one knows more points."""
    context = views()
    both = Views(**{name: getattr(context, name).repeat(2, *[1] * (getattr(context, name).ndim - 1)) for name in vars(context)})  # fmt: skip
    depth = torch.zeros(2, 2, SIZE, SIZE)
    depth[0, 0, 3, 5] = 3.0
    depth[1, :, ::2, ::3] = 8.0
    one = wall(context, 4.0)
    pair = HierGaussians(*(getattr(one, n).repeat(2, *[1] * (getattr(one, n).ndim - 1)) if n != "levels" else one.levels for n in vars(one)))  # fmt: skip
    parts = [float(depth_error(one, context, depth[b : b + 1])) for b in range(2)]
    assert parts[0] != pytest.approx(parts[1])
    assert float(depth_error(pair, both, depth)) == pytest.approx(sum(parts) / 2)


# --- judging ---------------------------------------------------------------------------------------------------------------


def test_ssim_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    generator = np.random.default_rng(0)
    image = generator.random((31, 40, 3)).astype(np.float32)
    other = np.clip(image + generator.normal(0, 0.2, image.shape), 0, 1).astype(np.float32)
    expected = metrics.structural_similarity(
        image.astype(float), other.astype(float), win_size=11, gaussian_weights=True, channel_axis=2, data_range=1.0
    )  # fmt: skip
    assert windowed_ssim(*map(torch.from_numpy, (image, other))) == pytest.approx(
        expected, abs=1e-9
    )


def test_ssim_by_hand():
    """One window: 11 × 11 pixels, written out without convolutions."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 11, 11, 1, generator=generator).double()
    offsets = torch.arange(11).double() - 5
    weight = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))[..., None]
    weight /= weight.sum()
    mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
    scale = 121 / 120
    xx, yy = (scale * ((weight * v * v).sum() - m * m) for v, m in ((x, mean_x), (y, mean_y)))
    xy = scale * ((weight * x * y).sum() - mean_x * mean_y)
    expected = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
    expected *= (2 * xy + 9e-4) / (xx + yy + 9e-4)
    triple = [v.expand(-1, -1, 3).contiguous() for v in (x, y)]
    assert windowed_ssim(*triple) == pytest.approx(float(expected), abs=1e-12)
    assert windowed_ssim(triple[0], triple[0]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 11"):
        windowed_ssim(torch.zeros(10, 40, 3), torch.zeros(10, 40, 3))


def test_a_prediction_is_judged_level_by_level(tmp_path):
    context, target = views(), views(3, seed=1)
    sample = {}
    for role, found in (("context", context), ("target", target)):
        sample |= {f"{role}_{name}": getattr(found, name)[0] for name in vars(found)}
    levels = [wall(context, 4.0, (0,)), wall(context, 4.0)]
    exact = dict(sample, target_images=render(levels[1], target)[0].clamp(0, 1))
    judged = judge("wall", lambda views: levels, exact)
    rows = score(judged, None)
    assert rows[1]["psnr"] == 100 and rows[1]["ssim"] == pytest.approx(1.0)
    assert rows[0]["psnr"] < 40
    sheet = image_info(write_sheet(tmp_path / "sheet.png", [judged, judged]))
    assert (sheet.width, sheet.height) == (5 * 160, 2 * (160 + 22))
    assert as_views(as_batch(sample), "target").num_views == 3


def test_means_leave_out_what_is_not_there():
    assert mean_scores([{"psnr": 1.0, "lpips": 3.0}, {"psnr": 2.0}]) == {"psnr": 1.5, "lpips": 3.0}


def test_a_flight_goes_there_and_back():
    context = views(3)
    path = flight(context, 9)
    assert path.num_views == 9
    assert torch.allclose(path.viewmats[0, 0], context.viewmats[0, 0], atol=1e-6)
    assert torch.allclose(path.viewmats[0, 4], context.viewmats[0, 2], atol=1e-6)
    assert torch.allclose(path.viewmats[0, 8], context.viewmats[0, 0], atol=1e-6)
    centers = invert_rigid(path.viewmats[0])[:, :3, 3]
    assert (centers[:5, 0].diff() < 0).all() and (centers[4:, 0].diff() > 0).all()
    Cameras(path.viewmats[0], path.Ks[0], ((SIZE, SIZE),) * 9, tuple("abcdefghi"))  # rotations


# --- stopping --------------------------------------------------------------------------------------------------------------


def test_a_signal_is_answered_between_steps_and_a_second_one_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with stop_between_steps() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
