"""Leave-one-out trials and what stage 2 and stage 3 make of them, on the tiny scene."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pipeline import ARGUMENTS, results, run
from tiny_pairs import save_tiny

import stage2_artifact_fix
from s2d.cameras import Cameras
from s2d.device import Choice, DeviceUnusable
from s2d.fixed_views import find_fixed_views, fixed_view_reader, is_worth_training_on
from s2d.fixer import judge as judging
from s2d.fixer import novel_views
from s2d.fixer.analytic import AnalyticFixer, feathered
from s2d.fixer.calibration import Calibration
from s2d.fixer.interface import FixResult
from s2d.images import read_image, write_image
from s2d.metrics import psnr
from s2d.pairs import trials as making
from s2d.pairs import workers
from s2d.pairs.fit import Fitted
from s2d.pairs.trials import TrialJob, TrialSettings, choose_trial_views, make_trial
from s2d.pairs.workers import run_jobs
from s2d.scene import load_scene
from s2d.split import Split
from s2d.stage_io import require_stage

SETTINGS = TrialSettings(num_views=2, num_steps=40)
FLAGS = ("--trial-views", "2", "--trial-steps", "40")


@pytest.fixture(scope="module")
def fixed(tiny_scene, tmp_path_factory) -> Path:
    """OUT after stages 0 to 2, with two trials. Do not change it."""
    out = tmp_path_factory.mktemp("trials") / "out"
    run("stage0", tiny_scene, out)
    run("stage1", tiny_scene, out, "--sample_iteration", "60", "--ensemble", "1")
    run("stage2", tiny_scene, out, *FLAGS)
    return out


@pytest.fixture
def copied(fixed, tmp_path) -> Path:
    return Path(shutil.copytree(fixed, tmp_path / "out"))


@pytest.fixture
def in_process(monkeypatch):
    """Trials without worker processes, which take seconds to start; `fixed` has them."""

    def run_here(work, jobs, *_):
        for job in jobs:
            yield job, "done", work(job, on_steps=lambda _: None)

    monkeypatch.setattr(making, "run_jobs", run_here)


def kept_of(out):
    return Split.load(out / "stage0/split.json").kept


def verdict_of(out):
    return json.loads((out / "stage2/trials.json").read_text())


# ------------------------------------------------------------------------------------------------------------ the trials


def test_left_out_views_are_evenly_spread():
    names = [f"{number}" for number in range(9)]
    assert choose_trial_views(names, 3) == ("1", "4", "7")
    assert choose_trial_views(names[:3], 3) == ("0", "1", "2")
    assert choose_trial_views(names[:3], 9) == ("0", "1", "2")
    assert choose_trial_views(names, 1) == ("4",)


def test_a_fit_does_not_know_the_photo_that_it_is_judged_by(tiny_scene, tmp_path):
    """Other pixels in that photo: another truth, the same render, guidance and coverage."""
    scene = Path(shutil.copytree(tiny_scene, tmp_path / tiny_scene.name))
    job = TrialJob(scene, ("view_1.png", "view_3.png", "view_6.png"), "view_3.png")
    counted = []
    for folder in ("one", "other"):
        make_trial(job, SETTINGS, tmp_path / folder, counted.append)
        made = tmp_path / folder / "view_3.png"
        assert torch.equal(read_image(made / "truth.png"), read_image(scene / "images/view_3.png"))
        write_image(scene / "images/view_3.png", torch.zeros(36, 48, 3))
    assert sum(counted) == 2 * SETTINGS.num_steps
    content = {
        name: [
            (tmp_path / folder / "view_3.png" / name).read_bytes() for folder in ("one", "other")
        ]
        for name in ("render.png", "guidance.png", "coverage.png", "truth.png", "trial.json")
    }
    assert [name for name, (one, other) in content.items() if one != other] == ["truth.png"]
    record = json.loads(content["trial.json"][0])
    assert record["failed"] is None and set(record["references"]) == {"view_1.png", "view_6.png"}


def test_a_fit_that_fails_is_a_dropped_trial(tiny_scene, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise ValueError("The photos share no surface.")

    monkeypatch.setattr(making, "fit", fail)
    kept = load_scene(tiny_scene).subset(["view_1.png", "view_3.png", "view_6.png"])
    for view in kept.names:
        make_trial(TrialJob(tiny_scene, kept.names, view), SETTINGS, tmp_path, lambda _: None)
    settings = replace(SETTINGS, num_views=3)
    pairs, failed = making.make_trials(kept, tiny_scene, settings, tmp_path)
    assert pairs == [] and failed == dict.fromkeys(kept.names, "The photos share no surface.")
    assert "no trial of view_6.png: The photos share no surface." in caplog.text
    (tmp_path / "scratch/trials").mkdir(parents=True)
    for view in kept.names:  # as stage 2's scratch folder would hold them
        shutil.move(tmp_path / view, tmp_path / "scratch/trials" / view)
    choice = judging.FixerChoice("analytic", "a test", {})
    verdict = judging.judge(choice, kept, tiny_scene, settings, None, tmp_path / "scratch", "cpu")
    assert verdict.calibration is None and verdict.choice is choice
    assert verdict.summary["failed"] == failed
    assert "used as it is: no trial could be made" in verdict.summary["decision"]


CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def some_fit(tiny_scene) -> Fitted:
    views = load_scene(tiny_scene).subset(["view_1.png", "view_3.png", "view_6.png"])
    return making.fit(views, replace(SETTINGS, num_steps=1).fit, 0)


class FailingGpu:
    """Two trials, the second of which a GPU does not get done; no process is started, and nothing fitted."""

    def __init__(self, tiny_scene, folder, monkeypatch, error, some_fit):
        self.kept = load_scene(tiny_scene).subset(["view_1.png", "view_3.png", "view_6.png"])
        self.scene, self.folder, self.tried = tiny_scene, folder, []

        def fit(views, settings, seed, on_steps, device, novel):
            assert {*views.names, *novel.names} == set(self.kept.names) and len(novel) == 1
            self.tried.append(device.type)
            if device.type == "cuda" and self.tried.count("cuda") == 2:
                raise error
            return some_fit

        monkeypatch.setattr(making, "fit", fit)
        monkeypatch.setattr(making, "choose_device", lambda asked: Choice(CUDA, "a test", asked))
        monkeypatch.setattr(workers, "free_memory", lambda _: (3 * 2**30, 8 * 2**30))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 8 * 2**30))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def make(self, device):
        return making.make_trials(self.kept, self.scene, SETTINGS, self.folder, device)


GPU_ERRORS = {
    "memory": (torch.OutOfMemoryError("CUDA out of memory."), "Out of memory on cuda:0: 1.0 of 8.0 GiB"),
    "later": (torch.AcceleratorError("CUDA error: illegal address"), "cuda:0 failed: CUDA error: ill"),
}  # fmt: skip


@pytest.mark.parametrize("failure", GPU_ERRORS)
def test_a_gpu_that_fails_a_trial_leaves_the_finished_ones(
    failure, tiny_scene, tmp_path, monkeypatch, in_process, caplog, some_fit
):
    error, message = GPU_ERRORS[failure]
    trials = FailingGpu(tiny_scene, tmp_path, monkeypatch, error, some_fit)
    with pytest.raises(DeviceUnusable, match=message):  # and no trial that is said to have failed
        trials.make("cuda")
    assert trials.tried == ["cuda", "cuda"]
    assert len(list(tmp_path.glob("*/trial.json"))) == 1
    trials.tried.clear()
    shutil.rmtree(tmp_path)
    pairs, failed = trials.make("auto")
    assert trials.tried == ["cuda", "cuda", "cpu"] and len(pairs) == 2 and not failed
    assert message in caplog.text and "Going on on the CPU" in caplog.text
    trials.make("cuda")
    assert len(trials.tried) == 3, "finished work was done again"


def test_trials_side_by_side_fit_into_a_gpus_memory(monkeypatch):
    monkeypatch.setattr(workers, "usable_cores", lambda: 16)
    for gib, most in ((0.5, 1), (2.5, 2), (80, 3)):
        monkeypatch.setattr(workers, "free_memory", lambda _, gib=gib: (int(gib * 2**30), 0))
        assert workers.suitable_workers(3, CUDA) == most
    assert workers.suitable_workers(3, torch.device("cpu")) == 3


def refuse(job, on_steps):
    raise DeviceUnusable(f"No GPU for {job.name}. Pass --device cpu.")


def test_what_a_worker_says_of_its_gpu_is_heard():
    job = TrialJob(Path("scene"), (), "view_1.png")
    with pytest.raises(DeviceUnusable, match=r"^No GPU for the trial of view_1.png\. Pass"):
        list(run_jobs(refuse, [job], 1, "no advice"))


def test_a_network_on_another_kind_of_device_has_its_trials_on_the_cpu(
    tiny_scene, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(judging, "make_trials", lambda *given: (asked.append(given[-1]), ([], {}))[1])  # fmt: skip
    for number, device in enumerate(("cpu", "auto", "cuda:1", "mps")):
        choice, scratch = judging.FixerChoice("analytic", "a test", {}), tmp_path / str(number)
        scratch.mkdir()
        judging.judge(choice, None, tiny_scene, SETTINGS, None, scratch, device)
    assert asked == ["cpu", "auto", "cuda:1", "cpu"]


def test_what_stage_2_writes_of_its_trials(fixed, tiny_scene):
    found = verdict_of(fixed)
    names = [trial["name"] for trial in found["trials"]]
    assert [trial["view"] for trial in found["trials"]] == list(
        choose_trial_views(kept_of(fixed), 2)
    )
    written = {path.name for path in (fixed / "stage2/trials").iterdir()}
    assert written == {f"{name}_{picture}.png" for name in names for picture in judging.PICTURES}
    for trial in found["trials"]:
        truth, *images = (
            read_image(fixed / f"stage2/trials/{trial['name']}_{picture}.png")
            for picture in ("truth", "render", "fixed", "calibrated")
        )
        assert torch.equal(truth, read_image(tiny_scene / "images" / trial["view"]))
        assert [psnr(image, truth) for image in images] == pytest.approx(
            list(trial["psnr"].values()), abs=5e-4
        )
    info = require_stage(fixed, "stage2").info
    assert info["decision"] == found["decision"] and info["calibrated"]
    calibration = Calibration.from_dict(found["calibration"])
    assert calibration.describe() == found["decision"]


def test_the_views_are_the_fixers_as_far_as_it_is_kept(fixed):
    learned = Calibration.from_dict(verdict_of(fixed)["calibration"])
    calibration, overlay = replace(learned, overlay=None), learned.overlay
    for path in sorted((fixed / "stage2/fixed").iterdir()):
        rendered, guidance = (
            read_image(fixed / folder / path.name)
            for folder in ("stage1/renders", "stage0/guidance")
        )
        # Without the points that are left out (test_guidance_hidden.py).
        covered = read_image(fixed / "stage2/mask" / path.name)[..., :1]
        guidance = guidance * covered
        changed = AnalyticFixer().fix(rendered, guidance, covered, rendered).fixed
        image, _ = calibration.apply(rendered, changed, guidance, covered)
        points = torch.lerp(image, guidance, feathered(covered, 1.5))
        image, confidence = overlay.apply(image, points, guidance, covered)
        # 8 bits: half a step.
        assert (read_image(path) - image).abs().max() <= 0.501 / 255
        written = read_image(fixed / "stage2/confidence" / path.name)[..., :1]
        assert (written - confidence).abs().max() <= 0.501 / 255


def test_photos_that_are_not_kept_change_nothing(copied, fixed, tiny_scene, tmp_path, in_process):
    """The leak test of the trials: other pixels in every other photo, the same bytes."""
    scene = Path(shutil.copytree(tiny_scene, tmp_path / tiny_scene.name))
    generator = torch.Generator().manual_seed(7)
    others = set(load_scene(tiny_scene).names) - set(kept_of(fixed))
    assert others
    for name in others:
        path = scene / "images" / name
        write_image(path, torch.rand(read_image(path).shape, generator=generator))
    run("stage2", scene, copied, *FLAGS, "--overwrite")
    assert results(copied, ["stage2"]) == results(fixed, ["stage2"])
    assert verdict_of(copied) == verdict_of(fixed)


# --------------------------------------------------------------------------------------------------------- the decisions


def test_a_harmful_fixer_is_not_used(copied, tiny_scene, monkeypatch, in_process):
    def spoil(self, rendered, guidance, coverage_mask, reference):
        """A chequered pattern, which no photo has: it makes every pixel worse, and no share of it is of use."""
        rows, columns = (torch.arange(size) for size in rendered.shape[:2])
        sign = 1.0 - 2 * ((rows[:, None] + columns) % 2)[..., None]
        spoiled = rendered + 0.8 * sign * torch.minimum(rendered, 1 - rendered)
        return FixResult(spoiled, coverage_mask, torch.ones_like(coverage_mask))

    trials = copied / "stage2/trials"
    with monkeypatch.context() as patch:
        patch.setattr(AnalyticFixer, "fix", spoil)
        patch.setattr(judging, "with_overlay", lambda learned, _: learned)  # its points are good
        run("stage2", tiny_scene, copied, *FLAGS, "--overwrite")
    assert verdict_of(copied)["decision"].startswith("off: on 2 trials the fixer turns")
    for path in (copied / "stage2/fixed").iterdir():
        assert torch.equal(read_image(path), read_image(copied / "stage1/renders" / path.name))
    for path in trials.glob("*_calibrated.png"):
        render = path.with_name(path.name.replace("_calibrated", "_render"))
        assert torch.equal(read_image(path), read_image(render))
    # Its own renders teach a model nothing.
    run("stage3", tiny_scene, copied, "--overwrite")
    assert require_stage(copied, "stage3").info["kept_share"] == 1
    fixed_dir = str(copied / "stage2/fixed")
    run("stage3", tiny_scene, copied, "--overwrite", "--fixed-dir", fixed_dir)
    assert require_stage(copied, "stage3").info["kept_share"] < 1
    manifest = copied / "stage1/manifest.json"
    content = json.loads(manifest.read_text())
    assert content["config"]["ensemble"] == 1 and not is_worth_training_on(copied)
    content["config"]["ensemble"] = 2
    manifest.write_text(json.dumps(content))
    assert is_worth_training_on(copied)
    content["config"]["ensemble"] = 1
    manifest.write_text(json.dumps(content))
    manifest = copied / "stage2/manifest.json"
    content = json.loads(manifest.read_text())
    content["config"]["stage1_novel_render_dir"] = "renders of another model"
    manifest.write_text(json.dumps(content))
    assert is_worth_training_on(copied)


def test_an_interrupted_run_makes_no_trial_again(
    copied, fixed, tiny_scene, monkeypatch, in_process
):
    def stop(*_):
        raise KeyboardInterrupt

    def no_jobs(work, jobs, *_):
        assert not jobs
        yield from ()

    for module, name in ((judging, "calibrate"), (novel_views, "read_view")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            with pytest.raises(KeyboardInterrupt):
                run("stage2", tiny_scene, copied, *FLAGS, "--overwrite")
        monkeypatch.setattr(making, "run_jobs", no_jobs)
    monkeypatch.setattr(judging, "make_trials", pytest.fail)
    run("stage2", tiny_scene, copied, *FLAGS, "--overwrite")
    assert results(copied, ["stage2"]) == results(fixed, ["stage2"])
    assert verdict_of(copied) == verdict_of(fixed)


def test_other_trials_are_other_inputs_and_none_is_the_fixer_as_it_is(copied, tiny_scene):
    with pytest.raises(ValueError, match=r"trials: .*'steps': 40.*now .*'steps': 41"):
        run("stage2", tiny_scene, copied, "--trial-views", "2", "--trial-steps", "41")
    run("stage2", tiny_scene, copied, "--trial-views", "0", "--overwrite")
    assert not (copied / "stage2/trials.json").exists()
    assert "calibrated" not in require_stage(copied, "stage2").info


def test_what_is_known_of_a_fixer_can_outweigh_its_trials(copied, fixed, tiny_scene, in_process):
    decision = verdict_of(fixed)["decision"]
    assert decision.startswith("fixer on")
    run("stage2", tiny_scene, copied, *FLAGS, "--expected-gain", "-9", "--expected-spread", "0.01", "--overwrite")  # fmt: skip
    assert verdict_of(copied)["decision"].startswith("off")
    with pytest.raises(ValueError, match=r"trials: .*expected"):
        run("stage2", tiny_scene, copied, *FLAGS)
    # 0 dB, give or take 0.5, is what is expected of a fixer that nothing is known of.
    run("stage2", tiny_scene, copied, *FLAGS, "--expected-gain", "0", "--overwrite")
    assert verdict_of(copied)["decision"] == decision
    with pytest.raises(ValueError, match="--expected-gain: no effect without trials"):
        run("stage2", tiny_scene, copied, "--trial-views", "0", "--expected-gain", "1")


def test_two_photos_are_too_few(tiny_scene, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(ARGUMENTS, "stage0", ["--keep-indices", "2,4"])
    run("stage0", tiny_scene, tmp_path)
    with caplog.at_level("INFO", "s2d"):
        cfg = stage2_artifact_fix.Config(model_dir=tmp_path)
        stage0 = stage2_artifact_fix.Stage0.of(cfg, tmp_path)
        assert stage2_artifact_fix.has_trials(cfg, stage0) is False
    assert "no trials: 2 kept photos, and leaving one out takes 3" in caplog.text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--fixer", "analytic", "--adapt-steps", "5"), "the analytic fixer cannot be adapted"),
        (("--trial-views", "-1"), "trial_views must be >= 0"),
    ],
)
def test_flags_without_sense_are_refused(copied, tiny_scene, flags, words):
    with pytest.raises(ValueError, match=words):
        run("stage2", tiny_scene, copied, *flags, "--overwrite")


def test_adaptation_without_trials_is_refused(copied, tiny_scene, tmp_path, monkeypatch):
    weights = save_tiny(tmp_path / "tiny.safetensors")
    monkeypatch.setitem(ARGUMENTS, "stage2", ["--weights", str(weights), "--trial-views", "0"])
    with pytest.raises(ValueError, match="--adapt-steps learns from trials, and there are none"):
        run("stage2", tiny_scene, copied, "--adapt-steps", "5", "--overwrite")


# ------------------------------------------------------------------------------------------------------------- stage 3


def test_a_wrong_patch_without_confidence_leaves_no_trace(copied, tiny_scene, tmp_path):
    confidence = tmp_path / "confidence"
    shutil.copytree(copied / "stage2/confidence", confidence)
    for path in confidence.iterdir():
        image = read_image(path)[..., :1]
        # A pixel's gradient reads windows up to 5 pixels off, and these read 5 further: 10 around the patch.
        image[:26, 1:30] = 0
        write_image(path, image)
    steps = ["--iterations", "100", "--fixed-confidence-dir", str(confidence)]
    splats = {}
    for colour in (0.0, 1.0):
        for path in (copied / "stage2/fixed").iterdir():
            image = read_image(path)
            image[9:16, 11:20] = colour
            write_image(path, image)
        run("stage3", tiny_scene, copied, *steps, "--overwrite")
        splats[colour] = results(copied, ["stage3"])
    assert splats[0.0] == splats[1.0]
    steps = steps[:2]  # stage 2's own confidence: the patch is believed
    run("stage3", tiny_scene, copied, *steps, "--overwrite")
    assert results(copied, ["stage3"]) != splats[1.0]


def test_only_measured_confidence_weighs_and_none_is_one(copied, tiny_scene, tmp_path):
    novel = Cameras.from_json(copied / "stage0/novel_cameras.json")

    def weights(**folders):
        read = fixed_view_reader(novel, find_fixed_views(copied, novel.names, **folders), beta=0.4)
        return {name: read(name)[1] for name in novel.names}

    mask_only = weights(fixed_dir=copied / "stage2/fixed")
    measured = weights()
    for name, weight in measured.items():
        confidence = read_image(copied / "stage2/confidence" / name)[..., :1]
        assert torch.allclose(weight, mask_only[name] * confidence)
        assert {round(value, 6) for value in mask_only[name].unique().tolist()} <= {0.4, 1.0}
    (copied / "stage2/confidence" / novel.names[0]).unlink()
    assert torch.equal(weights()[novel.names[0]], mask_only[novel.names[0]])
    with pytest.raises(FileNotFoundError, match="Check --fixed-confidence-dir"):
        weights(confidence_dir=tmp_path / "nowhere")
    run("stage2", tiny_scene, copied, "--trial-views", "0", "--overwrite")
    assert all(torch.equal(mask_only[name], weight) for name, weight in weights().items())
