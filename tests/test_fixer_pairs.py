"""Training pairs for the fixer: what jobs fit and render, the folder they end in, and what happens when something stops."""

import errno
import json
import multiprocessing
import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from s2d.backdrop import NUM
from s2d.checks import check_shape
from s2d.device import DeviceUnusable
from s2d.gaussians import Gaussians
from s2d.geometry import invert_rigid, quat_to_rotation
from s2d.images import read_image
from s2d.metrics import psnr
from s2d.pairs import corrupt, jobs, plan
from s2d.pairs.dataset import LETTERS, Dataset
from s2d.pairs.fit import FitSettings, fit
from s2d.pairs.jobs import run_job
from s2d.pairs.plan import KINDS, PairScene, PairSettings, plan_jobs
from s2d.pairs.preview import write_preview
from s2d.pairs.scenes import add_scene, find_scenes, scene_name
from s2d.pairs.workers import run_jobs
from s2d.scene import load_scene
from s2d.split import make_split
from tools import make_fixer_pairs
from tools.make_fixer_pairs import Config

FIT = FitSettings(num_steps=30, max_init_points=600, max_gaussians=800, sh_degree=1)
SETTINGS = PairSettings(FIT)
# The same as flags; frames 0 and 4 of 8 are test frames.
FLAGS = {
    "num_steps": 30,
    "max_init_points": 600,
    "max_gaussians": 800,
    "sh_degree": 1,
    "test_every": 4,
    "keep_counts": (3,),
    "workers": 1,
}


def pair_scene(folder: Path, num_views: int = 8, test_frames=(0, 4)) -> PairScene:
    return PairScene("tiny", folder, num_views, tuple(test_frames), False)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")
    }


@pytest.fixture(scope="module")
def made(tiny_scene, tmp_path_factory) -> SimpleNamespace:
    """Both jobs of the tiny scene, run by the command with two workers."""
    cfg = Config(sources=(tiny_scene,), output_dir=tmp_path_factory.mktemp("pairs"), **FLAGS)
    make_fixer_pairs.main(replace(cfg, workers=2))
    lines = (cfg.output_dir / "pairs.jsonl").read_text().splitlines()
    return SimpleNamespace(cfg=cfg, dir=cfg.output_dir, rows=[json.loads(line) for line in lines])


@pytest.fixture
def copy(made, tmp_path) -> SimpleNamespace:
    """The same data set to change."""
    shutil.copytree(made.dir, tmp_path / "pairs")
    return SimpleNamespace(
        cfg=replace(made.cfg, output_dir=tmp_path / "pairs"), dir=tmp_path / "pairs", rows=made.rows
    )


# --- corruptions ---------------------------------------------------------------------------------------------------------


