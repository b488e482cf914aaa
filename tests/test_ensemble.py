"""Several models of one scene: their seeds, their mean picture, and that the stage goes on where it was stopped."""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from s2d.cameras import Cameras
from s2d.config import parse_config
from s2d.ensemble import disagreement, mean_pictures, member_folders, member_seed
from s2d.fixed_views import (
    default_agreed_weight,
    find_fixed_views,
    fixed_view_reader,
    model_renders,
)
from s2d.fixer.near_views import distance_shares
from s2d.images import list_images, read_image, write_image
from s2d.model_folder import render_name
from s2d.scene import load_scene
from s2d.split import Split

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


def renders_by_name(folder):
    return {name: read_image(folder / name) for name in list_images(folder)}


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


def test_steps_by_the_number_of_photos(out, tiny_scene, monkeypatch):
    """Without flags as many as the kept photos ask for; a flag that says the same changes nothing. Stage 3's own are counted from wherever stage 1 ended."""
    monkeypatch.setattr("stage1_3dgs_init.stage1_steps", lambda num_kept: 4 * num_kept)
    run("stage1_3dgs_init", tiny_scene, out, "--ensemble", "1")
    before = (out / "stage1/manifest.json").stat().st_mtime_ns
    run("stage1_3dgs_init", tiny_scene, out, "--ensemble", "1", "--sample-iteration", "12")
    assert (out / "stage1/manifest.json").stat().st_mtime_ns == before
    run("stage3_3dgs_mixed_opt", tiny_scene, out, "--no-pseudo-views", "--steps", "5")
    assert (out / "point_cloud/iteration_12/point_cloud.ply").is_file()
    assert (out / "point_cloud/iteration_17/point_cloud.ply").is_file()
    with pytest.raises(ValueError, match=r"sample_iteration"):
        run("stage1_3dgs_init", tiny_scene, out, "--sample-iteration", "0", "--overwrite")


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


def test_less_is_changed_near_kept_photos(fitted, tiny_scene):
    """Against the same stage without it: each view has its share of the change, which is all of it where models differ."""
    tried = ("--trial-views", "2", "--trial-steps", "20", "--expected-gain", "9")
    whole = renders_by_name(stage2(tiny_scene, fitted, *tried, "--no-fade-near") / "fixed")
    with pytest.raises(ValueError, match="near views faded"):
        stage2(tiny_scene, fitted, *tried)
    stage = stage2(tiny_scene, fitted, *tried, "--overwrite")
    faded = renders_by_name(stage / "fixed")
    kept = load_scene(tiny_scene).cameras.select(Split.load(fitted / "stage0/split.json").kept)
    novel = Cameras.from_json(fitted / "stage0/novel_cameras.json")
    shares = distance_shares(novel, kept).tolist()
    assert min(shares) < 0.9
    changed = 0.0
    for name, share in zip(map(render_name, novel.names), shares, strict=True):
        pictures = torch.stack(
            [read_image(folder / name) for folder in member_folders(fitted / "stage1")]
        )
        kept_share = disagreement(pictures).clamp_min(share)
        expected = torch.lerp(pictures.mean(0), whole[name], kept_share)
        assert (faded[name] - expected).abs().max() <= 1 / 255 + 1e-6
        changed = max(changed, float((faded[name] - whole[name]).abs().max()))
    assert changed > 3 / 255
    untried = stage2(tiny_scene, fitted, "--overwrite")  # without trials all is kept
    inputs = json.loads((untried / "manifest.json").read_text())["inputs"]
    assert inputs["near views faded"] == {"value": False}


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


