"""The evaluation on a run whose right answers are known: the final splat is the one that the photos were rendered from."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from s2d.cameras import Cameras
from s2d.config import no_effect
from s2d.device import Choice, DeviceUnusable
from s2d.files import atomic_write_json
from s2d.gaussians import Checkpoint, Gaussians, gaussians_from_points, save_checkpoint
from s2d.geometry import invert_rigid
from s2d.guidance.cloud import SurfaceCloud
from s2d.images import read_image, write_image
from s2d.metrics import LpipsUnavailable, psnr, score, ssim
from s2d.model_folder import render_name
from s2d.rasterize import rasterize
from s2d.report.support import support_overlay
from s2d.scene import load_scene
from s2d.split import Split, make_split
from s2d.stage_io import open_stage
from tools import evaluate
from tools.evaluate import Config

META = torch.device("meta")
NUM_VIEWS, WIDTH, HEIGHT = 9, 48, 36


@dataclass(frozen=True)
class StageConfig:
    """What the evaluation reads from a stage's config."""

    source: Path = no_effect()
    seed: int = 0
    device: str = no_effect("cpu")


@pytest.fixture(scope="module")
def truth() -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(80, 3, generator=generator) * 2 - 1
    gaussians = gaussians_from_points(
        points, torch.rand(80, 3, generator=generator), 1, init_opacity=0.8
    )
    gaussians.shN = 0.1 * torch.randn(80, 3, 3, generator=generator)
    return gaussians


@pytest.fixture(scope="module")
def source(tmp_path_factory, truth) -> Path:
    """A scene on disk: nine cameras in a row before the Gaussians, their renders as photos."""
    folder = tmp_path_factory.mktemp("scenes") / "row"
    frames = []
    for i in range(NUM_VIEWS):
        camera = make_camera(i)
        write_image(folder / camera.names[0], rasterize(truth, camera).rgb[0])
        c2w = invert_rigid(camera.viewmats[0]) @ torch.diag(
            torch.tensor([1.0, -1, -1, 1])
        )  # OpenGL axes in the file
        frames.append({"file_path": camera.names[0], "transform_matrix": c2w.tolist()})
    intrinsics = {
        "fl_x": 50.0,
        "fl_y": 50.0,
        "cx": WIDTH / 2,
        "cy": HEIGHT / 2,
        "w": WIDTH,
        "h": HEIGHT,
    }
    atomic_write_json(folder / "transforms.json", {**intrinsics, "frames": frames})
    return folder


def make_camera(i: int) -> Cameras:
    viewmat = torch.eye(4)
    viewmat[0, 3] = 0.5 - i / 8  # centres from -0.5 to 0.5
    viewmat[2, 3] = 4.0
    K = torch.tensor([[50.0, 0, WIDTH / 2], [0, 50.0, HEIGHT / 2], [0, 0, 1]])
    return Cameras(viewmat[None], K[None], ((WIDTH, HEIGHT),), (f"images/view{i}.png",))


