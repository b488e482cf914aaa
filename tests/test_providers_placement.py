"""What becomes of a model's depth: which pixels are believed, in which unit, in rigs that leave something open."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from provider_scene import EXTENT, Truth, distance_to_surface
from scipy.spatial.transform import Rotation
from tiny_scene import cast

from s2d.alignment import Sim3
from s2d.cameras import Cameras
from s2d.geometry import invert_rigid, look_at, pixel_grid
from s2d.guidance.matches import SparsePoints
from s2d.guidance.providers.filters import FilterSettings, believed_pixels, depth_edges
from s2d.guidance.providers.interface import Geometry
from s2d.guidance.providers.placement import cloud_in_scene, place, reconstruct_with
from s2d.guidance.providers.scale import fit_inverse_depth
from s2d.images import write_image
from s2d.scene import Scene

FILTERS = FilterSettings()
SIZE = (112, 84)
FRAME = Sim3(
    0.37,
    torch.from_numpy(Rotation.random(rng=np.random.default_rng(4)).as_matrix()),
    torch.tensor([0.4, -1.0, 2.0]).double(),
)


def rig(centers: list[list[float]]) -> Cameras:
    """Cameras in the room of `tiny_scene` that look past the box in turn."""
    centers = torch.tensor(centers, dtype=torch.float64)
    targets = torch.tensor([0.0, 0.0, 0.6]).double() + 0.4 * torch.arange(len(centers))[:, None]
    viewmats = look_at(centers, targets, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    K = torch.tensor([[100.0, 0, 56], [0, 100, 42], [0, 0, 1]])
    count = len(centers)
    return Cameras(
        viewmats.float(), K.repeat(count, 1, 1), [SIZE] * count, [f"{i}" for i in range(count)]
    )


ONE_PLACE = [[0.3, -3.0, 1.6]] * 3
LINE = [[-0.8, -3.0, 1.6], [0.0, -3.0, 1.6], [0.6, -3.0, 1.6]]
TWO = LINE[:2]


def surface(camera: Cameras) -> torch.Tensor:
    """[H, W, 3]"""
    rays = torch.nn.functional.pad(pixel_grid(*SIZE, dtype=torch.float64), (0, 1), value=1.0)
    c2w = invert_rigid(camera.viewmats[0].double())
    directions = rays @ torch.linalg.inv(camera.Ks[0].double()).T @ c2w[:3, :3].T
    return cast(c2w[:3, 3].expand_as(directions), directions)


def true_geometry(cameras: Cameras, frame: Sim3 = FRAME, confidence: float = 0.9) -> Geometry:
    """What a perfect model says, in a frame of its own."""
    moved = frame.cameras(cameras)
    depths = []
    for camera in cameras:
        viewmat = camera.viewmats[0].double()
        depth = surface(camera) @ viewmat[2, :3] + viewmat[2, 3]
        depths.append(frame.depth(depth).float())
    maps = [torch.full(depth.shape, confidence) for depth in depths]
    rgbs = [torch.full((*depth.shape, 3), 0.5) for depth in depths]
    return Geometry.from_depths(moved, depths, maps, rgbs)


def true_sparse(cameras: Cameras, per_camera: int = 40) -> SparsePoints:
    points, pairs = [], []
    for row, camera in enumerate(cameras):
        chosen = np.random.default_rng(row).choice(SIZE[0] * SIZE[1], per_camera, replace=False)
        points.append(surface(camera).reshape(-1, 3)[chosen])
        pairs.append(np.full((per_camera, 2), row))
    return SparsePoints(torch.cat(points).numpy(), np.concatenate(pairs))


def assert_on_surface(points: torch.Tensor) -> None:
    error = distance_to_surface(points) / EXTENT
    assert float(torch.quantile(error, 0.999)) < 1e-3  # measured 3.5e-4
    assert len(points) > 8000


# -- rigs that leave something open ------------------------------------------------------------------------------------


@pytest.mark.parametrize("centers", [TWO, LINE], ids=["two", "line"])
@pytest.mark.parametrize("with_points", [True, False])
def test_two_cameras_and_cameras_in_a_line(centers, with_points):
    cameras = rig(centers)
    sparse = true_sparse(cameras) if with_points else None
    cloud = cloud_in_scene(true_geometry(cameras), cameras, sparse, FILTERS)
    assert_on_surface(cloud.points)


def test_one_place_with_points():
    cameras = rig(ONE_PLACE)
    cloud = cloud_in_scene(true_geometry(cameras), cameras, true_sparse(cameras), FILTERS)
    assert_on_surface(cloud.points)


def test_one_place_without_points_is_a_guess_that_is_told(caplog):
    cameras = rig(ONE_PLACE)
    with caplog.at_level(logging.WARNING):
        cloud = cloud_in_scene(true_geometry(cameras), cameras, None, FILTERS)
    assert "the cloud's distance is a guess" in caplog.text
    assert len(cloud) > 8000


def test_sparse_points_overrule_a_wrong_baseline():
    """A model that puts its two cameras 1.7 times too far apart: depth follows the scene's points, not the cameras."""
    cameras = rig(TWO)
    geometry = true_geometry(cameras)
    viewmats = geometry.cameras.viewmats.clone()
    centers = geometry.cameras.centers
    viewmats[1, :3, 3] = -viewmats[1, :3, :3] @ (centers[0] + 1.7 * (centers[1] - centers[0]))
    wrong = Cameras(viewmats, geometry.cameras.Ks, cameras.sizes, cameras.names)
    geometry = Geometry(
        wrong, *(getattr(geometry, name) for name in ("depths", "points", "confidence", "rgbs"))
    )
    assert_on_surface(cloud_in_scene(geometry, cameras, true_sparse(cameras), FILTERS).points)
    alone = cloud_in_scene(geometry, cameras, None, FILTERS).points
    assert float((distance_to_surface(alone) / EXTENT).median()) > 0.02


