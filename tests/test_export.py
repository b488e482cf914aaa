"""tools/export.py: formats come back through another program, films play, paths are smooth."""

import cv2
import numpy as np
import pytest
import torch
from layer_server import blob, write_small_levels
from web_build import built_viewer

from benchmarks import export_formats
from s2d.cameras import Cameras
from s2d.export import FORMATS, fly_through, render_frames, write_depth, write_splats, write_video
from s2d.export import splats as splats_module
from s2d.export.model import kept_cameras
from s2d.export.splats import SPLAT_RECORD
from s2d.gaussians import Gaussians
from s2d.geometry import look_at
from s2d.images import read_image
from s2d.layers.levels import gaussians_of_level
from s2d.layers.manifest import load_levels
from s2d.layers.show import widened
from s2d.metrics import psnr
from s2d.rasterize import rasterize
from tools import export

# Worst of three views, measured: 100, 58.1, 52.4, 42.4, 58.8, 100 dB (100 is: the same 8-bit pictures).
LEAST_PSNR = {"ply": 100, "splat": 54, "compressed-ply": 48, "spz": 38, "sog": 54, "glb": 90}


def ring(num, arc=2 * np.pi, size=(64, 48)):
    """Cameras on a circle of radius 4 around the origin, which they look at; y is down."""
    angles = torch.arange(num, dtype=torch.float64) / num * arc
    centers = torch.stack([4 * torch.sin(angles), torch.full_like(angles, -0.5), -4 * torch.cos(angles)], 1)  # fmt: skip
    viewmats = look_at(centers, torch.zeros(num, 3).double(), torch.tensor([0.0, -1.0, 0.0]).double())  # fmt: skip
    K = torch.tensor([[60.0, 0, 33], [0, 60, 23], [0, 0, 1]]).repeat(num, 1, 1)
    return Cameras(viewmats.float(), K, (size,) * num, tuple(f"{i}.jpg" for i in range(num)))


@pytest.fixture
def run_folder(tmp_path):
    """OUT as far as the export looks at it."""
    blob(300, 0).save_ply(tmp_path / "out/point_cloud/iteration_30/point_cloud.ply")
    blob(10, 1).save_ply(tmp_path / "out/point_cloud/iteration_4/point_cloud.ply")
    (tmp_path / "out/stage3").mkdir()
    ring(5).to_json(tmp_path / "out/stage3/kept_cameras.json")
    return tmp_path / "out"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_comes_back_through_another_program(tmp_path, name):
    built_viewer()
    gaussians = blob(
        400, 5, sh_degree=0 if name in ("splat", "sog") else 2
    )  # sog clusters SH: slow
    path = write_splats(gaussians, tmp_path / f"scene{FORMATS[name][0]}", name)
    back = export_formats.read_back(path, name)
    assert back.num == gaussians.num and back.sh_degree == gaussians.sh_degree
    if name not in ("ply", "splat"):  # 8 to 10 bits a component, or float32
        assert (back.quats.norm(dim=1) - 1).abs().max() < 0.02
    scores = export_formats.compare(gaussians, back, ring(3))
    assert min(scores) >= LEAST_PSNR[name], scores


