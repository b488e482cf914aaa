"""Train the hierarchical feed-forward Gaussians: a few posed pictures in, Gaussians of three levels out.

Reads   chunk data sets (RealEstate10K, ACID: docs/hier_data.md), posed scenes, folders of posed scenes (--data, several)
Writes  OUT/ model_final.safetensors, checkpoints/, eval/step_<step>.{png,mp4}, history.json

Example
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml tools/train_hier_init.py --preset paper --data data/re10k \
        --output-dir out/hier
    python tools/train_hier_init.py --preset compact --data data/scenes out/synthetic --exclude-scenes fern,fox --output-dir out/hier
    python tools/train_hier_init.py --preset tiny --data demo/study --output-dir out/tiny      # to see that everything runs
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import torch
from torch import Tensor

from s2d.checks import check_range
from s2d.config import no_effect, run_script
from s2d.device import Precision
from s2d.export import write_video
from s2d.files import atomic_write_json
from s2d.hier.config import NUM_LEVELS, HierConfig
from s2d.hier.data.samples import TrainingSamples, as_views
from s2d.hier.data.settings import SampleSettings
from s2d.hier.data.sources import Case, chunk_cases, open_sources, posed_cases
from s2d.hier.judging import write_sheet
from s2d.hier.model import HierModel
from s2d.hier.training.losses import HierLoss, HierWeights
from s2d.hier.training.schedule import RateSchedule, rate_factor
from s2d.hier.training.validation import choose_cases, describe, film, judge_cases, scores_by_level
from s2d.hier.weights import load_dino, load_model, save_model
from s2d.log import logger, progress
from s2d.metrics import find_lpips
from s2d.runs.batches import Sharing, load_batches
from s2d.runs.ema import Ema
from s2d.runs.interrupt import stop_between_steps
from s2d.runs.launch import make_accelerator
from s2d.runs.run_folder import RunFolder, open_run_folder, training_key
from s2d.runs.scalars import ScalarWriter
from s2d.runs.state import TrainingState

if TYPE_CHECKING:  # takes seconds to import
    from accelerate import Accelerator

SUFFIX = ".safetensors"
FILM_FRAMES, FILM_FPS = 48, 24


@dataclass(frozen=True, kw_only=True)
class Config(SampleSettings):
    """Train the hierarchical feed-forward Gaussians."""

    data: tuple[Path, ...] = no_effect()
    """Chunk data sets (with train/ and test/), posed scenes, or folders of posed scenes."""
    output_dir: Path = no_effect()
    """Where everything goes; the same command again goes on from the last checkpoint."""
    exclude_scenes: tuple[str, ...] = ()
    """Posed scenes that nothing is trained on; the model is judged by them."""
    eval_index: Path | None = None
    """Also judge by this index of the first chunk data set's test/."""
    cache_dir: Path | None = no_effect(None)
    """For points matched in scenes without a sparse model. Default: OUT/cache."""
    model: Literal["compact", "paper", "tiny"] = "compact"
    """Size of the network."""
    one_level: bool = False
    """Predict Gaussians of the finest level alone: what the levels are compared with."""
    dino: Path | None = no_effect(None)
    """DINOv2 ViT-B/14 weights (a folder or a file), which the paper's size needs."""
    init_weights: Path | None = no_effect(None)
    """Weights to start from; their size of network wins over --model."""
    train_batch_size: int = no_effect(4)
    """Samples per process and forward pass."""
    gradient_accumulation_steps: int = no_effect(1)
    """Forward passes per step."""
    max_train_steps: int = 300_000
    """Number of steps."""
    learning_rate: float = 2e-4
    """Adam's largest step size."""
    lr_schedule: RateSchedule = "one_cycle"
    """one_cycle: up, then down to nothing at the last step. constant: up, then level; may be made longer."""
    lr_warmup_steps: int = 3000
    """Steps over which the step size rises."""
    max_grad_norm: float = 0.5
    """Longer gradients are shortened to this length."""
    ema_decay: float = 0.0
    """Judge and save a running average of the weights, 0.999 for a memory of 1000 steps. 0: the weights themselves."""
    lambda_lpips: float = 0.05
    """Weight of LPIPS, beside 1 for the squared error. Left out, with a message, where its network's weights are missing."""
    lpips_net: Literal["vgg", "alex"] = "vgg"
    """Backbone of LPIPS in the loss. alex costs a tenth of vgg."""
    lambda_depth: float = 0.0
    """Weight of the error at depths known from points (posed scenes)."""
    precision: Precision = "fp32"
    """Of the network; weights, rendering and losses stay in fp32."""
    checkpointing_steps: int = no_effect(500)
    """Steps between two checkpoints: so many are lost at most when a run is killed, none by Ctrl-C."""
    keep_checkpoints: int = no_effect(3)
    """Keep this many of checkpoints/model_<step>. 0 keeps all."""
    eval_freq: int = no_effect(500)
    """Steps between two evaluations; 0 disables."""
    viz_freq: int = no_effect(500)
    """Steps between two sheets and films in eval/; 0 disables."""
    eval_count: int = no_effect(8)
    """Pairs that are judged by, evenly spread."""
    log_every: int = no_effect(20)
    """Steps between two rows of history.json."""
    num_workers: int = no_effect(0)
    """Processes that read pictures while a GPU computes; 0 reads in between."""
    seed: int = 0
    """Seed of random weights and of what samples draw."""
    device: Literal["auto", "cpu"] = no_effect("auto")
    """auto: what `accelerate launch` set up, else a GPU if there is one."""
    overwrite: bool = no_effect(False)
    """Throw away what OUT holds and start again."""


