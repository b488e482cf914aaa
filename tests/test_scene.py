"""Scenes: loading, preparing, restricting, re-triangulating, and the leak test at this level."""

import json
import logging
import shutil

import cv2
import numpy as np
import pycolmap
import pytest
import torch
from tiny_scene import NAMES, SIZES, cameras, texture, tiny_model

from s2d.colmap_io import write_model
from s2d.images import list_images, read_image, write_image
from s2d.lenses import Lens
from s2d.ply_io import write_points_ply
from s2d.scene import load_scene, prepare_scene, retriangulate

KEPT = (NAMES[0], NAMES[2], NAMES[5], NAMES[7])


@pytest.fixture
def copy(tiny_scene, tmp_path):
    return shutil.copytree(tiny_scene, tmp_path / "scene")


def test_load_a_colmap_scene(tiny_scene):
    scene = load_scene(tiny_scene)
    assert scene.name == "tiny" and scene.names == NAMES and len(scene) == 8
    assert scene.cameras.sizes == SIZES
    assert torch.allclose(scene.cameras.viewmats, cameras()[0].float(), atol=1e-6)
    assert len(scene.sfm.points) == 400
    for name, (width, height) in zip(NAMES, SIZES, strict=True):
        assert scene.image(name).shape == (height, width, 3)
    assert scene.image(NAMES[0]) is scene.image(NAMES[0])
    with pytest.raises(KeyError, match="no view called"):
        scene.image("other.png")


def test_observations_point_where_the_points_project(tiny_scene):
    scene = load_scene(tiny_scene)
    sfm = scene.sfm
    viewmats, Ks = scene.cameras.viewmats[sfm.view_ids], scene.cameras.Ks[sfm.view_ids]
    in_camera = (viewmats[:, :3, :3] @ sfm.points[sfm.point_ids][..., None])[..., 0] + viewmats[
        :, :3, 3
    ]
    homogeneous = (Ks @ in_camera[..., None])[..., 0]
    assert torch.allclose(homogeneous[:, :2] / homogeneous[:, 2:], sfm.xys, atol=1e-3)


def test_subset_knows_nothing_else(tiny_scene):
    scene = load_scene(tiny_scene)
    subset = scene.subset(KEPT[::-1])
    assert subset.names == KEPT  # name order again
    assert subset.image_paths == tuple(tiny_scene / "images" / name for name in KEPT)
    assert torch.equal(subset.cameras.viewmats, scene.cameras.select(KEPT).viewmats)
    with pytest.raises(KeyError):
        subset.image(NAMES[1])
    assert bool(subset.sfm.points.isnan().all()) and bool(subset.sfm.rgbs.isnan().all())
    assert bool((torch.bincount(subset.sfm.point_ids) >= 2).all())
    rows = [NAMES.index(name) for name in KEPT]
    seen = torch.isin(scene.sfm.view_ids, torch.tensor(rows))
    expected = torch.bincount(scene.sfm.point_ids[seen], minlength=400)
    assert len(subset.sfm.points) == int((expected >= 2).sum())
    assert len(subset.sfm.xys) == int(expected[expected >= 2].sum())
    with pytest.raises(ValueError, match="1 of 1 camera names are not among the 8 cameras"):
        scene.subset(["x.png"])


def test_retriangulated_points_are_the_true_ones_in_the_kept_photos_colours(tiny_scene):
    scene = load_scene(tiny_scene)
    points, rgbs, errors = retriangulate(scene.subset(KEPT))
    assert len(points) > 250
    nearest = torch.cdist(points.double(), scene.sfm.points.double()).amin(1)
    assert float(nearest.max()) < 1e-3  # measured 2e-4: float32 pixels
    assert float(errors.max()) < 1e-3
    # A photo's pixel is a mean over its area: at 48 x 36 that differs by 0.03 from the texture at a point; other points' colours by 0.2.
    assert float((rgbs - texture(points.double())).abs().mean()) < 0.04
    assert bool(((rgbs >= 0) & (rgbs <= 1)).all())


def test_nothing_of_the_other_photos_leaks(copy):
    """Other photos' pixels, all 3D points and colours, and the other photos' observations change no bit of the result."""
    before = retriangulate(load_scene(copy).subset(KEPT))
    rng = np.random.default_rng(1)
    for name, (width, height) in zip(NAMES, SIZES, strict=True):
        if name not in KEPT:
            write_image(copy / "images" / name, torch.rand(height, width, 3))
    model = tiny_model()
    others = ~np.isin(model.view_ids, [NAMES.index(name) for name in KEPT])
    xys = model.xys.copy()
    xys[others] = rng.uniform(0, 24, (others.sum(), 2))
    scrambled = model._replace(
        points=rng.normal(size=(400, 3)), rgbs=rng.uniform(size=(400, 3)), xys=xys
    )
    write_model(copy / "sparse" / "0", scrambled)
    after = retriangulate(load_scene(copy).subset(KEPT))
    assert len(before[0]) > 250
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


