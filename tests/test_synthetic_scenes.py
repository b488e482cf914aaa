"""Synthetic scenes: photos are where their cameras say, rays agree with geometry, files load, and the same seed gives the same bits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from s2d.geometry import project
from s2d.guidance.mvs import reconstruct
from s2d.images import write_image
from s2d.pairs.scenes import find_scenes
from s2d.pairs.synthetic.files import SceneSettings, make_scene
from s2d.pairs.synthetic.layouts import Light, random_layout
from s2d.pairs.synthetic.light import bake
from s2d.pairs.synthetic.photograph import photograph
from s2d.pairs.synthetic.rigs import RigKind, random_rig
from s2d.pairs.synthetic.shapes import Material, Shape
from s2d.pairs.synthetic.textures import Texture, pattern_texture
from s2d.pairs.synthetic.things import turned
from s2d.scene import load_scene
from tools import make_synthetic_scenes
from tools.make_synthetic_scenes import Config

WHITE = Texture(np.full((8, 8, 3), 255, np.uint8))
EVEN = Light(np.array([0.0, 0, 9]), 0.1, np.zeros(3), np.ones(3), 1.0)
SKY = Shape("ellipsoid", np.zeros(3), 50 * np.eye(3), Material(WHITE, is_lit=False), casts=False)
SMALL = {"width": 96, "height": 72}


def open_maps(shapes):
    """Light maps without any shadow."""
    return [np.ones((2, 2, 2), np.float32) for _ in shapes]


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(5)


def test_a_point_of_a_texture_lands_where_the_camera_says(rng):
    size, mark = 512, (360, 150)  # column and row of the texel corner in the middle of a round spot
    y, x = np.mgrid[0:size, 0:size] + 0.5
    spot = np.exp(-((x - mark[0]) ** 2 + (y - mark[1]) ** 2) / (2 * 7.0**2))
    texture = Texture(np.repeat((255 * spot)[..., None], 3, 2).round().astype(np.uint8))
    axes = turned(0.5) @ np.diag([1.2, 1.2, 1.0])
    axes[2, 1] = 0.4  # not even a right angle: a leaning parallelogram
    center = np.array([0.1, 0.3, 0.9])
    board = Shape("quad", center, axes, Material(texture))
    black = Texture(np.zeros((8, 8, 3), np.uint8))
    shapes = [Shape("ellipsoid", np.zeros(3), 50 * np.eye(3), Material(black, is_lit=False)), board]
    truth = center + axes @ [2 * mark[0] / size - 1, 2 * mark[1] / size - 1, 0]
    K = np.array([[210.0, 0, 101.3], [0, 214.0, 78.9], [0, 0, 1]])
    for turn in rng.normal(0, 0.15, (4, 3)):
        viewmat = np.eye(4)
        viewmat[:3, :3], _ = np.linalg.qr(np.eye(3) + turn * 0.3 + np.diag([1e-9, 0, 0]))
        viewmat[:3, :3] *= np.sign(np.diag(viewmat[:3, :3]))
        viewmat[:3, 3] = np.array([0, -0.3, 3.0]) + turn
        photo = photograph(shapes, EVEN, open_maps(shapes), K, viewmat, 200, 150)
        weight = np.sqrt(photo.linear[..., 0])  # the spot as it was painted
        row, column = np.mgrid[0:150, 0:200] + 0.5
        found = [(weight * values).sum() / weight.sum() for values in (column, row)]
        expected, depth = project(*(torch.from_numpy(v) for v in (truth, K, viewmat)))
        # Measured: 0.021 px, of which most is the slant of the board: perspective makes the spot a little lopsided.
        assert np.abs(found - expected.numpy()).max() < 0.05
        x, y = expected.long()
        assert photo.depth[y, x] == pytest.approx(float(depth), rel=0.005)


@pytest.mark.parametrize("kind", ["quad", "ellipsoid", "tube"])
def test_rays_hit_the_points_they_are_aimed_at(kind, rng):
    shape = Shape(kind, rng.normal(size=3), turned(1.0) @ np.diag([0.7, 1.3, 0.4]), Material(WHITE), 0.4)  # fmt: skip
    uv = rng.uniform(0.05, 0.95, (200, 2))
    local = shape.from_uv(uv)
    assert np.abs(shape.uv(local) - uv).max() < 1e-9  # measured: 1e-16
    points, normals = shape.center + local @ shape.axes.T, shape.normals(local)
    start = points + 0.2 * normals + 0.02 * rng.normal(size=(200, 3))
    ray = shape.to_local(points - start)
    hits = shape.hit(tuple(shape.to_local(start - shape.center).T), tuple(ray.T))
    assert np.abs(hits - 1).max() < 1e-9  # measured: 2e-15
    # The normal is across the surface: two steps along it, found by differences.
    step = 1e-6
    for along in ([step, 0], [0, step]):
        tangent = (shape.from_uv(uv + along) - local) @ shape.axes.T / step
        assert np.abs(np.einsum("ni,ni->n", tangent, normals)).max() < 1e-4  # measured: 2e-5


def test_a_ray_beside_a_shape_misses_and_masks_cut(rng):
    mask = np.zeros((4, 4), bool)
    mask[0, 3] = True  # v small, u large
    board = Shape("quad", np.zeros(3), np.eye(3), Material(WHITE, mask=mask))
    x, y = np.array([0.75, -0.75, 1.01]), np.array([-0.75, 0.75, -0.75])
    down = (np.zeros(3), np.zeros(3), -np.ones(3))
    assert board.hit((x, y, np.ones(3)), down).tolist() == [1.0, np.inf, np.inf]
    pipe = Shape("tube", np.zeros(3), np.eye(3), Material(WHITE), span=0.5)
    ahead = (np.ones(2), np.zeros(2), np.zeros(2))
    # From inside, only the piece about +x is there; from behind it is seen through the open side.
    assert pipe.hit((np.array([0.0, -3.0]), np.zeros(2), np.zeros(2)), ahead).tolist() == [1.0, 4.0]
    assert pipe.hit((np.zeros(1), np.zeros(1), np.zeros(1)), (-np.ones(1), np.zeros(1), np.zeros(1)))[0] == np.inf  # fmt: skip


def test_shadows_fall_below_what_is_in_the_way(rng):
    floor = Shape("quad", np.zeros(3), np.diag([2.0, 2, 1]), Material(WHITE), casts=False)
    roof = Shape("quad", np.array([0, 0, 0.4]), np.diag([0.5, 0.5, 1]), Material(WHITE))
    lamp = Light(np.array([0, 0, 30.0]), 0.01, np.ones(3), np.ones(3), 1.0)
    light_map = bake(rng, [floor, roof], lamp, np.array([3.0, 0, 3]))[0]
    middle = len(light_map) // 2
    assert light_map[middle, middle, 0] < 0.01 < 0.99 < light_map[0, 0, 0]
    assert light_map[middle, middle, 1] < 0.5 and light_map[0, 0, 1] > 0.99
    half = (light_map[middle, :, 0] < 0.5).mean() * 4
    assert half == pytest.approx(1.0, abs=0.15)  # as wide as the roof


def test_textures_average_what_is_too_fine_to_see():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    texture = Texture(stripes)
    uv = np.random.default_rng(0).uniform(-3, 3, (50, 2)).astype(np.float32)
    assert np.abs(texture.sample(uv, np.full(50, 8.0)) - 100 / 255).max() < 0.01
    centers = np.array([[0.5 / 64, 0.5], [1.5 / 64, 0.5], [-0.5 / 64, 0.5]], np.float32)
    assert texture.sample(centers, np.ones(3))[:, 0] * 255 == pytest.approx([200, 0, 200], abs=0.01)


@pytest.mark.parametrize("kind", ["grid", "arc", "walk"])
def test_rigs_look_at_what_they_should(kind: RigKind):
    for seed in range(10):
        rig = random_rig(np.random.default_rng(seed), kind, 504, 378)
        assert 12 <= len(rig.viewmats) <= 24
        fov = 2 * np.degrees(np.arctan(252 / rig.K[0, 0]))
        assert 40 <= fov <= 75
        if kind == "walk":  # looks aside at times
            continue
        for viewmat in rig.viewmats:
            seen, depth = project(*map(torch.from_numpy, (rig.target, rig.K, viewmat)))
            assert depth > 0 and 0 < seen[0] < 504 and 0 < seen[1] < 378


def test_layouts_are_closed_and_keep_clear_of_the_cameras(rng):
    for seed in range(3):
        layout = random_layout(np.random.default_rng(seed), (), 64, 48)
        for viewmat in layout.rig.viewmats[:: len(layout.rig.viewmats) - 1]:
            photo = photograph(layout.shapes, layout.light, open_maps(layout.shapes), layout.rig.K, viewmat, 64, 48)  # fmt: skip
            assert np.isfinite(photo.linear).all()  # a hole would have been an error
            assert photo.depth.min() > 0.05


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(2):
        pixels = pattern_texture(np.random.default_rng(seed), 200).levels[0]
        write_image(folder / f"{seed}.png", torch.from_numpy(pixels).float() / 255)
    return folder


def test_command_makes_scenes_once_and_the_same_every_time(textures, tmp_path):
    cfg = Config(tmp_path / "a", count=1, seed=3, textures=(textures,), **SMALL)
    make_synthetic_scenes.main(cfg)
    one = tmp_path / "a" / "synthetic-3-0000"
    before = {path.name: path.stat().st_mtime_ns for path in one.rglob("*")}
    content = {path.name: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    make_synthetic_scenes.main(cfg)
    assert {path.name: path.stat().st_mtime_ns for path in one.rglob("*")} == before
    photos = tuple(sorted(textures.iterdir()))
    again = make_scene(SceneSettings(3, photos, *SMALL.values()), 0, tmp_path / "synthetic-3-0000")
    assert {path.name: path.read_bytes() for path in again.rglob("*") if path.is_file()} == content
    assert (tmp_path / "a" / "preview.png").is_file()
    assert list(find_scenes([tmp_path / "a"])) == ["synthetic-3-0000"]
    scene = load_scene(one)
    assert len(scene) >= 12 and scene.cameras.width == 96
    layout = random_layout(np.random.default_rng([3, 0]), photos, *SMALL.values())
    # The cameras survive the file's other axes; float32 in memory. Measured: 2e-7.
    assert np.abs(scene.cameras.viewmats.numpy() - layout.rig.viewmats).max() < 1e-5
    with pytest.raises(ValueError, match="other textures"):
        make_synthetic_scenes.main(Config(tmp_path / "a", count=1, seed=3, **SMALL))
    with pytest.raises(FileNotFoundError, match="has no photos"):
        (tmp_path / "empty").mkdir()
        make_synthetic_scenes.main(Config(tmp_path / "b", textures=(tmp_path / "empty",)))


@pytest.mark.slow
def test_stereo_recovers_the_depth(tmp_path):
    settings = SceneSettings(1, (), 320, 240)
    scene = load_scene(make_scene(settings, 0, tmp_path / "scene"))
    layout = random_layout(np.random.default_rng([1, 0]), (), 320, 240)
    kept = scene.subset(scene.names[::4])
    depth_maps = reconstruct(kept).depth_maps
    errors = []
    for name in kept.names[::2]:
        row = scene.names.index(name)
        truth = photograph(layout.shapes, layout.light, open_maps(layout.shapes), layout.rig.K, layout.rig.viewmats[row], 320, 240).depth  # fmt: skip
        found = depth_maps[name].depth
        known = found > 0
        assert known.mean() > 0.2
        errors.append(np.abs(found[known] / truth[known] - 1))
    assert np.median(np.concatenate(errors)) < 0.01  # measured: 0.006
