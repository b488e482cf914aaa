"""Losses on rendered depth and on warped views: each against numbers by hand, or a picture that cannot share its mistake."""

from dataclasses import replace

import pytest
import torch
from blobs import FOCAL, HEIGHT, WIDTH, camera

from s2d.geometry import pixel_grid, unproject
from s2d.strategies import binocular, depth_supervision

# ---- depth -----------------------------------------------------------------------------------------------------------


def slanted_plane():
    """Depth [H, W] of the plane 0.3 x + 0.1 y + z = 5 in camera axes, and its normal that faces the camera."""
    normal = torch.tensor([0.3, 0.1, 1.0], dtype=torch.float64)
    xy = pixel_grid(WIDTH, HEIGHT, dtype=torch.float64)
    rays = torch.stack(
        [(xy[..., 0] - 16) / FOCAL, (xy[..., 1] - 12) / FOCAL, xy[..., 0] * 0 + 1], -1
    )
    return (5 / (rays @ normal)).float(), -(normal / normal.norm()).float()


def test_depth_losses_by_hand():
    target = torch.tensor([[2.0, 4.0], [0.0, 1.0]])
    confidence = torch.tensor([[1.0, 0.5], [1.0, 1.0]])
    alpha = torch.tensor([[1.0, 1.0], [1.0, 0.01]])  # the last one is hardly drawn
    ones = torch.ones(2, 2)
    assert float(depth_supervision.depth_loss(target, ones, target, ones)) == 0
    depth = torch.tensor([[1.0, 8.0], [3.0, 9.0]])
    # |2/1 - 1| + 0.5 |4/8 - 1|, over four pixels.
    loss = depth_supervision.depth_loss(depth, alpha, target, confidence)
    assert float(loss) == pytest.approx((1 + 0.25) / 4)


def test_pearson_knows_no_scale_and_no_offset(generator):
    inverse = torch.rand(8, 9, generator=generator) + 0.5
    ones = torch.ones(8, 9)
    same = depth_supervision.pearson_loss(1 / (3 * inverse + 0.2), ones, 1 / inverse, ones)
    assert float(same) == pytest.approx(0, abs=1e-5)  # measured 0
    opposite = depth_supervision.pearson_loss(1 / (3 - inverse), ones, 1 / inverse, ones)
    assert float(opposite) == pytest.approx(2, abs=1e-5)
    nothing = depth_supervision.pearson_loss(1 / inverse, ones, 0 * inverse, ones)
    assert float(nothing) == 0


def test_normals_of_a_plane_are_its_normal():
    depth, normal = slanted_plane()
    normals, known = depth_supervision.normals_of(depth, camera().Ks[0])
    assert bool(known.all())
    torch.testing.assert_close(
        normals, normal.expand_as(normals), atol=5e-5, rtol=0
    )  # measured 3e-6
    ones = torch.ones_like(depth)
    K = camera().Ks[0]
    assert float(depth_supervision.normal_loss(depth, ones, depth, ones, K)) < 1e-6
    flat = torch.full_like(depth, 5.0)
    # Per pixel 1 - cos of the angle to the optical axis, over all but the last row and column.
    share = (WIDTH - 1) * (HEIGHT - 1) / (WIDTH * HEIGHT)
    loss = depth_supervision.normal_loss(flat, ones, depth, ones, K)
    assert float(loss) == pytest.approx(share * (1 + float(normal[2])), rel=1e-3)


def test_a_step_in_depth_gives_no_normal():
    depth = torch.full((4, 6), 2.0)
    depth[:, 3:] = 3.0
    _, known = depth_supervision.normals_of(depth, torch.eye(3))
    assert known[0].tolist() == [True, True, False, True, True]


def test_smoothness_asks_nothing_at_edges_of_the_photo():
    depth = torch.full((4, 6), 2.0)
    ones, photo = torch.ones(4, 6), torch.zeros(4, 6, 3)
    assert float(depth_supervision.smoothness_loss(depth, ones, photo)) == 0
    depth[:, 3:] = 4.0
    plain = float(depth_supervision.smoothness_loss(depth, ones, photo))
    photo[:, 3:] = 1.0
    assert plain > 0.05
    assert float(depth_supervision.smoothness_loss(depth, ones, photo)) < 1e-6 * plain


# ---- binocular -------------------------------------------------------------------------------------------------------


def texture(points):
    return 0.5 + 0.4 * torch.sin(
        points @ torch.tensor([[1.1, 0.3, 0.2], [0.4, 1.3, 0.9], [0.2, 0.5, 1.7]]).T
    )


def picture(view):
    """What a camera sees of the plane z = 0.5 x of the world: colours [H, W, 3] and depth [H, W]."""
    far = unproject(torch.ones(HEIGHT, WIDTH), view.Ks[0], view.viewmats[0])
    center = view.centers[0]
    rays = far - center
    normal = torch.tensor([-0.5, 0.0, 1.0])
    depth = -(center @ normal) / (rays @ normal)
    return texture(center + rays * depth[..., None]), depth


def test_the_right_depth_brings_the_shifted_picture_back():
    first, focal, shift = camera(), torch.tensor(FOCAL), torch.tensor(0.3)
    photo, depth = picture(first)
    image, _ = picture(replace(first, viewmats=binocular.shifted(first.viewmats, shift)))
    assert float((image - photo).abs().mean()) > 0.02
    good = binocular.binocular_loss(image, depth, photo, focal, shift)
    bad = [binocular.binocular_loss(image, depth * f, photo, focal, shift) for f in (0.8, 1.25)]
    # Measured 4e-4 (bilinear) against 0.017 and 0.015.
    assert float(good) < 0.001 < 0.01 < min(map(float, bad))
    wrong = (depth * 1.25).requires_grad_()
    binocular.binocular_loss(image, wrong, photo, focal, shift).backward()
    assert float(wrong.grad.sum()) > 0  # smaller depth is better


def test_shifts_stay_small_in_the_picture(generator):
    depth, focal = torch.full((HEIGHT, WIDTH), 7.0), camera().Ks[0, 0, 0]
    shifts = [binocular.draw_shift(depth, focal, generator) for _ in range(200)]
    disparities = torch.tensor(shifts) * FOCAL / 7.0
    assert 0.9 * 0.04 * WIDTH < float(disparities.abs().max()) <= 0.04 * WIDTH
    assert float(disparities.min()) < 0 < float(disparities.max())
    assert binocular.draw_shift(0 * depth, focal, generator) == 0
