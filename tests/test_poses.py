"""Cameras from photos alone: known cameras come back, held-out photos leak nothing, and what users meet has a message."""

import json
import logging
import shutil
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image
from synthetic_stereo import BACKGROUND, FOREGROUND, Rectangle, viewmat

import stage0_point_guidance as stage0
from s2d.alignment import align_cameras
from s2d.cameras import Cameras
from s2d.poses.features import STANDARD, extract, match_all
from s2d.poses.mapping import make_cameras
from s2d.poses.photos import find_photos, is_photo_folder, leave_out_copies
from s2d.poses.place import place_photos, write_photo_scene
from s2d.poses.refine import polish, quality
from s2d.poses.world import TYPICAL_DISTANCE, level_world, up_direction
from s2d.scene import load_scene
from s2d.split import Split

WIDTH, HEIGHT = 240, 180
FOCAL_35MM = 32
FOCAL = FOCAL_35MM / np.hypot(36, 24) * np.hypot(WIDTH, HEIGHT)  # as EXIF defines it, by diagonals
K = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
RECTANGLES = [BACKGROUND, FOREGROUND, Rectangle((-3, 0.8, 3.5), (6, 0, 0), (0, 0.4, 2.5), 4)]
CENTERS = [(-0.8, 0.0, 0.0), (-0.4, 0.15, 0.1), (0.0, -0.1, 0.2), (0.4, 0.1, 0.0), (0.8, 0.0, 0.1)]
NAMES = [f"IMG {row}.jpg" for row in range(len(CENTERS))]  # a space: COLMAP's own lists break at it
LYING = 2  # stored turned, with an EXIF orientation that says so
KEPT, HELD_OUT = NAMES[::2], NAMES[1::2]


def pose(row: int) -> np.ndarray:
    return viewmat(CENTERS[row], -0.12 * CENTERS[row][0])


