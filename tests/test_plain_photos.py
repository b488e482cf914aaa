"""Photos made plain: the truth is the ray-cast tiny scene, seen through the lens, size and orientation in question."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_scene import cameras, cast, render, texture

from s2d.geometry import invert_rigid
from s2d.images import write_image
from s2d.lenses import Lens, cam_from_img, img_from_cam
from s2d.plain_photos import plain_image, plain_lens, plain_points, plain_viewmat, plan_photo

VIEWMAT = cameras()[0][2]
PINHOLE = Lens("PINHOLE", 96, 72, (90.0, 88.0, 49.5, 34.5))
POINTS = np.random.default_rng(0).uniform([-0.5, -0.6, 0.0], [0.5, -0.6, 1.0], (50, 3))


def project(lens, viewmat, points=POINTS):
    return img_from_cam(lens, points @ viewmat[:3, :3].T + viewmat[:3, 3])


def photo_through(lens, viewmat, samples=3):
    """What a camera with any lens sees: mean of samples x samples rays per pixel. [H, W, 3]"""
    x = (np.arange(lens.width * samples) + 0.5) / samples
    y = (np.arange(lens.height * samples) + 0.5) / samples
    rays = cam_from_img(lens, np.stack(np.meshgrid(x, y), -1).reshape(-1, 2))
    c2w = invert_rigid(viewmat)
    directions = torch.from_numpy(rays) @ c2w[:3, :3].T
    colours = texture(cast(c2w[:3, 3].expand_as(directions), directions))
    return colours.reshape(lens.height, samples, lens.width, samples, 3).mean((1, 3)).float()


def check_plain(plan):
    """The plain photo is what its own pinhole camera sees, and observations moved with the pixels."""
    lens, viewmat = plain_lens(plan), plain_viewmat(plan, VIEWMAT.numpy())
    image = plain_image(plan)
    assert image.shape == (lens.height, lens.width, 3)
    truth = render(torch.from_numpy(viewmat), lens)
    inner = (slice(2, -2), slice(2, -2))
    error = (image[inner] - truth[inner]).abs().mean()
    # Measured 0.002 to 0.006, from 8 bits and resampling. Half a pixel off gives more than 0.015 (the test below).
    assert float(error) < 0.008
    return lens, viewmat


def test_a_plain_photo_needs_nothing(tmp_path):
    path = write_image(tmp_path / "a.png", photo_through(PINHOLE, VIEWMAT))
    plan = plan_photo(path, PINHOLE, max_side=96)
    assert not plan.needed
    assert check_plain(plan)[0] == PINHOLE


def test_the_check_sees_half_a_pixel(tmp_path):
    shifted = PINHOLE._replace(params=(90.0, 88.0, 50.0, 35.0))
    plan = plan_photo(write_image(tmp_path / "a.png", photo_through(shifted, VIEWMAT)), PINHOLE)
    with pytest.raises(AssertionError):
        check_plain(plan)


@pytest.mark.parametrize(
    "lens",
    [
        Lens("SIMPLE_RADIAL", 96, 72, (90.0, 49.5, 34.5, -0.15)),
        Lens("OPENCV", 96, 72, (90.0, 88.0, 49.5, 34.5, -0.15, 0.05, 0.004, -0.003)),
        Lens("OPENCV_FISHEYE", 96, 72, (60.0, 61.0, 49.5, 34.5, 0.02, -0.01, 0.0, 0.0)),
    ],
    ids=lambda lens: lens.model,
)
@pytest.mark.parametrize("max_side", [0, 60])
def test_undistortion(tmp_path, lens, max_side):
    path = write_image(tmp_path / "a.png", photo_through(lens, VIEWMAT))
    plan = plan_photo(path, lens, max_side)
    assert plan.reasons[0] == f"has a {lens.model} camera"
    found, viewmat = check_plain(plan)
    moved = plain_points(plan, project(lens, VIEWMAT.numpy()))
    np.testing.assert_allclose(moved, project(found, viewmat), atol=1e-3)
    if max_side:
        assert max(found.width, found.height) == 60


def test_a_photo_of_half_the_cameras_size(tmp_path):
    small = Lens("PINHOLE", 48, 36, (45.0, 44.0, 24.75, 17.25))
    plan = plan_photo(write_image(tmp_path / "a.png", photo_through(small, VIEWMAT)), PINHOLE)
    assert plan.reasons == ["is 48 x 36 pixels, its camera 96 x 72"]
    found, viewmat = check_plain(plan)
    assert found == small
    np.testing.assert_allclose(
        plain_points(plan, project(PINHOLE, viewmat)), project(small, viewmat)
    )


def test_max_side(tmp_path):
    path = write_image(tmp_path / "a.png", photo_through(PINHOLE, VIEWMAT))
    plan = plan_photo(path, PINHOLE, max_side=41)
    assert plan.reasons == ["is larger than 41 pixels"]
    found, viewmat = check_plain(plan)
    assert (found.width, found.height) == (41, 31)
    # K follows each direction's own rounding: the corners of the picture stay the corners.
    assert plain_points(plan, np.array([[96.0, 72.0]])).tolist() == [[41, 31]]
    np.testing.assert_allclose(
        plain_points(plan, project(PINHOLE, viewmat)), project(found, viewmat), atol=1e-9
    )


STORED_FROM_UPRIGHT = {3: 2, 6: 1, 8: -1}  # anticlockwise quarter turns


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("max_side", [0, 60])
def test_a_lying_photo_with_the_camera_of_its_stored_pixels(tmp_path, orientation, max_side):
    """As COLMAP makes them: it ignores the EXIF flag. The plain photo stands upright, and its camera with it."""
    stored = photo_through(PINHOLE, VIEWMAT)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray((stored * 255).round().byte().numpy()).save(path, exif=exif)
    plan = plan_photo(path, PINHOLE, max_side)
    assert f"has EXIF orientation {orientation}" in plan.reasons
    found, viewmat = check_plain(plan)
    if orientation != 3:
        assert found.height > found.width
    if not max_side:
        turned = torch.rot90(stored, -STORED_FROM_UPRIGHT[orientation], (0, 1))
        assert float((plain_image(plan) - turned).abs().max()) < 0.003
    np.testing.assert_allclose(
        plain_points(plan, project(PINHOLE, VIEWMAT.numpy())), project(found, viewmat), atol=1e-9
    )


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_lying_photo_with_the_camera_of_its_upright_pixels(tmp_path, orientation):
    """As other tools make them: they turn the photo first."""
    upright = photo_through(PINHOLE, VIEWMAT)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = torch.rot90(upright, STORED_FROM_UPRIGHT[orientation], (0, 1))
    path = tmp_path / "a.png"
    Image.fromarray((stored * 255).round().byte().numpy()).save(path, exif=exif)
    plan = plan_photo(path, PINHOLE)
    assert plan.oriented and plan.turn == 1
    assert check_plain(plan)[0] == PINHOLE


def test_another_shape_is_refused(tmp_path):
    path = write_image(tmp_path / "a.png", torch.zeros(72, 80, 3))
    with pytest.raises(
        ValueError, match=r"a.png is 80 x 72 pixels, but its camera is 96 x 72: another shape"
    ):
        plan_photo(path, PINHOLE)


@pytest.mark.parametrize("size", [(48, 36), (32, 24), (192, 144), (47, 36), (33, 24)])
def test_rounded_sizes_are_the_same_shape(tmp_path, size):
    path = write_image(tmp_path / "a.png", torch.zeros(size[1], size[0], 3))
    assert plan_photo(path, PINHOLE).size == size