def test_disagreement_is_the_mean_distance_of_pairs_around_a_pixel(generator):
    flat = torch.full((40, 160, 3), 0.5)  # neighbourhood: 2 pixels to each side
    apart = [flat + shift for shift in (0.0, 0.01, 0.03)]  # pairs 0.01, 0.03, 0.02
    assert torch.allclose(disagreement(torch.stack(apart)), torch.full((40, 160, 1), 0.5))
    assert torch.allclose(disagreement(torch.stack(apart[:2])), torch.full((40, 160, 1), 0.25))
    assert disagreement(torch.stack([flat, flat])).eq(0).all()
    assert disagreement(torch.stack([flat, flat + 0.3])).eq(1).all()
    point = flat.clone()
    point[20, 80] += 0.02 * 25  # spread over 5 × 5 pixels, and half as far as it takes
    spread = disagreement(torch.stack([flat, point]))
    assert torch.allclose(spread[18:23, 78:83], torch.tensor(0.5), atol=1e-5)
    assert spread.sum().item() == pytest.approx(12.5, abs=1e-3)
    corner = flat.clone()
    corner[0, 0] += 0.02 * 9  # a neighbourhood of 3 × 3 pixels
    assert disagreement(torch.stack([flat, corner]))[0, 0].item() == pytest.approx(0.5)
    noisy = torch.rand(3, 16, 24, 3, generator=generator) * 0.05
    once = disagreement(noisy)
    assert torch.allclose(disagreement(noisy[[2, 0, 1]]), once, atol=1e-6)
    assert torch.allclose(disagreement(noisy.flip(2)), once.flip(1), atol=1e-6)


def test_fixed_views_weigh_by_disagreement(fitted, tiny_scene):
    stage2(tiny_scene, fitted)
    novel = Cameras.from_json(fitted / "stage0/novel_cameras.json")
    paths = find_fixed_views(fitted, novel.names)
    models = model_renders(fitted, novel.names)
    for name in novel.names:
        assert [path.parent.name for path in models[name]] == ["0", "1"]
        plain = fixed_view_reader(novel, paths, 0.4)(name)
        image, weight = fixed_view_reader(novel, paths._replace(models=models), 0.4, 0.25)(name)
        apart = disagreement(torch.stack([read_image(path) for path in models[name]]))
        assert apart.max() > 0.25 and apart.min() < 0.25  # both sides of the least weight
        assert torch.equal(image, plain[0])
        assert torch.allclose(weight, plain[1] * apart.clamp(min=0.25))
    assert "models" not in paths.inputs()
    assert len(paths._replace(models=models).inputs()["models"]) == 2 * len(novel.names)


def test_what_models_agree_on_teaches_nothing_at_weight_0(fitted, tiny_scene, tmp_path):
    """Alike everywhere: the fixed views may show anything. At a tenth they count for a little."""
    stage2(tiny_scene, fitted)
    first, second = member_folders(fitted / "stage1")
    for name in list_images(first):
        shutil.copyfile(first / name, second / name)
    splats = {}
    for weight in ("0", "0.1"):
        for colour in (0.0, 1.0):
            for name in list_images(first):
                write_image(tmp_path / "fixed" / name, torch.full((48, 64, 3), colour))
            flags = ("--iterations", str(STEPS + 20), "--agreed-weight", weight, "--overwrite")
            folder = ("--fixed-dir", str(tmp_path / "fixed"))
            run("stage3_3dgs_mixed_opt", tiny_scene, fitted, *flags, *folder)
            splat = fitted / f"point_cloud/iteration_{STEPS + 20}/point_cloud.ply"
            splats[weight, colour] = splat.read_bytes()
    assert splats["0", 0.0] == splats["0", 1.0]
    assert splats["0.1", 0.0] != splats["0.1", 1.0]


def test_agreement_counts_for_more_the_more_photos_there_are(out, tiny_scene):
    weights = [default_agreed_weight(num) for num in (1, 3, 4, 5, 6, 12)]
    assert weights == [1.0, 1.0, 0.7, 0.4, 0.1, 0.1]
    stage1(tiny_scene, out, "--ensemble", "1")
    flags = ("--no-pseudo-views", "--iterations", str(STEPS + 2))
    stage3 = run("stage3_3dgs_mixed_opt", tiny_scene, out, *flags)
    assert json.loads((stage3 / "manifest.json").read_text())["config"]["agreed_weight"] == 1.0


def test_one_model_agrees_with_nobody(out, tiny_scene):
    """Its fixed views weigh as they did."""
    stage1(tiny_scene, out, "--ensemble", "1")
    assert model_renders(out, Cameras.from_json(out / "stage0/novel_cameras.json").names) == {}


def test_an_empty_ensemble_is_refused(out, tiny_scene):
    with pytest.raises(ValueError, match="ensemble"):
        stage1(tiny_scene, out, "--ensemble", "0")
    assert not (out / "stage1").exists()