def texture(seed: int, width: int, height: int) -> np.ndarray:
    """Noise with details of all sizes, as SIFT likes it. [height, width, 3] uint8"""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for size in (2, 4, 8, 16, 32):
        coarse = random.normal(size=(height // size + 2, width // size + 2, 3))
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(127 + 40 * total, 0, 255).astype(np.uint8)


def photograph(row: int) -> np.ndarray:
    """Draw the rectangles as the camera sees them, far ones first. [H, W, 3] uint8"""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    middle = np.array(
        [[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]
    )  # OpenCV has whole numbers in pixel centres
    rotation, translation = pose(row)[:3, :3], pose(row)[:3, 3]
    for corner, u, v, seed in sorted(RECTANGLES, key=lambda rectangle: -rectangle.corner[2]):
        size = [int(np.linalg.norm(side) * 45) for side in (u, v)]  # about a pixel at the back
        sides = np.array([np.divide(u, size[0]), np.divide(v, size[1]), corner]).T
        warp = K @ (rotation @ sides + np.outer(translation, [0, 0, 1]))
        warp = np.linalg.inv(middle) @ warp @ middle
        shown = np.dstack([texture(seed, *size), np.full(size[::-1], 255, np.uint8)])
        drawn = cv2.warpPerspective(shown, warp, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
        pixels = np.where(drawn[..., 3:] > 127, drawn[..., :3], pixels)
    return pixels


def save(path: Path, pixels: np.ndarray, orientation: int = 1) -> None:
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[41989] = FOCAL_35MM
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=96, exif=exif)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five photos of three rectangles, without cameras."""
    root = tmp_path_factory.mktemp("photos")
    for row, name in enumerate(NAMES):
        pixels, lying = photograph(row), row == LYING
        save(root / name, np.rot90(pixels) if lying else pixels, 6 if lying else 1)
    return root


@pytest.fixture(scope="module")
def truth() -> Cameras:
    viewmats = torch.from_numpy(np.stack([pose(row) for row in range(len(NAMES))]))
    Ks = torch.from_numpy(np.stack([K] * len(NAMES)))
    names = [Path(name).with_suffix(".png").as_posix() for name in NAMES]
    return Cameras(viewmats, Ks, ((WIDTH, HEIGHT),) * len(NAMES), tuple(names))


@pytest.fixture(scope="module")
def scene(folder, tmp_path_factory):
    """The scene of three kept photos and two that were placed afterwards."""
    scratch = tmp_path_factory.mktemp("scratch")
    photos = find_photos(folder)
    placement = place_photos(photos[::2], photos[1::2], scratch)
    assert placement.left_out == {}
    return write_photo_scene(placement, folder, "mine", scratch / "scene", scratch, max_side=0)


def test_known_cameras_come_back(scene, truth):
    assert scene.name == "mine"
    # The lying photo was turned, so the scene had to be written anew, and its views are PNG.
    assert scene.names == truth.names
    assert scene.cameras.sizes == truth.sizes
    found = align_cameras(scene.cameras, truth)
    assert float(found.rotation_errors.max()) < 0.05  # measured 0.014
    assert float(found.center_errors.max()) < 0.1  # measured 0.03 % of the rig
    focal = scene.cameras.Ks[:, 0, 0]
    assert (focal / FOCAL - 1).abs().max() < 1e-3  # EXIF rounds to whole millimetres; measured 1e-4
    assert set(scene.sfm.view_ids.tolist()) == {0, 2, 4}  # held-out photos give no observation


def test_the_world_is_level_centred_and_of_usual_size(scene):
    down = scene.cameras.viewmats[:, 1, :3].mean(0)
    assert float(down[1]) > 0.999
    distances = (scene.cameras.centers[[0, 2, 4], None] - scene.sfm.points[None]).norm(dim=-1)
    assert float(distances.median()) == pytest.approx(TYPICAL_DISTANCE, rel=1e-3)
    assert float(scene.sfm.points.median(0).values.abs().max()) < 0.05


def run(folder: Path, out: Path, **settings) -> Path:
    return stage0.main(stage0.Config(folder, out, keep_count=3, num_novel=2, **settings))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    return run(folder, tmp_path_factory.mktemp("out"))


def test_stage_0_takes_photos_and_generates_novel_cameras(finished):
    split = Split.load(finished / "split.json")
    assert split.kept == ("IMG 0.png", "IMG 2.png", "IMG 4.png")
    assert split.novel == () and split.test == ("IMG 1.png", "IMG 3.png")
    assert Cameras.from_json(finished / "novel_cameras.json").names == ("novel_0000", "novel_0001")
    record = json.loads((finished / "poses.json").read_text())
    assert record["placed"] == KEPT and set(record["held_out"]) == set(HELD_OUT)
    assert record["attempts"][0]["quality"]["num_placed"] == 3
    info = json.loads((finished / "manifest.json").read_text())["info"]
    assert info["poses"] == record and info["leaks_test_photos"] is False


def test_held_out_photos_change_nothing(finished, folder, tmp_path):
    other = tmp_path / "photos"
    shutil.copytree(folder, other)
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    save(other / HELD_OUT[0], noise)  # cannot be placed
    brighter = np.asarray(Image.open(folder / HELD_OUT[1])) // 2 + 100
    save(other / HELD_OUT[1], brighter[:, ::-1].copy())
    after = run(other, tmp_path / "out")
    own = {"manifest.json", "config.yaml", "poses.json", "split.json"}
    compared = 0
    for path in sorted(finished.rglob("*")):
        inside = path.relative_to(finished)
        if path.is_file() and inside.name not in own and inside.parts[0] != "scene":
            assert path.read_bytes() == (after / inside).read_bytes(), inside
            compared += 1
    assert compared >= 10
    splits = [Split.load(stage / "split.json") for stage in (finished, after)]
    assert splits[0].kept == splits[1].kept and splits[0].novel == splits[1].novel
    kept = [load_scene(stage / "scene").subset(splits[0].kept) for stage in (finished, after)]
    assert torch.equal(kept[0].cameras.viewmats, kept[1].cameras.viewmats)
    assert torch.equal(kept[0].cameras.Ks, kept[1].cameras.Ks)
    assert torch.equal(kept[0].sfm.xys, kept[1].sfm.xys)
    assert [path.read_bytes() for path in kept[0].image_paths] == [
        path.read_bytes() for path in kept[1].image_paths
    ]


def test_all_images_uses_the_held_out_photos_and_says_so(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="s2d"):
        stage = run(folder, tmp_path, all_images=True)
    assert "know the test photos" in caplog.text
    info = json.loads((stage / "manifest.json").read_text())["info"]
    assert info["leaks_test_photos"] is True
    assert info["poses"]["placed"] == NAMES
    split = Split.load(stage / "split.json")
    assert split.novel == split.test == ("IMG 1.png", "IMG 3.png")


def test_matches_are_the_same_on_any_number_of_threads_and_made_once(folder, tmp_path, monkeypatch):
    photos = find_photos(folder)[:2]
    features = [extract(photo, STANDARD, limit=400) for photo in photos]
    cameras = make_cameras(photos, guess=1.0, shared=True)
    found = []
    for threads in ("1", "2"):
        monkeypatch.setenv("S2D_NUM_THREADS", threads)
        database = tmp_path / f"{threads}.db"
        match_all(database, photos, features, cameras, seed=0)
        with pycolmap.Database.open(str(database)) as db:
            found.append(db.read_two_view_geometry(1, 2).inlier_matches)
    assert len(found[0]) > 50 and np.array_equal(*found)

    def fail(*_):
        raise AssertionError("matched again what an interrupted run had matched")

    monkeypatch.setattr(pycolmap, "match_image_pairs", fail)
    match_all(database, photos, features, cameras, seed=0)


def test_polish_finds_the_focal_length_despite_wrong_matches():
    """COLMAP's synthetic scene, noise of 0.3 pixels, one observation in twelve far off, focal length 10 % wrong."""
    pycolmap.set_random_seed(0)
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_frames_per_rig, options.num_points3D = 1, 6, 200
    model = pycolmap.synthesize_dataset(options)
    random = np.random.default_rng(0)
    for image in model.images.values():
        for at, point in enumerate(image.points2D):
            far = at % 12 == 0
            point.xy = point.xy + random.normal(0, 15.0 if far else 0.3, 2)
    camera_id = next(iter(model.cameras))
    true_focal = model.cameras[camera_id].params[0]
    model.cameras[camera_id].params[0] *= 1.1
    before = quality(model)
    notes = polish(model, {camera_id: (1.1 * true_focal, False)})
    after = quality(model)
    assert model.cameras[camera_id].params[0] == pytest.approx(true_focal, rel=2e-3)
    assert after.num_placed == 6 and after.error < 0.6 < before.error
    assert notes[0].startswith("focal length refined: 0.909 of a guess")


def test_a_photo_that_only_pairs_hold_is_left_out():
    """Points that two photos see say nothing about how far the third is: it goes, the two stay."""
    pycolmap.set_random_seed(0)
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_frames_per_rig, options.num_points3D = 1, 3, 120
    model = pycolmap.synthesize_dataset(options)
    last = max(model.images)
    for count, point_id in enumerate(sorted(model.points3D)):
        # Half of the points are seen by the first two, half by the last two.
        gone = last if count < 80 else min(model.images)
        for element in list(model.points3D[point_id].track.elements):
            if element.image_id == gone:
                model.delete_observation(element.image_id, element.point2D_idx)
    camera = next(iter(model.cameras.values()))
    focal = camera.params[0]
    camera.params[0] *= 1.05
    notes = polish(model, {camera.camera_id: (focal, True)})
    assert model.num_reg_images() == 2
    assert quality(model).weakest > 0
    # Two photos do not determine a focal length: it is EXIF's again.
    assert camera.params[0] == focal and notes[0].startswith("focal length from EXIF")


def test_up_is_across_level_horizons_even_if_all_cameras_look_down():
    viewmats = []
    for yaw in (0.0, 0.8, 1.7):
        tilt = 0.6  # down
        turned = viewmat((0, 0, 0), yaw)
        tilted = np.eye(4)
        tilted[1:3, 1:3] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
        viewmats.append(tilted @ turned)
    up = up_direction(np.stack(viewmats))
    assert up == pytest.approx([0, -1, 0], abs=0.06)  # the mean of the cameras' ups is 0.56 off
    same = np.stack([viewmats[0]] * 3)  # nothing but their own ups to go by
    assert up_direction(same) == pytest.approx(-viewmats[0][1, :3], abs=1e-6)


def test_the_level_world_keeps_what_cameras_see():
    random = np.random.default_rng(0)
    viewmats = np.stack([pose(row) for row in range(3)])
    points = random.normal((0, 0, 5), 1, (50, 3))
    world = level_world(viewmats, points)
    moved, seen = world.points(points), world.viewmats(viewmats)
    before = np.einsum("vij,pj->vpi", viewmats[:, :3, :3], points) + viewmats[:, None, :3, 3]
    after = np.einsum("vij,pj->vpi", seen[:, :3, :3], moved) + seen[:, None, :3, 3]
    assert after == pytest.approx(before * world.scale, abs=1e-9)
    assert np.linalg.det(world.rotation) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------- what users meet


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (64, 48)) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "has no photos. Expected PNG"),
        (["a.png"], "has one photo"),
        (["a.HEIC", "b.heic"], "2 HEIC files .* heif-convert"),
        (["clip.mp4"], "1 video file .* ffmpeg"),
        (["a.png", "a.jpg"], "differ in their suffix only"),
        (["a.png", "broken.jpg"], "broken.jpg is not an image"),
    ],
)
def test_folders_that_cannot_be_used_have_a_message(tmp_path, files, words):
    for seed, name in enumerate(files):
        if name.startswith(("broken", "clip")) or name.lower().endswith("heic"):
            (tmp_path / name).write_bytes(b"not a picture")
        else:
            picture(tmp_path / name, seed)
    assert is_photo_folder(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        stage0.main(stage0.Config(tmp_path, tmp_path / "out"))


def test_a_video_as_scene_is_refused_with_the_cure(tmp_path):
    (tmp_path / "clip.MOV").write_bytes(b"video")
    with pytest.raises(ValueError, match=r"is a video\. .*ffmpeg"):
        stage0.main(stage0.Config(tmp_path / "clip.MOV", tmp_path / "out"))


def test_heic_beside_usable_photos_is_reported(tmp_path, caplog):
    for seed in range(2):
        picture(tmp_path / f"{seed}.png", seed)
    (tmp_path / "2.heic").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="s2d"):
        assert len(find_photos(tmp_path)) == 2
    assert "ignoring 1 HEIC file (first: 2.heic). Convert" in caplog.text