def test_the_kept_photos_do_matter(copy):
    """The leak test can fail: a kept photo's pixels change the colours."""
    before = retriangulate(load_scene(copy).subset(KEPT))
    write_image(copy / "images" / KEPT[0], 1 - read_image(copy / "images" / KEPT[0]))
    after = retriangulate(load_scene(copy).subset(KEPT))
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_a_plain_scene_is_not_written_again(tiny_scene, tmp_path):
    scene = prepare_scene(tiny_scene, tmp_path / "prepared", max_side=64)
    assert scene.names == NAMES and scene.image_paths[0] == tiny_scene / "images" / NAMES[0]
    assert not (tmp_path / "prepared").exists()


def test_prepare_limits_the_size(tiny_scene, tmp_path):
    scene = prepare_scene(tiny_scene, tmp_path / "prepared", max_side=40)
    assert scene.name == "tiny"
    expected = [(40, 30) if width > 40 else (width, height) for width, height in SIZES]
    assert list(scene.cameras.sizes) == expected
    points, _, errors = retriangulate(scene.subset(KEPT))
    assert len(points) > 250 and float(errors.max()) < 1e-3
    again = load_scene(tmp_path / "prepared")
    assert again.names == NAMES and torch.equal(again.cameras.Ks, scene.cameras.Ks)


def test_prepare_a_scene_of_many_kinds(copy, tmp_path, caplog):
    """One photo each: distorted lens, larger than its camera, grey, RGBA, 16 bit, JPEG in a subfolder."""
    model = tiny_model()
    lenses, names = list(model.lenses), list(model.names)
    images = copy / "images"
    w, h = SIZES[0]
    lenses[0] = Lens("SIMPLE_RADIAL", w, h, (43.0, 24.7, 17.6, -0.05))
    large = cv2.resize(cv2.imread(str(images / NAMES[1])), (96, 72))
    cv2.imwrite(str(images / NAMES[1]), large)
    grey = cv2.imread(str(images / NAMES[3]), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(images / NAMES[3]), grey)
    colour = cv2.imread(str(images / NAMES[4]))
    cv2.imwrite(str(images / NAMES[4]), np.dstack([colour, np.full(grey.shape, 255, np.uint8)]))
    cv2.imwrite(str(images / NAMES[6]), cv2.imread(str(images / NAMES[6])).astype(np.uint16) * 257)
    names[7] = "sub/view_7.JPG"
    (images / "sub").mkdir()
    cv2.imwrite(str(images / "sub" / "view_7.jpg"), cv2.imread(str(images / NAMES[7])))
    (images / "sub" / "view_7.jpg").rename(images / "sub" / "view_7.JPG")
    (images / NAMES[7]).unlink()
    order = np.argsort(names)  # "sub/…" comes before "view_…"
    write_model(copy / "sparse" / "0", model._replace(names=names, lenses=lenses))

    with caplog.at_level(logging.INFO, logger="s2d.scene"):
        scene = prepare_scene(copy, tmp_path / "prepared", max_side=64)
    assert scene.names == tuple(names[i].replace(".JPG", ".png") for i in order)
    assert (
        "preparing 8 photos" in caplog.text and "(2 need it;" in caplog.text
    )  # the lens and the larger photo
    assert scene.names[0] == "sub/view_7.png"
    for name in scene.names:
        width, height = scene.cameras.select([name]).sizes[0]
        assert scene.image(name).shape == (height, width, 3)
    assert scene.cameras.select([NAMES[1]]).sizes[0] == (64, 48)
    assert len(list_images(tmp_path / "prepared" / "images")) == 8
    # Geometry survived: the sparse points still project onto their observations (view 0 was never distorted in truth, so leave it out).
    points, _, errors = retriangulate(
        scene.subset([name for name in scene.names if name != NAMES[0]])
    )
    assert len(points) > 300 and float(errors.max()) < 1e-2
    with pytest.raises(
        ValueError,
        match=r"2 of 8 photos in .* need preparation \(first: view_0.png has a SIMPLE_RADIAL camera\)",
    ):
        load_scene(copy)


def test_grey_rgba_and_16_bit_load_without_preparation(copy):
    expected = load_scene(copy).image(NAMES[6]).clone()
    path = copy / "images" / NAMES[6]
    cv2.imwrite(str(path), cv2.imread(str(path)).astype(np.uint16) * 257)
    assert torch.allclose(load_scene(copy).image(NAMES[6]), expected, atol=1e-6)


