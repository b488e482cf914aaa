"""Clouds that the user brings: PLY, LAS, GLB and OBJ, with and without colours, in the right frame and in a wrong one."""

from pathlib import Path

import laspy
import numpy as np
import pytest
import torch
import trimesh
from synthetic_stereo import BACKGROUND, FOREGROUND, photograph, viewmat

from s2d.cameras import Cameras
from s2d.guidance.points import load_points
from s2d.guidance.render import render_cloud
from s2d.ply_io import write_points_ply
from s2d.scene import Scene

POSES = [viewmat((-0.4, 0.0, 0.0), 0.05), viewmat((0.4, 0.1, 0.0), -0.05)]


@pytest.fixture(scope="module")
def kept() -> Scene:
    views = [photograph(pose, [BACKGROUND, FOREGROUND])[0] for pose in POSES]
    cameras = Cameras(
        torch.tensor(np.stack(POSES)),
        torch.tensor(np.stack([view.K for view in views])),
        ((160, 120),) * 2,
        ("a.png", "b.png"),
    )
    photos = {
        name: torch.from_numpy(view.rgb) for name, view in zip(cameras.names, views, strict=True)
    }
    return Scene("synthetic", cameras, (Path("a.png"), Path("b.png")), None, photos)


@pytest.fixture(scope="module")
def surface() -> tuple[np.ndarray, np.ndarray]:
    """A dense grid on both rectangles, float64, and distinct colours, 8 bits."""
    a, b = np.meshgrid(np.linspace(0, 1, 240), np.linspace(0, 1, 180))
    points = [
        np.array(r.corner) + a[..., None] * np.array(r.u) + b[..., None] * np.array(r.v)
        for r in (BACKGROUND, FOREGROUND)
    ]
    points = np.concatenate([p.reshape(-1, 3) for p in points])
    return points, np.random.default_rng(0).integers(1, 256, points.shape).astype(np.uint8)


def write_las(path: Path, points: np.ndarray, colours: np.ndarray | None, scale: int = 257) -> Path:
    header = laspy.LasHeader(point_format=0 if colours is None else 2)
    header.scales, header.offsets = [1e-4] * 3, [0, 0, 0]
    las = laspy.LasData(header)
    las.xyz = points
    if colours is not None:
        las.red, las.green, las.blue = (colours.astype(np.uint16) * scale).T
    las.write(path)
    return path


def write_glb(path: Path, points: np.ndarray, colours: np.ndarray | None) -> Path:
    cloud = trimesh.PointCloud(
        points, colours if colours is None else np.c_[colours, np.full(len(colours), 255)]
    )
    moved = np.eye(4)
    moved[:3, 3] = (0, 0, 1)
    scene = trimesh.Scene()
    scene.add_geometry(trimesh.PointCloud(points - (0, 0, 1), cloud.colors), transform=moved)
    path.write_bytes(scene.export(file_type="glb"))
    return path


@pytest.mark.parametrize("kind", ["ply", "las", "las with 8-bit colours", "laz", "glb"])
def test_coloured_clouds(tmp_path, kept, surface, kind):
    if kind == "laz":
        pytest.importorskip("lazrs", reason="LAZ needs the package lazrs")
    points, colours = surface
    path = tmp_path / f"cloud.{kind.split()[0]}"
    if kind == "ply":
        write_points_ply(path, torch.from_numpy(points), torch.from_numpy(colours) / 255)
    elif kind == "glb":
        write_glb(path, points, colours)
    else:
        write_las(path, points, colours, 1 if "8-bit" in kind else 257)
    found = load_points(path, kept)
    assert len(found.cloud) == len(points)
    np.testing.assert_allclose(found.cloud.points, points, atol=2e-4)
    np.testing.assert_allclose(found.cloud.rgbs, colours / 255, atol=1e-3)
    # Both rectangles are sampled by about one point per pixel: the picture is closed, and the depth of the front is in front.
    depth = found.depth_maps["a.png"].depth
    assert (depth > 0).mean() > 0.95
    assert abs(np.median(depth[50:70, 75:90]) - 3.0) < 0.1
    assert set(found.depth_maps) == {"a.png", "b.png"}


@pytest.mark.parametrize("kind", ["ply", "las", "glb", "obj"])
def test_clouds_without_colours_take_them_from_the_photos(tmp_path, kept, surface, kind):
    points, _ = surface
    path = tmp_path / f"cloud.{kind}"
    if kind == "ply":
        trimesh.PointCloud(points).export(path)
    elif kind == "las":
        write_las(path, points, None)
    elif kind == "glb":
        path.write_bytes(mesh_of(points).export(file_type="glb"))
    else:
        mesh_of(points).export(path)
    found = load_points(path, kept)
    picture = render_cloud(found.cloud, kept.cameras[0])
    error = (picture.rgb - kept.image("a.png"))[picture.coverage].square().mean()
    assert picture.coverage.float().mean() > 0.9
    # PSNR > 20 dB: the waves are a few pixels long and one point is about a pixel; the foreground's colours on the background give 9 dB.
    assert float(error) < 0.01


def mesh_of(points: np.ndarray) -> trimesh.Trimesh:
    """The two rectangles as triangles, no colours."""
    rectangles = points.reshape(2, 180, 240, 3)
    corners = rectangles[:, [0, 0, -1, -1], [0, -1, -1, 0]].reshape(-1, 3)
    mesh = trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]], process=False)
    mesh.visual = trimesh.visual.ColorVisuals()
    return mesh


def test_confidence_of_a_ply_is_kept(tmp_path, kept, surface):
    points, colours = (torch.from_numpy(array) for array in surface)
    confidence = torch.linspace(0, 1, len(points))
    write_points_ply(tmp_path / "cloud.ply", points, colours / 255, confidence)
    assert torch.equal(load_points(tmp_path / "cloud.ply", kept).cloud.confidence, confidence)


def test_what_cannot_be_used_is_refused(tmp_path, kept, surface):
    points, colours = surface
    with pytest.raises(FileNotFoundError, match="No such point cloud"):
        load_points(tmp_path / "none.ply", kept)
    for name in ("broken.las", "broken.glb", "broken.ply"):
        (tmp_path / name).write_bytes(b"not a cloud")
        with pytest.raises(ValueError, match=name):
            load_points(tmp_path / name, kept)
    (tmp_path / "cloud.xyz").write_text("1 2 3\n")
    with pytest.raises(ValueError, match=r"Expected \.ply, \.las"):
        load_points(tmp_path / "cloud.xyz", kept)
    with pytest.raises(ValueError, match="has no points"):
        load_points(write_las(tmp_path / "empty.las", points[:0], colours[:0]), kept)
    with pytest.raises(ValueError, match="Align it with the scene"):
        load_points(
            write_las(tmp_path / "elsewhere.las", points - np.array([0, 0, 20]), colours), kept
        )
    truncated = tmp_path / "truncated.las"
    truncated.write_bytes(write_las(tmp_path / "whole.las", points, colours).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"truncated\.las"):
        load_points(truncated, kept)


def test_laz_without_its_package_says_what_to_install(tmp_path, kept, surface, monkeypatch):
    path = write_las(tmp_path / "cloud.las", *surface).rename(tmp_path / "cloud.laz")
    monkeypatch.setattr(laspy.LazBackend, "detect_available", classmethod(lambda cls: ()))
    with pytest.raises(ValueError, match="pip install lazrs"):
        load_points(path, kept)
