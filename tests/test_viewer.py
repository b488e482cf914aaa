"""tools/view.py's parts: what a folder has to show while it grows, and that a browser gets it."""

import os

import numpy as np
import pytest
import torch
from layer_server import blob, write_small_levels

from s2d.cameras import Cameras
from s2d.gaussians import Checkpoint, save_checkpoint
from s2d.images import write_image
from s2d.layers.levels import gaussians_of_level
from s2d.sh import sh0_to_rgb
from s2d.strategies.support import LEVELS
from s2d.viewer import ModelFolder, Viewer


def checkpoint(path, num, step, mtime):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, Checkpoint(blob(num, step), step, 1.0))
    os.utime(path, (mtime, mtime))


def cameras(*names):
    viewmats = torch.eye(4).repeat(len(names), 1, 1)
    viewmats[:, 0, 3] = torch.arange(float(len(names)))
    K = torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]).repeat(len(names), 1, 1)
    return Cameras(viewmats, K, ((64, 48),) * len(names), names)


@pytest.fixture
def viewer(tmp_path):
    pytest.importorskip("viser")
    viewer = Viewer(ModelFolder(tmp_path), "127.0.0.1", 0)
    yield viewer
    viewer.server.stop()


def test_a_folder_shows_what_is_newest_while_it_grows(tmp_path):
    folder = ModelFolder(tmp_path)
    assert folder.choices() == {} and folder.cameras() is None
    checkpoint(tmp_path / "stage1.partial/scratch/run.pth", 10, 500, 1000)
    assert list(folder.choices()) == ["newest", "stage1, in training"]
    assert folder.load("newest")[0].num == 10 and "500" in folder.load("newest")[1]
    (tmp_path / "stage1.partial/scratch/run.pth").unlink()
    checkpoint(tmp_path / "chkpnt_stage1_900.pth", 20, 900, 1100)
    checkpoint(tmp_path / "stage3.partial/scratch/run.pth", 30, 1200, 1200)
    assert folder.load("newest")[0].num == 30 and folder.load("chkpnt_stage1_900")[0].num == 20
    write_small_levels(tmp_path / "stage3/layers")
    shown, words = folder.load("level 1")
    assert words == "level 1 of 2"
    whole = gaussians_of_level(tmp_path / "stage3/layers", 1)
    assert shown.num == int((torch.sigmoid(whole.opacity_logits) >= 0.999 / 255).sum())
    # With cameras, a level that was trained on smaller photos comes as wide as these showed it.
    cameras("a.jpg").to_json(tmp_path / "stage3/kept_cameras.json")
    wide, _ = folder.load("level 1")
    depth = shown.means[:, 2].clamp(
        min=0
    )  # the camera stands at the origin; its focal length is 50
    grown = (2 * wide.log_scales).exp() - (2 * shown.log_scales).exp()
    expected = 0.3 * (4 - 1) * (depth / 50).square()  # 0.3 pixels² of pixels twice as large
    assert torch.allclose(
        grown, expected[:, None].expand(-1, 3), atol=1e-7
    )  # measured 5e-9, of up to 1e-3
    finest, _ = folder.load("level 2")
    whole = gaussians_of_level(tmp_path / "stage3/layers", 2, visible_only=True)
    assert torch.allclose(finest.log_scales, whole.log_scales, atol=1e-6)
    with pytest.raises(FileNotFoundError, match="Expected OUT"):
        ModelFolder(tmp_path / "nothing")


def test_the_viewer_follows_the_folder(viewer, tmp_path):
    viewer.refresh()
    assert "Waiting" in viewer.status.content
    run = tmp_path / "stage1.partial/scratch/run.pth"
    checkpoint(run, 10, 500, 1000)
    viewer.refresh()
    assert "10 Gaussians" in viewer.status.content and "step 500" in viewer.status.content
    checkpoint(run, 40, 1000, 1010)
    viewer.refresh()
    assert "40 Gaussians" in viewer.status.content
    run.write_bytes(b"half a checkpoint")  # being replaced: what was shown stays
    os.utime(run, (1020, 1020))
    viewer.refresh()
    assert "40 Gaussians" in viewer.status.content


