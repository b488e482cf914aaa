"""`train_artifact_fixer.py` as a whole, on models and images that take seconds."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_fixer import save_base, tiny_unet, tiny_vae
from tiny_pairs import save_tiny, write_pairs

import train_artifact_fixer
from s2d.config import parse_config
from s2d.fixer.diffusion import load_compact_fixer, load_difix_fixer
from s2d.images import image_info, read_image
from train_artifact_fixer import Config, main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("weights") / "init.safetensors")


@pytest.fixture
def cfg(dataset, tiny_weights, tmp_path):
    return Config(
        dataset_folder=dataset,
        output_dir=tmp_path / "out",
        init_weights=tiny_weights,
        train_image_prep="crop_32",
        train_batch_size=2,
        max_train_steps=6,
        learning_rate=3e-3,
        lr_warmup_steps=2,
        ema_decay=0.9,
        lambda_lpips=0,
        eval_freq=0,
        viz_freq=0,
        log_every=1,
        checkpointing_steps=3,
        device="cpu",
    )


def state_of(folder):
    return torch.load(folder / "checkpoints/state.pth", weights_only=True)


def losses(folder):
    return [row["loss"] for row in json.loads((folder / "history.json").read_text())["train"]]


def assert_same_bits(one, other):
    """Everything that a step reads or changes, in two checkpoints."""
    for part in ("parameters", "step"):
        left, right = one[part], other[part]
        if isinstance(left, dict):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left), part
        else:
            assert left == right
    assert all(
        torch.equal(one["ema"]["average"][name], other["ema"]["average"][name])
        for name in one["ema"]["average"]
    )
    for number, moments in one["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, other["optimizer"]["state"][number][name])


# --- it learns, and what comes out of it is used ---------------------------------------------------------------------------


def test_it_learns_and_stage_2_reads_what_it_writes(cfg, dataset):
    cfg = replace(
        cfg, max_train_steps=40, train_batch_size=4, eval_freq=40, viz_freq=20, log_every=10
    )
    final = main(cfg)
    assert final == cfg.output_dir / "model_final.safetensors"
    history = json.loads((cfg.output_dir / "history.json").read_text())
    scores = history["eval"][-1]
    first, *_, last = (row["loss"] for row in history["train"])
    assert last < 0.6 * first, (first, last)  # measured 0.29 of it
    assert scores["step"] == 40
    # Measured: render 19.9, mix 21.0, fixed 28.2 dB.
    assert scores["psnr_fixed"] > scores["psnr_mixed"] + 3 > scores["psnr_rendered"] + 3
    for step in (20, 40):
        sheet = image_info(cfg.output_dir / f"eval/step_{step:06d}.png")
        assert sheet.width == 4 * 320
        assert sheet.height == 2 * (22 + round(320 * 40 / 48)), "a row per test pair"

    name = "scene_sparse_0001.png"
    rendered, target, guidance = (read_image(dataset / f"test_{part}/{name}") for part in "ABP")
    mask = (guidance > 0).any(-1, keepdim=True).float()
    fixer = load_compact_fixer(final)
    fixed = fixer.fix(rendered, guidance, mask, reference=target).fixed
    assert (fixed - target).square().mean() < 0.4 * (rendered - target).square().mean()


def test_adapters_on_a_base_are_trained_and_loaded_by_stage_2(cfg, dataset, tmp_path):
    base = save_base(tmp_path / "base", tiny_unet(), tiny_vae(skips=False), difix=False)
    cfg = replace(
        cfg,
        base_model_path=str(base),
        init_weights=None,
        max_train_steps=3,
        learning_rate=1e-3,
        lr_warmup_steps=0,
        gradient_checkpointing=True,
        ema_decay=0.0,
    )
    final = main(cfg)
    assert final.name == "model_final.pkl"
    image = read_image(dataset / "test_A/scene_sparse_0000.png")
    views = (image, torch.zeros_like(image), torch.zeros_like(image[..., :1]), image)
    trained, untrained = (
        load_difix_fixer(str(base), path).fix(*views).fixed for path in (final, None)
    )
    assert not torch.equal(trained, untrained)
    parameters = state_of(cfg.output_dir)["parameters"]
    assert all("lora" in name or "conv_in" in name or "skip" in name for name in parameters)


# --- interrupted, resumed, repeated ----------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, number):
    """Ctrl-C in the middle of a step."""
    calls = []
    loss = train_artifact_fixer.FixerLoss.forward

    def forward(self, *arguments):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    monkeypatch.setattr(train_artifact_fixer.FixerLoss, "forward", forward)


def test_an_interrupted_run_ends_with_the_same_bits(cfg, tmp_path, monkeypatch):
    cfg = replace(cfg, gradient_accumulation_steps=2, lr_schedule="cosine", log_every=2)
    whole = main(cfg)
    parts = replace(cfg, output_dir=tmp_path / "parts")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2 * 4 + 2)  # in step 5, with a checkpoint after step 3
        main(parts)
    assert state_of(parts.output_dir)["step"] == 3
    assert not (parts.output_dir / "model_final.safetensors").exists()
    resumed = main(parts)
    assert resumed.read_bytes() == whole.read_bytes()
    assert_same_bits(state_of(parts.output_dir), state_of(cfg.output_dir))
    assert losses(parts.output_dir) == losses(cfg.output_dir)
    assert [row["step"] for row in state_of(cfg.output_dir)["history"]["train"]] == [2, 4, 6]


def test_a_constant_schedule_may_be_made_longer(cfg, tmp_path):
    whole = main(cfg)
    longer = replace(cfg, output_dir=tmp_path / "longer", max_train_steps=4)
    main(longer)
    longer = replace(longer, max_train_steps=6)
    assert main(longer).read_bytes() == whole.read_bytes()


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(cfg, caplog, monkeypatch):
    cfg = replace(cfg, max_train_steps=2, lr_schedule="cosine", overwrite=True)
    final = main(cfg)
    before = final.stat().st_mtime_ns
    cfg = replace(cfg, overwrite=False)
    monkeypatch.setattr("s2d.log.logger.propagate", True)
    with caplog.at_level("INFO", logger="s2d"):
        assert main(cfg).stat().st_mtime_ns == before
    assert "up to date, 2 steps are done" in caplog.text
    with pytest.raises(ValueError, match=r"other settings or data \(max_train_steps: 2, now 3\).*--overwrite"):  # fmt: skip
        main(replace(cfg, max_train_steps=3))
    main(replace(cfg, max_train_steps=3, overwrite=True))
    assert state_of(cfg.output_dir)["step"] == 3


def test_a_damaged_checkpoint_says_what_to_do(cfg):
    main(replace(cfg, max_train_steps=3))
    path = cfg.output_dir / "checkpoints/state.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"state.pth cannot be continued.*--overwrite"):
        main(cfg)


def test_only_the_newest_models_are_kept(cfg):
    cfg = replace(cfg, checkpointing_steps=1, keep_checkpoints=2)
    main(cfg)
    kept = sorted(path.name for path in (cfg.output_dir / "checkpoints").glob("model_*"))
    assert kept == ["model_4.safetensors", "model_5.safetensors"], "model_final is the sixth"


def test_nothing_is_written_for_a_malformed_data_set(cfg, tmp_path):
    dataset = write_pairs(tmp_path / "spoilt", num_train=2, num_test=1)
    (dataset / "test_B/scene_sparse_0000.png").unlink()
    with pytest.raises(ValueError, match=r"test_A have no partner in"):
        main(replace(cfg, dataset_folder=dataset, eval_freq=1))
    assert not cfg.output_dir.exists()
    main(replace(cfg, dataset_folder=dataset, max_train_steps=1))  # without evaluation


def test_a_loss_that_is_no_number_names_its_images(cfg, monkeypatch):
    def broken(self, fixed, target, step):
        return {"loss": fixed.sum() * float("nan")}

    monkeypatch.setattr(train_artifact_fixer.FixerLoss, "forward", broken)
    with pytest.raises(ValueError, match=r"not finite at step 0 \(scene_sparse_.*--learning-rate"):
        main(cfg)


# --- several processes -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(cfg, dataset, tiny_weights, tmp_path):
    """Also as one process with two forward passes per step."""
    cfg = replace(cfg, train_batch_size=4, max_train_steps=4)
    main(cfg)
    shared = tmp_path / "shared"
    flags = {
        "dataset-folder": dataset,
        "output-dir": shared,
        "init-weights": tiny_weights,
        "device": "cpu",
        "train-batch-size": 2,
    }
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for field, value in vars(cfg).items():
        flag = field.replace("_", "-")
        if flag not in flags and value != defaults[field]:
            flags[flag] = value
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(ROOT / "train_artifact_fixer.py")]
    command += [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert done.stderr.count("parameters are trained") == 1, "only one of them talks"
    accumulated = replace(
        cfg,
        train_batch_size=2,
        gradient_accumulation_steps=2,
        output_dir=tmp_path / "accumulated",
    )
    main(accumulated)
    # Sums in another order: measured 4e-7.
    assert losses(shared) == pytest.approx(losses(cfg.output_dir), rel=1e-5)
    assert losses(accumulated.output_dir) == pytest.approx(losses(cfg.output_dir), rel=1e-5)
    assert len(set(losses(shared))) == 4


# --- flags and presets -----------------------------------------------------------------------------------------------------

RELEASED = """
--base-model-path "nvidia/difix_ref" --output-dir /path/to/output/s2d_stage2 --dataset-folder /path/to/dataset_root
--train-image-prep resize_512 --test-image-prep resize_512 --train-batch-size 4 --num-training-epochs 20
--max-train-steps 80000 --checkpointing-steps 500 --viz-freq 100 --eval-freq 100 --lambda-lpips 1.0 --lambda-l2 6.0
--lambda-ssim 4.0 --enable-xformers-memory-efficient-attention
"""


@pytest.mark.parametrize("spelling", ["hyphens", "underscores"])
def test_the_released_command_is_understood(spelling):
    argv = shlex.split(RELEASED)
    if spelling == "underscores":
        argv = ["--" + a[2:].replace("-", "_") if a.startswith("--") else a for a in argv]
    cfg = parse_config(Config, "train_artifact_fixer", argv)
    assert cfg == Config(
        dataset_folder=Path("/path/to/dataset_root"),
        output_dir=Path("/path/to/output/s2d_stage2"),
        base_model_path="nvidia/difix_ref",
        train_image_prep="resize_512",
        test_image_prep="resize_512",
        max_train_steps=80000,
        viz_freq=100,
        eval_freq=100,
        enable_xformers_memory_efficient_attention=True,
    ), "and the rest of it is our default"


def test_checkpoint_every_is_another_name():
    argv = ["--dataset-folder", "a", "--output-dir", "b", "--checkpoint-every", "7"]
    assert parse_config(Config, "train_artifact_fixer", argv).checkpointing_steps == 7


def test_a_number_that_makes_no_sense_is_refused_at_once(cfg):
    with pytest.raises(ValueError, match="train_batch_size"):
        main(replace(cfg, train_batch_size=0))
    with pytest.raises(ValueError, match="all weights --lambda"):
        main(replace(cfg, lambda_l2=0, lambda_ssim=0))
    with pytest.raises(ValueError, match="Training images need one size"):
        main(replace(cfg, train_image_prep="none"))


@pytest.mark.parametrize(
    ("name", "processes", "on_cpu"),
    [("cpu", 1, True), ("one_gpu", 1, False), ("multi_gpu", 4, False), ("multi_node", 8, False)],
)
def test_the_launcher_reads_its_configs(name, processes, on_cpu):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / f"configs/accelerate/{name}.yaml"))
    assert (config.num_processes, config.use_cpu) == (processes, on_cpu)
    assert config.mixed_precision in ("no", False, None), "--precision decides"


def test_curves_go_to_tensorboard_where_it_is_installed(cfg, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, step, value))

        def close(self):
            written.append("closed")

    monkeypatch.setattr("s2d.runs.scalars.importlib.util.find_spec", lambda name: name)
    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    main(replace(cfg, max_train_steps=1))
    assert written[0] == str(cfg.output_dir / "tensorboard")
    row = json.loads((cfg.output_dir / "history.json").read_text())["train"][0]
    assert ("train/loss", 1, row["loss"]) in written
    assert written[-1] == "closed"


def test_a_kill_leaves_a_run_that_goes_on(cfg, monkeypatch):
    """SIGKILL between two files of a checkpoint: the newer one is there, the other is as it was."""
    steps = []
    write = train_artifact_fixer.atomic_write_json

    def killed(path, value):
        steps.append(path.name)
        if len(steps) == 2:
            raise SystemExit(-signal.SIGKILL)
        write(path, value)

    cfg = replace(cfg, checkpointing_steps=2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_artifact_fixer, "atomic_write_json", killed)
        main(cfg)
    assert state_of(cfg.output_dir)["step"] == 4
    assert len(losses(cfg.output_dir)) == 2
    main(cfg)
    assert len(losses(cfg.output_dir)) == 6