def test_each_photo_has_its_own_factor_from_its_points():
    cameras = rig(LINE)
    geometry = true_geometry(cameras)
    depths = [
        depth * factor for depth, factor in zip(geometry.depths, (1.1, 0.95, 1.0), strict=True)
    ]
    geometry = Geometry.from_depths(geometry.cameras, depths, geometry.confidence, geometry.rgbs)
    assert_on_surface(cloud_in_scene(geometry, cameras, true_sparse(cameras), FILTERS).points)


def test_a_photo_that_wants_another_world_is_not_followed(caplog):
    """Its sparse points are all wrong: it keeps the scale of the others."""
    cameras = rig(LINE)
    sparse = true_sparse(cameras)
    wrong = sparse.pairs[:, 0] == 2
    center = cameras.centers[2].numpy()
    sparse.points[wrong] = center + 4 * (sparse.points[wrong] - center)
    with caplog.at_level(logging.WARNING):
        cloud = cloud_in_scene(true_geometry(cameras), cameras, sparse, FILTERS)
    assert "2: its sparse points want 4.0" in caplog.text
    assert_on_surface(cloud.points)


def test_cameras_that_are_not_the_scene_s_are_told(caplog):
    cameras = rig([*LINE, [-0.4, -3.0, 1.2]])
    geometry = true_geometry(cameras)
    order = [1, 3, 0, 2]
    mixed = geometry.cameras[order].renamed(geometry.cameras.names)
    geometry = Geometry.from_depths(mixed, geometry.depths, geometry.confidence, geometry.rgbs)
    with caplog.at_level(logging.WARNING):
        cloud_in_scene(geometry, cameras, None, FILTERS)
    assert "the model's cameras are not the scene's" in caplog.text


# -- which pixels --------------------------------------------------------------------------------------------------------


def test_a_plane_has_no_edges_however_steep():
    x = torch.linspace(0, 1, 40).expand(30, 40)
    depth = 1 / (0.2 + 0.75 * x)  # 5 to 1.05 world units across the picture
    assert float(depth_edges(depth).max()) < 2e-6  # measured 2.8e-7


def test_steps_are_edges_also_when_smeared():
    depth = torch.full((20, 30), 2.0)
    depth[:, 15:] = 3.0
    edges = depth_edges(depth) > 0.03
    assert edges[10].nonzero()[:, 0].tolist() == [13, 14, 15, 16]  # a pixel beside the step too
    depth[:, 15] = 2.4  # a network's point between the surfaces
    edges = depth_edges(depth) > 0.03
    assert bool(edges[:, 14:17].all())
    assert not bool(edges[:, :12].any()) and not bool(edges[:, 19:].any())
    depth[:, 15:] = 0  # nothing there: no edge
    assert not bool((depth_edges(depth) > 0.03)[:, :15].any())