def test_copies_are_left_out_and_nothing_but_copies_is_refused(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name, seed=int(name == "c.png"))
    photos = find_photos(tmp_path)
    left, reasons = leave_out_copies(photos)
    assert [photo.name for photo in left] == ["a.png", "c.png"]
    assert reasons == {"b.png": "is the same file as a.png"}
    with pytest.raises(ValueError, match=r"copies of a\.png.* Take the photos again"):
        place_photos(photos[:2], [], tmp_path)


def test_photos_of_different_things_are_refused_with_advice(tmp_path):
    for seed in range(2):
        picture(tmp_path / f"{seed}.png", seed, size=(96 + seed, 72))
    with pytest.raises(
        ValueError, match=r"No two of the 2 photos .*2 different sizes.*a step to the side"
    ):
        place_photos(find_photos(tmp_path), [], tmp_path)


def test_the_same_picture_twice_has_no_depth(folder, tmp_path):
    """Saved again at another quality: other bytes, the same place."""
    for number, quality_ in enumerate((95, 80)):
        with Image.open(folder / NAMES[0]) as photo:
            photo.save(tmp_path / f"{number}.jpg", quality=quality_, exif=photo.getexif())
    with pytest.raises(ValueError, match=r"No two of the 2 photos could be placed"):
        place_photos(find_photos(tmp_path), [], tmp_path)


def test_flags_that_contradict_the_scene_are_refused(folder, tiny_scene, tmp_path):
    with pytest.raises(ValueError, match="--all-images is for photos without cameras"):
        stage0.main(stage0.Config(tiny_scene, tmp_path, all_images=True))
    cloud = {"provider": "points", "points_path": tmp_path / "cloud.ply"}
    with pytest.raises(ValueError, match="needs cameras in the frame of"):
        stage0.main(stage0.Config(folder, tmp_path, **cloud))
