"""The capture check on the demo scene's photos, as they are and spoiled, and its measurements on data whose truth is known."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from s2d.capture import CaptureReport, check_capture, find_photos
from s2d.capture.pairs import Pair, compare, match, rotation_share
from s2d.capture.photos import Photo, read_photo
from s2d.capture.report import MAX_PHOTOS
from s2d.capture.rules import closest, components, judge
from s2d.capture.sharpness import edge_blur
from s2d.capture.table import print_report
from s2d.images import write_image

DEMO = Path(__file__).resolve().parent.parent / "demo" / "study" / "images"
NAMES = [f"IMG_{i:04d}.jpg" for i in range(1, 6)]
SPOILED = 2  # the row of the photo that tests spoil


@pytest.fixture(scope="module")
def good() -> tuple[list[Photo], list[Pair]]:
    photos = [read_photo(DEMO / name, name, 1000) for name in NAMES]
    return photos, compare_all(photos)


def compare_all(photos: list[Photo]) -> list[Pair]:
    rows = range(len(photos))
    found = [compare(a, b, photos) for a in rows for b in rows if a < b]
    return [pair for pair in found if pair is not None]


def spoil(good, tmp_path, picture, name="spoiled.png", added=False):
    """Findings (problems and warnings) after one photo was replaced, or `added` beside the others."""
    photos, pairs = list(good[0]), list(good[1])
    place = len(photos) if added else SPOILED
    cv2.imwrite(str(tmp_path / name), picture)
    photos[place : place + 1] = [read_photo(tmp_path / name, name, 1000)]
    pairs = [pair for pair in pairs if place not in (pair.a, pair.b)]
    pairs += [
        pair
        for row in range(len(photos))
        if row != place and (pair := compare(*sorted((row, place)), photos)) is not None
    ]
    return [finding for finding in judge(photos, pairs) if finding.level != "note"]


def original() -> np.ndarray:
    return cv2.imread(str(DEMO / NAMES[SPOILED]))


# ------------------------------------------------------------------------------------------------------------- verdicts


def test_good_photos_give_no_finding_but_notes(good):
    assert [finding for finding in judge(*good) if finding.level != "note"] == []
    assert len(good[1]) >= len(NAMES) - 1


def test_a_blurred_photo_is_named(good, tmp_path):
    (finding,) = spoil(good, tmp_path, cv2.GaussianBlur(original(), (0, 0), 2.5))
    assert (finding.kind, finding.photos) == ("blur", ("spoiled.png",))
    assert "Take it again" in finding.text


def test_motion_in_one_direction_is_blur_too(good, tmp_path):
    kernel = np.zeros((13, 13))
    kernel[6] = 1 / 13
    (finding,) = spoil(good, tmp_path, cv2.filter2D(original(), -1, kernel))
    assert (finding.kind, finding.photos) == ("blur", ("spoiled.png",))


def test_a_photo_of_little_texture_is_not_blurred(good, tmp_path):
    """Faint, but sharp: a quarter of the contrast, in the upper half alone."""
    picture = original().astype(np.float64)
    picture[len(picture) // 2 :] = 128
    faint = np.rint(128 + (picture - 128) * 0.25).astype(np.uint8)
    assert all(finding.kind != "blur" for finding in spoil(good, tmp_path, faint))


def test_a_set_that_is_soft_as_a_whole_is_one_finding(good):
    photos = [replace(photo, blur=1.8) for photo in good[0]]
    found = [finding for finding in judge(photos, good[1]) if finding.kind == "blur"]
    assert len(found) == 1 and found[0].photos == () and "All photos are soft" in found[0].text


@pytest.mark.parametrize(("factor", "word"), [(0.5, "darker"), (2.0, "brighter")])
def test_another_exposure_is_named_with_its_stops(good, tmp_path, factor, word):
    (finding,) = spoil(good, tmp_path, in_linear_light(original(), [factor] * 3))
    assert (finding.kind, finding.photos) == ("exposure", ("spoiled.png",))
    assert f"1.0 stops {word}" in finding.text


def test_another_white_balance_is_named_with_its_colour(good, tmp_path):
    found = spoil(good, tmp_path, in_linear_light(original(), [1, 1, 1.8]))
    assert [(finding.kind, finding.photos) for finding in found] == [
        ("white balance", ("spoiled.png",))
    ]
    assert "more red" in found[0].text


def in_linear_light(picture: np.ndarray, factors) -> np.ndarray:  # BGR
    """A pure power law: close to sRGB, and not the code's own formula."""
    linear = (picture / 255.0) ** 2.2 * factors
    return np.rint(np.clip(linear, 0, 1) ** (1 / 2.2) * 255).astype(np.uint8)