def test_thresholds_apply_where_there_is_enough():
    depth = torch.full((20, 30), 2.0)
    depth[:, 20:] = 3.0
    confidence = torch.full((20, 30), 0.8)
    confidence[:5] = 0.05
    chosen, gave_way = believed_pixels(depth, confidence, FILTERS)
    assert gave_way == ""
    assert not bool(chosen[:5].any())
    assert not bool(chosen[:, 19:21].any())
    assert bool(chosen[5:, :18].all())


def test_a_threshold_gives_way_before_a_photo_is_lost():
    """VGGT's users lose whole clouds to one threshold: here the best third stays, and it is said."""
    depth = torch.full((20, 30), 2.0)
    confidence = 0.01 + 0.001 * torch.arange(600).reshape(20, 30) / 600
    chosen, gave_way = believed_pixels(depth, confidence, FILTERS)
    assert "confidence 0.0107" in gave_way
    # 30 % of 600, and one more where the quantile falls between two pixels: the promise is "at least"
    assert 180 <= int(chosen.sum()) <= 181
    assert bool(chosen[15:].all())
    generator = torch.Generator().manual_seed(0)
    rough = 2 + torch.rand(20, 30, generator=generator)  # edges everywhere
    chosen, gave_way = believed_pixels(rough, torch.full((20, 30), 0.9), FILTERS)
    assert gave_way.startswith("depth step")
    assert int(chosen.sum()) >= 180


def test_a_model_s_own_mask_is_kept_unless_it_is_everything():
    depth = torch.full((20, 30), 2.0)
    confidence = torch.zeros(20, 30)
    confidence[:2] = 0.9
    chosen, gave_way = believed_pixels(depth, confidence, FILTERS)
    assert int(chosen.sum()) == 60 and gave_way == ""
    chosen, gave_way = believed_pixels(depth, torch.zeros(20, 30), FILTERS)
    assert int(chosen.sum()) == 600 and "confidence is 0 everywhere" in gave_way
    chosen, gave_way = believed_pixels(torch.zeros(20, 30), confidence, FILTERS)
    assert not bool(chosen.any()) and gave_way == "no depth at all"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    floor=st.floats(0, 1),
    step=st.floats(1e-4, 1),
    scale=st.floats(1e-3, 1),
    share=st.floats(0.05, 1),
)
@example(seed=9275, floor=1.0, step=1.0, scale=1.0, share=0.951171875)  # each cut rounds
def test_no_thresholds_can_empty_a_photo(seed, floor, step, scale, share):
    generator = torch.Generator().manual_seed(seed)
    depth = (torch.randn(12, 15, generator=generator)).exp()
    depth[torch.rand(12, 15, generator=generator) < 0.3] = 0
    depth[0, 0] = 1.0
    confidence = scale * torch.rand(12, 15, generator=generator)
    chosen, gave_way = believed_pixels(depth, confidence, FilterSettings(floor, step, share))
    assert int(chosen.sum()) >= math.floor(share**2 * int((depth > 0).sum()))
    assert int(chosen.sum()) >= 1
    assert not bool(chosen[depth == 0].any())
    low = bool((confidence[chosen] < floor).any())
    assert not low or "confidence" in gave_way


def test_settings_are_checked():
    for wrong in ({"min_confidence": 1.5}, {"max_depth_step": 0.0}, {"min_share": -0.1}):
        with pytest.raises(ValueError, match=f"FilterSettings: {next(iter(wrong))} must be"):
            FilterSettings(**wrong)


def test_a_photo_of_little_confidence_is_told_and_stays(caplog):
    cameras = rig(LINE)
    geometry = true_geometry(cameras, confidence=0.02)
    with caplog.at_level(logging.WARNING):
        cloud = cloud_in_scene(geometry, cameras, None, FILTERS)
    assert "0: little to believe, thresholds lowered (confidence 0.02)" in caplog.text
    assert_on_surface(cloud.points)


