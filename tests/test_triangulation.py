"""Triangulation against known points, with wrong observations, points behind cameras and hopeless angles."""

import torch
from tiny_scene import tiny_model

from s2d.geometry import project
from s2d.triangulation import triangulate


def rig():
    """Three cameras side by side that look along z."""
    viewmats = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    viewmats[:, 0, 3] = torch.tensor([1.0, 0.0, -1.0])  # centres at x = -1, 0, 1
    K = torch.tensor([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]], dtype=torch.float64)
    return viewmats, K.repeat(3, 1, 1)


def observe(points, viewmats, Ks):
    """All points in all views: xys, point_ids, view_ids."""
    xys = [project(points, K, viewmat)[0] for K, viewmat in zip(Ks, viewmats, strict=True)]
    count = len(points)
    views = torch.arange(len(viewmats)).repeat_interleave(count)
    return torch.cat(xys), torch.arange(count).repeat(len(viewmats)), views


def test_exact_observations_give_the_points_back(generator):
    viewmats, Ks = rig()
    points = torch.rand(200, 3, generator=generator, dtype=torch.float64) * 2 + torch.tensor(
        [-1, -1, 4.0]
    )
    found = triangulate(*observe(points, viewmats, Ks), viewmats, Ks, 200)
    assert bool(found.good.all()) and bool(found.used.all())
    assert float((found.points - points).abs().max()) < 1e-8  # measured 1e-13
    assert float(found.errors.max()) < 1e-8


def test_the_angle_is_that_of_the_outer_rays():
    viewmats, Ks = rig()
    point = torch.tensor([[0.0, 0.0, 10.0]], dtype=torch.float64)
    found = triangulate(*observe(point, viewmats, Ks), viewmats, Ks, 1)
    assert torch.allclose(found.angles, 2 * torch.atan(torch.tensor([0.1], dtype=torch.float64)))


def test_noise_of_half_a_pixel_keeps_points_near_and_errors_honest(generator):
    viewmats, Ks = rig()
    points = torch.rand(500, 3, generator=generator, dtype=torch.float64) * 2 + torch.tensor(
        [-1, -1, 4.0]
    )
    xys, point_ids, view_ids = observe(points, viewmats, Ks)
    xys = xys + 0.5 * torch.randn(xys.shape, generator=generator, dtype=torch.float64)
    found = triangulate(xys, point_ids, view_ids, viewmats, Ks, 500)
    error = (found.points - points)[found.good].norm(dim=1)
    # Depth noise of a stereo pair: z² / (f b) * 0.5 px is 0.06 at z = 5; measured median 0.05.
    assert float(error.median()) < 0.1
    # 6 residuals minus 3 unknowns: the root mean square over 3 observations is about 0.5 sqrt(2) sqrt(3 / 6) = 0.5 px.
    assert 0.35 < float(found.errors[found.good].mean()) < 0.6


def test_one_wrong_observation_is_left_out(generator):
    viewmats, Ks = rig()
    viewmats = torch.cat([viewmats, viewmats[1:2]])
    viewmats[3, 1, 3] = 1.0  # a fourth camera above, so that the majority is clear
    Ks = torch.cat([Ks, Ks[:1]])
    points = torch.rand(50, 3, generator=generator, dtype=torch.float64) + torch.tensor(
        [-0.5, -0.5, 5.0]
    )
    xys, point_ids, view_ids = observe(points, viewmats, Ks)
    wrong = view_ids == 2
    xys[wrong] += torch.tensor([7.0, 11.0], dtype=torch.float64)
    found = triangulate(xys, point_ids, view_ids, viewmats, Ks, 50)
    assert bool(found.good.all())
    assert torch.equal(found.used, ~wrong)
    assert float((found.points - points).abs().max()) < 1e-6


def test_behind_the_cameras_one_view_and_small_angles_are_not_good():
    viewmats, Ks = rig()
    points = torch.tensor(
        [[0.2, 0.1, -5.0], [0.2, 0.1, 5.0], [0.2, 0.1, 500.0]], dtype=torch.float64
    )
    xys, point_ids, view_ids = observe(points, viewmats, Ks)
    only_once = (point_ids != 1) | (view_ids == 0)
    found = triangulate(xys[only_once], point_ids[only_once], view_ids[only_once], viewmats, Ks, 3)
    # The third: 2 / 500 rad is 0.23 degrees, below 1.
    assert found.good.tolist() == [False, False, False]


def test_order_of_observations_does_not_matter(generator):
    model = tiny_model()
    K = [
        [[p[0], 0, p[2]], [0, p[1], p[3]], [0, 0, 1]]
        for p in (lens.params for lens in model.lenses)
    ]
    tensors = [torch.from_numpy(values) for values in (model.xys, model.point_ids, model.view_ids)]
    shuffle = torch.randperm(len(tensors[0]), generator=generator)
    cameras = (
        torch.from_numpy(model.viewmats),
        torch.tensor(K, dtype=torch.float64),
        len(model.points),
    )
    one = triangulate(*tensors, *cameras)
    other = triangulate(*(values[shuffle] for values in tensors), *cameras)
    assert torch.allclose(one.points, other.points, atol=1e-9)
    assert float((one.points - torch.from_numpy(model.points)).abs().max()) < 1e-6


def test_no_observations():
    viewmats, Ks = rig()
    none = torch.zeros(0, dtype=torch.long)
    found = triangulate(torch.zeros(0, 2), none, none, viewmats, Ks, 2)
    assert found.good.tolist() == [False, False]
