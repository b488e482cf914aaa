"""Each adapter on a scene with known depth, through a fake network that tells the truth in its package's conventions.

`FAKES` has one entry per adapter; what a fake does wrong on purpose ("plant") must be found by the same checks.
"""

import pytest
import torch
from provider_scene import (
    EXTENT,
    FakeDepthAnything3,
    FakeMapAnything,
    FakeMonocular,
    FakePi3,
    FakeVggt,
    Truth,
    distance_to_surface,
)

from s2d.cameras import Cameras
from s2d.geometry import invert_rigid, rotation_angle
from s2d.guidance.providers.canvas import fit_canvas
from s2d.guidance.providers.depth_anything3 import DepthAnything3Provider
from s2d.guidance.providers.filters import FilterSettings
from s2d.guidance.providers.interface import Geometry, make_cameras
from s2d.guidance.providers.mapanything import MapAnythingProvider
from s2d.guidance.providers.monocular import KINDS, MonocularProvider
from s2d.guidance.providers.pi3 import Pi3Provider, fit_intrinsics
from s2d.guidance.providers.placement import cloud_in_scene, place
from s2d.guidance.providers.vggt import VggtProvider

CPU = torch.device("cpu")
FILTERS = FilterSettings()
TOLERANCE = 1e-3  # of the scene's extent

# How to make the provider around its fake, whether the model knows only centred principal points, and what can be planted.
FAKES = {
    "pi3": (
        lambda truth, plant="": Pi3Provider(FakePi3(truth, plant), CPU, max_pixels=9000),
        False,
        ["w2c for c2w", "transposed rotation", "half pixel"],
    ),
    "vggt": (
        lambda truth, plant="": VggtProvider(FakeVggt(truth, plant), CPU, side=112),
        True,
        ["quaternion wxyz", "fields swapped", "half pixel"],
    ),
    "mapanything": (
        lambda truth, plant="": MapAnythingProvider(FakeMapAnything(truth, plant), CPU, side=112),
        False,
        ["w2c for c2w", "depth along the ray", "half pixel"],
    ),
    "depth-anything-3": (
        lambda truth, plant="": DepthAnything3Provider(FakeDepthAnything3(truth, plant), side=112),
        True,
        ["c2w for w2c", "half pixel"],
    ),
}


def check_geometry(geometry: Geometry, truth: Truth) -> None:
    """Every pixel of every photo is where it should be, through the model's points and through its depth and cameras."""
    moved = truth.frame.cameras(truth.cameras)
    lifted = Geometry.from_depths(
        geometry.cameras, geometry.depths, geometry.confidence, geometry.rgbs
    )
    for row in range(3):
        height, width = geometry.depths[row].shape
        expected = truth.frame.points(truth.photo_surface(row, width, height))
        for points in (geometry.points[row], lifted.points[row]):
            error = (points.double() - expected).norm(dim=-1).max() / truth.frame.scale / EXTENT
            assert float(error) < 5e-6, "a pixel's point"  # measured 2.6e-7: float32
        error = (geometry.cameras.Ks[row] - truth.cameras.Ks[row]).abs().max()
        assert float(error) < 1e-3, "intrinsics"  # measured 8e-6 pixels
    turned = rotation_angle(geometry.cameras.viewmats[:, :3, :3], moved.viewmats[:, :3, :3])
    assert float(turned.max()) < 2e-6, "orientation"  # measured 7e-8
    apart = (geometry.cameras.centers - moved.centers).norm(dim=-1).max() / truth.frame.scale
    assert float(apart) < 2e-5, "centres"  # measured 8e-7
    assert geometry.cameras.sizes == truth.cameras.sizes


def check_cloud(points: torch.Tensor, truth: Truth) -> None:
    """On the true surface, and most of it there (the canvases have about 20,000 pixels)."""
    error = distance_to_surface(points) / EXTENT
    assert float(torch.quantile(error, 0.99)) < 1e-6  # measured 9e-8: float32
    assert float(torch.quantile(error, 0.999)) < TOLERANCE  # measured 3e-4
    # Where floor and wall meet, `fuse` continues the plane of one by a pixel into the other: one point of 16,000, measured 1.2e-3.
    assert int((error > TOLERANCE).sum()) <= 1
    assert float(error.max()) < 2 * TOLERANCE
    assert len(points) > 12_000