def write_run(
    model_dir: Path,
    source: Path,
    truth: Gaussians,
    split: Split,
    stages: int = 4,
    novel: Cameras | None = None,
    prepared: bool = False,
) -> Path:
    """Write the folders of a finished run: stage 1 is the truth with its opacities lowered, the final splat is the truth."""
    scene = load_scene(source)
    cfg = StageConfig(source)
    novel = scene.cameras.select(split.novel) if novel is None else novel
    worse = Gaussians(**{**truth.tensors(), "opacity_logits": truth.opacity_logits - 1.5})
    history = {"step": [1, 2], "loss": [0.2, 0.1], "num_gaussians": [80, 80], "seconds": [0.1, 0.2]}
    left_half = torch.zeros(HEIGHT, WIDTH)
    left_half[:, : WIDTH // 2] = 1
    grey, spacing = torch.full_like(truth.means, 0.5), torch.full((truth.num,), 0.1)
    with open_stage(model_dir, "stage0", cfg, {}) as stage:
        SurfaceCloud.without_orientation(truth.means, grey, spacing).save(stage.dir / "surface.npz")
        split.save(stage.dir / "split.json")
        if prepared:
            shutil.copytree(source, stage.dir / "scene")
        novel.to_json(stage.dir / "novel_cameras.json")
        for camera in novel:
            name = render_name(camera.names[0])
            write_image(
                stage.dir / "guidance" / name,
                rasterize(truth, camera).rgb[0] * left_half[..., None],
            )
            write_image(stage.dir / "coverage" / name, left_half)
    with open_stage(model_dir, "stage1", cfg, {}) as stage:
        render_all(stage.dir / "renders", worse, novel)
        save_checkpoint(stage.extra_path("chkpnt_stage1_10.pth"), Checkpoint(worse, 10, 1.0))
        worse.save_ply(stage.extra_path("point_cloud/iteration_10/point_cloud.ply"))
        atomic_write_json(stage.dir / "history.json", history)
        stage.info |= {"num_gaussians": 80, "iteration": 10}
    if stages > 2:
        with open_stage(model_dir, "stage2", cfg, {}) as stage:
            for camera in novel:
                mix = 0.5 * (rasterize(worse, camera).rgb[0] + rasterize(truth, camera).rgb[0])
                write_image(stage.dir / "fixed" / render_name(camera.names[0]), mix)
    if stages > 3:
        with open_stage(model_dir, "stage3", cfg, {}) as stage:
            render_all(stage.dir / "renders", truth, novel)
            truth.save_ply(stage.extra_path("point_cloud/iteration_20/point_cloud.ply"))
            atomic_write_json(stage.dir / "history.json", history)
            stage.info |= {"num_gaussians": 80, "iteration": 20}
    return model_dir


def render_all(folder: Path, gaussians: Gaussians, cameras: Cameras) -> None:
    for camera in cameras:
        write_image(folder / render_name(camera.names[0]), rasterize(gaussians, camera).rgb[0])


def read_results(model_dir: Path) -> tuple[dict, dict]:
    return tuple(
        json.loads((model_dir / name).read_text()) for name in ("results.json", "per_view.json")
    )


@pytest.fixture
def names(source) -> tuple[str, ...]:
    return load_scene(source).names


def test_s2d_protocol_scores_what_is_known(tmp_path, source, truth, names):
    split = make_split(names, keep_count=3)
    run = write_run(tmp_path / "out", source, truth, split)
    report = evaluate.main(Config(run, lpips=()))
    results, per_view = read_results(run)

    assert report == run / "report.html"
    assert results["scene"] == "row"
    assert (results["protocol"], results["kept"], results["test"]) == (
        "s2d",
        list(split.kept),
        list(split.test),
    )
    assert results["test"] == results["novel"]
    final = results["stages"]["stage3"]
    assert final["test"] == {
        "psnr": 100.0,
        "ssim": pytest.approx(1.0),
        "lpips_vgg": None,
        "lpips_alex": None,
        "num_views": 6,
    }
    assert final["num_gaussians"] == 80
    assert final["seconds"] > 0 and final["peak_rss_mb"] > 10
    assert (
        results["stages"]["stage1"]["test"]["psnr"]
        < results["stages"]["stage2"]["test"]["psnr"]
        < 60
    )
    assert results["guidance"]["test"] == {
        "coverage": pytest.approx(0.5),
        "psnr_covered": 100.0,
        "num_views": 6,
    }
    assert results["total_seconds"] == pytest.approx(sum(s["seconds"] for s in results["stages"].values()) + results["guidance"]["seconds"], abs=0.01)  # fmt: skip
    assert (results["device"], results["version"]) == ("cpu", "0.1.0")

    scene = load_scene(source)
    for name in split.test:
        render, photo = (
            read_image(run / "test" / "ours_10" / kind / render_name(name))
            for kind in ("renders", "gt")
        )
        assert torch.equal(photo, scene.image(name))
        assert per_view["stage1"]["test"][name]["psnr"] == pytest.approx(psnr(render, photo))
        assert per_view["stage1"]["test"][name]["ssim"] == pytest.approx(ssim(render, photo))
    mean = sum(per_view["stage1"]["test"][name]["psnr"] for name in split.test) / len(split.test)
    assert results["stages"]["stage1"]["test"]["psnr"] == pytest.approx(mean)


def test_eval_protocol_keeps_test_and_novel_apart(tmp_path, source, truth, names):
    split = make_split(names, keep_count=3, eval=True, test_every=4)
    run = write_run(tmp_path / "out", source, truth, split)
    evaluate.main(Config(run, lpips=()))
    results, per_view = read_results(run)
    assert results["test"] == [names[0], names[4], names[8]]
    assert not set(results["test"]) & set(results["novel"])
    assert results["stages"]["stage2"]["test"] is None
    assert results["stages"]["stage2"]["novel"]["num_views"] == 3
    assert results["stages"]["stage3"]["test"]["psnr"] == 100.0
    assert results["stages"]["stage3"]["novel"]["psnr"] == 100.0
    assert set(per_view["stage3"]["test"]) == set(split.test)
    assert sorted(path.name for path in (run / "test" / "ours_20" / "renders").rglob("*.png")) == [
        "view0.png",
        "view4.png",
        "view8.png",
    ]
    guidance = results["guidance"][
        "test"
    ]  # drawn by the evaluation: grey points, which cover some of the picture
    assert 0.05 < guidance["coverage"] < 1
    assert 5 < guidance["psnr_covered"] < 40
    picture = read_image(run / "test" / "guidance" / "view4.png")
    covered = read_image(run / "test" / "coverage" / "view4.png")[..., 0] > 0.5
    assert (picture[covered] > 0).all() and (picture[~covered] == 0).all()
    page = (run / "report.html").read_text()
    assert page.count('class="source" data-column') == 3 * 5 + 3 * (
        2 + 1 + 1
    )  # novel: all columns; test: no fixed image


@pytest.mark.parametrize("stages", [2, 3])
def test_a_run_that_is_not_finished_is_scored_as_far_as_it_goes(
    tmp_path, source, truth, names, stages, capsys
):
    run = write_run(tmp_path / "out", source, truth, make_split(names, keep_count=3), stages)
    evaluate.main(Config(run, lpips=()))
    results, _ = read_results(run)
    assert results["stages"]["stage1"]["test"]["num_views"] == 6
    assert (results["stages"]["stage2"] is None) == (stages == 2)
    assert results["stages"]["stage3"] is None
    assert "This run is not finished" in (run / "report.html").read_text()
    assert "stage 1" in capsys.readouterr().out


def test_generated_novel_cameras_have_pictures_but_no_scores(tmp_path, source, truth, names):
    split = Split("s2d", names, (), ())
    novel = Cameras.cat([make_camera(2), make_camera(5)]).renamed(["novel_000", "novel_001"])
    run = write_run(tmp_path / "out", source, truth, split, novel=novel, prepared=True)
    evaluate.main(Config(run, lpips=(), sheet=True))
    results, _ = read_results(run)
    assert results["novel"] == ["novel_000", "novel_001"]
    assert results["scene"] == "row"  # not the name of the prepared copy
    assert all(
        stage["test"] is None and stage["novel"] is None for stage in results["stages"].values()
    )
    assert (run / "report.html").read_text().count(
        'class="source" data-column'
    ) == 2 * 4  # no truth
    assert read_image(run / "test" / "sheet.png").shape[1] == 4 * 306 + 6


def test_support_and_unreached_views_are_shown_as_they_are(tmp_path, source, truth, names):
    """A splat that knows its support is painted at every view; a novel view that no round has reached has no fixed picture."""
    split = make_split(names, keep_count=3)
    out = write_run(tmp_path / "out", source, truth, split)
    evaluate.main(Config(out, lpips=()))
    assert not (out / "test/support").exists()
    splat = next(out.glob("point_cloud/*/point_cloud.ply"))
    truth.save_ply(splat, torch.full((truth.num,), 2.0))
    unreached = render_name(split.novel[0])
    (out / "stage2/fixed" / unreached).unlink()
    page = evaluate.main(Config(out, lpips=())).read_text()
    assert {path.name for path in (out / "test/support").rglob("*.png")} == {
        Path(render_name(name)).name for name in split.test
    }
    name = split.test[0]
    camera = load_scene(source).cameras.select([name])
    painted = read_image(out / "test/support" / render_name(name))
    expected = support_overlay(truth, torch.full((truth.num,), 2.0), camera)
    assert float((painted - expected).abs().max()) <= 0.5 / 255 + 1e-6
    assert f'alt="{name}: Support"' in page and "two photos or more" in page
    assert f'alt="{split.novel[0]}: Fixed"' not in page
    assert f'alt="{split.novel[1]}: Fixed"' in page
    assert split.novel[0] not in json.loads((out / "per_view.json").read_text())["stage2"]["novel"]


def test_missing_lpips_is_said_and_the_rest_goes_on(tmp_path, source, truth, names, monkeypatch):
    def unavailable(net):
        raise LpipsUnavailable(f"LPIPS: not available: no weights for {net} here. Do something.")

    monkeypatch.setattr(evaluate, "load_lpips", unavailable)
    run = write_run(tmp_path / "out", source, truth, make_split(names, keep_count=3))
    evaluate.main(Config(run))
    results, _ = read_results(run)
    assert results["stages"]["stage1"]["test"]["lpips_vgg"] is None
    assert results["stages"]["stage1"]["test"]["psnr"] > 0
    assert "no weights for vgg here" in (run / "report.html").read_text()


def test_each_picture_is_scored_once_by_each_network(tmp_path, source, truth, names, monkeypatch):
    calls = []

    def load(net):
        def network(image, target):
            calls.append(net)
            return float((image - target).abs().mean())

        network.to = lambda device: network
        return network

    monkeypatch.setattr(evaluate, "load_lpips", load)
    run = write_run(tmp_path / "out", source, truth, make_split(names, keep_count=3))
    evaluate.main(Config(run, lpips=("alex",)))
    results, per_view = read_results(run)
    assert len(calls) == 6 * 3  # six views, three stages; test and novel are the same pictures
    assert results["stages"]["stage3"]["novel"]["lpips_alex"] == 0.0
    assert per_view["stage1"]["novel"] == per_view["stage1"]["test"]


def test_pictures_too_small_for_lpips_are_scored_without_it():
    image, photo = torch.zeros(20, 40, 3), torch.full((20, 40, 3), 0.1)
    assert score(image, photo, {"lpips_alex": None})["lpips_alex"] is None
    assert score(image, photo, {})["psnr"] == pytest.approx(20.0, abs=1e-4)


def test_masks_say_what_is_scored(tmp_path, source, truth, names):
    """The final splat is right and stage 1's is not; with half of each view masked, the same masked by hand."""
    run = write_run(tmp_path / "out", source, truth, make_split(names, keep_count=3))
    mask = torch.zeros(HEIGHT, WIDTH, 3)
    mask[:, WIDTH // 2 :] = 1
    for name in names:
        write_image(tmp_path / "masks" / render_name(name), mask)
    evaluate.main(Config(run, lpips=(), mask_dir=tmp_path / "masks"))
    _, per_view = read_results(run)
    name, found = next(iter(per_view["stage1"]["test"].items()))
    folder = min((run / "test").glob("ours_*"), key=lambda path: int(path.name[5:]))
    image, photo = (read_image(folder / kind / render_name(name)) for kind in ("renders", "gt"))
    assert found["psnr"] == pytest.approx(psnr(image, photo, mask[..., 0]), abs=1e-4)
    white = [picture.clone() for picture in (image, photo)]
    for picture in white:
        picture[:, : WIDTH // 2] = 1
    assert found["ssim"] == pytest.approx(ssim(*white), abs=1e-4)
    assert found["psnr"] != pytest.approx(psnr(image, photo), abs=0.01)
    (tmp_path / "masks" / render_name(name)).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 6 scored views have no mask"):
        evaluate.main(Config(run, lpips=(), mask_dir=tmp_path / "masks"))


def test_what_is_drawn_is_drawn_on_the_device_and_scored_the_same(
    tmp_path, source, truth, names, monkeypatch
):
    """Gaussians and the networks are moved; tensors on the meta device draw nothing, so a copy on the CPU stands in when they do."""
    model_dir = write_run(tmp_path / "out", source, truth, make_split(names, keep_count=3))
    before = evaluate.main(Config(model_dir=model_dir, lpips=(), device="cpu"))
    moved, here = [], read_results(model_dir)
    monkeypatch.setattr(evaluate, "choose_device", lambda asked: Choice(META, "a test", asked))
    monkeypatch.setattr(Gaussians, "to", lambda self, device: moved.append(device) or self)
    assert evaluate.main(Config(model_dir=model_dir, lpips=())) == before
    assert moved == [META] * 2 and read_results(model_dir) == here


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_was_asked_for_by_name_is_no_cpu(tmp_path):
    with pytest.raises(DeviceUnusable, match=r"--device cuda cannot be used.*--device auto takes"):
        evaluate.main(Config(model_dir=tmp_path, device="cuda"))


def test_another_scene_is_refused(tmp_path, source, truth, names):
    run = write_run(tmp_path / "out", source, truth, make_split(names, keep_count=3))
    content = json.loads((source / "transforms.json").read_text())
    content["frames"] = [
        {**frame, "file_path": str(source / frame["file_path"])} for frame in content["frames"][:4]
    ]
    other = tmp_path / "other"
    atomic_write_json(other / "transforms.json", content)
    with pytest.raises(ValueError, match=r"5 of the views .* are not in .*other .*Pass it with -s"):
        evaluate.main(Config(run, source=other, lpips=()))
    assert not (run / "results.json").exists()


def test_without_stage_1_the_message_says_what_to_run(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"stage0 is not finished: no manifest\.json.*Run: python stage0_point_guidance\.py",
    ):
        evaluate.main(Config(tmp_path))