def test_quat_product_is_one_rotation_after_the_other(generator):
    a, b = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    expected = quat_to_rotation(a) @ quat_to_rotation(b)
    # Rounding of float64 alone: measured 5e-16.
    torch.testing.assert_close(
        quat_to_rotation(corrupt.quat_product(a, b)), expected, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("kind", corrupt.CORRUPTIONS)
def test_a_corruption_changes_its_share_of_the_gaussians_and_nothing_else(kind, generator):
    gaussians = random_gaussians(400, generator)
    before = {name: tensor.clone() for name, tensor in gaussians.tensors().items()}
    changed, share = corrupt.CORRUPTIONS[kind](gaussians, generator)
    for name, tensor in gaussians.tensors().items():
        assert torch.equal(tensor, before[name]), "the model itself must stay as it was"
    if kind == "drop":
        assert changed.num == 400 - round(share * 400)
        rows = [before["means"].tolist().index(mean) for mean in changed.means.tolist()]
        assert rows == sorted(rows)
        assert all(
            torch.equal(tensor, before[name][rows]) for name, tensor in changed.tensors().items()
        )
        return
    touched = {"rotate": "quats", "scale": "log_scales"}[kind]
    moved = (getattr(changed, touched) != before[touched]).any(1)
    assert int(moved.sum()) == round(share * 400)
    for name in before.keys() - {touched}:
        assert torch.equal(getattr(changed, name), before[name]), name


def test_rotations_have_the_size_they_say(generator):
    gaussians = random_gaussians(4000, generator)
    changed, _ = corrupt.rotate(gaussians, generator)
    relative = quat_to_rotation(changed.quats) @ quat_to_rotation(gaussians.quats).mT
    angles = torch.rad2deg(
        torch.acos(((relative.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1))
    )
    sigma = float(angles[angles > 0.1].square().mean().sqrt())
    low, high = corrupt.TURNED_DEGREES
    assert 0.9 * low < sigma < 1.1 * high  # of at least 200 samples: +-5 % one sigma


def test_a_shifted_path_moves_sideways_by_a_share_of_the_distance(tiny_scene, generator):
    scene = load_scene(tiny_scene)
    # Points at distance 2 from every camera, whichever way it looks.
    c2w = invert_rigid(scene.cameras.viewmats)
    points = c2w[0, :3, 3] + 2 * c2w[0, :3, 2] + torch.zeros(10, 3)
    cameras = scene.cameras[0]
    shifted = corrupt.shifted_cameras(cameras, points, generator)
    move = (shifted.centers - cameras.centers)[0]
    share = float(move.norm()) / 2
    assert corrupt.SHIFT[0] - 1e-5 <= share <= corrupt.SHIFT[1] + 1e-5
    assert abs(float(move @ c2w[0, :3, 2])) < 1e-5  # float32 at coordinates of 3
    assert torch.equal(shifted.viewmats[:, :3, :3], cameras.viewmats[:, :3, :3])
    assert shifted.names == cameras.names


def random_gaussians(num: int, generator: torch.Generator) -> Gaussians:
    shapes = {
        "means": (num, 3),
        "log_scales": (num, 3),
        "quats": (num, 4),
        "opacity_logits": (num,),
        "sh0": (num, 1, 3),
        "shN": (num, 3, 3),
    }
    return Gaussians(**{n: torch.randn(*s, generator=generator) for n, s in shapes.items()})


# --- the plan ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_model_is_fitted_to_test_frames_and_halves_share_none(seed):
    scene = pair_scene(Path("x"), 41, range(0, 41, 8))
    planned = plan_jobs([scene], (2, 3, 12), (seed,), KINDS)
    assert [job.is_halves for job in planned] == [False, False, False, True]
    for job in planned:
        for frames in job.sets:
            assert list(frames) == sorted(set(frames))
            assert not set(frames) & set(scene.test_frames)
    first, second = planned[-1].sets
    assert not set(first) & set(second)
    assert len(first) == len(second) == plan.MAX_HALF
    assert [len(job.sets[0]) for job in planned[:3]] == [2, 3, 12]
    # All along the scene: one of each third of the 35 frames, so no gap is longer than two thirds.
    assert max(b - a for a, b in pairwise(planned[1].sets[0])) <= 2 / 3 * 41


def test_seed_0_keeps_what_stage_0_keeps_and_other_seeds_others():
    scene = pair_scene(Path("x"), 30, ())
    names = [f"{i:02d}" for i in range(30)]
    kept = {seed: plan_jobs([scene], (5,), (seed,), ("sparse",))[0].sets[0] for seed in range(4)}
    assert [names[frame] for frame in kept[0]] == list(make_split(names, keep_count=5).kept)
    assert len(set(kept.values())) == 4


def test_scenes_that_are_too_small_are_skipped_and_named(caplog):
    large, small = pair_scene(Path("x"), 20, ()), replace(pair_scene(Path("y"), 5, ()), name="wee")
    planned = plan_jobs([large, small], (3, 6), (0,), ("sparse",))
    assert [job.name for job in planned] == ["tiny_k3-s0", "tiny_k6-s0", "wee_k3-s0"]
    assert "wee (5 views) keeping 6" in caplog.text
    with pytest.raises(ValueError, match=r"wee \(5 views\) keeping 6.*Lower --keep-counts"):
        plan_jobs([small], (6,), (0,), ("sparse",))


# --- jobs ----------------------------------------------------------------------------------------------------------------


def test_copies_on_the_way_do_not_change_the_fit(tiny_scene):
    views = load_scene(tiny_scene).subset(["view_1.png", "view_3.png", "view_6.png"])
    counted = []
    plain = fit(views, FIT, 0)
    watched = fit(views, FIT, 0, (3, 30), counted.append)
    for name, tensor in plain.gaussians.tensors().items():
        assert torch.equal(tensor, watched.gaussians.tensors()[name]), name
    assert sum(counted) == FIT.num_steps
    early, last = watched.early
    # The last of the steps; what stands behind the scene comes after it.
    assert torch.equal(last.means, plain.gaussians.means[: last.num])
    assert plain.gaussians.num == last.num + NUM
    assert not torch.equal(early.sh0, last.sh0)


def test_pairs_are_what_their_lines_say(made, tiny_scene):
    scene = load_scene(tiny_scene)
    (kept,) = plan_jobs([pair_scene(tiny_scene)], (3,), (0,), ("sparse",))[0].sets
    first, second = plan_jobs([pair_scene(tiny_scene)], (3,), (0,), ("cross",))[0].sets
    known = {"cross-a-s0": first, "cross-b-s0": second, "cycle-s0": first}
    assert {row["kind"] for row in made.rows} == set(KINDS)
    for row in made.rows:
        scene_part, what, frame = row["name"].removesuffix(".png").rsplit("_", 2)
        assert (scene_part, what.split("-")[0]) == ("tiny", row["kind"])
        assert int(frame) == row["frame"]
        assert row["view"] == f"view_{row['frame']}.png"
        assert row["split"] == ("test" if row["frame"] in (0, 4) else "train")
        a, b, p, m = (read_image(made.dir / f"{row['split']}_{x}" / row["name"]) for x in "ABPM")
        assert torch.equal(b, scene.image(row["view"]))
        check_shape("a", a, b.shape)
        assert psnr(a, b) == pytest.approx(row["psnr"], abs=1e-3)
        assert set(m.unique().tolist()) <= {0.0, 1.0}
        assert float(m.mean()) == pytest.approx(row["coverage"], abs=1e-4)
        assert float((p * (1 - m)).abs().max()) == 0, "guidance outside its mask"
        assert not torch.equal(p, torch.zeros_like(p))
        # The photos that the model knew, nearest first, and the truth only where the kind says so.
        frames = known.get(what, kept)
        references = [
            int(name.removesuffix(".png").rsplit("_", 1)[1]) for name in row["references"]
        ]
        assert set(references) == set(frames) - {row["frame"]}
        assert row["frame"] not in frames or row["kind"] == "cycle"
        distances = scene.cameras[row["frame"]].pose_distances(scene.cameras[list(frames)])[0]
        of = dict(zip(frames, distances.tolist(), strict=True))
        assert [of[f] for f in references] == sorted(of[f] for f in references)
        assert all((made.dir / "photos" / name).is_file() for name in row["references"])
    assert any(row["kind"] == "cycle" and row["frame"] in first for row in made.rows)


def test_every_folder_has_the_same_names_and_nothing_else(made):
    for split in ("train", "test"):
        expected = sorted(row["name"] for row in made.rows if row["split"] == split)
        assert len(set(expected)) == len(expected) > 0
        for letter in LETTERS:
            assert sorted(p.name for p in (made.dir / f"{split}_{letter}").iterdir()) == expected
    truth = made.dir / "train_B" / next(r["name"] for r in made.rows if r["split"] == "train")
    assert truth.stat().st_nlink > 1, "photos are linked, not copied"
    assert not list(made.dir.rglob("*.partial"))


def test_the_manifest_counts_what_is_there(made):
    manifest = json.loads((made.dir / "manifest.json").read_text())
    for split in ("train", "test"):
        assert manifest["num_pairs"][split] == len(list((made.dir / f"{split}_A").iterdir()))
    sparse = [row["psnr"] for row in made.rows if row["kind"] == "sparse"]
    assert manifest["kinds"]["sparse"]["psnr"]["mean"] == pytest.approx(
        sum(sparse) / len(sparse), abs=0.006
    )
    assert manifest["settings"]["num_steps"] == 30
    assert manifest["num_jobs"] == 2
    assert manifest["cpu_seconds"] > 0
    assert manifest["failed"] == {}


def test_a_job_gives_the_same_bytes_in_another_process(made, tiny_scene, tmp_path):
    """Here with all threads, there in a worker with one; and corruption depends on the frame, not on what came before."""
    (job,) = plan_jobs([pair_scene(tiny_scene)], (3,), (0,), ("sparse",))
    rows = run_job(job, tmp_path, replace(SETTINGS, kinds=("underfit", "rotate", "drop")))
    assert {row["kind"] for row in rows} == {"underfit", "rotate", "drop"}
    for row in rows:
        for letter in "APM":
            theirs = made.dir / f"{row['split']}_{letter}" / row["name"]
            assert (tmp_path / letter / row["name"]).read_bytes() == theirs.read_bytes()


def test_views_that_nothing_is_known_of_are_left_out(tiny_scene, tmp_path):
    (job,) = plan_jobs([pair_scene(tiny_scene)], (3,), (0,), ("sparse",))
    settings = replace(SETTINGS, kinds=("sparse",), min_coverage=0.7, views_per_kind=4)
    rows = run_job(job, tmp_path, settings)
    good = [row for row in rows if "name" in row]
    assert len(rows) == job.max_pairs(settings) == 4
    assert 0 < len(good) < 4
    assert all(row["coverage"] >= 0.7 for row in good)
    assert len(list((tmp_path / "A").iterdir())) == len(good)


def test_a_failed_fit_is_a_record_and_not_the_end(tiny_scene, tmp_path, monkeypatch):
    def no_surface(*_, **__):
        raise ValueError("no two photos show the same surface")

    monkeypatch.setattr(jobs, "fit", no_surface)
    dataset = Dataset(tmp_path)
    (job,) = plan_jobs([pair_scene(tiny_scene)], (3,), (0,), ("sparse",))
    record = dataset.work(job, SETTINGS, lambda num: None)
    assert (record["failed"], record["pairs"]) == ("no two photos show the same surface", [])
    assert dataset.is_finished(job)
    assert dataset.finish({})["failed"] == {job.name: record["failed"]}


def test_models_are_fitted_on_the_device_that_is_asked_for(tiny_scene, tmp_path, monkeypatch):
    asked = []

    def fit_here(*arguments):
        asked.append((arguments[5], arguments[6]))
        return fit(*arguments[:5], torch.device("cpu"), arguments[6])

    monkeypatch.setattr(jobs, "fit", fit_here)
    (job,) = plan_jobs([pair_scene(tiny_scene)], (3,), (0,), ("sparse",))
    record = Dataset(tmp_path).work(job, SETTINGS, lambda num: None, torch.device("cuda"))
    assert record["pairs"] and [device.type for device, _ in asked] == ["cuda"]
    assert len(asked[0][1]) == job.scene.num_views - 3  # it knows where it will be rendered
    # Done when another job's GPU failed: what goes on on the CPU finds its pictures in their place.
    row, dataset = record["pairs"][0], Dataset(tmp_path)
    picture = tmp_path / f"{row['split']}_A" / row["name"]
    assert not picture.exists()
    monkeypatch.setattr("s2d.pairs.dataset._link", lambda *_: None)
    assert make_fixer_pairs.unfinished(dataset, [job]) == [] and picture.exists()


def test_a_gpu_that_fails_is_not_a_failed_fit(tiny_scene, tmp_path, monkeypatch):
    def fit_there(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(jobs, "fit", fit_there)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 8 * 2**30))
    dataset = Dataset(tmp_path)
    (job,) = plan_jobs([pair_scene(tiny_scene)], (3,), (0,), ("sparse",))
    with pytest.raises(DeviceUnusable, match=r"Out of memory on cuda: 1\.0 of 8\.0 GiB"):
        dataset.work(job, SETTINGS, lambda num: None, torch.device("cuda"))
    assert not dataset.is_finished(job)


# --- going on ------------------------------------------------------------------------------------------------------------


def test_a_finished_data_set_is_left_alone(copy, caplog):
    before = {path: path.stat().st_mtime_ns for path in copy.dir.rglob("*")}
    with caplog.at_level("INFO", "s2d"):
        make_fixer_pairs.main(copy.cfg)
    assert "up to date" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in copy.dir.rglob("*")} == before