def test_a_browser_gets_the_gaussians_that_are_there(viewer, tmp_path):
    gaussians = blob(50, 3)
    gaussians.save_ply(tmp_path / "a.ply")
    viewer.folder = ModelFolder(tmp_path / "a.ply")
    viewer.refresh()
    handle = viewer.server.scene.get_handle_by_name("/gaussians")
    order = np.lexsort(handle.centers.T)
    ours = np.lexsort(gaussians.means.numpy().T)
    np.testing.assert_allclose(handle.centers[order], gaussians.means.numpy()[ours])
    # Eigenvalues of a covariance are the squared sizes, however it is turned.
    sizes = np.sort(np.linalg.eigvalsh(handle.covariances[order].astype(np.float64)), axis=1)
    expected = np.sort(gaussians.log_scales.double().exp().square().numpy()[ours], axis=1)
    np.testing.assert_allclose(sizes, expected, rtol=1e-3)  # measured 1e-5; viser may halve floats
    colours = sh0_to_rgb(gaussians.sh0[:, 0]).clamp(0, 1).numpy()[ours]
    shown = handle.rgbs[order] / (255 if handle.rgbs.dtype == np.uint8 else 1)
    np.testing.assert_allclose(shown, colours, atol=1 / 255)


def test_support_is_a_mode_with_a_legend(viewer, tmp_path):
    gaussians, support = blob(3, 3), torch.tensor([0.0, 1.0, 5.0])
    path = tmp_path / "point_cloud/iteration_700/point_cloud.ply"
    gaussians.save_ply(path, support)
    save_checkpoint(tmp_path / "chkpnt700.pth", Checkpoint(gaussians, 700, 1.0))
    save_checkpoint(tmp_path / "chkpnt_stage1_500.pth", Checkpoint(gaussians, 500, 1.0))
    viewer.refresh()
    viewer.colours.value = "by support"
    viewer.what.value = "chkpnt700"
    viewer.refresh()
    handle = viewer.server.scene.get_handle_by_name("/gaussians")
    scale = 255 if handle.rgbs.dtype == np.uint8 else 1
    for row, (name, colour) in enumerate(LEVELS):
        assert name in viewer.legend.content
        sent = np.abs(handle.centers - gaussians.means[row].numpy()).sum(1).argmin()
        np.testing.assert_allclose(handle.rgbs[sent] / scale, colour, atol=1 / 255)
    viewer.what.value = "chkpnt_stage1_500"  # no splat of that step
    viewer.refresh()
    assert "--support" in viewer.legend.content
    viewer.colours.value = "as photographed"
    viewer.refresh()
    assert viewer.legend.content == ""
    alone = ModelFolder(path)
    assert torch.equal(alone.support("newest", 3), support) and alone.support("newest", 4) is None


def test_cameras_and_the_fixers_pictures(viewer, tmp_path):
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage0").mkdir()
    cameras("a.jpg", "b.jpg").to_json(tmp_path / "stage1/kept_cameras.json")
    cameras("b.jpg", "c.jpg").to_json(tmp_path / "stage0/novel_cameras.json")
    write_image(tmp_path / "stage1/renders/c.png", torch.zeros(48, 64, 3))
    write_image(tmp_path / "stage2/fixed/c.png", torch.ones(48, 64, 3))
    viewer.refresh()
    assert viewer.view.options == ("a.jpg", "b.jpg", "c.jpg") and viewer.num_kept == 2
    assert list(viewer.folder.pictures("c.jpg")) == ["before: stage 1", "after: fixed"]
    assert viewer.folder.pictures("a.jpg") == {}
    viewer.view.value = "c.jpg"
    viewer.cut.value = 0.25
    viewer._show_pictures()
    picture = viewer.picture.image
    assert picture[:, : picture.shape[1] // 4].max() == 0
    assert picture[:, picture.shape[1] // 4 + 1 :].min() == 255


def test_a_missing_viser_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "viser", None)
    with pytest.raises(ValueError, match="pip install viser"):
        Viewer(ModelFolder(tmp_path), "127.0.0.1", 0)
