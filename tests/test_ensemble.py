"""Several models of one scene: their seeds, their mean picture, and that the stage goes on where it was stopped."""

import importlib
import shutil
from types import SimpleNamespace

import pytest
import torch

from s2d.config import parse_config
from s2d.ensemble import mean_pictures, member_folders, member_seed
from s2d.images import list_images, read_image, write_image

STEPS = 30


def run(script, scene, out, *arguments):
    module = importlib.import_module(script)
    argv = ["-s", str(scene), "-m", str(out), *arguments]
    return module.main(parse_config(module.Config, script, argv))


def stage1(scene, out, *arguments):
    flags = ("--sample-iteration", str(STEPS), "--checkpoint-every", "20")
    return run("stage1_3dgs_init", scene, out, *flags, *arguments)


def renders(folder):
    """All pixels of a folder's pictures. [P, 3]"""
    return torch.cat([read_image(folder / name).reshape(-1, 3) for name in list_images(folder)])


@pytest.fixture(scope="module")
def prepared(tiny_scene, tmp_path_factory):
    """OUT with stage 0 alone."""
    out = tmp_path_factory.mktemp("ensemble") / "out"
    run("stage0_point_guidance", tiny_scene, out, "--keep-count", "3", "--eval")
    return out


@pytest.fixture
def out(prepared, tmp_path):
    """A folder of its own on the same stage 0."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/stage0").symlink_to(prepared / "stage0")
    return tmp_path / "out"


def test_seeds_never_meet():
    assert member_seed(7, 0) == 7
    seeds = {member_seed(seed, member) for seed in range(100) for member in range(20)}
    assert len(seeds) == 2000


def test_the_mean_is_the_mean(tmp_path, generator):
    pictures = (torch.rand(3, 4, 5, 3, generator=generator) * 255).round() / 255
    for number, picture in enumerate(pictures):
        write_image(tmp_path / str(number) / "sub/a.png", picture)
    mean_pictures([tmp_path / str(number) for number in range(3)], tmp_path / "mean")
    mean = read_image(tmp_path / "mean/sub/a.png")
    assert (mean - pictures.mean(0)).abs().max() <= 0.5 / 255 + 1e-6
    mean_pictures([tmp_path / str(number) for number in range(3)], tmp_path / "0")  # in place
    assert (tmp_path / "0/sub/a.png").read_bytes() == (tmp_path / "mean/sub/a.png").read_bytes()
    (tmp_path / "1/sub/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        mean_pictures([tmp_path / str(number) for number in range(3)], tmp_path / "mean")


def test_renders_are_the_mean_of_runs_with_their_seeds(out, tiny_scene, tmp_path):
    """Three models against three stages of one model each: the same scene as the first's, the mean of all pictures."""
    stage1(tiny_scene, out, "--ensemble", "3", "--seed", "5")
    alone = []
    for member in range(3):
        other = tmp_path / str(member)
        other.mkdir()
        (other / "stage0").symlink_to(out / "stage0")
        stage1(tiny_scene, other, "--ensemble", "1", "--seed", str(member_seed(5, member)))
        alone.append(renders(other / "stage1/renders"))
    splat = f"point_cloud/iteration_{STEPS}/point_cloud.ply"
    assert (out / splat).read_bytes() == (tmp_path / "0" / splat).read_bytes()
    assert (alone[1] - alone[0]).abs().mean() > 1e-3  # they differ at all
    mean = torch.stack(alone).mean(0)
    assert (renders(out / "stage1/renders") - mean).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_an_interrupted_ensemble_ends_with_the_same_bytes(
    out, prepared, tiny_scene, tmp_path, monkeypatch, stop_after
):
    """Stopped after the first model's first or last checkpoint, or the second's: nothing that was finished is fitted again."""
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "stage0").symlink_to(prepared / "stage0")
    stage1(tiny_scene, whole, "--ensemble", "2")
    script = importlib.import_module("stage1_3dgs_init")
    save_run, step, calls, steps = script.save_run, script.optimise_view, [], []

    def save_and_stop(training_run, path):
        save_run(training_run, path)
        calls.append(path.name)
        if len(calls) == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_run", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            stage1(tiny_scene, out, "--ensemble", "2")
    assert calls == ["run.pth", "run.pth", "run_1.pth", "run_1.pth"][:stop_after]
    monkeypatch.setattr(
        script, "optimise_view", lambda *a, **k: (steps.append(1), step(*a, **k))[1]
    )
    stage1(tiny_scene, out, "--ensemble", "2")
    done = {1: 20, 2: STEPS, 3: STEPS + 20, 4: 2 * STEPS}[stop_after]
    assert len(steps) == 2 * STEPS - done
    splat = f"point_cloud/iteration_{STEPS}/point_cloud.ply"
    assert (out / splat).read_bytes() == (whole / splat).read_bytes()
    for name in list_images(whole / "stage1/renders"):
        one, other = (folder / "stage1/renders" / name for folder in (out, whole))
        assert one.read_bytes() == other.read_bytes()


