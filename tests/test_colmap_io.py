"""COLMAP models: round trips, a text model written by hand, COLMAP 3 and 4, every lens, and damaged files."""

import logging
import shutil

import numpy as np
import pycolmap
import pytest
from tiny_scene import tiny_model

from s2d.colmap_io import find_model, match_observations, read_model, write_model
from s2d.lenses import (
    Lens,
    pinhole_matrix,
    rescaled_lens,
    undistort_map,
    undistort_points,
    undistorted_lens,
)

# 90 degrees about z: (x, y, z) -> (-y, x, z); COLMAP's files have the quaternion as w x y z.
CAMERAS_TXT = "# comment\n1 PINHOLE 40 30 50 60 20 15\n7 SIMPLE_RADIAL 80 60 70 40 30 0.1\n"
IMAGES_TXT = (
    "# comment\n3 0.7071067811865476 0 0 0.7071067811865476 1 2 3 7 dir/b.jpg\n10.5 20.25 5 1 1 -1\n"
    "2 1 0 0 0 0 0 4 1 a.png\n30 10 5\n"
)
POINTS_TXT = "# comment\n5 0.5 -0.5 2 255 0 51 0.7 3 0 2 0\n"


def write_text_model(folder):
    folder.mkdir(parents=True)
    for name, content in (
        ("cameras", CAMERAS_TXT),
        ("images", IMAGES_TXT),
        ("points3D", POINTS_TXT),
    ):
        (folder / f"{name}.txt").write_text(content)
    return folder


def test_a_text_model_written_by_hand(tmp_path):
    model = read_model(write_text_model(tmp_path / "sparse"))
    assert model.names == ["a.png", "dir/b.jpg"]
    assert model.lenses == [
        Lens("PINHOLE", 40, 30, (50.0, 60.0, 20.0, 15.0)),
        Lens("SIMPLE_RADIAL", 80, 60, (70.0, 40.0, 30.0, 0.1)),
    ]
    np.testing.assert_allclose(
        model.viewmats[1], [[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]], atol=1e-12
    )
    assert model.viewmats[0, :3, 3].tolist() == [0, 0, 4]
    assert model.points.tolist() == [[0.5, -0.5, 2]]
    np.testing.assert_allclose(model.rgbs, [[1, 0, 0.2]])
    found = sorted(
        zip(model.view_ids.tolist(), model.point_ids.tolist(), model.xys.tolist(), strict=True)
    )
    assert found == [(0, 0, [30.0, 10.0]), (1, 0, [10.5, 20.25])]


def assert_same(one, other):
    assert one.names == other.names and one.lenses == other.lenses
    np.testing.assert_allclose(one.viewmats, other.viewmats, atol=1e-14)
    np.testing.assert_array_equal(one.points, other.points)
    np.testing.assert_allclose(one.rgbs, other.rgbs, atol=0.5 / 255 + 1e-9)

    def tracks(model):
        return sorted(zip(model.point_ids, model.view_ids, map(tuple, model.xys), strict=True))

    assert tracks(one) == tracks(other)


def test_binary_round_trip_and_colmap_3_without_rigs_and_frames(tmp_path):
    model = tiny_model()
    write_model(tmp_path / "a", model)
    assert_same(read_model(tmp_path / "a"), model)
    for name in ("rigs.bin", "frames.bin"):
        (tmp_path / "a" / name).unlink()
    assert_same(read_model(tmp_path / "a"), model)


def test_text_written_by_colmap(tmp_path):
    write_model(tmp_path / "a", tiny_model())
    (tmp_path / "b").mkdir()
    pycolmap.Reconstruction(str(tmp_path / "a")).write_text(str(tmp_path / "b"))
    assert_same(read_model(tmp_path / "b"), tiny_model())


def test_images_without_a_pose_are_left_out(tmp_path):
    write_model(tmp_path / "a", tiny_model())
    model = pycolmap.Reconstruction(str(tmp_path / "a"))
    model.deregister_frame(model.find_image_with_name("view_3.png").frame_id)
    model.write_binary(str(tmp_path / "a"))
    read = read_model(tmp_path / "a")
    assert read.names == [name for name in tiny_model().names if name != "view_3.png"]