def test_a_killed_run_goes_on_from_its_finished_jobs(copy, made):
    """As a kill leaves it: one job complete but half moved, the other not complete."""
    moved_back = [row for row in copy.rows if row["kind"] in ("sparse", "drop")]
    for row in moved_back:
        for letter in "APM":
            source = copy.dir / f"{row['split']}_{letter}" / row["name"]
            target = copy.dir / "jobs" / "tiny_k3-s0" / letter / row["name"]
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
        (copy.dir / f"{row['split']}_B" / row["name"]).unlink()
    finished = copy.dir / "jobs" / "tiny_k3-s0" / "job.json"
    stamp = finished.stat().st_mtime_ns
    (copy.dir / "jobs" / "tiny_halves-s0").rename(copy.dir / "jobs" / "tiny_halves-s0.partial")
    for row in copy.rows:
        if row["kind"] in ("cross", "cycle"):
            for letter in LETTERS:
                (copy.dir / f"{row['split']}_{letter}" / row["name"]).unlink()
    for name in ("manifest.json", "pairs.jsonl", "preview.png"):
        (copy.dir / name).unlink()

    make_fixer_pairs.main(copy.cfg)
    assert finished.stat().st_mtime_ns == stamp, "a finished job was done again"
    assert content(copy.dir) == content(made.dir)
    assert (copy.dir / "pairs.jsonl").read_text() == (made.dir / "pairs.jsonl").read_text()


