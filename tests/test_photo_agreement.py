"""Which pixels two photos show as the model does: against the geometry of a wall, and under a change of the world's frame."""

import math

import pytest
import torch

from s2d.cameras import Cameras
from s2d.fixed_views import weigh_less
from s2d.gaussians import Gaussians, concatenate, gaussians_from_points
from s2d.geometry import quat_to_rotation
from s2d.photo_agreement import PhotoAgreement
from s2d.rasterize import rasterize
from tests.plane_scene import DEPTH, FOCAL, HEIGHT, WIDTH, wall_colour

APART = 0.5  # of each kept camera from the novel one between them


def camera(x: float, name: str = "a") -> Cameras:
    """At (x, 0, 0), looking along z."""
    viewmat = torch.eye(4)
    viewmat[0, 3] = -x
    K = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    return Cameras(viewmat[None], K[None], ((WIDTH, HEIGHT),), (name,))


def wall(left: float, right: float, z: float, slope: float = 0.0) -> Gaussians:
    """Opaque, textured, higher than the picture: Gaussians half a pixel of the far wall apart."""
    step = 0.05
    x = torch.arange(left, right, step)
    y = torch.arange(-2.0, 2.0, step)
    points = torch.stack(
        [*torch.meshgrid(x, y, indexing="ij"), torch.full((len(x), len(y)), z)], -1
    ).reshape(-1, 3)
    points[:, 2] += slope * (points[:, 0] + 0.6 * points[:, 1])
    colours = torch.from_numpy(wall_colour(points[:, 0].numpy(), points[:, 1].numpy()) / 255)
    return gaussians_from_points(points, colours.float(), 0, init_opacity=0.99)


FAR_WALL = wall(-3.5, 3.5, DEPTH)
KEPT = [camera(-APART, "left"), camera(APART, "right")]
COLUMNS = (torch.arange(WIDTH) + 0.5 - WIDTH / 2) * DEPTH / FOCAL  # x of the far wall


def views_of(model: Gaussians, cameras=KEPT):
    return [(one, rasterize(model, one).rgb[0].clamp(0, 1)) for one in cameras]


def middle_row(share):
    return share[HEIGHT // 2]


def test_where_the_pictures_of_both_photos_overlap():
    share = PhotoAgreement(FAR_WALL, views_of(FAR_WALL)).share(camera(0.0))
    both = WIDTH / 2 * DEPTH / FOCAL - APART
    pixel = DEPTH / FOCAL
    assert share.shape == (HEIGHT, WIDTH)
    assert bool((middle_row(share)[COLUMNS.abs() < both - pixel] == 1).all())
    assert bool((middle_row(share)[COLUMNS.abs() > both + pixel] == 0).all())


def test_one_photo_alone_proves_nothing():
    share = PhotoAgreement(FAR_WALL, views_of(FAR_WALL, KEPT[:1])).share(camera(0.0))
    assert float(share.max()) == 0


def test_a_photo_of_another_colour_does_not_agree():
    (left, photo), (right, other) = views_of(FAR_WALL)
    changed = other.clone()
    changed[:, : WIDTH // 2] = (changed[:, : WIDTH // 2] + 0.5) % 1
    share = PhotoAgreement(FAR_WALL, [(left, photo), (right, changed)]).share(camera(0.0))
    # The right camera's left half looks at the wall left of x = APART.
    pixel = DEPTH / FOCAL
    inside, edge = COLUMNS.abs() < 1.7, COLUMNS - APART
    assert float(middle_row(share)[inside & (edge < -pixel)].mean()) < 0.1
    assert bool((middle_row(share)[inside & (edge > pixel)] == 1).all())


def test_what_is_hidden_from_a_photo_is_not_seen_by_it():
    """A board at half the distance hides the wall at 0.7 to 1.5 from the right camera and at 1.2 to 2 from the novel one."""
    near = wall(0.6, 1.0, DEPTH / 2)
    model = concatenate([FAR_WALL, near])
    share = middle_row(PhotoAgreement(model, views_of(model)).share(camera(0.0)))
    without = middle_row(PhotoAgreement(FAR_WALL, views_of(FAR_WALL)).share(camera(0.0)))
    shadow = (COLUMNS > 0.8) & (COLUMNS < 1.1)
    assert int(shadow.sum()) == 3
    assert bool((without[shadow] == 1).all())
    assert bool((share[shadow] == 0).all())
    assert bool((share[(COLUMNS > -1.2) & (COLUMNS < 0.4)] == 1).all())


def test_the_frame_and_the_unit_of_the_world_do_not_matter():
    scale, shift = 3.0, torch.tensor([0.4, -1.0, 2.0])
    quat = torch.tensor([[0.9, 0.2, -0.3, 0.1]])
    turn = quat_to_rotation(quat)[0]
    model = wall(
        -3.5, 3.5, DEPTH, slope=0.2
    )  # no two at one depth, whose order would be anyone's guess
    moved = Gaussians(
        **model.tensors()
        | {
            "means": scale * model.means @ turn.T + shift,
            "log_scales": model.log_scales + math.log(scale),
        }
    )  # round Gaussians: their own rotation is free

    def carried(one: Cameras) -> Cameras:
        viewmat = one.viewmats[0].clone()
        viewmat[:3, :3] = one.viewmats[0, :3, :3] @ turn.T
        viewmat[:3, 3] = scale * one.viewmats[0, :3, 3] - viewmat[:3, :3] @ shift
        return Cameras(viewmat[None], one.Ks, one.sizes, one.names)

    photos = views_of(model)
    expected = PhotoAgreement(model, photos).share(camera(0.0))
    there = PhotoAgreement(moved, [(carried(one), photo) for one, photo in photos])
    assert float((there.share(carried(camera(0.0))) - expected).abs().mean()) < 0.01
    assert 0.5 < float(expected.mean()) < 0.9


@pytest.mark.parametrize(("factor", "expected"), [(0.0, [0.8, 0.4, 0.0]), (0.25, [0.8, 0.5, 0.2])])
def test_weight_falls_with_the_share(factor, expected):
    asked = []

    def share(name):
        asked.append(name)
        return torch.tensor([[0.0, 0.5, 1.0]])

    picture = torch.rand(1, 3, 3)
    read = weigh_less(lambda name: (picture, torch.full((1, 3, 1), 0.8)), share, factor)
    for _ in range(2):
        image, weight = read("a")
        assert image is picture
        assert torch.allclose(weight[0, :, 0], torch.tensor(expected))
    assert asked == ["a"]