@pytest.mark.parametrize("file", ["cameras", "images", "points3D", "rigs", "frames"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_cut_off_binary_files_are_named(tmp_path, file, part):
    """pycolmap 4.2.1 alone takes a cut-off cameras.bin for a good one, and reads a cut-off frames.bin for minutes."""
    write_model(tmp_path, tiny_model())
    path = tmp_path / f"{file}.bin"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(
        ValueError, match=rf"{file}.bin is cut off or damaged \({int(part * len(content))} bytes\)"
    ):
        read_model(tmp_path)


def test_wrong_ids_in_a_file_of_the_right_length(tmp_path):
    write_model(tmp_path, tiny_model())
    path = tmp_path / "rigs.bin"
    content = path.read_bytes()
    path.write_bytes(content[:8] + (999).to_bytes(4, "little") + content[12:])
    with pytest.raises(ValueError, match="COLMAP's reader says the model is damaged"):
        read_model(tmp_path)


def test_bytes_after_the_end(tmp_path):
    write_model(tmp_path, tiny_model())
    with open(tmp_path / "images.bin", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"images.bin has bytes after its end"):
        read_model(tmp_path)


def test_a_text_file_with_nonsense(tmp_path):
    write_text_model(tmp_path / "sparse")
    (tmp_path / "sparse" / "images.txt").write_text("1 2 3 what\n\n")
    with pytest.raises(ValueError, match=r"damaged|empty model"):
        read_model(tmp_path / "sparse")


def test_an_empty_model(tmp_path):
    write_model(tmp_path, tiny_model())
    pycolmap.Reconstruction().write_binary(str(tmp_path))
    with pytest.raises(ValueError, match="is an empty model: no image has a pose"):
        read_model(tmp_path)


def test_find_model_prefers_the_one_with_most_images(tmp_path, caplog):
    write_text_model(tmp_path / "sparse" / "0")
    write_model(tmp_path / "sparse" / "1", tiny_model())
    with caplog.at_level(logging.INFO, logger="s2d.colmap_io"):
        assert find_model(tmp_path) == tmp_path / "sparse" / "1"
    assert "2 models (sparse/0: 2, sparse/1: 8); using sparse/1" in caplog.text


def test_find_model_in_sparse_itself_and_binary_before_text(tmp_path):
    write_text_model(tmp_path / "sparse")
    assert find_model(tmp_path) == tmp_path / "sparse"
    write_model(tmp_path / "sparse", tiny_model())
    assert len(read_model(tmp_path / "sparse").names) == 8


def test_no_model_and_half_a_model(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"No COLMAP model in .*expected cameras, images and points3D"
    ):
        find_model(tmp_path)
    write_text_model(tmp_path / "sparse" / "0")
    (tmp_path / "sparse" / "0" / "points3D.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no points3D.bin or points3D.txt"):
        find_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="No complete COLMAP model"):
        read_model(tmp_path / "sparse" / "0")


def test_observations_left_in_the_pixels_of_larger_photos(caplog):
    """Photos and cameras were shrunk after the reconstruction, the observations were not (pycolmap's Camera.rescale does just that)."""
    model = tiny_model()
    widths = np.array([lens.width for lens in model.lenses])[model.view_ids]
    heights = np.array([lens.height for lens in model.lenses])[model.view_ids]
    old = np.stack([np.rint(widths * 1.38), np.rint(heights * 1.38)], 1)
    large = model._replace(xys=model.xys * old / np.stack([widths, heights], 1))
    with caplog.at_level(logging.INFO, logger="s2d.colmap_io"):
        matched = match_observations(large, "model")
    np.testing.assert_allclose(matched.xys, model.xys, atol=1e-9)
    assert "observations are in pixels of 66 x 50 pictures, the cameras are 48 x 36" in caplog.text


def test_observations_that_fit_or_fit_nothing_are_left_alone():
    model = tiny_model()
    assert np.array_equal(match_observations(model, "model").xys, model.xys)
    scrambled = model._replace(points=np.random.default_rng(0).permutation(model.points))
    assert np.array_equal(match_observations(scrambled, "model").xys, model.xys)


LENSES = [
    Lens("SIMPLE_RADIAL", 80, 60, (70.0, 41.0, 29.0, -0.1)),
    Lens("RADIAL", 80, 60, (70.0, 41.0, 29.0, -0.1, 0.02)),
    Lens("OPENCV", 80, 60, (70.0, 72.0, 41.0, 29.0, -0.1, 0.02, 0.003, -0.002)),
    Lens("FULL_OPENCV", 80, 60, (70.0, 72.0, 41.0, 29.0, -0.1, 0.02, 0.003, -0.002, 0.01, 0, 0, 0)),
    Lens("OPENCV_FISHEYE", 80, 60, (50.0, 52.0, 41.0, 29.0, -0.02, 0.01, 0, 0)),
    Lens("FOV", 80, 60, (70.0, 72.0, 41.0, 29.0, 0.5)),
    Lens("THIN_PRISM_FISHEYE", 80, 60, (50.0, 52.0, 41.0, 29.0, -0.02, 0.01, 0, 0, 0, 0, 0.001, 0)),
]


@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: lens.model)
def test_undistortion_agrees_with_itself_and_stays_inside(lens):
    assert pinhole_matrix(lens) is None
    pinhole = undistorted_lens(lens)
    assert pinhole.model == "PINHOLE" and pinhole_matrix(pinhole) is not None
    at = undistort_map(lens, pinhole)
    assert at.shape == (pinhole.height, pinhole.width, 2)
    # No blank pixels: every pixel of the result comes from inside the photo (up to a border pixel).
    assert at.min() > -1 and (at.reshape(-1, 2).max(0) < [81, 61]).all()
    x, y = np.meshgrid(np.arange(pinhole.width) + 0.5, np.arange(pinhole.height) + 0.5)
    back = undistort_points(lens, pinhole, at.reshape(-1, 2)).reshape(at.shape)
    np.testing.assert_allclose(
        back, np.stack([x, y], -1), atol=1e-4
    )  # COLMAP inverts a lens by iteration


