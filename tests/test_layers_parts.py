"""Pyramids, depth, and what the reduced mode measures: each against a way to the same number that shares no code with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from layer_server import write_small_levels

from s2d.cameras import Cameras
from s2d.depth_io import read_depth
from s2d.gaussians import Gaussians
from s2d.geometry import look_at, project
from s2d.layers import reduce
from s2d.layers.depth import (
    DepthTarget,
    depth_target,
    depth_weight,
    relative_depth_loss,
)
from s2d.layers.foundation import Foundation
from s2d.layers.pyramid import Pyramid, reduced
from s2d.layers.reduce import contributions, cull_colours, least_important, redundant_rows
from s2d.layers.score import score_views
from s2d.layers.show import draw_level, shown_rescale, widened
from s2d.metrics import psnr
from s2d.optim import LearningRates, create_optimizer
from s2d.rasterize import rasterize
from s2d.refinement import Refinement, RefinementRates
from s2d.scene import load_scene
from s2d.views import View


def cameras_of(*sizes):
    centers = torch.tensor([[0.5 * i - 0.5, -6.0, 0.4] for i in range(len(sizes))])
    viewmats = look_at(centers, torch.zeros(len(sizes), 3), torch.tensor([0.0, 0.0, 1.0]))
    Ks = torch.tensor(
        [[[1.1 * w, 0, 0.5 * w + 1.3], [0, 1.2 * w, 0.5 * h - 0.7], [0, 0, 1]] for w, h in sizes]
    )
    return Cameras(viewmats, Ks, sizes, tuple(f"v{i}" for i in range(len(sizes))))


def some_gaussians(num=60, seed=0, degree=2):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return Gaussians(
        normal(num, 3), normal(num, 3) * 0.3 - 1.5, normal(num, 4), normal(num),
        normal(num, 1, 3) * 0.5, normal(num, (degree + 1) ** 2 - 1, 3) * 0.2,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- pyramids


@pytest.mark.parametrize("factor", [2.0, 3.7, 8.0])
def test_reduced_intrinsics_are_exact(factor):
    """A point's pixel moves by new size / old size in each direction, whatever the rounding of the size did."""
    camera = cameras_of((67, 50))
    view = reduced(View(camera, torch.rand(50, 67, 3), torch.rand(50, 67, 1)), factor)
    width, height = view.camera.width, view.camera.height
    assert view.target.shape == (height, width, 3) and view.weight.shape == (height, width, 1)
    assert (width, height) == (round(67 / factor), round(50 / factor))
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    before, _ = project(points, camera.Ks[0], camera.viewmats[0])
    after, _ = project(points, view.camera.Ks[0], view.camera.viewmats[0])
    scale = torch.tensor([width / 67, height / 50])
    torch.testing.assert_close(after, before * scale, atol=1e-5, rtol=1e-6)  # measured 2e-6 px


def coverage(old, new):
    """How much of each old pixel every new pixel covers, as shares that sum to 1. [new, old]"""
    edges = np.linspace(0, old, new + 1)
    low = np.maximum(edges[:-1, None], np.arange(old)[None])
    high = np.minimum(edges[1:, None], np.arange(old)[None] + 1)
    return np.clip(high - low, 0, None) / (old / new)


@pytest.mark.parametrize("factor", [2.0, 2.5, 8.0])
def test_reduced_pixels_are_means_over_areas(factor):
    image = torch.rand(40, 56, 3, generator=torch.Generator().manual_seed(0))
    view = reduced(View(cameras_of((56, 40)), image, None), factor)
    rows, columns = coverage(40, view.camera.height), coverage(56, view.camera.width)
    expected = np.einsum("ij,jkc,lk->ilc", rows, image.double().numpy(), columns)
    assert np.abs(view.target.double().numpy() - expected).max() < 1e-5  # measured 4e-7: float32


def test_a_checkerboard_turns_grey_and_does_not_alias():
    board = ((torch.arange(48)[:, None] + torch.arange(64)) % 2).float()[..., None].repeat(1, 1, 3)
    view = reduced(View(cameras_of((64, 48)), board, None), 8)
    assert float((view.target - 0.5).abs().max()) < 1e-6


def test_a_pyramid_makes_each_view_once():
    calls = []
    camera = cameras_of((16, 16))

    def source(is_kept, name):
        calls.append((is_kept, name))
        return View(camera, torch.rand(16, 16, 3), None)

    pyramid = Pyramid(source, 2)
    assert pyramid(True, "v0") is pyramid(True, "v0")
    pyramid(False, "v0")
    assert calls == [(True, "v0"), (False, "v0")]


