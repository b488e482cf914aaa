"""The demo scene as it lies in the repository, and the parts of its script that need no renderer."""

import importlib
import sys
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest

DEMO = Path(__file__).resolve().parents[1] / "demo"
SCENE = DEMO / "study"
MODULES = (
    "make_demo",
    "desk",
    "room",
    "crockery",
    "plants",
    "prints",
    "parts",
    "shapes",
    "textures",
)


@pytest.fixture(scope="module")
def demo():
    """The demo's modules, imported as its script does (their names are short: they leave again afterwards)."""
    sys.path.insert(0, str(DEMO))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(DEMO))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model():
    return pycolmap.Reconstruction(str(SCENE / "sparse" / "0"))


def test_photographs_load_and_are_small():
    paths = sorted((SCENE / "images").iterdir())
    assert [p.name for p in paths] == [f"IMG_{k:04d}.jpg" for k in range(1, 25)]
    assert sum(p.stat().st_size for p in paths) <= 4_000_000
    for path in paths:
        image = cv2.imread(str(path))
        assert image.shape == (427, 640, 3), path.name
        assert image.std() > 30, f"{path.name} is nearly one colour"
        assert np.mean(image >= 254) < 0.10, f"{path.name} is burnt out"


def test_model_covers_every_photograph(model):
    names = sorted(image.name for image in model.images.values())
    assert names == sorted(p.name for p in (SCENE / "images").iterdir())
    camera = next(iter(model.cameras.values()))
    assert len(model.cameras) == 1
    assert camera.model.name == "PINHOLE"
    assert (camera.width, camera.height) == (640, 427)


def test_model_reprojects(model):
    """Measured by projecting every observation, not by reading the errors that the mapper stored."""
    errors = []
    for image in model.images.values():
        camera = model.cameras[image.camera_id]
        K = camera.calibration_matrix()
        cam_from_world = image.cam_from_world().matrix()
        observed = [p for p in image.points2D if p.has_point3D()]
        assert len(observed) >= 150, image.name  # the poorest view has 370
        points = np.array([model.points3D[p.point3D_id].xyz for p in observed])
        pixels = (points @ cam_from_world[:, :3].T + cam_from_world[:, 3]) @ K.T
        xy = np.array([p.xy for p in observed])
        errors.append(np.linalg.norm(pixels[:, :2] / pixels[:, 2:] - xy, axis=1))
    assert np.concatenate(errors).mean() < 1.0  # 0.456 measured


def test_model_agrees_with_the_true_cameras(demo, model):
    """The cameras that rendered the photographs, up to a similarity transform."""
    errors = demo["make_demo"].camera_errors(model)
    assert errors["rotation_degrees"].max() < 0.5  # 0.122 measured
    assert errors["center_percent"].max() < 1.0  # 0.107 measured


def test_cameras_look_at_the_desk(demo):
    script = demo["make_demo"]
    viewmats, K = script.camera_path(), script.intrinsics()
    assert viewmats.shape == (24, 4, 4)
    turns = viewmats[:, :3, :3]
    np.testing.assert_allclose(
        turns @ turns.transpose(0, 2, 1), np.tile(np.eye(3), (24, 1, 1)), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(turns), 1.0)
    centers = -np.einsum("nij,ni->nj", turns, viewmats[:, :3, 3])
    assert (centers[:, 2] > 0.2).all() and (
        centers[:, 1] < -0.5
    ).all()  # above the desk, on the room's side
    azimuth = np.degrees(np.arctan2(centers[:, 0], -centers[:, 1]))
    assert 90 < np.ptp(azimuth) < 125
    assert (np.diff(azimuth) > 0).all()  # the names follow the walk
    middle = viewmats @ np.array((0.0, 0.0, 0.0, 1.0))
    pixels = middle[:, :3] @ K.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    assert (middle[:, 2] > 0.8).all()
    assert (
        np.abs(pixels / (640, 427) - 0.5) < 0.25
    ).all()  # the middle of the desk is in the middle half of each photo


def test_textures_are_deterministic_and_textured(demo):
    textures, prints = demo["textures"], demo["prints"]
    for make in (textures.terracotta, textures.gingham, prints.tea_label, prints.page_edges):
        first, second = make(), make()
        assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3
        np.testing.assert_array_equal(first, second)
        assert first.std() > 5
    plain = textures.plaster("sage", (186, 196, 172))
    assert plain.std(axis=(0, 1)).max() < 4  # the wall has to stay plain: it is there to be hard
    assert (textures.wood("a", 64, 64) != textures.wood("b", 64, 64)).any()


def test_sky_has_the_sun_where_it_was_asked_for(demo):
    textures = demo["textures"]
    sun = np.array((0.3, 0.8, 0.5))
    with_sun = textures.sky(256, 512, sun, 1000.0)
    brightest = np.unravel_index(with_sun.sum(-1).argmax(), with_sun.shape[:2])
    direction = textures.environment_directions(256, 512)[brightest]
    assert direction @ (sun / np.linalg.norm(sun)) > np.cos(np.radians(1.5))


def test_meshes_are_sound(demo):
    parts = [*demo["desk"].desk_things(), *demo["room"].room_things()]
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        mesh = part.mesh
        assert np.isfinite(mesh.vertices).all() and np.isfinite(mesh.uvs).all(), part.name
        assert mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices), part.name
        length = np.linalg.norm(mesh.normals, axis=1)
        np.testing.assert_allclose(length, 1.0, atol=1e-5, err_msg=part.name)
    on_desk = [
        p for p in parts if p.name in ("mug", "teapot", "tea tin", "basket", "tin", "book 0 boards")
    ]
    assert len(on_desk) == 6
    for part in on_desk:
        low, high = part.mesh.vertices.min(0), part.mesh.vertices.max(0)
        assert low[2] > -1e-6 and high[2] < 0.35, part.name  # stands on the desk
        assert (np.abs(low[:2]) < (0.85, 0.42)).all() and (np.abs(high[:2]) < (0.85, 0.42)).all(), (
            part.name
        )


def test_a_box_faces_outwards_and_a_ball_is_round(demo):
    shapes = demo["shapes"]
    cube = shapes.box((-1, -1, -1), (1, 1, 1))
    a, b, c = (cube.vertices[cube.faces[:, k]] for k in range(3))
    face_normals = np.cross(b - a, c - a)
    assert (np.einsum("fi,fi->f", face_normals, (a + b + c) / 3) > 0).all()
    np.testing.assert_allclose(0.5 * np.linalg.norm(face_normals, axis=1).sum(), 24.0, rtol=1e-6)
    ball = shapes.ball(0.5)
    np.testing.assert_allclose(np.linalg.norm(ball.vertices, axis=1), 0.5, rtol=1e-5)
    inner = np.abs(ball.vertices[:, 2]) < 0.49
    cosine = np.einsum("vi,vi->v", ball.normals, ball.vertices)[inner] / 0.5
    assert cosine.min() > 0.99  # outwards; 0.9999999 measured


def test_a_similarity_is_found_again(demo):
    rng = np.random.default_rng(0)
    source = rng.normal(size=(10, 3))
    turn = demo["shapes"].rotation("z", 40) @ demo["shapes"].rotation("x", -25)
    scale, found, shift = demo["make_demo"].similarity(source, 2.5 * source @ turn.T + (1, -2, 3))
    np.testing.assert_allclose(scale, 2.5)
    np.testing.assert_allclose(found, turn, atol=1e-12)
    np.testing.assert_allclose(shift, (1, -2, 3), atol=1e-12)