def stage2(scene, out, *arguments):
    """Stage 2 with the shipped network as it is; returns the folder."""
    flags = ("--fixer", "compact", "--trial-views", "0", "--no-check-guidance")
    return run("stage2_artifact_fix", scene, out, *flags, *arguments)


@pytest.fixture
def fitted(out, tiny_scene):
    """OUT with a stage 1 of two models."""
    stage1(tiny_scene, out, "--ensemble", "2")
    return out


def test_members_are_kept_in_order(tmp_path):
    assert member_folders(tmp_path) == []
    for member in range(12):
        (tmp_path / "members" / str(member)).mkdir(parents=True)
    assert [folder.name for folder in member_folders(tmp_path)] == [str(row) for row in range(12)]


def test_each_models_renders_are_fixed_and_averaged(fitted, tiny_scene, tmp_path):
    """Against two stages 2 that are told to fix one model's renders each, and one that fixes their mean."""
    models = member_folders(fitted / "stage1")
    for name in list_images(models[1]):  # so few steps make models that are nearly alike
        write_image(models[1] / name, 0.6 * read_image(models[1] / name).flip(0))
    mean_pictures(models, fitted / "stage1/renders")
    both = stage2(tiny_scene, fitted)
    alone = []
    for member in range(2):
        other = tmp_path / f"alone{member}"
        shutil.copytree(fitted, other, symlinks=True, ignore=shutil.ignore_patterns("stage2"))
        alone.append(stage2(tiny_scene, other, "--stage1-novel-render-dir", str(models[member])))
    for part in ("fixed", "mask", "confidence"):
        one, other = (renders(folder / part) for folder in alone)
        assert (renders(both / part) - (one + other) / 2).abs().max() <= 0.5 / 255 + 1e-6
    fixed = renders(both / "fixed")
    mean = stage2(tiny_scene, fitted, "--fix-models", "mean", "--overwrite")
    assert (renders(mean / "fixed") - fixed).abs().max() > 4 / 255  # a network is not linear
    assert (
        list_images(mean / "fixed")
        == list_images(both / "fixed")
        == list_images(fitted / "stage1/renders")
    )


def test_whose_renders_are_fixed(fitted):
    script = importlib.import_module("stage2_artifact_fix")

    def models(fixer, reach=None, **flags):
        cfg = script.Config(model_dir=fitted, **flags)
        return [folder.name for folder in script.models_to_fix(cfg, fixer, fitted, reach)]

    assert models("compact") == models("analytic") == ["0", "1"]
    assert models("difix") == [] and models("difix", fix_models="each") == ["0", "1"]
    assert models("compact", fix_models="mean") == []
    assert models("compact", stage1_novel_render_dir=fitted / "stage1/renders") == []
    later = SimpleNamespace(previous=1)  # the second round fixes stage 3's renders
    assert models("compact", later) == []


def test_an_interrupted_repair_goes_on_with_the_next_models_view(fitted, tiny_scene, monkeypatch):
    script = importlib.import_module("s2d.fixer.novel_views")
    write_results, written = script.write_results, []

    def write_and_stop(write, folder, results):
        write_results(write, folder, results)
        written.extend(results)
        if len(written) == 3:
            raise KeyboardInterrupt

    expected = stage2(tiny_scene, fitted)
    pictures = {path: path.read_bytes() for path in expected.rglob("*.png")}
    monkeypatch.setattr(script, "write_results", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        stage2(tiny_scene, fitted, "--overwrite")
    stage2(tiny_scene, fitted, "--overwrite")
    assert len(written) == len(set(written)) == 2 * len(list_images(fitted / "stage1/renders"))
    assert {path: path.read_bytes() for path in expected.rglob("*.png")} == pictures


def test_an_empty_ensemble_is_refused(out, tiny_scene):
    with pytest.raises(ValueError, match="ensemble"):
        stage1(tiny_scene, out, "--ensemble", "0")
    assert not (out / "stage1").exists()