def test_a_photo_of_another_place_shares_nothing(good, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    elsewhere = cv2.resize(noise, (640, 427), interpolation=cv2.INTER_NEAREST)
    (finding,) = spoil(good, tmp_path, elsewhere, added=True)
    assert (finding.kind, finding.level) == ("overlap", "problem")
    assert (
        finding.text
        == "spoiled.png shares nothing with the others: take two photos between spoiled.png and IMG_0005.jpg, "
        "or leave out what it shows if that is another place."
    )


def test_a_photo_of_nothing_says_so(good, tmp_path):
    (finding,) = spoil(good, tmp_path, np.full((427, 640, 3), 200, np.uint8))
    assert "next to nothing in it to recognise" in finding.text


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_same_picture_again_is_a_duplicate(good, tmp_path, scale):
    smaller = cv2.resize(original(), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", smaller, [cv2.IMWRITE_JPEG_QUALITY, 60])
    found = spoil(good, tmp_path, cv2.imdecode(jpeg, cv2.IMREAD_COLOR), added=True)
    assert [(finding.kind, finding.photos) for finding in found] == [
        ("duplicate", ("spoiled.png",))
    ]
    assert f"the same picture as {NAMES[SPOILED]}" in found[0].text


def test_photos_from_one_spot_have_no_depth(tmp_path):
    photos = []
    for k, angle in enumerate((-0.08, 0.0, 0.07)):
        K = np.array([[700.0, 0, 320], [0, 700, 213], [0, 0, 1]])
        R = cv2.Rodrigues(np.array([0.3 * angle, angle, 0]))[0]
        picture = cv2.warpPerspective(original(), K @ R @ np.linalg.inv(K), (640, 427))
        cv2.imwrite(str(tmp_path / f"{k}.png"), picture)
        photos.append(read_photo(tmp_path / f"{k}.png", f"{k}.png", 1000))
    found = [finding for finding in judge(photos, compare_all(photos)) if finding.level != "note"]
    assert [finding.kind for finding in found] == ["parallax"]
    assert found[0].level == "problem" and "don't turn on the spot" in found[0].text


def test_rules_of_number_and_overlap(good):
    photos, pairs = good

    def texts(count):
        inside = [pair for pair in pairs if pair.b < count]
        return [finding.text for finding in judge(photos[:count], inside)]

    assert any("1 readable photo:" in text for text in texts(1))
    assert any("Two photos show depth only where both look" in text for text in texts(2))
    assert any("No two photos show enough of the same" in f.text for f in judge(photos, []))


# --------------------------------------------------------------------------------------------------------- whole folders


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A folder with three good photos, one cut off, one film, and one of another camera that lies on its side."""
    folder = tmp_path_factory.mktemp("mixed") / "my photos"
    folder.mkdir()
    for name in NAMES[:3]:
        shutil.copy(DEMO / name, folder)
    content = (DEMO / NAMES[3]).read_bytes()
    (folder / "cut.jpg").write_bytes(content[:200])
    (folder / "film.MOV").write_bytes(b"")
    image = Image.open(DEMO / NAMES[3]).transpose(Image.Transpose.ROTATE_90)  # anticlockwise
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    exif[0x0110] = "Pocket 3"
    exif.get_ifd(0x8769)[0xA405] = 28
    image.save(folder / "turned.jpg", exif=exif, quality=95)
    return folder


@pytest.fixture(scope="module")
def report(mixed) -> CaptureReport:
    return check_capture(find_photos(mixed))


def test_a_folder_of_everything(report, capsys):
    assert not report.good
    assert {(f.kind, f.photos) for f in report.findings if f.level != "note"} == {
        ("unreadable", ("cut.jpg",)),
        ("format", ()),
    }
    assert [finding.level for finding in report.findings] == ["problem", "warning", "note"]
    turned = next(photo for photo in report.photos if photo.name == "turned.jpg")
    assert (turned.size, turned.camera, turned.focal_35mm) == ((640, 427), "Pocket 3", 28)
    assert {pair.b for pair in report.pairs if pair.a == 0} == {1, 2, 3}  # read upright

    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {photo["name"] for photo in plain["photos"]} == {*NAMES[:3], "turned.jpg"}
    assert ["IMG_0001.jpg", "IMG_0002.jpg"] in [pair["photos"] for pair in plain["pairs"]]

    print_report(report)
    said = capsys.readouterr().out
    for words in ("unreadable", "film.MOV cannot be read", "1 problem, 1 warning, 1 note"):
        assert words in said


def test_two_runs_say_the_same(mixed, report):
    assert check_capture(find_photos(mixed)).to_json() == report.to_json()


def test_names_that_later_stages_confuse(tmp_path):
    shutil.copy(DEMO / NAMES[0], tmp_path / "a.jpg")
    write_image(tmp_path / "a.png", torch.zeros(8, 8, 3))
    report = check_capture(find_photos(tmp_path))
    assert [f.photos for f in report.findings if f.kind == "names"] == [("a.jpg", "a.png")]


def test_scenes_are_looked_into_and_wrong_folders_refused(tmp_path):
    assert find_photos(DEMO.parent).names == find_photos(DEMO).names
    with pytest.raises(FileNotFoundError, match="has no photos"):
        find_photos(tmp_path)
    with pytest.raises(FileNotFoundError, match="No such folder"):
        find_photos(tmp_path / "none")
    for i in range(MAX_PHOTOS + 1):
        (tmp_path / f"{i}.jpg").touch()
    with pytest.raises(ValueError, match="Copy the ones to use"):
        check_capture(find_photos(tmp_path))


# --------------------------------------------------------------------------------------------------------- measurements


@pytest.mark.parametrize("sigma", [0.8, 1.2, 2.0, 3.0])
@pytest.mark.parametrize("contrast", [0.2, 0.9])
def test_blur_of_discs_is_the_one_they_were_given(sigma, contrast):
    """Edges of every direction with a known profile; the gradient filter's own variance adds to theirs. Measured: 3 % off at most."""
    rows, columns = np.mgrid[0:240, 0:240] + 0.5
    radius = np.hypot((rows % 80) - 40, (columns % 80) - 40)
    # The blurred edge of a large disc, in closed form.
    profile = np.vectorize(lambda d: 0.5 * (1 + math.erf(d)))((25 - radius) / (sigma * 2**0.5))
    grey = (0.05 + contrast * profile).astype(np.float32)
    assert edge_blur(grey) == pytest.approx(math.sqrt(sigma**2 + 0.4), rel=0.05)


def test_blur_of_noise_and_of_nothing_is_none():
    noise = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    assert edge_blur(noise) < 0.1
    assert edge_blur(np.full((64, 64), 0.5, np.float32)) == 0


def test_a_turn_explains_all_matches_and_a_step_few():
    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(-1, 1, 200), rng.uniform(-1, 1, 200), rng.uniform(2, 6, 200)], 1)
    R = cv2.Rodrigues(np.array([0.02, 0.15, 0.05]))[0]
    photo = fake_photo(focal_35mm=0)

    def project(points):
        return points[:, :2] / points[:, 2:] * 500 + [320, 240]

    before = project(points)
    wrong = rng.random(200) < 0.1  # every tenth match is no match
    for step, low, high in ((0.0, 0.85, 0.95), (0.3, 0.0, 0.4)):
        after = project(points @ R.T + [step, 0, 0])
        after[wrong] = rng.uniform(0, 480, (wrong.sum(), 2))
        assert low <= rotation_share(photo, photo, before, after) <= high


def fake_photo(focal_35mm: float) -> Photo:
    none = np.zeros((0, 2)), np.zeros((0, 128), np.float32), np.zeros((0, 3))
    return Photo("a", (640, 480), "", focal_35mm, (640, 480), 0.0, *none)


def test_matches_are_mutual_and_distinct():
    a = np.eye(4, dtype=np.float32)[:3]
    b = np.eye(4, dtype=np.float32)[[2, 0, 0]]  # a's first has two equals: ambiguous
    assert match(a, b).tolist() == [[2, 0]]
    assert match(a[:1], b).shape == (0, 2)


def test_components_and_their_neighbours():
    def pair(a, b):
        return Pair(a, b, 50, 0.1, 5.0, 0.1, 0.3, np.zeros(3))

    groups = components(6, [pair(3, 5), pair(0, 1), pair(1, 5)])
    assert groups == [[0, 1, 3, 5], [2], [4]]
    assert closest([2], groups[0]) == (2, 1)
