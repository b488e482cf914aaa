"""Sim(3) between two frames: exact where the truth is known, in every degenerate rig, and with cameras and points that lie."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from s2d.alignment import Sim3, align_cameras
from s2d.cameras import Cameras
from s2d.geometry import look_at, project, rotation_angle


def random_rotation(seed: int) -> torch.Tensor:
    return torch.from_numpy(Rotation.random(rng=np.random.default_rng(seed)).as_matrix())


def some_sim3(seed: int = 0, scale: float = 2.7) -> Sim3:
    translation = scale * torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    return Sim3(scale, random_rotation(seed), translation)


def rig(kind: str, count: int, seed: int = 0) -> Cameras:
    """Cameras about 4 units from what they look at."""
    random = np.random.default_rng(seed)
    along = torch.linspace(-1, 1, count, dtype=torch.float64)[:, None]
    centers = {
        "arc": torch.cat([1.5 * torch.sin(along), 0.4 * along**2, 0.3 * torch.cos(3 * along)], 1),
        "line": along * torch.tensor([1.0, 0.2, 0.1], dtype=torch.float64),
        "one place": torch.zeros(count, 3, dtype=torch.float64),
    }[kind]
    targets = torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64) + 0.5 * torch.from_numpy(
        random.normal(size=(count, 3))
    )
    viewmats = look_at(centers, targets, torch.tensor([0.1, -1.0, 0.0], dtype=torch.float64))
    K = torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]])
    names = [f"{i}" for i in range(count)]
    return Cameras(viewmats.float(), K.expand(count, 3, 3), [(64, 48)] * count, names)


def cloud(seed: int = 5, count: int = 300) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.uniform([-2, -2, 3], [2, 2, 6], (count, 3))).float()


def disturbed(cameras: Cameras, rows: list[int], degrees: float, shift: float) -> Cameras:
    viewmats = cameras.viewmats.double().clone()
    for row in rows:
        turn = torch.from_numpy(
            Rotation.from_rotvec(
                math.radians(degrees) * np.array([0.6, 0.0, 0.8]) * (1 if row % 2 else -1)
            ).as_matrix()
        )
        viewmats[row, :3] = turn @ viewmats[row, :3]
        viewmats[row, :3, 3] += shift * torch.tensor([0.3, -0.8, 0.5]) * (1 + row)
    return Cameras(viewmats.float(), cameras.Ks, cameras.sizes, cameras.names)


def assert_same(found: Sim3, truth: Sim3, tolerance: float) -> None:
    """Largest difference of where the points of the scene end up, relative to the scene."""
    points = cloud().double()
    error = (found.points(points) - truth.points(points)).norm(dim=-1).max() / truth.scale / 4
    assert float(error) < tolerance


def test_cameras_and_points_move_together():
    cameras, points, truth = rig("arc", 4), cloud(), some_sim3()
    moved = truth.cameras(cameras)
    for before, after in zip(cameras, moved, strict=True):
        xy, z = project(points, before.Ks[0], before.viewmats[0])
        moved_xy, moved_z = project(truth.points(points), after.Ks[0], after.viewmats[0])
        # measured 1.6e-5 pixels and 2.5e-7 relative: float32 viewmats
        assert torch.allclose(xy, moved_xy, atol=2e-4)
        assert torch.allclose(truth.depth(z), moved_z, rtol=5e-6)


def test_the_inverse_undoes():
    points, truth = cloud().double(), some_sim3()
    # measured 2.7e-15
    assert torch.allclose(truth.inverse().points(truth.points(points)), points, atol=1e-12)
    assert torch.equal(Sim3.identity().points(points), points)


@pytest.mark.parametrize("kind", ["arc", "line"])
@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize("scale", [1e-3, 2.7, 1e4])
def test_exact_cameras_give_the_exact_transform(kind, count, scale):
    """Two views and views in a line are not degenerate, because orientations count too."""
    source, truth = rig(kind, count), some_sim3(count, scale)
    found = align_cameras(source, truth.cameras(source))
    assert found.scale_from == "centres"
    assert bool(found.inliers.all())
    assert_same(found.sim3, truth, 5e-6)  # measured 3.4e-7: float32 viewmats
    assert float(found.rotation_errors.max()) < 1e-3
    assert float(found.center_errors.max()) < 1e-2


def test_umeyama_without_noise_is_met_by_many_cameras():
    """Closed form on the centres alone (Umeyama 1991): with exact cameras both must say the same."""
    source, truth = rig("arc", 8), some_sim3(3)
    target = truth.cameras(source)
    a, b = source.centers.double().numpy(), target.centers.double().numpy()
    a0, b0 = a - a.mean(0), b - b.mean(0)
    u, d, vh = np.linalg.svd(b0.T @ a0)
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vh))])
    rotation, scale = u @ sign @ vh, (d * np.diag(sign)).sum() / (a0**2).sum()
    found = align_cameras(source, target).sim3
    # measured 1.4e-7 and 5e-9
    assert float(rotation_angle(found.rotation, torch.from_numpy(rotation))) < 1e-5
    assert found.scale == pytest.approx(scale, rel=1e-5)


def test_moving_both_frames_changes_nothing_but_the_frame():
    source, truth = disturbed(rig("arc", 6), [1, 4], 1.0, 0.01), some_sim3()
    target = truth.cameras(rig("arc", 6))
    first = align_cameras(source, target)
    a, b = some_sim3(11, 0.3), some_sim3(12, 5.0)
    second = align_cameras(a.cameras(source), b.cameras(target))
    # measured 1.4e-6 degrees, 2.4e-5 % and 1.2e-5 of 100
    assert torch.allclose(first.rotation_errors, second.rotation_errors, atol=1e-4)
    assert torch.allclose(first.center_errors, second.center_errors, atol=1e-3)
    points = cloud().double()
    through = b.points(first.sim3.points(a.inverse().points(a.points(points))))
    assert torch.allclose(through, second.sim3.points(a.points(points)), rtol=1e-5, atol=5e-4)


def test_the_other_direction_is_the_inverse_for_exact_cameras():
    source, truth = rig("arc", 5), some_sim3()
    back = align_cameras(truth.cameras(source), source).sim3
    assert_same(back.inverse(), truth, 5e-6)


@pytest.mark.parametrize(("count", "wrong"), [(3, [1]), (5, [0, 3]), (9, [0, 2, 5, 8])])
def test_wrong_cameras_are_named_and_have_no_say(count, wrong):
    """Almost half may be wrong by a lot; the result is that of the others."""
    source, truth = rig("arc", count), some_sim3()
    found = align_cameras(disturbed(source, wrong, 25, 0.8), truth.cameras(source))
    assert (~found.inliers).nonzero()[:, 0].tolist() == wrong
    assert_same(found.sim3, truth, 5e-6)  # measured 2.6e-7
    assert float(found.rotation_errors[wrong].min()) > 5


def test_least_squares_would_have_been_misled():
    """Proof that the test above has teeth: one wrong camera of five moves the plain closed form by more than 10 %."""
    source, truth = rig("arc", 5), some_sim3()
    target, bad = truth.cameras(source), disturbed(source, [0], 25, 2.0)
    a, b = bad.centers.numpy(), target.centers.numpy()
    a0, b0 = a - a.mean(0), b - b.mean(0)
    _, d, _ = np.linalg.svd(b0.T @ a0)
    assert abs(d.sum() / (a0**2).sum() / truth.scale - 1) > 0.1


def test_errors_are_reported_in_degrees_and_percent_of_the_rig():
    source = rig("arc", 7)
    found = align_cameras(disturbed(source, [2], 3.0, 0.0), source)
    assert float(found.rotation_errors[2]) == pytest.approx(3.0, abs=0.01)
    others = [0, 1, 3, 4, 5, 6]
    assert float(found.rotation_errors[others].max()) < 0.01
    shifted = source.viewmats.clone()
    shifted[4, 0, 3] += 0.1 * source.extent
    moved = Cameras(shifted, source.Ks, source.sizes, source.names)
    found = align_cameras(moved, source)
    assert float(found.center_errors[4]) == pytest.approx(10.0, rel=0.01)
    assert "6 of 7 cameras agree" in found.summary()


def test_noise_on_all_cameras_averages():
    """With equal noise on every camera the error is that of the noise, not of the worst camera."""
    source, truth = rig("arc", 12), some_sim3()
    random = np.random.default_rng(0)
    viewmats = source.viewmats.double().clone()
    for row in range(12):
        turn = Rotation.from_rotvec(np.radians(0.5) * random.normal(size=3)).as_matrix()
        viewmats[row, :3] = torch.from_numpy(turn) @ viewmats[row, :3]
        viewmats[row, :3, 3] += torch.from_numpy(0.01 * random.normal(size=3))
    noisy = Cameras(viewmats.float(), source.Ks, source.sizes, source.names)
    found = align_cameras(noisy, truth.cameras(source))
    assert bool(found.inliers.all())
    assert float(rotation_angle(found.sim3.rotation, truth.rotation)) < math.radians(
        0.5
    )  # measured 0.19 degrees
    assert found.sim3.scale == pytest.approx(truth.scale, rel=0.02)  # measured 0.2 %


# -- pure rotation: the cameras cannot tell the scale ---------------------------------------------------------------


def test_pure_rotation_says_that_the_scale_is_unknown():
    source, truth = rig("one place", 4), some_sim3()
    found = align_cameras(source, truth.cameras(source))
    assert found.scale_from == "nothing"
    assert found.sim3.scale == 1.0
    assert float(rotation_angle(found.sim3.rotation, truth.rotation)) < 1e-5
    assert torch.allclose(
        found.sim3.points(source.centers), truth.cameras(source).centers, atol=1e-5
    )


def test_a_model_that_sees_no_motion_does_not_make_up_a_scale():
    """Centres apart in the scene, in one place up to noise in the model: their ratio is noise."""
    target = rig("arc", 5)
    viewmats = target.viewmats.double().clone()
    random = np.random.default_rng(0)
    viewmats[:, :3, 3] = torch.from_numpy(1e-4 * random.normal(size=(5, 3)))
    source = Cameras(viewmats.float(), target.Ks, target.sizes, target.names)
    assert align_cameras(source, target).scale_from == "nothing"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_points_fix_the_scale_of_a_pure_rotation(count):
    source, truth = rig("one place", count), some_sim3()
    points = cloud()
    found = align_cameras(source, truth.cameras(source), points, truth.points(points))
    assert found.scale_from == "points"
    assert_same(found.sim3, truth, 1e-6)  # measured 2.2e-8
    assert found.point_error < 1e-3


def test_depth_ratios_fix_the_scale_of_a_pure_rotation():
    source, truth = rig("one place", 3), some_sim3()
    ratios = torch.full((50,), truth.scale)
    ratios[:20] = 9.0  # wrong ones
    ratios[20] = float("nan")
    found = align_cameras(source, truth.cameras(source), depth_ratios=ratios)
    assert found.scale_from == "depths"
    assert found.sim3.scale == pytest.approx(truth.scale, rel=1e-6)
    assert_same(found.sim3, truth, 5e-6)


# -- points beside cameras --------------------------------------------------------------------------------------------


def test_wrong_points_have_no_say():
    source, truth = rig("line", 3), some_sim3()
    points = cloud()
    target_points = truth.points(points)
    random = np.random.default_rng(1)
    wrong = torch.from_numpy(random.normal(size=(120, 3))).float() * 10
    target_points[:120] += wrong
    found = align_cameras(source, truth.cameras(source), points, target_points)
    assert_same(found.sim3, truth, 5e-6)  # measured 1.1e-7


def test_points_help_two_noisy_cameras():
    """Two cameras whose baseline is off by 10 %: exact points pull the scale back."""
    source, truth = rig("line", 2), some_sim3()
    target = truth.cameras(source)
    viewmats = source.viewmats.clone()
    center = 1.1 * source.centers[1] - 0.1 * source.centers[0]
    viewmats[1, :3, 3] = -viewmats[1, :3, :3] @ center
    noisy = Cameras(viewmats, source.Ks, source.sizes, source.names)
    points = cloud()
    alone = abs(align_cameras(noisy, target).sim3.scale / truth.scale - 1)
    found = align_cameras(noisy, target, points, truth.points(points))
    helped = abs(found.sim3.scale / truth.scale - 1)
    assert alone > 0.08
    assert helped < 0.6 * alone  # cameras and points weigh the same: about half way


# -- what cannot be done ------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    cameras = rig("arc", 4)
    with pytest.raises(ValueError, match="the same cameras twice, got 4 and 3"):
        align_cameras(cameras, cameras[:3])
    with pytest.raises(ValueError, match="Give both or none"):
        align_cameras(cameras, cameras, cloud())
    with pytest.raises(ValueError, match=r"target_points must be \[P, 3\] with P=300"):
        align_cameras(cameras, cameras, cloud(), cloud(count=10))
    bad = cloud()
    bad[3] = float("nan")
    with pytest.raises(ValueError, match="source_points has 3 non-finite values"):
        align_cameras(cameras, cameras, bad, cloud())