def test_splat_records_by_hand(tmp_path):
    """Two Gaussians: the larger one comes first; 32 bytes each, numbers worked out by hand."""
    gaussians = Gaussians(
        means=torch.tensor([[1.0, 2, 3], [4, 5, 6]]),
        log_scales=torch.tensor([[0.0, 0, 0], [1, 1, 1]]),
        quats=torch.tensor([[2.0, 0, 0, 0], [0, 3, 0, -4]]),
        opacity_logits=torch.tensor([0.0, 20.0]),
        sh0=torch.tensor([[[0.0, 10, -10]], [[1, 0, 0]]]),
        shN=torch.zeros(2, 3, 3),
    )
    path = write_splats(gaussians, tmp_path / "a.splat", "splat")
    assert path.stat().st_size == 64
    first, second = np.frombuffer(path.read_bytes(), SPLAT_RECORD)
    assert first["means"].tolist() == [4, 5, 6] and second["means"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(first["scales"], np.e)
    assert second["rgba"].tolist() == [128, 255, 0, 128]  # 0.5, clipped, clipped, sigmoid(0)
    assert first["rgba"].tolist() == [199, 128, 128, 255]  # 0.5 + 0.2821
    assert first["quats"].tolist() == [128, 205, 128, 26]  # 0, 0.6, 0, -0.8 in 128ths around 128
    assert second["quats"].tolist() == [255, 128, 128, 128]


def test_a_missing_converter_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(splats_module, "WEB_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tools/build_viewer\.sh"):
        write_splats(blob(5, 0), tmp_path / "a.spz", "spz")
    assert not (tmp_path / "a.spz").exists()
    with pytest.raises(ValueError, match="Expected one of: ply, splat"):
        write_splats(blob(5, 0), tmp_path / "a.usd", "usd")


@pytest.mark.parametrize("kind", ["interpolate", "orbit", "spiral"])
def test_paths_are_smooth_and_keep_the_lens(kind):
    kept = ring(6, arc=2.0, size=(65, 49))
    path = fly_through(kind, kept, 90, width=101)
    assert (path.width, path.height) == (100, 76)
    torch.testing.assert_close(path.Ks[0], kept[0].scaled((100, 76)).Ks[0])
    steps = (path.centers[1:] - path.centers[:-1]).norm(dim=-1)
    bends = (path.centers[2:] - 2 * path.centers[1:-1] + path.centers[:-2]).norm(dim=-1)
    assert bends.max() < 0.25 * steps.max(), "no jerk"  # measured 0.05 to 0.16
    # Near the cameras, and the origin stays near the middle of the picture.
    assert torch.cdist(path.centers, kept.centers).amin(1).max() < 1.0
    middle = path.viewmats[:, :3, 3]
    assert ((middle[:, :2] / middle[:, 2:]).norm(dim=-1) < 0.15).all() and (middle[:, 2] > 3).all()


def test_the_path_through_the_cameras_starts_and_ends_at_one_and_visits_all():
    kept = ring(5, arc=1.5)
    path = fly_through("interpolate", kept, 200)
    distance = torch.cdist(path.centers, kept.centers)
    assert distance[0].min() < 1e-5 and distance[-1].min() < 1e-5
    assert distance.amin(0).max() < 0.02  # a frame is at most half a step from each


def test_an_orbit_of_photos_from_all_sides_is_a_full_circle_else_it_swings_back():
    full = fly_through("orbit", ring(8), 40).centers
    angles = torch.atan2(full[:, 0], -full[:, 2])
    assert angles.sort().values.diff().max() < 0.2
    swing = fly_through("orbit", ring(4, arc=1.0), 40).centers
    assert (swing[-1] - swing[0]).norm() < (swing[10] - swing[0]).norm() / 3
    with pytest.raises(ValueError, match="Use the orbit"):
        fly_through("interpolate", ring(1), 5)


def test_a_film_plays_and_half_a_film_is_not_left(tmp_path):
    cameras = fly_through("orbit", ring(5), 6)
    frames = [render.rgb[0] for _, render in render_frames(blob(300, 0), cameras)]
    path = write_video(tmp_path / "film.mp4", iter(frames), fps=12)
    film = cv2.VideoCapture(str(path))
    assert film.get(cv2.CAP_PROP_FPS) == 12
    for frame in frames:
        there, pixels = film.read()
        assert there
        shown = torch.from_numpy(pixels[..., ::-1].astype(np.float32) / 255)
        assert psnr(shown, frame.clamp(0, 1)) > 25  # measured 33: half the colour resolution
    assert not film.read()[0]

    def breaks():
        yield frames[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "other.mp4", breaks(), fps=12)
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_depth_is_written_like_stage_0_writes_it(tmp_path):
    camera = ring(1)
    render = rasterize(blob(300, 0), camera)
    with np.load(write_depth(tmp_path / "a.npz", render)) as file:
        assert file["depth"].dtype == np.float32 and file["confidence"].dtype == np.float16
        assert file["depth"].shape == (48, 64)
        # The blob is around the origin, 4 away.
        assert 3 < np.median(file["depth"][file["confidence"] > 0.5]) < 4.2


def test_the_command_line(run_folder, capsys, caplog):
    main = export.main
    assert main(["splats", "-m", str(run_folder), "--format", "ply", "--format", "splat"]) == 0
    assert Gaussians.load_ply(run_folder / "export/scene.ply").num == 300
    assert (run_folder / "export/scene.splat").stat().st_size == 300 * 32
    flight = ["-m", str(run_folder), "--seconds", "0.2", "--fps", "10", "--width", "32"]
    assert main(["video", *flight, "--path", "orbit"]) == 0
    assert (run_folder / "export/orbit.mp4").stat().st_size > 500
    assert main(["images", *flight, "--kept", "--depth"]) == 0
    assert read_image(run_folder / "export/kept/3.png").shape == (24, 32, 3)
    assert (run_folder / "export/kept/3.npz").is_file()

    write_small_levels(run_folder / "stage3/layers")
    assert main(["splats", "-m", str(run_folder), "--levels", "-o", str(run_folder / "l")]) == 0
    numbers = [Gaussians.load_ply(run_folder / f"l/level_{k}.ply").num for k in range(3)]
    assert 1000 < numbers[0] <= 1500 and 2500 < numbers[1] <= 4000 and numbers[2] <= 5200
    coarse = [
        "images",
        "-m",
        str(run_folder),
        "--kept",
        "--level",
        "0",
        "-o",
        str(run_folder / "k"),
    ]
    assert main(coarse) == 0
    level, cameras = gaussians_of_level(run_folder / "stage3/layers", 0), kept_cameras(run_folder)
    rescale = load_levels(run_folder / "stage3/layers").levels[0].rescale
    picture = read_image(run_folder / "k" / "3.png")
    camera = cameras.select(["3.jpg"])
    wide = rasterize(widened(level, cameras, rescale), camera).rgb[0].clamp(0, 1)
    torch.testing.assert_close(picture, wide, atol=0.51 / 255, rtol=0)  # rounded to 8 bits
    assert float((rasterize(level, camera).rgb[0] - wide).abs().max()) > 0.05
    assert main(["splats", "-m", str(run_folder), "--level", "7"]) == 2
    assert main(["video", "-m", str(run_folder / "nothing")]) == 2
    assert "Expected 0 to 2" in caplog.text and "Run: python stage3" in caplog.text