def test_a_worker_that_dies_is_named_and_takes_nothing_with_it(tiny_scene, tmp_path):
    dataset = Dataset(tmp_path)
    endless = replace(SETTINGS, fit=replace(FIT, num_steps=10**6))
    jobs = plan_jobs([pair_scene(tiny_scene)], (3,), (0,), ("sparse",))
    results = run_jobs(partial(dataset.work, settings=endless), jobs, 1, "use fewer --workers")
    assert next(event for _, event, _ in results if event != "idle") == "steps"
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(ValueError, match=r"tiny_k3-s0 was killed by signal 9.*--workers"):
        list(results)
    assert not multiprocessing.active_children()
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["tiny_k3-s0.partial"]


def test_other_settings_are_refused_and_overwrite_starts_anew(copy):
    with pytest.raises(ValueError, match=r"num_steps: 30, now 31.*--overwrite"):
        make_fixer_pairs.main(replace(copy.cfg, num_steps=31))
    with pytest.raises(ValueError, match=r"tiny is not what it was.*other train or test"):
        add_scene(Dataset(copy.dir), copy.cfg.sources[0], "tiny", 512, 0, True)
    foreign = copy.dir / "train_A" / "mine.png"
    foreign.write_bytes(b"")
    Dataset(copy.dir).begin({"num_steps": 31}, overwrite=True)
    left = sorted(path.relative_to(copy.dir).as_posix() for path in copy.dir.rglob("*.*"))
    assert left == [".s2d.lock", "jobs/settings.json", "train_A/mine.png"], (
        "what S2D has not made stays"
    )


