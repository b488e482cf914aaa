"""The script stage0_point_guidance.py on a small scene on disk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from synthetic_stereo import BACKGROUND, FOREGROUND, photograph, viewmat

import stage0_point_guidance as stage0
from s2d.cameras import Cameras
from s2d.guidance.cloud import SurfaceCloud
from s2d.images import read_image, write_image
from s2d.ply_io import read_points_ply
from s2d.split import Split

CENTERS = [(-0.6, 0.0, 0.0), (-0.3, 0.1, 0.0), (0.0, 0.0, 0.1), (0.3, -0.1, 0.0), (0.6, 0.0, 0.0)]


@pytest.fixture(scope="session")
def scene(tmp_path_factory) -> Path:
    """Five photos and a transforms.json, which needs no sparse points."""
    folder = tmp_path_factory.mktemp("scene")
    frames = []
    for row, center in enumerate(CENTERS):
        view, _ = photograph(viewmat(center, -0.1 * center[0]), [BACKGROUND, FOREGROUND])
        write_image(folder / "images" / f"{row}.png", torch.from_numpy(view.rgb))
        c2w = np.linalg.inv(view.viewmat) @ np.diag(
            [1, -1, -1, 1]
        )  # OpenGL axes, as the format has them
        frames.append({"file_path": f"images/{row}.png", "transform_matrix": c2w.tolist()})
    lens = {"w": 160, "h": 120, "fl_x": 150.0, "fl_y": 152.0, "cx": 83.3, "cy": 57.9}
    (folder / "transforms.json").write_text(json.dumps(lens | {"frames": frames}))
    return folder


@pytest.fixture(scope="session")
def finished(scene, tmp_path_factory) -> Path:
    """OUT after stage 0 with three kept photos."""
    out = tmp_path_factory.mktemp("out")
    stage0.main(stage0.Config(scene, out, keep_count=3))
    return out


def test_everything_is_written(finished, scene):
    folder = finished / "stage0"
    split = Split.load(folder / "split.json")
    assert split.kept == ("0.png", "2.png", "4.png")
    novel = Cameras.from_json(folder / "novel_cameras.json")
    assert set(novel.names) == set(split.novel) == set(split.test)
    for name in novel.names:
        guidance, coverage = (
            read_image(folder / "guidance" / name),
            read_image(folder / "coverage" / name),
        )
        assert set(np.unique(coverage.numpy())) <= {0.0, 1.0}
        covered = coverage[..., 0] > 0
        assert covered.float().mean() > 0.75
        assert not guidance[~covered].any()
        truth = read_image(scene / "images" / Path(name).name)
        psnr = -10 * torch.log10((guidance - truth)[covered].square().mean())
        assert psnr > 15  # measured 19: waves of few pixels; black or shifted pictures have 6 to 9
    cloud = read_points_ply(folder / "points.ply")
    assert len(cloud.points) > 10_000
    assert (
        cloud.confidence is not None and cloud.confidence.min() >= 0 and cloud.confidence.max() <= 1
    )
    for name in split.kept:
        arrays = np.load((folder / "depth" / name).with_suffix(".npz"))
        assert arrays["depth"].shape == arrays["confidence"].shape == (120, 160)
        assert ((arrays["depth"] > 0) == (arrays["confidence"] > 0)).mean() > 0.999
    assert trimesh.load_scene(folder / "scene.glb").geometry["points"].vertices.shape == (
        len(cloud.points),
        3,
    )
    patches = SurfaceCloud.load(folder / "surface.npz")
    assert torch.equal(patches.points, cloud.points)
    info = json.loads((folder / "manifest.json").read_text())["info"]
    assert info["num_points"] == len(cloud.points) and 0.75 < info["mean_coverage"] <= 1


def test_photos_that_are_not_kept_change_nothing(finished, scene, tmp_path):
    other = tmp_path / "scene"
    shutil.copytree(scene, other)
    for row in (1, 3):
        write_image(
            other / "images" / f"{row}.png",
            torch.rand(120, 160, 3, generator=torch.Generator().manual_seed(row)),
        )
    stage0.main(stage0.Config(other, tmp_path / "out", keep_count=3))
    before, after = finished / "stage0", tmp_path / "out" / "stage0"
    compared = 0
    for path in sorted(before.rglob("*")):
        if path.is_file() and path.name not in ("manifest.json", "config.yaml"):
            assert path.read_bytes() == (after / path.relative_to(before)).read_bytes(), path.name
            compared += 1
    assert compared >= 10


def test_a_second_run_is_up_to_date_and_other_settings_are_refused(finished, scene):
    before = (finished / "stage0" / "manifest.json").read_bytes()
    cfg = stage0.Config(scene, finished, keep_count=3)
    assert stage0.main(cfg) == finished / "stage0"
    assert (finished / "stage0" / "manifest.json").read_bytes() == before
    with pytest.raises(ValueError, match="seed"):
        stage0.main(replace(cfg, seed=1))


def test_a_cloud_of_the_user_and_generated_cameras(finished, scene, tmp_path):
    cfg = stage0.Config(
        scene,
        tmp_path / "out",
        keep_count=3,
        provider="points",
        points_path=finished / "stage0" / "points.ply",
        novel="interpolate",
        num_novel=3,
        output_dir=tmp_path / "pictures",
        scene_path=tmp_path / "model.glb",
    )
    folder = stage0.main(cfg)
    names = Cameras.from_json(folder / "novel_cameras.json").names
    assert len(names) == 3
    for name in names:
        assert read_image(folder / "coverage" / f"{name}.png").mean() > 0.75
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes() == (
            folder / "guidance" / f"{name}.png"
        ).read_bytes()
    assert (tmp_path / "model.glb").read_bytes() == (folder / "scene.glb").read_bytes()


def test_larger_photos_are_scaled_down_for_all_stages(scene, tmp_path):
    folder = stage0.main(stage0.Config(scene, tmp_path, keep_count=3, max_side=80))
    assert (folder / "scene" / "sparse").is_dir()
    assert Cameras.from_json(folder / "novel_cameras.json").sizes == ((80, 60),) * 2
    assert len(read_points_ply(folder / "points.ply").points) > 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"provider": "points"}, "--points-path"),
        ({"provider": "mvs", "points_path": Path("cloud.ply")}, "--provider points"),
        ({"device": "gpu", "provider": "pi3"}, "expected auto, cpu, cuda or cuda:N"),
        ({"keep_count": 1}, "at least 2"),
        ({"source": Path("nowhere")}, "nowhere"),
        ({"provider": "points", "points_path": Path("nowhere.ply")}, "nowhere.ply"),
    ],
)
def test_what_a_user_can_do_wrong_is_one_message_and_leaves_nothing(
    scene, tmp_path, changes, words
):
    cfg = replace(stage0.Config(scene, tmp_path / "out", keep_count=3), **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        stage0.main(cfg)
    assert not (tmp_path / "out" / "stage0").exists()
    assert not (tmp_path / "out" / "stage0.partial").exists()
