"""`tools/train_hier_init.py` as a whole, and `tools/evaluate.py hier` on what it makes, on models and pictures that take seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_captures import write_chunks

from s2d import hier_evaluation, metrics
from s2d.hier.weights import load_info, load_model
from s2d.hier_evaluation import HierEvaluation
from s2d.images import image_info
from s2d.ply_io import read_gaussians_ply
from tools import train_hier_init
from tools.train_hier_init import Config, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scenes(tiny_scene, tmp_path_factory):
    """The tiny scene under two names, so that one can be left out."""
    folder = tmp_path_factory.mktemp("scenes")
    for name in ("one", "two"):
        shutil.copytree(tiny_scene, folder / name)
    return folder


@pytest.fixture
def cfg(scenes, tmp_path):
    return Config(
        data=(scenes / "one",),
        output_dir=tmp_path / "out",
        cache_dir=scenes.parent / "cache",
        model="tiny",
        image_size=(32, 32),
        target_views=2,
        min_overlap=0.3,
        max_angle=60.0,
        train_batch_size=1,
        max_train_steps=4,
        learning_rate=2e-3,
        lr_warmup_steps=2,
        ema_decay=0.9,
        lambda_lpips=0,
        lambda_depth=0.05,
        checkpointing_steps=100,
        log_every=1,
        eval_freq=0,
        viz_freq=0,
        device="cpu",
    )


def losses(folder):
    return [row["loss"] for row in json.loads((folder / "history.json").read_text())["train"]]


def test_it_learns_and_says_what_it_was_trained_on(cfg, scenes):
    cfg = replace(
        cfg,
        data=(scenes,),
        exclude_scenes=("two",),
        max_train_steps=30,
        train_batch_size=2,
        log_every=5,
        eval_freq=30,
        viz_freq=30,
        eval_count=2,
        checkpointing_steps=15,
    )
    final = main(cfg)
    assert final == cfg.output_dir / "model_final.safetensors"
    first, *_, last = losses(cfg.output_dir)
    assert last < 0.8 * first, (first, last)
    row = json.loads((cfg.output_dir / "history.json").read_text())["eval"][-1]
    assert row["step"] == 30 and {"psnr_0", "psnr_1", "psnr_2", "ssim_2"} <= set(row)
    sheet = image_info(cfg.output_dir / "eval/step_000030.png")
    assert (sheet.width, sheet.height) == (6 * 160, 2 * 182)
    assert (cfg.output_dir / "eval/step_000030.mp4").stat().st_size > 1000
    assert (cfg.output_dir / "checkpoints/model_15.safetensors").is_file()
    info = load_info(final)
    assert (
        info["steps"] == 30 and info["left_out"] == ["two"] and "1 posed scenes" in info["data"][0]
    )
    load_model(final)


def test_an_interrupted_run_loses_no_step_and_ends_with_the_same_bits(cfg, tmp_path, monkeypatch):
    whole = main(cfg)
    parts = replace(cfg, output_dir=tmp_path / "parts")
    calls = []
    loss = train_hier_init.HierLoss.forward

    def forward(self, *arguments):
        calls.append(1)
        if len(calls) == 2:  # in the middle of the second step
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_hier_init.HierLoss, "forward", forward)
        main(parts)
    state = torch.load(parts.output_dir / "checkpoints/state.pth", weights_only=True)
    assert state["step"] == 2, "the step was finished and kept, though no checkpoint was due"
    assert not (parts.output_dir / "model_final.safetensors").exists()
    assert main(parts).read_bytes() == whole.read_bytes()
    assert losses(parts.output_dir) == losses(cfg.output_dir)
    with pytest.raises(ValueError, match="other settings or data"):
        main(replace(cfg, learning_rate=1e-3))


def test_chunks_and_scenes_train_together(cfg, tmp_path):
    chunks = write_chunks(tmp_path / "chunks")
    cfg = replace(
        cfg,
        data=(chunks, *cfg.data),
        shares=(1.0, 1.0),
        min_gap=(3, 3),
        max_gap=(6, 6),
        context_views=(2, 3),
        max_train_steps=2,
        gradient_accumulation_steps=2,
    )
    assert load_info(main(cfg))["data"][0] == "chunks: 3 scenes of train in 2 chunks"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude_scenes": ("three",)}, "--exclude-scenes three: no scene"),
        ({"exclude_scenes": ("one",)}, "no scene to train on"),
        ({"shares": (1.0, 2.0)}, "2 numbers for 1 data sets"),
        ({"context_views": (1,)}, "context_views"),
        ({"model": "paper"}, "--dino"),
    ],
)
def test_what_makes_no_sense_is_refused(cfg, changes, message):
    with pytest.raises(ValueError, match=message):
        main(replace(cfg, **changes))
    assert not (cfg.output_dir / "training.json").exists()


def test_without_the_weights_of_lpips_it_trains_without(cfg, monkeypatch, caplog):
    def nothing(net, *, download=True):
        raise metrics.LpipsUnavailable("LPIPS: not available: none here.")

    monkeypatch.setattr(metrics, "load_lpips", nothing)
    main(replace(cfg, lambda_lpips=0.05, max_train_steps=1))
    assert "none here" in caplog.text and "goes on without LPIPS" in caplog.text
    row = json.loads((cfg.output_dir / "history.json").read_text())["train"][0]
    assert "lpips" not in row and "mse_2" in row
    key = json.loads((cfg.output_dir / "training.json").read_text())["key"]
    assert key["with_lpips"] is False, "so it is not gone on with where there are weights"


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(cfg, tmp_path):
    cfg = replace(cfg, train_batch_size=2, max_train_steps=3)
    main(cfg)
    shared = tmp_path / "shared"
    flags = {
        "data": cfg.data[0],
        "output-dir": shared,
        "cache-dir": cfg.cache_dir,
        "model": "tiny",
        "image-size": "32,32",
        "target-views": 2,
        "min-overlap": 0.3,
        "max-angle": 60.0,
        "train-batch-size": 1,
        "max-train-steps": 3,
        "learning-rate": 2e-3,
        "lr-warmup-steps": 2,
        "ema-decay": 0.9,
        "lambda-lpips": 0,
        "lambda-depth": 0.05,
        "log-every": 1,
        "eval-freq": 0,
        "viz-freq": 0,
        "device": "cpu",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(ROOT / "tools/train_hier_init.py")]
    command += [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert losses(shared) == pytest.approx(losses(cfg.output_dir), rel=1e-4)
    assert len(set(losses(shared))) == 3


# --- evaluation ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(scenes, tmp_path_factory):
    from s2d.hier.config import HierConfig
    from s2d.hier.model import HierModel
    from s2d.hier.weights import save_model

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return save_model(path, HierModel(HierConfig.named("tiny")), {})


def test_posed_scenes_are_evaluated_with_everything_that_goes_with_it(
    scenes, weights, tmp_path, monkeypatch
):
    cfg = HierEvaluation(
        data=scenes,
        output_dir=tmp_path / "out",
        scenes=("one",),
        weights=(weights,),
        analytic=True,
        image_size=(48, 36),
        max_pairs=2,
        max_targets=1,
        films=1,
        plys=1,
    )
    table = hier_evaluation.main(cfg).read_text()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["contestants"]) == ["tiny", "analytic", "analytic, one level"]
    found = results["contestants"]
    assert [len(found[name]["levels"]) for name in found] == [3, 3, 1]
    assert found["tiny"]["num_cases"] == 2 and list(found["tiny"]["scenes"]) == ["one"]
    rows = json.loads((tmp_path / "out/per_case.json").read_text())["tiny"]
    mean = sum(levels[2]["psnr"] for levels in rows.values()) / 2
    assert found["tiny"]["levels"][2]["psnr"] == pytest.approx(mean)
    assert f"| tiny | {mean:.2f} |" in table and "| one | " in table
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert set(index) == set(rows) == {"one_00", "one_01"}
    assert (tmp_path / "out/films/one_00_tiny.mp4").is_file()
    assert (tmp_path / "out/sheet_analytic-one-level.png").is_file()
    splat = read_gaussians_ply(tmp_path / "out/ply/one_00_tiny.ply")
    assert len(splat["means"]) == 2 * (48 * 36 + 24 * 18 + 12 * 9)

    scored, score = [], hier_evaluation.score
    monkeypatch.setattr(hier_evaluation, "SHEET_ROWS", 1)
    monkeypatch.setattr(
        hier_evaluation,
        "score",
        lambda judged, lpips: scored.append(judged.name) or score(judged, lpips),
    )
    hier_evaluation.main(cfg)
    assert scored == ["one_00"] * 3, "the sheet's alone are looked at again"
    assert (tmp_path / "out/table.md").read_text() == table


def test_an_index_is_evaluated_beside_the_published_numbers(weights, tmp_path):
    root = write_chunks(tmp_path / "chunks", "test")
    index = tmp_path / "index.json"
    entries = {"aa": {"context": [1, 9], "target": [4, 5]}, "bb": None, "zz": {"context": [0, 1], "target": [1]}}  # fmt: skip
    index.write_text(json.dumps(entries))
    cfg = HierEvaluation(
        data=root,
        output_dir=tmp_path / "out",
        index=index,
        weights=(weights,),
        published="re10k",
        image_size=(32, 32),
        films=0,
        plys=0,
    )
    table = hier_evaluation.main(cfg).read_text()
    assert "| HiSplat (published) | 27.21 | 0.881 | 0.117 |" in table
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["missing"] == 1 and results["contestants"]["tiny"]["num_cases"] == 1
    with pytest.raises(ValueError, match="nothing to judge"):
        hier_evaluation.main(replace(cfg, weights=()))
    index.write_text('{"zz": {"context": [0, 1], "target": [1]}}')
    with pytest.raises(ValueError, match="None of the 1 scenes"):
        hier_evaluation.main(cfg)
