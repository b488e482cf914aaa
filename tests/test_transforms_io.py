"""transforms.json: axes by hand, every spelling of the intrinsics, distortion, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch

from s2d.images import write_image
from s2d.lenses import Lens
from s2d.transforms_io import find_transforms, read_transforms

EYE = np.eye(4).tolist()
INTRINSICS = {"fl_x": 50.0, "fl_y": 52.0, "cx": 16.5, "cy": 11.0, "w": 32, "h": 24}


def write(folder, content, names=("images/a.png",)):
    for name in names:
        write_image(folder / name, torch.rand(24, 32, 3))
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder / "transforms.json"


def one(folder, **content):
    frame = {"file_path": "images/a.png", "transform_matrix": EYE, **content.pop("frame", {})}
    return read_transforms(write(folder, {**INTRINSICS, **content, "frames": [frame]}))


def test_opengl_axes_become_opencv(tmp_path):
    """An OpenGL camera at (1, 2, 3) without rotation looks along -z with y up."""
    c2w = np.eye(4)
    c2w[:3, 3] = [1, 2, 3]
    scene = one(tmp_path, frame={"transform_matrix": c2w.tolist()})
    ahead, above = np.array([1, 2, -7, 1.0]), np.array([1, 3, 3, 1.0])
    np.testing.assert_allclose(scene.viewmats[0] @ ahead, [0, 0, 10, 1], atol=1e-12)
    np.testing.assert_allclose(scene.viewmats[0] @ above, [0, -1, 0, 1], atol=1e-12)


def test_a_turned_camera(tmp_path):
    """Columns of the matrix are the camera's right, up and backward axes in the world."""
    c2w = [
        [0, 0, -1, 5],
        [1, 0, 0, 0],
        [0, -1, 0, 0],
        [0, 0, 0, 1],
    ]  # right = +y, up = -z, backward = -x
    scene = one(tmp_path, frame={"transform_matrix": c2w})
    np.testing.assert_allclose(scene.viewmats[0] @ [5 + 4, 0, 0, 1], [0, 0, 4, 1], atol=1e-12)
    np.testing.assert_allclose(scene.viewmats[0] @ [5, 2, 3, 1], [2, 3, 0, 1], atol=1e-12)


def test_global_intrinsics_and_frame_overrides(tmp_path):
    names = ("images/a.png", "images/b.png")
    content = {
        **INTRINSICS,
        "frames": [
            {"file_path": names[1], "transform_matrix": EYE, "fl_x": 60.0, "w": 32},
            {"file_path": "./" + names[0], "transform_matrix": EYE},
        ],
    }
    scene = read_transforms(write(tmp_path, content, names))
    assert scene.names == ["a.png", "b.png"]
    assert scene.lenses == [
        Lens("PINHOLE", 32, 24, (50.0, 52.0, 16.5, 11.0)),
        Lens("PINHOLE", 32, 24, (60.0, 52.0, 16.5, 11.0)),
    ]


def test_field_of_view_and_size_from_the_photo(tmp_path):
    content = {
        "camera_angle_x": math.radians(90),
        "frames": [{"file_path": "./train/r_0", "transform_matrix": EYE}],
    }
    scene = read_transforms(write(tmp_path, content, ("train/r_0.png",)))
    lens = scene.lenses[0]
    assert (lens.width, lens.height) == (32, 24)
    assert lens.params == pytest.approx((16.0, 16.0, 16.0, 12.0))
    assert scene.image_paths[0] == tmp_path / "train" / "r_0.png" and scene.names == ["r_0.png"]


