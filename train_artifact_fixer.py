"""Train the artifact fixer of stage 2: LoRA adapters on a diffusion base, or the compact model as a whole.

Reads   DATASET/{train,test}_{A,B,P}/<name>.png (docs/data_formats.md; tools/make_fixer_pairs.py makes them)
Writes  OUT/ model_final.pkl (on a base) or model_final.safetensors (compact), checkpoints/, eval/step_<step>.png, history.json

Example
    accelerate launch --config_file configs/accelerate/one_gpu.yaml train_artifact_fixer.py --preset difix_lora \
        --dataset-folder data/pairs --output-dir out/fixer
    python train_artifact_fixer.py --preset compact --dataset-folder data/pairs --output-dir out/compact
    python train_artifact_fixer.py --preset tiny --dataset-folder data/pairs --output-dir out/tiny      # seconds
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor
from tyro.conf import arg

from s2d.checks import check_range
from s2d.config import no_effect, run_script
from s2d.device import Precision, choose_device
from s2d.files import atomic_write_json
from s2d.fixer.training.evaluation import (
    describe,
    repair_samples,
    score,
    write_sheet,
)
from s2d.fixer.training.losses import FixerLoss, LossWeights
from s2d.fixer.training.pairs import fingerprint, load_splits
from s2d.fixer.training.samples import ImagePrep, PairSamples
from s2d.fixer.training.schedule import LrSchedule, rate_factor
from s2d.fixer.training.trainable import Trainee, make_trainee
from s2d.log import logger, progress
from s2d.metrics import find_lpips
from s2d.runs.batches import Sharing, load_batches
from s2d.runs.ema import Ema
from s2d.runs.launch import make_accelerator
from s2d.runs.run_folder import RunFolder, open_run_folder, training_key
from s2d.runs.scalars import ScalarWriter
from s2d.runs.state import TrainingState
from s2d.sampling import spread

if TYPE_CHECKING:  # takes seconds to import
    from accelerate import Accelerator


@dataclass(frozen=True)
class Config:
    """Train the artifact fixer on pairs of renders and photos."""

    dataset_folder: Path = no_effect()
    """Folder with train_A, train_B, train_P and test_A, test_B, test_P."""
    output_dir: Path = no_effect()
    """Where everything goes; the same command again goes on from the last checkpoint."""
    test_scenes: tuple[str, ...] = ()
    """Judge by the pairs of these scenes (the first part of a pair's name) and train on all others, whichever split they lie in."""
    base_model_path: str | None = None
    """Diffusion base to put LoRA adapters on (a folder, or nvidia/difix_ref if downloaded). Without it the compact model is trained."""
    init_weights: Path | None = no_effect(None)
    """Weights to start from: a .pkl on a base, a .safetensors of a compact model. Default: the base alone, or random."""
    mixing: Literal["fixed", "learned"] | None = None
    """How guidance enters the render. Default: as the weights say, fixed where they say nothing."""
    guidance_share: float | None = None
    """Share of the guidance in the mix, or where the learned one starts. Default: as the weights say, else 0.5."""
    lora_rank_unet: int = 8
    """Rank of a new adapter on the UNet."""
    lora_rank_vae: int = 4
    """Rank of a new adapter on the VAE's decoder."""
    train_image_prep: str = "crop_256"
    """crop_N: random windows of N×N pixels; resize_N: the whole image stretched to N×N."""
    test_image_prep: str = no_effect("none")
    """The same for evaluation; none: whole images."""
    flip: bool = True
    """Mirror every other sample left to right."""
    min_scale: float = 1.0
    """crop_N: cut larger windows too, up to N / this, and shrink them to N×N: more context, other sizes of artifacts. 1: never."""
    colour_jitter: float = 0.0
    """Change brightness, tint and gamma of a sample by up to this factor off 1, all its images alike. 0: never."""
    guidance_dropout: float = 0.0
    """Show this share of the samples without guidance, and as many with guidance on one side only: the fixer must not lean on it blindly."""
    reference_window: int = 10
    """The reference of frame i is one of the frames i - N to i + N (where the data set does not list references)."""
    train_batch_size: int = no_effect(4)
    """Samples per process and forward pass."""
    gradient_accumulation_steps: int = no_effect(1)
    """Forward passes per step."""
    num_training_epochs: int = 20
    """Passes through the training pairs."""
    max_train_steps: int = -1
    """Number of steps. -1: as many as the epochs make."""
    learning_rate: float = 2e-5
    """AdamW's step size after the warm-up. Compact from scratch: 10 to 20 times as much."""
    lr_schedule: LrSchedule = "constant"
    """constant, or cosine: falls to 0 at the last step."""
    lr_warmup_steps: int = 500
    """Steps over which the step size rises from 0."""
    weight_decay: float = 0.01
    """AdamW's; per step a weight loses this share times the step size."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this length."""
    ema_decay: float = 0.0
    """Evaluate and save a running average of the weights, 0.999 for a memory of 1000 steps. 0: the weights themselves."""
    lambda_l2: float = 6.0
    """Weight of the mean squared error, colours in [-1, 1]."""
    lambda_psnr: float = 0.0
    """Weight of -PSNR / 10 of each sample: a decibel counts the same in views that are nearly right and in hopeless ones."""
    lambda_lpips: float = 1.0
    """Weight of LPIPS."""
    lambda_ssim: float = 4.0
    """Weight of 1 - SSIM."""
    lambda_gram: float = 0.0
    """Weight of the difference of Gram matrices (texture); Difix uses 0.5 to 1."""
    gram_start_step: int = 2000
    """Step at which the Gram term sets in."""
    lambda_dino: float = 0.0
    """Weight of 1 - cosine of DINO's features; needs --dino-folder."""
    lpips_net: Literal["vgg", "alex"] = "vgg"
    """Backbone of LPIPS in the loss. alex costs a tenth of vgg."""
    dino_folder: Path | None = None
    """Folder of a vision transformer, such as a download of facebook/dinov2-small."""
    precision: Precision = "fp32"
    """Of forward and backward pass; weights are kept in fp32."""
    gradient_checkpointing: bool = no_effect(False)
    """Compute activations twice instead of keeping them: a third more time, far less memory."""
    compile: bool = no_effect(False)
    """Compile the model with torch.compile (needs a compiler; the first step takes minutes)."""
    checkpointing_steps: Annotated[int, arg(aliases=["--checkpoint-every"])] = no_effect(500)
    """Steps between two checkpoints: so many are lost at most when a run is killed."""
    keep_checkpoints: int = no_effect(3)
    """Keep this many of checkpoints/model_<step>. 0 keeps all."""
    eval_freq: int = no_effect(500)
    """Steps between two evaluations; 0 disables."""
    viz_freq: int = no_effect(500)
    """Steps between two sheets in eval/; 0 disables."""
    eval_count: int = no_effect(8)
    """Test pairs that are evaluated, evenly spread."""
    log_every: int = no_effect(20)
    """Steps between two rows of history.json."""
    num_workers: int = no_effect(0)
    """Processes that read images while a GPU computes; 0 reads in between."""
    cache_mb: int = no_effect(2000)
    """Memory for decoded images per reading process."""
    enable_xformers_memory_efficient_attention: bool = no_effect(False)
    """Accepted and not needed: torch's own attention saves the same memory."""
    seed: int = 0
    """Seed of random weights and of what samples draw."""
    device: Literal["auto", "cpu", "cuda"] = no_effect("auto")
    """auto: what `accelerate launch` set up, else a GPU if there is one. cuda: not without one. Which one is the launcher's to say."""
    overwrite: bool = no_effect(False)
    """Throw away what OUT holds and start again."""


def main(cfg: Config) -> Path:
    """Train; returns the file with the final weights."""
    check_config(cfg)
    if cfg.device == "cuda":
        choose_device(cfg.device, kernels=False)
    on_cpu = cfg.device == "cpu"
    accelerator = make_accelerator(cfg.precision, on_cpu, compiled=cfg.compile)
    evaluates = cfg.eval_freq > 0 or cfg.viz_freq > 0
    train_pairs, test_pairs = load_splits(
        cfg.dataset_folder, cfg.reference_window, cfg.test_scenes, evaluates
    )
    logger.info("%d training pairs, %d test pairs", len(train_pairs), len(test_pairs))

    torch.manual_seed(cfg.seed)
    mixing = {"kind": cfg.mixing, "guidance_share": cfg.guidance_share}
    trainee = make_trainee(
        cfg.base_model_path,
        cfg.init_weights,
        {key: value for key, value in mixing.items() if value is not None},
        cfg.lora_rank_unet,
        cfg.lora_rank_vae,
    )
    multiple = trainee.model.multiple
    train_samples = PairSamples(
        train_pairs,
        ImagePrep.parse(cfg.train_image_prep, multiple),
        cfg.seed,
        cfg.flip,
        cfg.min_scale,
        cfg.colour_jitter,
        cfg.guidance_dropout,
        cfg.cache_mb * 2**20,
    )
    test_samples = PairSamples(test_pairs, ImagePrep.parse(cfg.test_image_prep, multiple))
    for samples in (train_samples, test_samples):
        samples.prep.check(samples.pairs)
    loss = FixerLoss(
        LossWeights(
            cfg.lambda_l2,
            cfg.lambda_psnr,
            cfg.lambda_lpips,
            cfg.lambda_ssim,
            cfg.lambda_gram,
            cfg.lambda_dino,
            cfg.gram_start_step,
        ),
        cfg.lpips_net,
        cfg.dino_folder,
        cfg.precision,
    )

    samples_per_step = (
        cfg.train_batch_size * cfg.gradient_accumulation_steps * accelerator.num_processes
    )
    num_steps = cfg.max_train_steps
    if num_steps < 0:
        num_steps = max(1, cfg.num_training_epochs * len(train_pairs) // samples_per_step)
    endless = cfg.lr_schedule == "constant"
    pairs = fingerprint(train_pairs)
    key = training_key(cfg, samples_per_step, cfg.init_weights, endless, pairs=pairs)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            folder = stack.enter_context(
                open_run_folder(cfg.output_dir, trainee.suffix, cfg, key, cfg.overwrite)
            )
        else:
            folder = RunFolder(cfg.output_dir, trainee.suffix)
        accelerator.wait_for_everyone()  # the main process may have emptied it
        train(cfg, accelerator, trainee, loss, train_samples, test_samples, folder, num_steps)
        accelerator.wait_for_everyone()
    return folder.final


def train(
    cfg: Config,
    accelerator: Accelerator,
    trainee: Trainee,
    loss: FixerLoss,
    train_samples: PairSamples,
    test_samples: PairSamples,
    folder: RunFolder,
    num_steps: int,
) -> None:
    """The loop: one step is one update of the weights."""
    model, parameters = trainee.model, trainee.parameters()
    model.to(memory_format=torch.channels_last).train()
    if cfg.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.vae.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    loss.to(accelerator.device)
    ema = Ema(parameters, cfg.ema_decay) if cfg.ema_decay > 0 else None
    state = TrainingState(parameters, optimizer, ema, accelerator.scaler)
    if folder.state.is_file():
        state.load(folder.state)
        if state.step >= num_steps and folder.final.is_file():
            logger.info("up to date, %d steps are done: %s", state.step, folder.final)
            return
        logger.info("going on after step %d: %s", state.step, folder.state)
    scalars = ScalarWriter(folder.dir if accelerator.is_main_process else None)
    batches = load_batches(
        train_samples,
        range(state.step, num_steps),
        Sharing(
            cfg.train_batch_size,
            cfg.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        ),
        cfg.num_workers,
        accelerator.device,
    )

    with progress(num_steps, "train", start=state.step) as bar, scalars:
        while state.step < num_steps:
            rate = cfg.learning_rate * rate_factor(
                state.step, cfg.lr_schedule, cfg.lr_warmup_steps, num_steps
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            # Whatever a network draws (dropout of a base model) depends on the step alone.
            torch.manual_seed(
                (cfg.seed * 1_000_003 + state.step) * accelerator.num_processes
                + accelerator.process_index
            )
            terms: dict[str, Tensor] = {}
            for micro in range(cfg.gradient_accumulation_steps):
                batch = next(batches)
                last = micro == cfg.gradient_accumulation_steps - 1
                with nullcontext() if last else accelerator.no_sync(wrapped):
                    fixed = wrapped(
                        batch["rendered"],
                        batch["guidance"],
                        batch["coverage_mask"],
                        batch["reference"][:, None],
                    )
                    found = loss(fixed, batch["target"], state.step)
                    require_finite(found["loss"], batch, train_samples, state.step)
                    accelerator.backward(found["loss"] / cfg.gradient_accumulation_steps)
                for name, value in found.items():
                    terms[name] = (
                        terms.get(name, 0) + value.detach() / cfg.gradient_accumulation_steps
                    )
            accelerator.clip_grad_norm_(list(parameters.values()), cfg.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update()
            state.step += 1

            means = accelerator.reduce(terms, "mean")
            state.add({name: float(value) for name, value in means.items()})
            is_last = state.step == num_steps
            if state.step % cfg.log_every == 0 or is_last:
                scalars.write("train", state.close_row(lr=rate))
            bar.update(state.step, loss=means["loss"])
            if accelerator.is_main_process:
                with ema.applied() if ema is not None else nullcontext():
                    evaluate(
                        cfg, accelerator, trainee, test_samples, folder, state, scalars, is_last
                    )
                    if state.step % cfg.checkpointing_steps == 0 and not is_last:
                        trainee.save(folder.model(state.step))
                        folder.prune_models(cfg.keep_checkpoints)
                if state.step % cfg.checkpointing_steps == 0 or is_last:
                    state.save(folder.state)
                    atomic_write_json(folder.dir / "history.json", state.history)
        if accelerator.is_main_process:
            with ema.applied() if ema is not None else nullcontext():
                trainee.save(folder.final)
            logger.info("done after %d steps: %s", state.step, folder.final)


def evaluate(
    cfg: Config,
    accelerator: Accelerator,
    trainee: Trainee,
    samples: PairSamples,
    folder: RunFolder,
    state: TrainingState,
    scalars: ScalarWriter,
    is_last: bool,
) -> None:
    """Score and show test pairs, if it is time to."""
    scores_now, sheet_now = (
        freq > 0 and (state.step % freq == 0 or is_last) for freq in (cfg.eval_freq, cfg.viz_freq)
    )
    if not (scores_now or sheet_now):
        return
    positions = spread(len(samples.pairs), cfg.eval_count)
    pictures = repair_samples(trainee.model, samples, positions, accelerator.autocast)
    if sheet_now:
        write_sheet(folder.sheet(state.step), pictures)
    if scores_now:
        # The backbone that the loss does not know; fetched only where the loss has fetched its own.
        lpips = find_lpips("alex", download=cfg.lambda_lpips > 0)
        row = {"step": state.step, **score(pictures, lpips)}
        state.history["eval"].append(row)
        scalars.write("eval", row)
        logger.info("step %d: %s", state.step, describe(row))


def check_config(cfg: Config) -> None:
    """Raise before anything is read or written."""
    for name in ("train_batch_size", "gradient_accumulation_steps", "num_training_epochs"):
        check_range(name, getattr(cfg, name), 1)
    for name in ("checkpointing_steps", "log_every", "eval_count"):
        check_range(name, getattr(cfg, name), 1)
    check_range("max_train_steps", cfg.max_train_steps, -1, hint="-1 takes --num-training-epochs.")
    check_range("learning_rate", cfg.learning_rate, above=0)
    check_range("max_grad_norm", cfg.max_grad_norm, above=0)
    check_range("ema_decay", cfg.ema_decay, 0, below=1)
    check_range("min_scale", cfg.min_scale, 0.1, 1.0)
    check_range("colour_jitter", cfg.colour_jitter, 0.0, below=1.0)
    check_range("guidance_dropout", cfg.guidance_dropout, 0.0, 0.5)
    weights = (
        cfg.lambda_l2,
        cfg.lambda_psnr,
        cfg.lambda_lpips,
        cfg.lambda_ssim,
        cfg.lambda_gram,
        cfg.lambda_dino,
    )
    check_range("lambda_...", torch.tensor(weights), 0)
    if not any(weights):
        raise ValueError("Nothing to minimise: all weights --lambda-... are 0. Give one of them.")
    if cfg.train_image_prep == "none":
        raise ValueError(
            "Training images need one size: pass --train-image-prep crop_256 or resize_512."
        )
    if cfg.enable_xformers_memory_efficient_attention:
        logger.info("xformers is not needed: torch's own attention saves the same memory")


def require_finite(loss: Tensor, batch: dict[str, Tensor], samples: PairSamples, step: int) -> None:
    """Stop at a loss that is not a number, with the names of what it was computed on."""
    if not bool(torch.isfinite(loss)):
        names = [samples.pairs[position].name for position in batch["position"].tolist()]
        raise ValueError(
            f"The loss is not finite at step {step} ({', '.join(names)}). Pass a lower --learning-rate or --precision bf16; "
            "the last checkpoint is good."
        )


if __name__ == "__main__":
    run_script(main, Config, "train_artifact_fixer")