def main(cfg: Config) -> Path:
    """Train; returns the file with the final weights."""
    check_config(cfg)
    accelerator = make_accelerator(cfg.precision, cfg.device == "cpu", some_unused=cfg.one_level)
    samples_per_step = (
        cfg.train_batch_size * cfg.gradient_accumulation_steps * accelerator.num_processes
    )
    samples, cases = open_data(cfg, samples_per_step, accelerator)
    torch.manual_seed(cfg.seed)
    model = make_model(cfg)
    lpips = find_lpips(cfg.lpips_net) if cfg.lambda_lpips > 0 else None
    if lpips is None and cfg.lambda_lpips > 0:
        logger.warning("The loss goes on without LPIPS.")
    weights = HierWeights(cfg.lambda_lpips if lpips else 0.0, cfg.lambda_depth)
    loss = HierLoss(weights, lpips, cfg.precision)
    key = training_key(
        cfg,
        samples_per_step,
        cfg.init_weights,
        cfg.lr_schedule == "constant",
        data=[source.fingerprint() for source in samples.sources],
        with_lpips=lpips is not None,
    )
    with ExitStack() as stack:
        folder = RunFolder(cfg.output_dir, SUFFIX)
        if accelerator.is_main_process:
            opened = open_run_folder(cfg.output_dir, SUFFIX, cfg, key, cfg.overwrite)
            folder = stack.enter_context(opened)
        accelerator.wait_for_everyone()  # the main process may have emptied it
        train(cfg, accelerator, model, loss, samples, cases, folder)
        accelerator.wait_for_everyone()
    return folder.final


