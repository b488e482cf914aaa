"""Drawing a cloud: against a naive z-buffer, and what must never shine through."""

from pathlib import Path

import native_build
import numpy as np
import pytest
import torch
from synthetic_stereo import SLANTED, exact_planes, photograph, viewmat

from s2d.cameras import Cameras
from s2d.guidance.cloud import SurfaceCloud
from s2d.guidance.kernels import fuse
from s2d.guidance.render import render_cloud
from s2d.guidance.scene_glb import frusta, write_scene_glb

ROOT = Path(__file__).resolve().parent.parent


def camera(pose: np.ndarray, width: int = 160, height: int = 120, focal: float = 150.0) -> Cameras:
    K = torch.tensor([[[focal, 0, width / 2 + 3.3], [0, focal, height / 2 - 2.1], [0, 0, 1]]])
    return Cameras(torch.tensor(pose)[None], K, ((width, height),), ("a.png",))


def wall(
    z: float, colour: tuple[float, float, float], spacing: float, half: float = 3.0
) -> SurfaceCloud:
    """A square grid of points at depth z that faces the origin."""
    axis = torch.arange(-half, half, spacing)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    points = torch.stack([x, y, torch.full_like(x, z)], -1).reshape(-1, 3)
    steps = torch.tensor([[spacing, 0, 0], [0, spacing, 0]]).expand(len(points), 2, 3)
    normals = torch.tensor([0.0, 0, -1]).expand(len(points), 3)
    return SurfaceCloud(
        points, torch.tensor(colour).expand(len(points), 3), torch.ones(len(points)), normals, steps
    )


def naive_z_buffer(cloud: SurfaceCloud, cam: Cameras) -> tuple[np.ndarray, np.ndarray]:
    """One pixel per point, the nearest wins: colour and depth (0 = none)."""
    image, depth = np.zeros((cam.height, cam.width, 3)), np.zeros((cam.height, cam.width))
    V, K = cam.viewmats[0].double().numpy(), cam.Ks[0].double().numpy()
    for point, rgb in zip(cloud.points.double().numpy(), cloud.rgbs.numpy(), strict=True):
        x, y, z = V[:3, :3] @ point + V[:3, 3]
        if z <= 0:
            continue
        column, row = (
            int(np.floor(K[0, 0] * x / z + K[0, 2])),
            int(np.floor(K[1, 1] * y / z + K[1, 2])),
        )
        if (
            0 <= column < cam.width
            and 0 <= row < cam.height
            and (depth[row, column] == 0 or z < depth[row, column])
        ):
            depth[row, column], image[row, column] = z, rgb
    return image, depth


@pytest.fixture(scope="module")
def photographed() -> tuple[SurfaceCloud, torch.Tensor, np.ndarray]:
    """A cloud made of one photo and its exact depth, that photo and that depth."""
    view, depth = photograph(viewmat((0.0, 0.1, 0.1), 0.03), [SLANTED])
    view.planes, view.confidence = exact_planes(view, depth), np.ones_like(depth, np.float32)
    cloud = SurfaceCloud(*(torch.from_numpy(array) for array in fuse([view], 1.5, 0.02)))
    return cloud, torch.from_numpy(view.rgb), depth


def test_at_its_own_camera_a_photo_comes_back(photographed):
    cloud, photo, depth = photographed
    cam = camera(viewmat((0.0, 0.1, 0.1), 0.03))
    cam = Cameras(
        cam.viewmats,
        torch.tensor([[[150.0, 0, 83.3], [0, 152.0, 57.9], [0, 0, 1]]]),
        cam.sizes,
        cam.names,
    )
    picture = render_cloud(cloud, cam)
    assert picture.coverage.all()
    error = (picture.rgb - photo).square().mean()
    assert (
        error < 10**-2.7
    )  # PSNR > 27 dB on a texture of few-pixel waves; half a pixel of offset gives 17 dB
    shifted = (torch.roll(picture.rgb, 1, 1) - photo).square().mean()
    assert error < 0.2 * shifted
    relative = (picture.depth.numpy() - depth) / depth
    assert np.abs(relative).max() < 0.01  # measured 0.003


def test_agrees_with_a_naive_z_buffer(photographed):
    cloud, _, _ = photographed
    both = SurfaceCloud.cat([cloud, wall(2.5, (0.9, 0.1, 0.2), 0.012, half=0.6)])
    cam = camera(viewmat((0.2, 0.0, 0.0), -0.05))
    picture = render_cloud(both, cam)
    image, depth = naive_z_buffer(both, cam)
    hit = depth > 0
    assert hit.mean() > 0.6
    assert picture.coverage.numpy()[hit].mean() > 0.995
    near = np.abs(picture.depth.numpy() - depth)[hit] / depth[hit]
    assert (
        near < 0.01
    ).mean() > 0.97  # the rest: points behind gaps of the front, which only the naive one shows
    colours = np.abs(picture.rgb.numpy() - image)[hit].mean()
    assert colours < 0.06


def test_nothing_shines_through_the_gaps_of_a_near_surface():
    front, back = wall(2.0, (1.0, 0.0, 0.0), 0.02, half=1.0), wall(4.0, (0.0, 0.0, 1.0), 0.02)
    cloud = SurfaceCloud.cat([back, front])
    # From 0.4 in front of it a step of 0.02 spans 7.5 pixels: nearly all pixels lie between points.
    picture = render_cloud(cloud, camera(viewmat((0.0, 0.0, 1.6))))
    assert picture.coverage.all()
    assert float(picture.rgb[..., 2].max()) < 0.02
    _, depth = naive_z_buffer(cloud, camera(viewmat((0.0, 0.0, 1.6))))
    assert (depth > 1.0).mean() > 0.05  # while the naive one does show the wall behind