def test_learned_cameras_follow_the_resolution():
    cameras = cameras_of((64, 48), (48, 36))
    refinement = Refinement(cameras, 1.0, RefinementRates.of_flags(True, True, False))
    for camera in cameras.scaled(0.25):
        view = refinement.view_of(camera)
        torch.testing.assert_close(view.K, camera.Ks[0], atol=1e-5, rtol=0)
        view.K.sum().backward()  # the focal length still learns
    assert refinement.view_of(cameras[0].renamed(["other"])) is None


# ------------------------------------------------------------------------------------------------------------------ depth


def test_depth_that_is_off_by_an_offset_per_patch_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    inverse = 0.2 + 0.1 * torch.rand(32, 32, generator=generator)
    offset = (
        torch.tensor([[0.0, 0.05], [-0.04, 0.1]]).repeat_interleave(16, 0).repeat_interleave(16, 1)
    )
    target = DepthTarget(inverse, torch.ones(32, 32))
    alpha = torch.ones(32, 32, 1)
    loss = relative_depth_loss(1 / (inverse + offset)[..., None], alpha, target)
    assert float(loss) < 1e-6  # measured 6e-8
    # Over patches twice as large the same offsets are an error.
    assert float(relative_depth_loss(1 / (inverse + offset)[..., None], alpha, target, 32)) > 0.05


