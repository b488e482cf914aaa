"""Axioms and round trips on random transforms; SciPy as an independent oracle for rotations."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp

from s2d.geometry import (
    invert_rigid,
    look_at,
    look_at_point,
    pixel_grid,
    project,
    quat_to_rotation,
    rigid,
    rotation_angle,
    rotation_to_quat,
    slerp,
    unproject,
    up_axis,
)


def random_rigid(count, generator):
    quats = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return rigid(
        quat_to_rotation(quats), torch.randn(count, 3, generator=generator, dtype=torch.float64)
    )


def test_inverse_cancels_on_both_sides(generator):
    transforms = random_rigid(50, generator)
    eye = torch.eye(4, dtype=torch.float64).expand(50, 4, 4)
    # Measured error 1e-15.
    assert torch.allclose(invert_rigid(transforms) @ transforms, eye, atol=1e-12)
    assert torch.allclose(transforms @ invert_rigid(transforms), eye, atol=1e-12)


def test_quat_to_rotation_agrees_with_scipy_for_any_norm(generator):
    quats = torch.randn(100, 4, generator=generator, dtype=torch.float64) * 5
    expected = Rotation.from_quat(quats[:, [1, 2, 3, 0]].numpy()).as_matrix()  # SciPy's are xyzw
    np.testing.assert_allclose(quat_to_rotation(quats).numpy(), expected, atol=1e-12)


def test_rotation_to_quat_round_trip_with_half_turns(generator):
    quats = torch.nn.functional.normalize(
        torch.randn(200, 4, generator=generator, dtype=torch.float64), dim=-1
    )
    quats[:3] = torch.eye(4, dtype=torch.float64)[1:]  # half turns about x, y, z: w = 0
    quats[3] = torch.tensor([1e-9, 0.6, 0.0, 0.8], dtype=torch.float64)
    found = rotation_to_quat(quat_to_rotation(quats))
    same = torch.minimum((found - quats).abs().amax(1), (found + quats).abs().amax(1))
    assert float(same.max()) < 1e-12  # measured 3e-16
    assert bool((found[:, 0] >= 0).all())


def test_slerp_agrees_with_scipy_and_takes_the_short_way(generator):
    quats = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    rotations = Slerp([0, 1], Rotation.from_quat(quats[:, [1, 2, 3, 0]].numpy()))(t.numpy())
    for second in (quats[1:], -quats[1:]):
        found = quat_to_rotation(slerp(quats[:1], second, t))
        np.testing.assert_allclose(found.numpy(), rotations.as_matrix(), atol=1e-12)


def test_slerp_of_equal_rotations_is_finite():
    quats = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    assert torch.allclose(slerp(quats, quats, torch.tensor([0.3])), quats)


@pytest.mark.parametrize("angle", [0.0, 1e-8, 0.5, 3.0, math.pi - 1e-6, math.pi])
def test_rotation_angle_is_accurate_everywhere(angle):
    turned = torch.from_numpy(Rotation.from_rotvec(np.array([0.6, 0.0, 0.8]) * angle).as_matrix())
    assert float(rotation_angle(turned, torch.eye(3, dtype=torch.float64))) == pytest.approx(
        angle, abs=1e-9
    )


def test_first_pixel_centre_is_at_one_half():
    grid = pixel_grid(4, 3)
    assert grid.shape == (3, 4, 2)
    assert grid[0, 0].tolist() == [0.5, 0.5] and grid[2, 3].tolist() == [3.5, 2.5]


def test_project_by_hand():
    K = torch.tensor([[100.0, 0, 20], [0, 200.0, 10], [0, 0, 1]])
    viewmat = torch.eye(4)
    viewmat[2, 3] = 1.0  # the camera stands at z = -1
    xy, depth = project(torch.tensor([1.0, -0.5, 3.0]), K, viewmat)
    assert depth == 4.0 and xy.tolist() == [100 * 1 / 4 + 20, 200 * -0.5 / 4 + 10]


def test_project_inverts_unproject(generator):
    viewmat = random_rigid(1, generator)[0]
    K = torch.tensor([[40.0, 0, 17.3], [0, 42.0, 11.1], [0, 0, 1]], dtype=torch.float64)
    depth = 1 + torch.rand(24, 32, generator=generator, dtype=torch.float64)
    depth[3, 5] = 0
    points = unproject(depth, K, viewmat)
    xy, z = project(points, K, viewmat)
    seen = depth > 0
    assert torch.allclose(xy[seen], pixel_grid(32, 24, dtype=torch.float64)[seen], atol=1e-9)
    assert torch.allclose(z[seen], depth[seen])
    assert points[3, 5].tolist() == [0, 0, 0]


def test_resizing_is_scaling_the_first_two_rows_of_k(generator):
    """The corner-origin convention: a point's position scales with the picture, with no half-pixel shift."""
    K = torch.tensor([[40.0, 0, 17.3], [0, 42.0, 11.1], [0, 0, 1]])
    points = torch.rand(10, 3, generator=generator) + torch.tensor([0, 0, 2.0])
    half = K.clone()
    half[:2] *= 0.5
    assert torch.allclose(
        project(points, half, torch.eye(4))[0], project(points, K, torch.eye(4))[0] / 2
    )


def test_look_at_sees_the_target_in_the_middle_with_up_upwards(generator):
    centers = torch.randn(20, 3, generator=generator, dtype=torch.float64) * 3
    target = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    viewmats = look_at(centers, target.expand_as(centers), up)
    in_camera = viewmats[:, :3, :3] @ target + viewmats[:, :3, 3]
    distance = (target - centers).norm(dim=-1)
    assert torch.allclose(
        in_camera, torch.stack([0 * distance, 0 * distance, distance], -1), atol=1e-9
    )
    assert torch.allclose(torch.linalg.det(viewmats), torch.ones(20, dtype=torch.float64))
    assert (
        bool((-(viewmats[:, 1, :3] @ up) <= 0).any()) is False
    )  # picture-up (-y) has a part along up


def test_look_at_straight_down_is_still_rigid():
    viewmat = look_at(
        torch.tensor([[0.0, 0.0, 5.0]]), torch.zeros(1, 3), torch.tensor([0.0, 0.0, 1.0])
    )
    assert torch.allclose(viewmat[0, :3, :3] @ viewmat[0, :3, :3].T, torch.eye(3), atol=1e-6)


def test_up_axis_and_look_at_point_of_a_ring():
    angle = torch.linspace(0, 5.5, 9, dtype=torch.float64)
    centers = torch.stack([2 * torch.cos(angle), 2 * torch.sin(angle), 0 * angle + 1], -1)
    target = torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    viewmats = look_at(centers, target.expand_as(centers), up)
    assert float((look_at_point(viewmats) - target).norm()) < 1e-6
    assert float(up_axis(viewmats) @ up) > 0.99
    # One camera that looks elsewhere has little say (a plain mean moves by 0.2).
    viewmats[0] = look_at(centers[:1], centers[:1] + torch.tensor([[0.0, 1.0, 0.3]]), up)[0]
    assert float((look_at_point(viewmats) - target).norm()) < 0.01


def test_parallel_cameras_look_at_the_fallback_depth():
    viewmats = torch.eye(4).repeat(3, 1, 1)
    viewmats[:, 0, 3] = torch.tensor([-1.0, 0.0, 1.0])
    assert torch.allclose(
        look_at_point(viewmats, fallback_depth=7.0), torch.tensor([0.0, 0.0, 7.0])
    )
