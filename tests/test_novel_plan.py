"""Planned novel cameras, on a wall whose pictures can be written down: what they see, which are chosen, and that the frame does not matter."""

import math

import pytest
import torch

from s2d.alignment import Sim3
from s2d.cameras import Cameras
from s2d.geometry import invert_rigid, quat_to_rotation
from s2d.guidance.cloud import SurfaceCloud
from s2d.novel import draw_top_view, make_novel_cameras
from s2d.novel.plan import MIN_COVERAGE, _angles, candidates, look, plan_cameras

WALL = 4.0  # the wall is z = WALL, |x| <= 3, |y| <= 2; cameras stand on z = 0 and look along +z
FOCAL, WIDTH, HEIGHT = 96.0, 96, 72  # 4 x 3 of the wall fill a picture


def wall(spacing=0.05, bump=0.0) -> SurfaceCloud:
    """Points on the wall with patches; `bump` makes it uneven, so that nothing is symmetric."""
    x, y = torch.meshgrid(
        torch.arange(-3, 3, spacing) + spacing / 2,
        torch.arange(-2, 2, spacing) + spacing / 2,
        indexing="xy",
    )
    z = WALL + bump * torch.sin(1.3 * x + 0.4) * torch.cos(0.9 * y - 0.2)
    points = torch.stack([x, y, z], -1).reshape(-1, 3)
    steps = torch.tensor([[spacing, 0, 0], [0, spacing, 0]]).expand(len(points), 2, 3).contiguous()
    normals = torch.tensor([0.0, 0.0, -1.0]).expand(len(points), 3).contiguous()
    return SurfaceCloud(points, torch.rand(points.shape), torch.ones(len(points)), normals, steps)


def standing(*centers) -> Cameras:
    """Cameras at (x, y, z), not turned."""
    viewmats = torch.eye(4).repeat(len(centers), 1, 1)
    viewmats[:, :3, 3] = -torch.tensor(centers)
    K = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    names = tuple(f"kept_{i}" for i in range(len(centers)))
    return Cameras(viewmats, K.repeat(len(centers), 1, 1), ((WIDTH, HEIGHT),) * len(centers), names)


@pytest.mark.parametrize(("x", "share"), [(0.0, 1.0), (1.0, 1.0), (2.0, 0.75), (3.0, 0.5)])
def test_coverage_is_the_share_of_the_picture_that_the_wall_fills(x, share):
    """A picture spans 4 units of the wall around x, which ends at 3."""
    seen = look(wall(), standing((x, 0.0, 0.0)))
    assert seen.coverage == pytest.approx(share, abs=0.03)  # one column of 48: 0.021
    assert seen.nearest == pytest.approx(WALL, rel=1e-4)
    assert seen.points[:, 2].sub(WALL).abs().max() < 1e-4
    # Beside the edge, the wall is presumed to go on for two pixels: 1/6 of a unit.
    reach = float(seen.points[:, 0].max())
    assert reach == pytest.approx(min(x + 2 - 1 / 24, 3 + 2 / 12), abs=0.09)


def test_behind_the_wall_there_is_nothing_to_see():
    behind = standing((0.0, 0.0, 2 * WALL))
    turned = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])) @ behind.viewmats
    seen = look(wall(), Cameras(turned, behind.Ks, behind.sizes, behind.names))
    assert float((seen.depth > 0).double().mean()) == 1.0  # it is drawn
    assert seen.coverage == 0.0  # but shows its back


def test_angles_are_those_of_the_triangle_and_hidden_points_have_none():
    here, there = standing((0.0, 0.0, 0.0)), standing((1.0, 0.0, 0.0))
    other = look(wall(), there)
    points = torch.tensor(
        [[0.5, 0.0, WALL], [1.0, 0.5, WALL], [-2.0, 0.0, WALL], [1.0, 0.0, 1.3 * WALL]]
    ).double()
    angles = _angles(points, here.centers.double().expand(4, 3), other)
    assert float(angles[0]) == pytest.approx(2 * math.atan(0.5 / WALL), rel=1e-6)
    rays = points[1] - here.centers[0], points[1] - there.centers[0]
    cosine = float((rays[0] @ rays[1]) / (rays[0].norm() * rays[1].norm()))
    assert float(angles[1]) == pytest.approx(math.acos(cosine), rel=1e-5)
    assert torch.isinf(angles[2:]).all()  # outside of its picture; behind the wall