def test_nothing_at_all_is_an_error():
    cameras = rig(LINE)
    geometry = true_geometry(cameras)
    nothing = [torch.zeros_like(depth) for depth in geometry.depths]
    geometry = Geometry.from_depths(geometry.cameras, nothing, geometry.confidence, geometry.rgbs)
    with pytest.raises(ValueError, match=r"no depth in any of the 3 photos.*--weight-path"):
        cloud_in_scene(geometry, cameras, None, FILTERS)
    with pytest.raises(ValueError, match="saw 3 photos, the scene has 2 cameras"):
        cloud_in_scene(true_geometry(cameras), cameras[:2], None, FILTERS)


# -- depth maps, the fit, and the whole way --------------------------------------------------------------------------------


def test_depth_maps_have_the_photo_s_size_and_no_dropped_pixel():
    cameras = rig(LINE).scaled((224, 168))
    geometry = true_geometry(rig(LINE))
    geometry = Geometry.from_depths(
        geometry.cameras.scaled((224, 168)), geometry.depths, geometry.confidence, geometry.rgbs
    )
    found = place(geometry, cameras, None, FILTERS)
    depth = torch.from_numpy(found.depth_maps["1"].depth)
    assert depth.shape == (168, 224)
    expected = (
        FRAME.inverse().depth(geometry.depths[1]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    kept = depth > 0
    assert 0.5 < float(kept.float().mean()) < 1  # edges are dropped
    assert torch.allclose(depth[kept], expected[kept], rtol=5e-6)  # measured 4.1e-7
    assert bool(((torch.from_numpy(found.depth_maps["1"].confidence) > 0) == kept).all())


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.05])
def test_the_fit_stands_a_third_of_wrong_points(shift):
    random = np.random.default_rng(0)
    true = torch.from_numpy(random.uniform(1, 8, 200))
    w = (1 / true - shift) / 2.5
    true_wrong = true.clone()
    true_wrong[:65] *= torch.from_numpy(random.uniform(0.3, 3, 65))
    depths = 1 / w
    scale, offset = fit_inverse_depth(depths, true_wrong, with_shift=True)
    assert scale == pytest.approx(2.5, rel=1e-9)  # measured 1.2e-15
    assert offset == pytest.approx(shift, abs=1e-9)


def test_the_fit_of_points_at_one_depth_has_no_shift():
    depths, true = torch.full((30,), 2.0), torch.full((30,), 6.0)
    scale, shift = fit_inverse_depth(depths, true, with_shift=True)
    assert scale / 2.0 + shift == pytest.approx(1 / 6.0, rel=1e-6)
    assert scale > 0


class Perfect:
    """A provider that knows the truth."""

    def __init__(self, truth: Truth):
        self.truth = truth

    def predict(self, photos, cameras=None):
        assert [tuple(photo.shape) for photo in photos] == [(h, w, 3) for w, h in cameras.sizes]
        moved = self.truth.frame.cameras(self.truth.cameras)
        depths = []
        for row, (width, height) in enumerate(moved.sizes):
            points = self.truth.frame.points(self.truth.photo_surface(row, width, height))
            viewmat = moved.viewmats[row].double()
            depths.append((points @ viewmat[2, :3] + viewmat[2, 3]).float())
        ones = [torch.ones_like(depth) for depth in depths]
        return Geometry.from_depths(moved, depths, ones, list(photos))


def test_from_photos_on_disk_to_a_cloud(tmp_path):
    """`reconstruct_with` is what stage 0 calls: kept photos in, cloud and depth maps out."""
    truth = Truth()
    paths = [
        write_image(tmp_path / name, photo)
        for name, photo in zip(truth.cameras.names, truth.photos, strict=True)
    ]
    kept = Scene("room", truth.cameras, tuple(paths), None)
    found = reconstruct_with(Perfect(truth), kept, FILTERS)
    # Measured 2.7e-3: photos of 96 x 72 pixels give few features, and not good ones.
    error = distance_to_surface(found.cloud.points) / EXTENT
    assert float(torch.quantile(error, 0.99)) < 6e-3
    assert set(found.depth_maps) == set(truth.cameras.names)
    # Colours are the photos', where the points are.
    row = int(torch.randint(len(found.cloud), (1,), generator=torch.Generator().manual_seed(0)))
    assert 0 <= float(found.cloud.rgbs[row].min()) <= float(found.cloud.rgbs[row].max()) <= 1
    assert float(found.cloud.rgbs.std()) > 0.1