@pytest.mark.parametrize("name", FAKES)
def test_without_cameras_the_model_frame_is_the_scene(name):
    make, centered, _ = FAKES[name]
    truth = Truth(centered)
    geometry = make(truth).predict(truth.photos)
    check_geometry(geometry, truth)
    assert geometry.cameras.names == ("0", "1", "2")
    cloud = cloud_in_scene(geometry, geometry.cameras, None, FILTERS)
    check_cloud(truth.frame.inverse().points(cloud.points), truth)


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize("with_points", [True, False])
def test_with_cameras_the_cloud_lies_in_the_scene(name, with_points):
    """Scale from the sparse points (a tenth of them wrong) or from three cameras alone."""
    make, centered, _ = FAKES[name]
    truth = Truth(centered)
    geometry = make(truth).predict(truth.photos, truth.cameras)
    assert geometry.cameras.names == truth.cameras.names
    found = place(geometry, truth.cameras, truth.sparse() if with_points else None, FILTERS)
    check_cloud(found.cloud.points, truth)
    for (width, height), photo_name in zip(truth.cameras.sizes, truth.cameras.names, strict=True):
        depth_map = found.depth_maps[photo_name]
        assert depth_map.depth.shape == depth_map.confidence.shape == (height, width)


@pytest.mark.parametrize(
    ("name", "plant"), [(name, plant) for name, entry in FAKES.items() for plant in entry[2]]
)
def test_a_planted_mistake_of_convention_is_found(name, plant):
    """The check that must fail is that of the geometry, which no later alignment can hide."""
    make, centered, _ = FAKES[name]
    truth = Truth(centered)
    geometry = make(truth, plant).predict(truth.photos)
    with pytest.raises(AssertionError, match=r"pixel's point|intrinsics|orientation|centres"):
        check_geometry(geometry, truth)


@pytest.mark.parametrize("name", ["pi3", "mapanything"])
def test_a_planted_mistake_of_the_poses_shows_in_the_cloud(name):
    make, _, _ = FAKES[name]
    truth = Truth()
    geometry = make(truth, "w2c for c2w").predict(truth.photos)
    cloud = cloud_in_scene(geometry, geometry.cameras, None, FILTERS)
    error = distance_to_surface(truth.frame.inverse().points(cloud.points)) / EXTENT
    assert float(error.median()) > 10 * TOLERANCE


def test_photos_of_one_size_are_not_padded():
    truth = Truth(same_size=True)
    geometry = FAKES["pi3"][0](truth).predict(truth.photos)
    check_geometry(geometry, truth)
    canvas = fit_canvas(truth.photos, 14, max_pixels=9000)
    assert {depth.shape for depth in geometry.depths} == {canvas.images.shape[2:]}


# -- cameras as a hint --------------------------------------------------------------------------------------------------


def test_pi3x_is_told_cameras_in_its_conventions():
    truth = Truth()
    model = FakePi3(truth)
    provider = Pi3Provider(model, CPU, takes_cameras=True, max_pixels=9000)
    provider.predict(truth.photos, truth.cameras)
    Ks, poses, found = model.told
    # measured 3.9e-6 pixels, 2.4e-7
    assert torch.allclose(Ks[0].double(), found.Ks, atol=1e-4)  # corner origin, on the canvas
    expected = invert_rigid(truth.cameras.viewmats)
    assert torch.allclose(poses[0], expected, atol=1e-5)
    Pi3Provider(model, CPU, max_pixels=9000).predict(truth.photos, truth.cameras)
    assert model.told[:2] == (None, None)  # plain Pi3 has no such arguments


def test_mapanything_is_told_cameras_in_its_conventions():
    truth = Truth()
    provider = FAKES["mapanything"][0](truth)
    provider.predict(truth.photos, truth.cameras)
    views, found = provider.model.told
    for row, view in enumerate(views):
        theirs = found.Ks[row].clone()
        theirs[:2, 2] -= 0.5  # pixels counted from 0 at their centres
        assert torch.allclose(view["intrinsics"][0].double(), theirs, atol=1e-4)
        pose = invert_rigid(truth.cameras.viewmats[row])
        assert torch.allclose(view["camera_poses"][0], pose, atol=1e-5)
        assert view["is_metric_scale"].tolist() == [False]


def test_depth_anything_3_is_told_cameras_in_its_conventions():
    truth = Truth(centered=True)
    provider = FAKES["depth-anything-3"][0](truth)
    provider.predict(truth.photos, truth.cameras)
    extrinsics, intrinsics, found = provider.model.told
    assert torch.equal(torch.from_numpy(extrinsics), truth.cameras.viewmats)
    assert torch.allclose(torch.from_numpy(intrinsics).double(), found.Ks, atol=1e-4)


# -- one photo at a time ---------------------------------------------------------------------------------------------------