def write_transforms(folder, with_points=True):
    """The tiny scene as nerfstudio would have it: OpenGL camera-to-world matrices."""
    viewmats, lenses = cameras()
    frames = []
    for name, viewmat, lens in zip(NAMES, viewmats, lenses, strict=True):
        c2w = torch.linalg.inv(viewmat) @ torch.diag(
            torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)
        )
        fx, fy, cx, cy = lens.params
        frames.append(
            {
                "file_path": f"images/{name}",
                "transform_matrix": c2w.tolist(),
                "w": lens.width,
                "h": lens.height,
            }
            | {"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy}
        )
    content = {"camera_model": "OPENCV", "frames": frames}
    if with_points:
        model = tiny_model()
        points, rgbs = torch.from_numpy(model.points).float(), torch.from_numpy(model.rgbs).float()
        write_points_ply(folder / "sparse_pc.ply", points, rgbs)
        content["ply_file_path"] = "sparse_pc.ply"
    (folder / "transforms.json").write_text(json.dumps(content))


def test_transforms_json_is_the_same_scene(copy):
    expected = load_scene(copy)
    write_transforms(copy)
    shutil.rmtree(copy / "sparse")
    for source in (copy, copy / "transforms.json"):
        scene = load_scene(source)
        assert scene.names == NAMES and scene.name == "scene"
        assert torch.allclose(scene.cameras.viewmats, expected.cameras.viewmats, atol=1e-6)
        assert torch.allclose(scene.cameras.Ks, expected.cameras.Ks)
        assert torch.allclose(scene.sfm.points, expected.sfm.points)
        # No observations: nothing can be made from the kept photos alone, and a subset must not show the points.
        assert len(scene.subset(KEPT).sfm.points) == 0
        assert len(retriangulate(scene.subset(KEPT))[0]) == 0
    write_transforms(copy, with_points=False)
    assert load_scene(copy).sfm is None and load_scene(copy).subset(KEPT).sfm is None


def test_prepare_transforms_json(copy, tmp_path):
    write_transforms(copy)
    shutil.rmtree(copy / "sparse")
    scene = prepare_scene(copy, tmp_path / "prepared", max_side=40)
    assert max(max(size) for size in scene.cameras.sizes) == 40
    assert len(scene.sfm.points) == 400 and len(scene.sfm.xys) == 0


def test_photos_without_a_camera_are_counted(copy, caplog):
    write_image(copy / "images" / "extra.png", torch.zeros(3, 3, 3))
    with caplog.at_level(logging.INFO, logger="s2d.scene"):
        assert len(load_scene(copy)) == 8
    assert "ignoring 1 photos without a camera" in caplog.text


def test_missing_photos(copy):
    for name in NAMES[2:4]:
        (copy / "images" / name).unlink()
    with pytest.raises(
        ValueError,
        match=r"2 of 8 images in sparse/0/ are missing from images/ \(first: view_2.png\)",
    ):
        load_scene(copy)
    shutil.rmtree(copy / "images")
    with pytest.raises(FileNotFoundError, match="There is no images/ folder"):
        load_scene(copy)


def test_a_photo_that_is_no_image(copy):
    (copy / "images" / NAMES[3]).write_text("not a picture")
    for load in (load_scene, lambda source: prepare_scene(source, copy / "prepared", 40)):
        with pytest.raises(ValueError, match=r"view_3.png is not an image"):
            load(copy)
    assert not (copy / "prepared").exists()


def test_a_photo_cut_off_in_its_pixels(copy):
    path = copy / "images" / NAMES[3]
    path.write_bytes(path.read_bytes()[:-500])
    scene = load_scene(copy)  # the header is intact, and loading reads no more
    with pytest.raises(ValueError, match=r"view_3.png is not an image, or is cut off"):
        scene.image(NAMES[3])


def test_a_photo_of_another_shape(copy):
    write_image(copy / "images" / NAMES[3], torch.zeros(36, 36, 3))
    with pytest.raises(
        ValueError, match=r"view_3.png is 36 x 36 pixels, but its camera is 48 x 36: another shape"
    ):
        load_scene(copy)


def test_a_photo_exchanged_after_loading(copy):
    scene = load_scene(copy)
    write_image(copy / "images" / NAMES[3], torch.zeros(18, 24, 3))
    with pytest.raises(ValueError, match="The photo has changed since the scene was loaded"):
        scene.image(NAMES[3])


def test_folders_that_are_no_scene(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"No such scene: .*nowhere\. Expected a folder with images/ and sparse/0",
    ):
        load_scene(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no photos. Expected"):
        load_scene(tmp_path / "empty")
    for i in range(3):
        write_image(tmp_path / "photos" / f"{i}.jpg", torch.zeros(4, 4, 3))
    with pytest.raises(
        ValueError,
        match=r"has 3 photos but no cameras .* Run stage0_point_guidance.py .* OUT/stage0/scene",
    ):
        load_scene(tmp_path / "photos")
    (tmp_path / "photos" / "sparse").mkdir()
    with pytest.raises(FileNotFoundError, match="No COLMAP model in"):
        load_scene(tmp_path / "photos")
    (tmp_path / "file.txt").touch()
    with pytest.raises(ValueError, match=r"file.txt is not a scene"):
        load_scene(tmp_path / "file.txt")


def test_photos_that_differ_in_their_suffix_only(copy):
    model = tiny_model()
    (copy / "images" / NAMES[1]).rename(copy / "images" / "view_0.jpg")
    write_model(copy / "sparse" / "0", model._replace(names=[NAMES[0], "view_0.jpg", *NAMES[2:]]))
    with pytest.raises(ValueError, match="two photos differ in their suffix only"):
        load_scene(copy)


def test_a_rig_of_two_cameras(copy):
    """COLMAP 4 can have a fixed pair of cameras: a frame's pose times the sensor's pose is the view's."""
    model = tiny_model()
    out = pycolmap.Reconstruction()
    for camera_id in (1, 2):
        lens = model.lenses[0]
        camera = pycolmap.Camera(
            camera_id=camera_id,
            model=lens.model,
            width=lens.width,
            height=lens.height,
            params=lens.params,
        )
        out.add_camera(camera)
    rig = pycolmap.Rig(rig_id=1)
    rig.add_ref_sensor(pycolmap.sensor_t(type=pycolmap.SensorType.CAMERA, id=1))
    offset = pycolmap.Rigid3d(pycolmap.Rotation3d(), [-0.5, 0, 0])
    rig.add_sensor(pycolmap.sensor_t(type=pycolmap.SensorType.CAMERA, id=2), offset)
    out.add_rig(rig)
    frame = pycolmap.Frame(
        frame_id=1, rig_id=1, rig_from_world=pycolmap.Rigid3d(model.viewmats[0, :3])
    )
    for image_id in (1, 2):
        frame.add_data_id(
            pycolmap.data_t(
                sensor_id=pycolmap.sensor_t(type=pycolmap.SensorType.CAMERA, id=image_id),
                id=image_id,
            )
        )
    out.add_frame(frame)
    for image_id in (1, 2):
        image = pycolmap.Image(name=NAMES[image_id - 1], camera_id=image_id, image_id=image_id)
        image.frame_id = 1
        out.add_image(image)
    out.register_frame(1)
    shutil.rmtree(copy / "sparse")
    (copy / "sparse" / "0").mkdir(parents=True)
    out.write_binary(str(copy / "sparse" / "0"))
    scene = load_scene(copy)
    assert scene.names == NAMES[:2] and scene.sfm is None
    second = model.viewmats[0].copy()
    second[0, 3] -= 0.5
    np.testing.assert_allclose(
        scene.cameras.viewmats.numpy(), np.stack([model.viewmats[0], second]), atol=1e-6
    )


REAL = (
    "dining",
    "fern",
    "fox",
    "greatwall",
    "kermit",
    "kitchen",
    "lund",
    "sceaux",
    "university",
    "valley",
)


@pytest.mark.parametrize("name", REAL)
def test_every_real_scene_loads(data_dir, name):
    scene = load_scene(data_dir / "scenes" / name)
    assert len(scene) >= 11 and scene.cameras.width > 300
    assert scene.image(scene.names[0]).shape == (scene.cameras.height, scene.cameras.width, 3)


@pytest.mark.parametrize("name", ["fern", "kitchen", "university"])
def test_points_from_six_real_photos_agree_with_those_from_all(data_dir, name):
    scene = load_scene(data_dir / "scenes" / name)
    kept = scene.names[:: len(scene) // 6][:6]
    points, rgbs, errors = retriangulate(scene.subset(kept))
    assert len(points) > 100 and len(rgbs) == len(points)
    assert float(errors.median()) < 0.4  # measured 0.12 to 0.29 px
    # Fewer photos leave depth less certain. Measured medians: 2.0 % of the rig's radius for fern (all cameras look one way), less elsewhere.
    distance = torch.cdist(points, scene.sfm.points).amin(1)
    assert float(distance.median()) < 0.03 * scene.cameras.extent
