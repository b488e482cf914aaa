"""`Cameras`: selection, scaling, JSON, nearest pose, and what it refuses."""

import math

import pytest
import torch

from s2d.cameras import Cameras
from s2d.geometry import look_at, project


def make(count=4, names=None):
    centers = torch.stack(
        [torch.arange(count) * 1.0, torch.zeros(count), torch.full((count,), -5.0)], -1
    )
    return Cameras(
        viewmats=look_at(centers, torch.zeros(count, 3), torch.tensor([0.0, -1.0, 0.0])),
        Ks=torch.tensor([[50.0, 0, 16.5], [0, 55.0, 11.0], [0, 0, 1]]).repeat(count, 1, 1),
        sizes=((32, 24),) * count,
        names=names or tuple(f"{i}.png" for i in range(count)),
    )


def same(one, other):
    return (
        torch.equal(one.viewmats, other.viewmats)
        and torch.equal(one.Ks, other.Ks)
        and one.sizes == other.sizes
        and one.names == other.names
    )


def test_indexing_gives_cameras():
    cameras = make()
    assert [part.names for part in cameras] == [("0.png",), ("1.png",), ("2.png",), ("3.png",)]
    assert cameras[-1].names == ("3.png",)
    assert cameras[1:3].names == ("1.png", "2.png")
    assert cameras[[2, 0]].names == ("2.png", "0.png")
    assert cameras[torch.tensor([2, 0])].names == ("2.png", "0.png")
    assert cameras[torch.tensor([True, False, False, True])].names == ("0.png", "3.png")
    assert len(cameras[[]]) == 0
    with pytest.raises(IndexError):
        cameras[4]
    with pytest.raises(ValueError, match=r"'2.png' occurs more than once"):
        cameras[[2, 0, 2]]


def test_centers_and_extent():
    cameras = make()
    expected = torch.tensor([[0.0, 0, -5], [1, 0, -5], [2, 0, -5], [3, 0, -5]])
    assert torch.allclose(cameras.centers, expected, atol=1e-5)
    assert cameras.extent == pytest.approx(1.5, abs=1e-5)
    assert cameras[0].extent == 0


def test_select_cat_renamed():
    cameras = make()
    assert cameras.select(["3.png", "1.png"]).names == ("3.png", "1.png")
    assert same(Cameras.cat([cameras[:2], cameras[2:]]), cameras)
    with pytest.raises(
        ValueError, match=r"1 of 2 camera names are not among the 4 cameras \(first: x.png\)"
    ):
        cameras.select(["0.png", "x.png"])
    with pytest.raises(ValueError, match=r"'0.png' occurs more than once"):
        Cameras.cat([cameras, cameras[0]])


@pytest.mark.parametrize("scale", [0.5, 2.0, 0.3, (16, 10)])
def test_scaling_moves_projections_with_the_picture(scale, generator):
    cameras = make(2)
    scaled = cameras.scaled(scale)
    width, height = scaled.sizes[0]
    points = torch.randn(10, 3, generator=generator)
    for row in range(2):
        before, _ = project(points, cameras.Ks[row], cameras.viewmats[row])
        after, _ = project(points, scaled.Ks[row], scaled.viewmats[row])
        assert torch.allclose(after, before * torch.tensor([width / 32, height / 24]), rtol=1e-5)


def test_width_needs_one_size():
    cameras = make(2)
    assert (cameras.width, cameras.height) == (32, 24)
    mixed = Cameras.cat([cameras, make(1, names=("x",)).scaled(0.5)])
    with pytest.raises(
        ValueError, match=r"The 3 cameras have 2 different sizes \(\(16, 12\) … \(32, 24\)\)"
    ):
        _ = mixed.width


def test_json_round_trip_is_exact(tmp_path):
    cameras = make(3, names=("a.png", "dir/b.JPG", "ü.png"))
    cameras.to_json(tmp_path / "novel_cameras.json")
    assert same(Cameras.from_json(tmp_path / "novel_cameras.json"), cameras)
    assert same(Cameras.from_json(cameras.to_json()), cameras)
    assert len(Cameras.from_json(make(1)[[]].to_json())) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["novel_cameras.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"format": 99}', "has format 99. Expected 1"),
        ('{"format": 1, "cameras": [{"name": "a"}]}', "a camera has no 'viewmat'"),
    ],
)
def test_json_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        Cameras.from_json(text)


def test_json_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="No camera file"):
        Cameras.from_json(tmp_path / "none.json")


def test_pose_distance_is_translation_over_extent_plus_angle():
    cameras = make(4)
    moved = Cameras(
        torch.eye(4)[None], cameras.Ks[:1], cameras.sizes[:1], ("m",)
    )  # centre 0, looks along z
    centers, extent = cameras.centers, 1.5
    expected = [
        float(centers[i].norm()) / extent + math.atan2(float(centers[i, 0]), 5.0) for i in range(4)
    ]  # camera i turned about y by atan(x / 5) to look at the origin
    assert moved.pose_distances(cameras)[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert moved.nearest(cameras) == [0]
    assert cameras.nearest(cameras) == [0, 1, 2, 3]


def test_pose_distance_does_not_depend_on_the_unit():
    cameras = make(4)
    bigger = cameras.viewmats.clone()
    bigger[:, :3, 3] *= 1000
    bigger = Cameras(bigger, cameras.Ks, cameras.sizes, cameras.names)
    assert torch.allclose(bigger.pose_distances(bigger), cameras.pose_distances(cameras), atol=1e-4)


def test_a_turned_camera_is_farther_than_a_slightly_moved_one():
    base = make(4)
    turned, moved = base.viewmats[0].clone(), base.viewmats[0].clone()
    turned[:3] = torch.tensor([[0.0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]) @ turned
    moved[0, 3] += 0.3
    query = Cameras(base.viewmats[:1], base.Ks[:1], base.sizes[:1], ("q",))
    rig = Cameras(
        torch.stack([turned, moved, base.viewmats[3]]), base.Ks[:3], base.sizes[:3], tuple("tmo")
    )
    assert query.nearest(rig) == [1]


def test_refuses_what_is_no_camera():
    good = make(2)

    def broken(**changes):
        values = {
            "viewmats": good.viewmats.clone(),
            "Ks": good.Ks.clone(),
            "sizes": good.sizes,
            "names": good.names,
        }
        return Cameras(**{**values, **changes})

    scaled, mirrored, nan = (good.viewmats.clone() for _ in range(3))
    scaled[1, :3, :3] *= 1.1
    mirrored[1, 0] *= -1
    nan[1, 0, 3] = torch.nan
    flat, negative = good.Ks.clone(), good.Ks.clone()
    flat[1, 2, 2] = 2
    negative[1, 0, 0] = -50
    for changes, message in (
        ({"viewmats": scaled}, r"1.png has no rotation in viewmat.*\(1 of 2 cameras\)"),
        ({"viewmats": mirrored}, "no rotation"),
        ({"viewmats": nan}, "non-finite"),
        ({"viewmats": good.viewmats.mT}, "0 0 0 1 as the last row|no rotation"),
        ({"Ks": negative}, "1.png must have focal lengths > 0"),
        ({"Ks": flat}, "0 0 1 as the last row of K"),
        ({"sizes": ((32, 24), (0, 24))}, "width and height > 0"),
        ({"sizes": ((32, 24),)}, "1 .*for 2 names|and 1"),
        ({"names": ("a", "a")}, "occurs more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            broken(**changes)