def monocular(truth: Truth, family: str, shift: float = 0.0, plant: str = "") -> MonocularProvider:
    kind = KINDS[family]
    model = FakeMonocular(truth, kind.inverse, shift, plant)
    side = 112 if kind.multiple < kind.side else kind.side
    multiple = 14 if kind.multiple < kind.side else kind.multiple
    small = type(kind)(kind.inverse, kind.freedom, side, multiple)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return MonocularProvider(model, CPU, small, mean, std)


@pytest.mark.parametrize(
    ("family", "shift"),
    [
        ("depth_anything metric", 0.0),
        ("depth_anything", 0.7),
        ("depth_anything", -0.2),
        ("dpt", 2.0),
    ],
)
def test_monocular_depth_is_fitted_to_the_sparse_points(family, shift):
    """Another unit for each photo, and for relative models a shift; a tenth of the sparse points is wrong."""
    truth = Truth()
    geometry = monocular(truth, family, shift).predict(truth.photos, truth.cameras)
    cloud = cloud_in_scene(geometry, truth.cameras, truth.sparse(), FILTERS)
    check_cloud(cloud.points, truth)


def test_a_planted_half_pixel_of_monocular_depth_is_found():
    truth = Truth()
    provider = monocular(truth, "depth_anything metric", plant="half pixel")
    geometry = provider.predict(truth.photos, truth.cameras)
    cloud = cloud_in_scene(geometry, truth.cameras, truth.sparse(), FILTERS)
    with pytest.raises(AssertionError):
        check_cloud(cloud.points, truth)


def test_monocular_depth_needs_cameras_and_points():
    truth = Truth()
    with pytest.raises(ValueError, match=r"needs known cameras.*--provider pi3"):
        monocular(truth, "depth_anything").predict(truth.photos)
    geometry = monocular(truth, "depth_anything").predict(truth.photos, truth.cameras)
    with pytest.raises(ValueError, match=r"0 sparse points.*Expected 12 or more"):
        cloud_in_scene(geometry, truth.cameras, None, FILTERS)


# -- parts ---------------------------------------------------------------------------------------------------------------


def test_a_canvas_holds_whole_photos_at_multiples_of_the_patch():
    photos = [torch.rand(72, 96, 3), torch.rand(96, 72, 3)]
    canvas = fit_canvas(photos, 14, max_side=112)
    assert canvas.images.shape == (2, 3, 112, 112)
    assert canvas.regions == ((0, 14, 112, 84), (14, 0, 84, 112))
    assert bool((canvas.images[0, :, :14] == 1).all())
    rgb = canvas.rgbs()[1]
    assert rgb.shape == (112, 84, 3)
    assert torch.equal(rgb.permute(2, 0, 1), canvas.images[1, :, :, 14:98])


def test_a_canvas_limits_the_pixels():
    """1920 x 1080 becomes 672 x 378, as the loader of Pi3 has it."""
    canvas = fit_canvas([torch.zeros(1080, 1920, 3)], 14, max_pixels=255_000)
    assert (canvas.width, canvas.height) == (672, 378)


def test_intrinsics_go_to_the_canvas_and_back():
    cameras = Truth().cameras
    photos = [torch.rand(height, width, 3) for width, height in cameras.sizes]
    canvas = fit_canvas(photos, 14, max_side=112)
    Ks = canvas.intrinsics(cameras)
    assert torch.allclose(canvas.photo_intrinsics(Ks), cameras.Ks, atol=1e-4)
    # The corners of the photo are the corners of its region, by hand.
    region = canvas.regions[1]
    expected = float(cameras.Ks[1, 0, 2]) * region.width / 72 + region.left
    assert float(Ks[1, 0, 2]) == pytest.approx(expected, abs=1e-4)


def test_intrinsics_are_fitted_to_rays_where_the_model_is_confident():
    truth = Truth()
    points = truth.answer(torch.stack([photo.permute(2, 0, 1) for photo in truth.photos[:1]]))
    confidence = torch.full(points.local.shape[1:3], 0.9)
    confidence[:, :20] = 0.01
    local = points.local[0].clone()
    local[:, :20] = torch.randn(local[:, :20].shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fit_intrinsics(local, confidence), truth.cameras.Ks[0], atol=1e-3)
    with pytest.raises(ValueError, match="no positive focal length"):
        fit_intrinsics(local * torch.tensor([-1.0, 1, 1]), confidence)


def test_cameras_of_a_network_become_rotations():
    """What half precision leaves of a rotation is made one again; numbers that are not finite are told."""
    truth = Truth()
    rough = truth.cameras.viewmats.clone()
    rough[:, :3, :3] += 2e-2 * torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))
    made = make_cameras(rough, truth.cameras.Ks, truth.cameras.sizes, None)
    assert isinstance(made, Cameras)
    rough[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        make_cameras(rough, truth.cameras.Ks, truth.cameras.sizes, None)