# --- what a user can get wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "No scene was given. Pass -s"),
        ({"sources": (Path("/no/such/scene"),)}, "No such scene: /no/such/scene. Expected"),
        ({"test_scenes": ("fern",)}, "--test-scenes fern is none of the 1 scenes: tiny"),
        ({"keep_counts": (1,)}, "keep_counts must be"),
        ({"keep_counts": (7,), "kinds": ("sparse",)}, "No scene has enough views: tiny"),
        ({"test_every": 1}, "--test-every must be 0"),
        ({"kinds": ()}, "--kinds is empty"),
    ],
)
def test_a_clear_message_before_any_work(tiny_scene, tmp_path, changes, message):
    cfg = Config(sources=(tiny_scene,), output_dir=tmp_path / "out", **FLAGS)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        make_fixer_pairs.main(replace(cfg, **changes))
    assert message in str(caught.value)
    assert not list((tmp_path / "out").rglob("job.json"))


def test_an_unreadable_photo_is_named_before_any_work(tiny_scene, tmp_path):
    shutil.copytree(tiny_scene, tmp_path / "tiny")
    photo = tmp_path / "tiny" / "images" / "view_5.png"
    photo.write_bytes(photo.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"view_5\.png is not an image, or is cut off"):
        make_fixer_pairs.main(
            Config(sources=(tmp_path / "tiny",), output_dir=tmp_path / "out", **FLAGS)
        )