@pytest.mark.parametrize(
    ("extra", "model", "params"),
    [
        ({"camera_model": "PINHOLE"}, "PINHOLE", ()),
        ({"camera_model": "OPENCV", "k1": 0, "k2": 0.0, "p1": 0, "p2": 0}, "PINHOLE", ()),
        ({"k1": 0.1, "k2": 0.2, "p1": 0.3, "p2": 0.4}, "OPENCV", (0.1, 0.2, 0.3, 0.4)),
        ({"k1": 0.1, "k3": 0.5, "p2": 0.4}, "FULL_OPENCV", (0.1, 0, 0, 0.4, 0.5, 0, 0, 0)),
        (
            {"camera_model": "OPENCV_FISHEYE", "k1": 0.1, "k4": 0.4},
            "OPENCV_FISHEYE",
            (0.1, 0, 0, 0.4),
        ),
        ({"is_fisheye": True, "k2": 0.1}, "OPENCV_FISHEYE", (0, 0.1, 0, 0)),
    ],
)
def test_distortion(tmp_path, extra, model, params):
    assert one(tmp_path, **extra).lenses == [Lens(model, 32, 24, (50.0, 52.0, 16.5, 11.0, *params))]


def test_points_file(tmp_path):
    (tmp_path / "sparse_pc.ply").touch()
    assert one(tmp_path, ply_file_path="sparse_pc.ply").points_path == tmp_path / "sparse_pc.ply"
    assert one(tmp_path, ply_file_path="gone.ply").points_path is None
    # The PLY lies in the world of the poses; applied_transform is history.
    moved = one(tmp_path, applied_transform=[[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]])
    assert np.array_equal(moved.viewmats, one(tmp_path).viewmats)


def test_names_keep_folders_that_differ(tmp_path):
    names = ("left/a.png", "right/a.png")
    frames = [{"file_path": name, "transform_matrix": EYE} for name in names]
    assert read_transforms(write(tmp_path, {**INTRINSICS, "frames": frames}, names)).names == list(
        names
    )


def test_rounded_matrices_are_made_orthonormal(tmp_path):
    angle = 0.3
    c2w = np.eye(4)
    c2w[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    viewmat = one(tmp_path, frame={"transform_matrix": c2w.round(4).tolist()}).viewmats[0]
    np.testing.assert_allclose(viewmat[:3, :3] @ viewmat[:3, :3].T, np.eye(3), atol=1e-12)


def test_refusals(tmp_path):
    scaled, mirrored = (np.eye(4) for _ in range(2))
    scaled[:3, :3] *= 1.5
    mirrored[0, 0] = -1
    for content, message in (
        (
            {"frame": {"transform_matrix": scaled.tolist()}},
            r"images/a.png: transform_matrix.* is not a rotation \(row lengths",
        ),
        ({"frame": {"transform_matrix": mirrored.tolist()}}, "is not a rotation"),
        (
            {"frame": {"transform_matrix": [[1, 2]]}},
            "needs a transform_matrix of 4 x 4 finite numbers",
        ),
        (
            {"frame": {"file_path": "images/x.png"}},
            r"1 of 1 photos in transforms.json are missing \(first: images/x.png\)",
        ),
        ({"fl_x": None, "fl_y": None}, "has no focal length. Expected fl_x"),
        ({"camera_model": "EQUIRECTANGULAR"}, "camera_model EQUIRECTANGULAR cannot be used"),
        ({"k4": 0.1}, "no camera model here has an r⁸ term"),
    ):
        with pytest.raises(ValueError, match=message):
            one(tmp_path, **content)
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "has no frames"),
        ('{"frames": []}', "has no frames"),
        ('{"frames": [{}]}', "frame 0 has no file_path"),
    ):
        (tmp_path / "transforms.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_transforms(tmp_path / "transforms.json")
    with pytest.raises(FileNotFoundError):
        read_transforms(tmp_path / "none.json")


def test_doubled_frames(tmp_path):
    frame = {"file_path": "images/a.png", "transform_matrix": EYE}
    with pytest.raises(ValueError, match=r"a.png stands in more than one frame"):
        read_transforms(write(tmp_path, {**INTRINSICS, "frames": [frame, frame]}))


def test_find_transforms(tmp_path):
    assert find_transforms(tmp_path) is None
    (tmp_path / "transforms_train.json").write_text("{}")
    assert find_transforms(tmp_path) == tmp_path / "transforms_train.json"
    (tmp_path / "transforms.json").write_text("{}")
    assert find_transforms(tmp_path) == tmp_path / "transforms.json"
    assert find_transforms(tmp_path / "transforms_train.json") == tmp_path / "transforms_train.json"
