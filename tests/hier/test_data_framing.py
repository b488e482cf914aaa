"""Photos at the model's size: what the changed camera projects is where the changed picture shows it."""

import numpy as np
import pytest
import torch

from s2d.geometry import look_at, project
from s2d.hier.data.framing import Framing, mirrored_cameras

POINT = torch.tensor([0.13, -0.08, 0.2], dtype=torch.float64)


def camera(width, height):
    viewmat = look_at(
        torch.tensor([0.4, -3.0, 0.9]).double(),
        torch.tensor([0.1, 0.0, 0.1]).double(),
        torch.tensor([0.0, 0.0, 1.0]).double(),
    )
    K = torch.tensor([[1.3 * width, 0, 0.53 * width], [0, 1.28 * width, 0.46 * height], [0, 0, 1]])
    return viewmat, K.double()


def photo_of_a_spot(width, height):
    """A bright round spot where the camera sees POINT."""
    viewmat, K = camera(width, height)
    (x, y), _ = project(POINT, K, viewmat)
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    spot = np.exp(-((columns - float(x)) ** 2 + (rows - float(y)) ** 2) / (2 * (width / 40) ** 2))
    return np.repeat((255 * spot)[..., None].round().astype(np.uint8), 3, 2), viewmat, K


def middle(picture):  # [3, H, W] uint8
    weight = picture[0].double()
    rows = torch.arange(weight.shape[0]) + 0.5
    columns = torch.arange(weight.shape[1]) + 0.5
    return (
        torch.stack([(weight.sum(0) * columns).sum(), (weight.sum(1) * rows).sum()]) / weight.sum()
    )


@pytest.mark.parametrize("source", [(320, 180), (200, 301), (64, 64)])
@pytest.mark.parametrize("size", [(96, 96), (128, 80)])
@pytest.mark.parametrize("place", [(0.5, 0.5), (0.4, 0.6)])
def test_a_point_is_seen_where_the_camera_projects_it(source, size, place):
    photo, viewmat, K = photo_of_a_spot(*source)
    framing = Framing.cover(source, size, place)
    picture = framing.crop(framing.scale(photo))
    assert picture.shape == (3, size[1], size[0])
    expected, _ = project(POINT, framing.intrinsics(K).double(), viewmat)
    # Measured: at most 0.02 pixels (8 bits). A half-pixel mistake is 0.5, a wrong offset more.
    assert torch.allclose(middle(picture), expected, atol=0.05)


@pytest.mark.parametrize("source", [(320, 180), (180, 320), (131, 97)])
def test_it_is_covered_by_the_larger_ratio_and_the_middle_is_cut_out(source):
    framing = Framing.cover(source, (64, 64))
    assert min(framing.scaled) == 64
    ratio = max(framing.scaled) / 64
    assert ratio == pytest.approx(max(source) / min(source), abs=0.01)  # whole pixels
    spare = (framing.scaled[0] - 64, framing.scaled[1] - 64)
    assert framing.offset == (spare[0] // 2, spare[1] // 2)


def test_shrinking_averages():
    stripes = np.zeros((64, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    picture = Framing.cover((256, 64), (64, 16)).scale(stripes)
    inner = picture[:, 4:-4].astype(float)
    assert abs(inner - 127.5).max() < 3, "without a filter it would be 0 or 255"


def test_a_mirrored_camera_sees_the_mirrored_world_mirrored():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(50, 3, generator=generator).double() * 0.4
    viewmat, K = camera(96, 72)
    flipped_viewmat, flipped_K = mirrored_cameras(viewmat, K, 96)
    xy, z = project(points, K, viewmat)
    mirrored = points * torch.tensor([-1.0, 1.0, 1.0]).double()
    flipped_xy, flipped_z = project(mirrored, flipped_K, flipped_viewmat)
    expected = torch.stack([96 - xy[:, 0], xy[:, 1]], -1)
    assert torch.allclose(flipped_xy, expected, atol=1e-10)
    assert torch.allclose(flipped_z, z, atol=1e-12)
    assert torch.linalg.det(flipped_viewmat[:3, :3]) == pytest.approx(1.0)
    assert not torch.allclose(project(points, K, viewmat)[0], flipped_xy, atol=1.0)


def test_the_mirrored_picture_shows_it_there():
    photo, viewmat, K = photo_of_a_spot(96, 72)
    picture = torch.from_numpy(photo).permute(2, 0, 1).flip(-1)
    flipped_viewmat, flipped_K = mirrored_cameras(viewmat, K, 96)
    mirrored = POINT * torch.tensor([-1.0, 1.0, 1.0]).double()
    expected, _ = project(mirrored, flipped_K, flipped_viewmat)
    assert torch.allclose(middle(picture), expected, atol=0.05)  # measured 0.01