def test_the_first_chosen_is_half_way_between_two_photos():
    """Of the cameras that see only what the photos see, the middle is farthest from both; sideways the wall ends."""
    kept = standing((-1.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    planned = plan_cameras(kept, wall(), 6)
    middle = planned.centers[(planned.centers[:, 0].abs() < 0.01)]
    assert len(middle) >= 1
    assert planned.sizes == ((WIDTH, HEIGHT),) * 6
    assert torch.equal(planned.Ks, kept.Ks[:1].expand(6, 3, 3))


def test_what_is_chosen_shows_enough_and_keeps_away_from_surfaces():
    kept, cloud = standing((-1.0, 0.0, 0.0), (1.0, 0.0, 0.0)), wall()
    enough = MIN_COVERAGE * sum(look(cloud, camera).coverage for camera in kept) / 2
    # A post close in front of where the path passes: half as far as the nearest that photos see it is too near.
    post = wall()
    near = (post.points[:, 0].abs() < 0.2) & (post.points[:, 1].abs() < 0.2)
    moved = post.points[near] * torch.tensor([0.2, 0.2, 0.0]) + torch.tensor([0.0, 0.0, 0.4])
    with_post = SurfaceCloud(
        torch.cat([cloud.points, moved]),
        torch.cat([cloud.rgbs, post.rgbs[near]]),
        torch.cat([cloud.confidence, post.confidence[near]]),
        torch.cat([cloud.normals, post.normals[near]]),
        torch.cat([cloud.steps, 0.2 * post.steps[near]]),
    )
    for shown in (cloud, with_post):
        planned = plan_cameras(kept, shown, 24)
        assert len(planned) > 4
        for camera in planned:
            assert look(cloud, camera).coverage >= enough - 1e-6
    before = plan_cameras(kept, cloud, 24).centers[:, 0].abs().min()
    after = plan_cameras(kept, with_post, 24).centers[:, 0].abs().min()
    assert float(before) < 0.01 and float(after) > 0.05


def test_no_camera_is_chosen_twice_and_more_contains_fewer():
    kept, cloud = standing((-1.0, 0.0, 0.0), (1.0, 0.2, 0.0), (0.1, -0.8, 0.0)), wall(bump=0.3)
    few, many = plan_cameras(kept, cloud, 4), plan_cameras(kept, cloud, 12)
    assert len(set(many.names)) == len(many)
    assert few.names == many.names[:4]
    assert torch.equal(few.viewmats, many.viewmats[:4])


@pytest.mark.parametrize("scale", [0.01, 300.0])
def test_moving_turning_and_scaling_the_world_moves_the_cameras_along(scale):
    kept, cloud = standing((-1.0, 0.0, 0.0), (1.0, 0.2, 0.0), (0.1, -0.8, 0.0)), wall(bump=0.3)
    rotation = quat_to_rotation(torch.tensor([0.6, -0.3, 0.5, 0.2], dtype=torch.float64))
    sim3 = Sim3(scale, rotation, torch.tensor([3.0, -7.0, 2.0], dtype=torch.float64) * scale)

    def directions(vectors):
        return (vectors.double() @ rotation.T).float()

    moved = SurfaceCloud(
        sim3.points(cloud.points.double()).float(),
        cloud.rgbs,
        cloud.confidence,
        directions(cloud.normals),
        directions(cloud.steps) * scale,
    )
    expected = sim3.cameras(plan_cameras(kept, cloud, 10))
    planned = plan_cameras(sim3.cameras(kept), moved, 10)
    assert planned.names == expected.names
    # float32 cameras: measured 2e-6 of the distance to the wall
    error = (planned.centers - expected.centers).norm(dim=1).max()
    assert float(error) < 2e-5 * scale * WALL
    assert torch.allclose(planned.viewmats[:, :3, :3], expected.viewmats[:, :3, :3], atol=1e-5)


def test_one_kept_camera_gets_cameras_around_it():
    kept = standing((0.0, 0.0, 0.0))
    around = candidates(kept, [WALL])
    assert len(around) == 16
    axes = invert_rigid(around.viewmats)[:, :3, 2]
    meet = around.centers + axes * ((WALL - around.centers[:, 2]) / axes[:, 2])[:, None]
    assert torch.allclose(
        meet, torch.tensor([0.0, 0.0, WALL]), atol=1e-5
    )  # where the kept one looks
    assert len(plan_cameras(kept, wall(), 3)) == 3


def test_without_a_surface_the_plain_path_takes_over():
    kept = standing((-1.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    far = wall()
    behind = SurfaceCloud(
        far.points * torch.tensor([1.0, 1.0, -1.0]),
        far.rgbs,
        far.confidence,
        far.normals,
        far.steps,
    )
    assert plan_cameras(kept, behind, 5) is None
    assert len(make_novel_cameras("coverage", kept, num=5, cloud=behind)) == 5
    planned = make_novel_cameras("coverage", kept, num=5, cloud=wall())
    assert planned.names == tuple(f"novel_{i:04d}" for i in range(5))
    assert torch.equal(planned.viewmats, plan_cameras(kept, wall(), 5).viewmats)


def test_the_top_view_shows_cameras_where_they_stand():
    """From above: x to the right, z upwards. The wall is a line at the top; kept cameras are orange below it, in the picture's order."""
    kept, novel = standing((-1.0, 0.0, 0.0), (1.0, 0.0, 0.0)), standing((0.0, 0.5, 0.0))
    image = draw_top_view(wall(), kept, novel)
    orange = (image[..., 0] > 0.6) & (image[..., 2] < 0.3)
    blue = (image[..., 2] > 0.6) & (image[..., 0] < 0.4)
    drawing = image.shape[0] - 40
    columns = [mask[:drawing].nonzero()[:, 1].double() for mask in (orange, blue)]
    middle = image.shape[1] / 2
    assert float(columns[0].min()) < middle - 50 and float(columns[0].max()) > middle + 50
    assert abs(float(columns[1].mean()) - middle) < 3
    assert float(orange[:drawing].nonzero()[:, 0].double().mean()) > drawing / 2