def train(
    cfg: Config,
    accelerator: Accelerator,
    model: HierModel,
    loss: HierLoss,
    samples: TrainingSamples,
    cases: list[Case],
    folder: RunFolder,
) -> None:
    """The loop: one step is one update of the weights."""
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), lr=cfg.learning_rate)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    loss.to(accelerator.device)
    ema = Ema(parameters, cfg.ema_decay) if cfg.ema_decay > 0 else None
    state = TrainingState(parameters, optimizer, ema, accelerator.scaler)
    num_steps = cfg.max_train_steps
    if folder.state.is_file():
        state.load(folder.state)
        if state.step >= num_steps and folder.final.is_file():
            logger.info("up to date, %d steps are done: %s", state.step, folder.final)
            return
        logger.info("going on after step %d: %s", state.step, folder.state)
    batches = load_batches(
        samples,
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
    scalars = ScalarWriter(folder.dir if accelerator.is_main_process else None)
    with (
        stop_between_steps() as asked_to_stop,
        progress(num_steps, "train", start=state.step) as bar,
        scalars,
    ):
        while state.step < num_steps:
            rate = cfg.learning_rate * rate_factor(
                state.step, cfg.lr_schedule, cfg.lr_warmup_steps, num_steps
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            terms: dict[str, Tensor] = {}
            for micro in range(cfg.gradient_accumulation_steps):
                batch = next(batches)
                last = micro == cfg.gradient_accumulation_steps - 1
                with nullcontext() if last else accelerator.no_sync(wrapped):
                    context = as_views(batch, "context")
                    found = loss(
                        wrapped(context),
                        context,
                        as_views(batch, "target"),
                        batch.get("context_depth"),
                    )
                    require_finite(found["loss"], state.step)
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

            # All processes stop at one step, whichever of them was asked to.
            terms["stop"] = terms["loss"].new_tensor(float(asked_to_stop()))
            means = accelerator.reduce(terms, "mean")
            stops = bool(means.pop("stop") > 0)
            state.add({name: float(value) for name, value in means.items()})
            is_last = state.step == num_steps
            if state.step % cfg.log_every == 0 or is_last:
                scalars.write("train", state.close_row(lr=rate))
            bar.update(state.step, loss=means["loss"])
            if accelerator.is_main_process:
                saves = state.step % cfg.checkpointing_steps == 0
                with ema.applied() if ema is not None else nullcontext():
                    evaluate(cfg, accelerator, model, cases, folder, state, scalars, is_last)
                    if saves and not is_last:
                        save(folder.model(state.step), model, cfg, state, samples)
                        folder.prune_models(cfg.keep_checkpoints)
                if saves or is_last or stops:
                    state.save(folder.state)
                    atomic_write_json(folder.dir / "history.json", state.history)
            if stops and not is_last:
                raise KeyboardInterrupt
        if accelerator.is_main_process:
            with ema.applied() if ema is not None else nullcontext():
                save(folder.final, model, cfg, state, samples)
            logger.info("done after %d steps: %s", state.step, folder.final)


def evaluate(
    cfg: Config,
    accelerator: Accelerator,
    model: HierModel,
    cases: list[Case],
    folder: RunFolder,
    state: TrainingState,
    scalars: ScalarWriter,
    is_last: bool,
) -> None:
    """Score and show views that were left out, if it is time to."""
    scores_now, shows_now = (
        freq > 0 and (state.step % freq == 0 or is_last) for freq in (cfg.eval_freq, cfg.viz_freq)
    )
    if not cases or not (scores_now or shows_now):
        return
    judged = judge_cases(model, cases, cfg.image_size, accelerator.device, accelerator.autocast)
    if scores_now:
        # The backbone that the loss does not know; fetched only where the loss has fetched its own.
        scores = scores_by_level(judged, find_lpips("alex", download=cfg.lambda_lpips > 0))
        row = {"step": state.step, **scores}
        state.history["eval"].append(row)
        scalars.write("eval", row)
        logger.info("step %d: %s", state.step, describe(scores))
    if shows_now:
        sheet = write_sheet(folder.sheet(state.step), judged)
        frames = film(cases[0], judged[0], cfg.image_size, FILM_FRAMES)
        write_video(sheet.with_suffix(".mp4"), frames, FILM_FPS)


def open_data(
    cfg: Config, samples_per_step: int, accelerator: Accelerator
) -> tuple[TrainingSamples, list[Case]]:
    """Open what is trained on, and what is judged by."""
    rules = cfg.rules()
    with accelerator.main_process_first():  # which fills the cache
        sources, left_out = open_sources(
            cfg.data, rules, cfg.exclude_scenes, cfg.cache_dir or cfg.output_dir / "cache"
        )
    cases = posed_cases(left_out, rules.pairs, max_pairs=4, max_targets=2)
    if cfg.eval_index is not None:
        cases += [
            case for _, case in chunk_cases(cfg.data[0], cfg.eval_index, cfg.near, cfg.far)[0]
        ]
    cases = choose_cases(cases, cfg.eval_count)
    logger.info(
        "training on %s; judged by %d pairs of left-out scenes",
        ", ".join(f"{source.name} ({len(source)} scenes)" for source in sources),
        len(cases),
    )
    samples = cfg.samples(sources, samples_per_step, cfg.seed, with_depth=cfg.lambda_depth > 0)
    return samples, cases


def make_model(cfg: Config) -> HierModel:
    """Build the network, or load one to go on with."""
    if cfg.init_weights is not None:
        model = load_model(cfg.init_weights, cfg.dino)
    else:
        config = HierConfig.named(cfg.model)
        if cfg.one_level:
            config = replace(config, gaussian_levels=(NUM_LEVELS - 1,))
        model = HierModel(config)
        if cfg.dino is not None:
            load_dino(model, cfg.dino)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%.2f M parameters are trained", trained / 1e6)
    return model


def save(
    path: Path, model: HierModel, cfg: Config, state: TrainingState, samples: TrainingSamples
) -> None:
    """Write weights that say what they were trained on."""
    info = {
        "steps": state.step,
        "image_size": list(cfg.image_size),
        "data": [f"{source.name}: {source.fingerprint()}" for source in samples.sources],
        "left_out": list(cfg.exclude_scenes),
    }
    save_model(path, model, info)


def check_config(cfg: Config) -> None:
    """Raise before anything is read or written."""
    cfg.check()
    if cfg.init_weights is None and cfg.dino is None and HierConfig.named(cfg.model).dino:
        raise ValueError(
            f"--model {cfg.model} looks at pictures with DINOv2 ViT-B/14, too. Give its weights: --dino FOLDER "
            "(hf download facebook/dinov2-base), or take --model compact."
        )
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps"):
        check_range(name, getattr(cfg, name), 1)
    for name in ("checkpointing_steps", "log_every"):
        check_range(name, getattr(cfg, name), 1)
    check_range("learning_rate", cfg.learning_rate, above=0)
    check_range("max_grad_norm", cfg.max_grad_norm, above=0)
    check_range("ema_decay", cfg.ema_decay, 0, below=1)
    for name in ("lambda_lpips", "lambda_depth", "lr_warmup_steps", "eval_count"):
        check_range(name, getattr(cfg, name), 0)


def require_finite(loss: Tensor, step: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"The loss is not finite at step {step}. Pass a lower --learning-rate or --precision fp32; the last checkpoint is good."
        )


if __name__ == "__main__":
    run_script(main, Config, "train_hier_init")