def test_a_folder_with_other_files_is_not_taken(tiny_scene, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"holds other files \(first: photos\)"):
        make_fixer_pairs.main(Config(sources=(tiny_scene,), output_dir=tmp_path, overwrite=True))
    assert (tmp_path / "photos").is_dir()


def test_a_full_disk_is_said_before_and_during_the_work(tiny_scene, tmp_path, monkeypatch):
    cfg = Config(sources=(tiny_scene,), output_dir=tmp_path, **FLAGS)
    usage = SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(make_fixer_pairs.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ValueError, match=r"the pairs need about 0\.0 GB, 0\.0 GB are free"):
            make_fixer_pairs.main(cfg)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/a.png")

    monkeypatch.setattr(make_fixer_pairs, "work", full)
    with pytest.raises(ValueError, match=r"The disk is full: /data/a\.png.*free some space"):
        make_fixer_pairs.main(cfg)


def test_scenes_are_found_in_folders_and_told_apart_by_name(tiny_scene, tmp_path):
    for name in ("a b", "c_1", ".hidden"):
        (tmp_path / "all" / name / "sparse").mkdir(parents=True)
    (tmp_path / "all" / "notes").mkdir()
    (tmp_path / "other" / "a-b" / "sparse").mkdir(parents=True)
    assert list(find_scenes([tmp_path / "all"])) == ["a-b", "c_1"]
    assert scene_name(tmp_path / "all" / "c_1") == "c_1"
    with pytest.raises(ValueError, match="Two scenes are called a-b"):
        find_scenes([tmp_path / "all", tmp_path / "other"])
    with pytest.raises(FileNotFoundError, match="is no scene and holds none"):
        find_scenes([tmp_path / "all" / "notes"])


def test_the_sheet_shows_what_is_in_the_files(made, tmp_path):
    rows = [row for row in made.rows if row["kind"] == "sparse"]
    sheet = read_image(write_preview(Dataset(made.dir), rows, tmp_path / "sheet.png"))
    best = max(rows, key=lambda row: row["psnr"])
    worst = min(rows, key=lambda row: row["psnr"])
    # Below the heading, three tiles of the worst pair at the left: the last of them is its photo.
    truth = read_image(made.dir / f"{worst['split']}_B" / worst["name"])
    corner = sheet[60:200, 2 * 256 + 8 : 2 * 256 + 240].mean((0, 1))
    assert float((corner - truth.mean((0, 1))).abs().max()) < 0.08  # measured 0.02
    assert best["name"] != worst["name"]
    everything = read_image(made.dir / "preview.png")
    assert everything.shape[0] > 6 * sheet.shape[0] * 0.8