def test_both_sides_of_a_silhouette_are_covered():
    cloud = SurfaceCloud.cat(
        [wall(4.0, (0.0, 0.0, 1.0), 0.02), wall(2.0, (1.0, 0.0, 0.0), 0.012, half=0.5)]
    )
    picture = render_cloud(cloud, camera(viewmat((0.0, 0.0, 0.0))))
    assert picture.coverage.all()
    red = picture.rgb[..., 0] > 0.5
    # The red square is 0.99 wide at depth 2: 74 pixels. It grows by at most a pixel on each side.
    assert 72 <= int(red.any(0).sum()) <= 77


def test_same_bits_with_any_number_of_threads(photographed):
    cloud, _, _ = photographed
    pictures = []
    for threads in (1, 3):
        native_build.set_num_threads(threads)
        pictures.append(render_cloud(cloud, camera(viewmat((0.3, 0.0, 0.2)))))
    native_build.set_num_threads(None)
    for one, other in zip(*pictures, strict=True):
        assert torch.equal(one, other)


def test_points_without_orientation_are_discs():
    points = torch.tensor([[0.0, 0.0, 2.0]])
    cloud = SurfaceCloud.without_orientation(points, torch.ones(1, 3), torch.tensor([0.1]))
    cam = camera(viewmat((0.0, 0.0, 0.0)))
    covered = render_cloud(cloud, cam).coverage
    rows, columns = covered.any(1).sum(), covered.any(0).sum()
    # Reach 2 sigma = 1 step: 0.1 * 150 / 2 = 7.5 pixels to each side.
    assert abs(int(rows) - 15) <= 1 and abs(int(columns) - 15) <= 1
    centre = covered.nonzero().float().mean(0) + 0.5
    assert torch.allclose(centre, torch.tensor([57.9, 83.3]), atol=0.6)


@pytest.mark.parametrize("points", [[], [[0.0, 0.0, -1.0]], [[1e9, 0.0, 1.0]], [[0.0, 0.0, 1e-12]]])
def test_what_is_not_in_view_leaves_the_picture_black(points):
    points = torch.tensor(points).reshape(-1, 3)
    cloud = SurfaceCloud.without_orientation(
        points, torch.ones_like(points), torch.ones(len(points))
    )
    picture = render_cloud(cloud, camera(viewmat((0, 0, 0))))
    assert not picture.coverage.any()
    assert not picture.rgb.any() and not picture.depth.any()


def test_one_pixel_picture_and_several_cameras():
    cloud = wall(2.0, (0.2, 0.4, 0.6), 0.02)
    picture = render_cloud(cloud, camera(viewmat((0, 0, 0)), 1, 1))
    assert torch.allclose(picture.rgb, torch.tensor([0.2, 0.4, 0.6]), atol=1e-5)
    one = camera(viewmat((0, 0, 0)))
    with pytest.raises(ValueError, match="one camera, got 2"):
        render_cloud(cloud, Cameras.cat([one, one.renamed(["b.png"])]))


def test_a_cloud_that_is_not_finite_is_refused():
    points = torch.tensor([[0.0, float("nan"), 1.0]])
    with pytest.raises(ValueError, match="points has 1 non-finite"):
        SurfaceCloud.without_orientation(points, torch.ones(1, 3), torch.ones(1))


def test_a_saved_cloud_draws_the_same_picture(photographed, tmp_path):
    cloud, _, _ = photographed
    loaded = SurfaceCloud.load(cloud.save(tmp_path / "surface.npz"))
    assert torch.equal(loaded.points, cloud.points) and torch.equal(loaded.steps, cloud.steps)
    assert torch.allclose(loaded.normals, cloud.normals, atol=1e-4)
    cam = camera(viewmat((0.2, 0.0, 0.1)))
    before, after = render_cloud(cloud, cam), render_cloud(loaded, cam)
    assert torch.equal(before.coverage, after.coverage)
    assert float((before.rgb - after.rgb).abs().max()) < 1 / 255  # colours are stored in 8 bits
    with pytest.raises(FileNotFoundError, match="--overwrite"):
        SurfaceCloud.load(tmp_path / "none.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK broken")
    with pytest.raises(ValueError, match="not a surface cloud"):
        SurfaceCloud.load(tmp_path / "broken.npz")


def test_scene_glb_holds_points_and_cameras(tmp_path):
    import trimesh

    cloud = wall(2.0, (0.2, 0.4, 0.6), 0.05)
    cam = camera(viewmat((0, 0, 0)))
    other = camera(viewmat((1, 0, 0))).renamed(["b.png"])
    scene = trimesh.load_scene(write_scene_glb(tmp_path / "scene.glb", cloud, cam, other))
    assert set(scene.geometry) == {"points", "kept", "novel"}
    loaded = scene.geometry["points"]
    assert np.allclose(np.sort(loaded.vertices, 0), np.sort(cloud.points.numpy(), 0), atol=1e-6)
    assert np.abs(loaded.colors[:, :3] - [51, 102, 153]).max() <= 1
    # The tip of the pyramid is the camera's centre, and its base is seen at the picture's corners.
    segments = frusta(other, 0.5)
    assert np.allclose(segments[0, 0], [1, 0, 0], atol=1e-6)
    corner = segments[0, 1] - [1, 0, 0]
    assert np.allclose(corner, [-83.3 / 150 * 0.5, -57.9 / 150 * 0.5, 0.5], atol=1e-5)