def test_depth_loss_by_hand():
    """One patch of two known pixels: t = 0.5, 0.25, q = 0.5, 0.5; means 0.375 and 0.5; |q - mean q - (t - mean t)| = 0.125 for both."""
    target = DepthTarget(torch.tensor([[0.5, 0.25, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    depth = torch.tensor([[2.0, 2.0, 7.0]])[..., None]
    loss = relative_depth_loss(depth, torch.ones(1, 3, 1), target, patch=4)
    assert float(loss) == pytest.approx(0.125 / 0.375)
    # What is hardly drawn says nothing about depth, and what is unknown weighs nothing.
    faint = torch.tensor([[1.0, 0.2, 1.0]])[..., None]
    assert float(relative_depth_loss(depth, faint, target, patch=4)) == 0.0
    assert float(relative_depth_loss(depth * 0, torch.zeros(1, 3, 1), target)) == 0.0


def test_depth_gradient_against_differences():
    generator = torch.Generator().manual_seed(0)
    depth = 2 + torch.rand(9, 7, 1, generator=generator, dtype=torch.float64)
    target = DepthTarget(
        0.3 + 0.1 * torch.rand(9, 7, generator=generator, dtype=torch.float64),
        torch.rand(9, 7, generator=generator, dtype=torch.float64),
    )
    depth.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda z: relative_depth_loss(z, torch.ones(9, 7, 1), target, 4), depth, eps=1e-7, atol=1e-5
    )


def test_depth_targets_are_averaged_by_confidence():
    depth = torch.tensor([[2.0, 4.0, -1.0, 5.0], [2.0, 4.0, 0.0, 5.0]])
    confidence = torch.tensor([[1.0, 0.5, 1.0, 0.0], [1.0, 0.5, 1.0, 0.0]])
    target = depth_target(depth, confidence, 2, 1)
    # Left: (0.5 + 0.5 x 0.25) / 1.5 of weight (1 + 0.5) / 2; right: nothing is known.
    assert target.inv_depth[0].tolist() == pytest.approx([0.625 / 1.5, 0.0])
    assert target.weight[0].tolist() == pytest.approx([0.75, 0.0])


def test_depth_weight_sets_in_late_and_falls():
    weights = [depth_weight(2.0, share) for share in (0.0, 0.24, 0.25, 0.625, 1.0)]
    assert weights == pytest.approx([0.0, 0.0, 2.0, 0.2, 0.02])
    assert depth_weight(0.0, 0.9) == 0.0


def test_missing_depth_says_what_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no depth of a/b\.jpg.*provider"):
        read_depth(tmp_path, "a/b.jpg")
    (tmp_path / "depth/a").mkdir(parents=True)
    np.savez(
        tmp_path / "depth/a/b.npz",
        depth=np.ones((2, 3), np.float32),
        confidence=np.ones((2, 3), np.float16),
    )
    depth, confidence = read_depth(tmp_path, "a/b.jpg")
    assert depth.shape == confidence.shape == (2, 3) and confidence.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------- reduced mode


def test_contributions_are_all_of_alpha():
    """Every bit of a picture's alpha is some Gaussian's blending weight; who is not drawn has none."""
    gaussians, cameras = some_gaussians(), cameras_of((48, 36), (40, 30))
    gaussians.means[5] = torch.tensor([0.0, -50.0, 0.0])  # behind the cameras
    weights = contributions(gaussians, cameras)
    alpha = sum(float(rasterize(gaussians, camera).alpha.sum()) for camera in cameras)
    assert float(weights.sum()) == pytest.approx(alpha, rel=1e-4)  # measured 3e-7
    assert float(weights[5]) == 0.0 and float(weights.min()) >= 0.0
    # Alone in the picture, all of alpha is one Gaussian's.
    one = Gaussians(**{name: tensor[7:8] for name, tensor in gaussians.tensors().items()})
    alpha = sum(float(rasterize(one, camera).alpha.sum()) for camera in cameras)
    assert float(contributions(one, cameras)[0]) == pytest.approx(alpha, rel=1e-4)


def test_least_important_takes_its_share_of_the_candidates():
    weights = torch.tensor([0.1, 5.0, 0.2, 3.0, 0.0, 4.0])
    candidates = torch.tensor([False, True, True, True, True, True])
    chosen = least_important(weights, candidates, 0.4)
    assert chosen.tolist() == [False, False, True, False, True, False]
    assert not least_important(weights, candidates, 0.1).any()


def test_redundant_are_the_faintest_beyond_three_in_a_pixel():
    gaussians = some_gaussians(9)
    gaussians.means[:] = 0.01
    gaussians.means[7] = torch.tensor([0.5, 0.0, 0.0])  # many pixels away
    gaussians.means[8] = torch.tensor([0.01, -50.0, 0.01])  # behind: in nobody's pixel
    gaussians.opacity_logits[:] = torch.tensor([0.0, 1, 2, 3, 4, 5, -9, -9, -9])
    cameras = cameras_of((48, 36))
    nobody, first = torch.zeros(9, dtype=torch.bool), torch.zeros(9, dtype=torch.bool)
    first[0] = True
    assert redundant_rows(gaussians, cameras, nobody).nonzero()[:, 0].tolist() == [0, 1, 2, 6]
    assert redundant_rows(gaussians, cameras, first).nonzero()[:, 0].tolist() == [1, 2, 3, 6]
    # At a higher resolution the room of a pixel is smaller, and these are no longer in one.
    gaussians.means[:7] += 0.02 * torch.arange(7)[:, None]
    assert redundant_rows(gaussians, cameras_of((1920, 1440)), nobody).sum() == 0
    assert redundant_rows(gaussians, cameras_of((24, 18)), nobody).sum() > 0


def test_culled_colours_look_the_same():
    gaussians, cameras = some_gaussians(), cameras_of((48, 36), (48, 36), (40, 30))
    gaussians.shN[:30] *= 0.01  # hardly view-dependent
    gaussians.shN[30:] *= 5
    before = [rasterize(gaussians, camera).rgb for camera in cameras]
    candidates = torch.ones(60, dtype=torch.bool)
    candidates[50:] = False
    kept = gaussians.shN[50:].clone()
    flat = cull_colours(gaussians, cameras, candidates)
    assert 30 <= flat < 50 and not gaussians.shN[:30].any()
    assert torch.equal(gaussians.shN[50:], kept)
    for camera, rgb in zip(cameras, before, strict=True):
        error = (rasterize(gaussians, camera).rgb - rgb).abs()
        # A colour may move by twice the spread that counts as flat; measured 0.06 at most and 0.006 on average.
        assert float(error.max()) < 3 * reduce.FLAT_COLOUR and float(error.mean()) < 0.02


def test_culling_keeps_the_degree_that_is_seen():
    """View dependence of degree 1 alone stays; that of degree 2 which cannot be told from none goes."""
    gaussians = some_gaussians(20)
    gaussians.shN[:, :3] = 2.0
    gaussians.shN[:, 3:] = 1e-4
    cull_colours(
        gaussians, cameras_of((48, 36), (48, 36), (40, 30)), torch.ones(20, dtype=torch.bool)
    )
    dependent = gaussians.shN[:, :3].any(2).any(1)
    assert bool(dependent.any()) and not gaussians.shN[:, 3:].any()


def test_frozen_optimiser_state_is_no_way_back():
    """Large moments of frozen rows move them in a step; what is put back afterwards are the old bits."""
    gaussians = some_gaussians(10)
    optimizer = create_optimizer(gaussians, LearningRates(), 1.0)
    foundation = Foundation.of(gaussians, 6, "opacity")
    before = gaussians.means.detach().clone()
    for tensor in gaussians.tensors().values():
        tensor.grad = torch.zeros_like(tensor)
        optimizer.state[tensor] = {
            "step": torch.tensor(5.0),
            "exp_avg": torch.ones_like(tensor),
            "exp_avg_sq": torch.full_like(tensor, 1e-4),
        }
    optimizer.step()
    assert not torch.equal(gaussians.means[:6], before[:6])
    foundation.hold(gaussians)
    assert torch.equal(gaussians.means[:6], before[:6])
    assert not torch.equal(gaussians.means[6:], before[6:])


# ------------------------------------------------------------------------------------------------------------------ scores


def test_scores_are_perfect_for_what_was_rendered(tiny_scene, tmp_path):
    """A 'photo' that is the render itself, rounded as files are: 100 dB at its own size."""
    scene = load_scene(tiny_scene)
    gaussians = some_gaussians()
    camera = scene.cameras[:1]
    shown = rasterize(gaussians, camera).rgb[0].clamp(0, 1)
    scene._cache[camera.names[0]] = (shown * 255).round() / 255
    scores = score_views(gaussians, camera, scene, 1.0, folder=tmp_path)
    assert scores["psnr"] == pytest.approx(100.0) and scores["ssim"] == pytest.approx(1.0)
    assert (tmp_path / camera.names[0]).is_file()
    assert score_views(gaussians, camera, scene, 0.5)["psnr"] < 60


def test_above_its_own_resolution_a_level_is_its_own_picture_enlarged(tiny_scene):
    """The 'photo' is a level's picture enlarged by another program: what a level is scored against at full size must be the same."""
    scene = load_scene(tiny_scene)
    gaussians = some_gaussians()
    gaussians.log_scales -= 3.0  # far thinner than a pixel, as coarse levels are
    camera = scene.cameras[:1]
    own = rasterize(gaussians, camera.scaled(0.5)).rgb.clamp(0, 1).permute(0, 3, 1, 2)
    # torch's bicubic kernel is OpenCV's: a = -0.75.
    size = (camera.height, camera.width)
    enlarged = torch.nn.functional.interpolate(own, size, mode="bicubic", align_corners=False)
    scene._cache[camera.names[0]] = enlarged[0].permute(1, 2, 0).clamp(0, 1)
    shown = score_views(gaussians, camera, scene, 1.0, own_rescale=0.5)
    assert shown["psnr"] > 60  # measured 100
    assert score_views(gaussians, camera, scene, 1.0)["psnr"] < 30  # needles; measured 24


def test_the_resolution_of_what_has_arrived(tmp_path):
    levels = write_small_levels(tmp_path)  # 1/4, 1/2, 1
    shares = [(-1, 0.0), (-1, 0.7), (0, 0.0), (0, 0.25), (0, 0.5), (0, 0.9), (1, 0.0), (1, 0.25)]
    shown = [shown_rescale(levels, level, share) for level, share in shares]
    assert shown == pytest.approx([0.25, 0.25, 0.25, 0.375, 0.5, 0.5, 0.5, 0.75])
    assert shown_rescale(levels, 2, 0.0) == 1.0


def test_widened_gaussians_show_a_level_at_full_size():
    cameras = cameras_of((128, 96), (128, 96), (128, 96))
    gaussians = some_gaussians(300)
    gaussians.log_scales -= 2.0
    view = cameras[1]
    own = draw_level(gaussians, view, 0.25)
    wide = draw_level(widened(gaussians, cameras, 0.25), view, 1.0)
    assert psnr(wide, own) > 29  # measured 31.6: depths differ from camera to camera
    assert psnr(draw_level(gaussians, view, 1.0), own) < 18  # needles; measured 15.9
    nowhere = replace(gaussians, means=(3 * view.centers).expand(gaussians.num, 3))
    for model, rescale in ((gaussians, 1.0), (nowhere, 0.25)):  # nowhere: behind all cameras
        same = widened(model, cameras, rescale)
        assert torch.allclose(same.log_scales, model.log_scales, atol=1e-6)  # measured 0