def test_opencv_distortion_by_its_formula():
    """Written out from the definition of the OPENCV model, independent of pycolmap."""
    lens = LENSES[2]
    fx, fy, cx, cy, k1, k2, p1, p2 = lens.params
    pinhole = undistorted_lens(lens)
    gx, gy, gcx, gcy = pinhole.params
    x, y = (10.5 - gcx) / gx, (7.5 - gcy) / gy
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 * r2
    expected = (
        fx * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + cx,
        fy * (y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + cy,
    )
    np.testing.assert_allclose(undistort_map(lens, pinhole)[7, 10], expected, atol=1e-9)


def test_lenses_without_distortion_are_pinhole():
    assert pinhole_matrix(Lens("OPENCV", 8, 6, (7.0, 8.0, 4.0, 3.0, 0, 0, 0, 0))).tolist() == [
        [7, 0, 4],
        [0, 8, 3],
        [0, 0, 1],
    ]
    assert pinhole_matrix(Lens("SIMPLE_PINHOLE", 8, 6, (7.0, 4.0, 3.0)))[1, 1] == 7
    # A fisheye without coefficients is still a fisheye.
    assert pinhole_matrix(Lens("OPENCV_FISHEYE", 8, 6, (7.0, 8.0, 4.0, 3.0, 0, 0, 0, 0))) is None


def test_panoramas_are_refused():
    with pytest.raises(
        ValueError, match="EQUIRECTANGULAR camera of 64 x 32 cannot be made a pinhole camera"
    ):
        undistorted_lens(Lens("EQUIRECTANGULAR", 64, 32, (64.0, 32.0)))


def test_rescaled_lens():
    half = rescaled_lens(LENSES[2], (40, 30))
    assert half.params[:4] == (35.0, 36.0, 20.5, 14.5) and half.params[4:] == LENSES[2].params[4:]
    assert (half.width, half.height) == (40, 30)


def test_real_model_reads_like_pycolmap(data_dir, tmp_path):
    folder = data_dir / "scenes" / "fern" / "sparse" / "0"
    model, theirs = read_model(folder), pycolmap.Reconstruction(str(folder))
    assert len(model.names) == theirs.num_reg_images()
    assert len(model.points) == theirs.num_points3D()
    assert len(model.xys) == theirs.compute_num_observations()
    shutil.copytree(folder, tmp_path / "copy")
    assert_same(read_model(write_model(tmp_path / "again", model)), model)
