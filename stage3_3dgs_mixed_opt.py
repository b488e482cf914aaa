"""Stage 3: continue the optimisation on kept photos and fixed views.

Two rules of S2D keep the photos in charge. *Random sample drop*: kept views make up the share alpha of all training samples,
however many pseudo views there are. *Weighted gradient*: on pseudo views, pixels that no point supports pull with beta only,
all pixels as far as stage 2's trials have shown that they are right, and with more than three photos those on which stage 1's models agree less than others.

With --layers the scene is made anew instead, coarse to fine: each layer sees photos of its own resolution and adds Gaussians to those below,
which stay as they are (docs/layers.md).

Reads   SCENE (-s) kept photos; OUT/chkpnt_stage1_<it>.pth; OUT/stage0 cameras, points.ply, depth/; OUT/stage1/members/; OUT/stage2/ fixed, mask, confidence
        stage 2 not with --no-pseudo-views, and stage 1 then only if it is there
Writes  OUT/stage3/ renders/<name>.png, kept_cameras.json, history.json; with --layers also layers/
        OUT/chkpnt<it>.pth, OUT/point_cloud/iteration_<it>/point_cloud.ply, OUT/cameras.json, OUT/cfg_args.json

Example
    python stage3_3dgs_mixed_opt.py -s data/fern -m out/fern
    python stage3_3dgs_mixed_opt.py -s data/fern -m out/fern --iterations 30000 --alpha 0.5 --overwrite
    python stage3_3dgs_mixed_opt.py -s data/fern -m out/fern --layers 8,4,2,1 --no-pseudo-views
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import OmitArgPrefixes, arg

from s2d.cameras import Cameras
from s2d.checks import check_range
from s2d.config import no_effect, run_script
from s2d.depth_io import read_depth
from s2d.device import choose_device, run_on
from s2d.files import atomic_write_json
from s2d.fixed_views import (
    FixedViews,
    default_agreed_weight,
    find_fixed_views,
    fixed_view_reader,
    is_worth_training_on,
    model_renders,
    view_source,
)
from s2d.gaussians import Checkpoint, load_checkpoint, save_checkpoint
from s2d.layers.options import LayerFlags, plan_layers
from s2d.layers.stage import check_strategy, layer_inputs, optimise_layers
from s2d.log import logger, progress
from s2d.memory_plan import DataDevice, TrainingMemory
from s2d.model_folder import (
    kept_views,
    point_cloud_name,
    stage1_checkpoint,
    write_cameras_json,
    write_cfg_args,
)
from s2d.novel.rounds import (
    Reach,
    Round,
    is_left_out,
    reach_of,
    round_checkpoint,
    round_start,
)
from s2d.optim import FEW_STEPS, LearningRates, active_sh_degree, set_means_rate
from s2d.ply_io import read_points_ply
from s2d.rasterize import cpus_for_kernels
from s2d.refinement import RefinementRates, start_refinement, write_refinement
from s2d.renders import render_views
from s2d.sampling import SampleDrop, ViewSampler
from s2d.saved_runs import load_run, run_checkpoint, save_run, saved_backdrop
from s2d.scene import Scene
from s2d.scored_cameras import follow_refinement
from s2d.split import Split
from s2d.stage_io import Stage, open_stage, require_stage
from s2d.strategies.settings import Strategy
from s2d.training import (
    TrainingRun,
    control_density,
    finish_run,
    optimise_view,
    record,
    refine_cameras,
    stand_backdrop,
    start_run,
    use_strategies,
)
from s2d.views import views_on


@dataclass(frozen=True)
class StageFlags:
    """What stage 3 takes with and without layers."""

    source: Annotated[Path, arg(aliases=["-s"])] = no_effect()
    """The scene that stage 0 was run on."""
    model_dir: Annotated[Path, arg(aliases=["-m"])] = no_effect()
    """Output folder OUT; stages 0 to 2 must have finished there."""
    steps: int = 4500
    """Optimisation steps of this stage. With --layers, --layer-iters counts instead."""
    iterations: int | None = None
    """Last step, counted on from stage 1's, as 3DGS counts. Instead of --steps."""
    pseudo_views: bool = True
    """Train on stage 2's fixed views as well, unless its trials have switched the fixer off and stage 1 has but one model (--fixed-dir OUT/stage2/fixed: then, too). Without them stage 2 is not needed."""
    alpha: float = 0.7
    """Share of kept views among the training samples."""
    beta: float = 0.4
    """Weight of the gradient in unguided pixels of fixed views. 1 disables the weighting."""
    agreed_weight: float | None = None
    """Least weight of the gradient of fixed views where stage 1's models agree: there the photos have decided, and a fixed view is only less sharp. 1 disables the weighting. Default: 1 up to three kept photos, 0.3 less for each further one, 0.1 from six on."""
    sample_drop: SampleDrop = "normalised"
    """normalised: reaches alpha; literal: the published formula, which does not."""
    sh_degree_every: int = 1000
    """Steps between two raises of the active SH degree, counted from stage 1's start. 0 uses all."""
    ssim_weight: float = 0.2
    """Share of 1 - SSIM in the loss; the rest is L1. With --layers: --layer-dssim."""
    opacity_weight: float = 0.0
    """Weight of the mean opacity in the loss. 0 disables."""
    lr_means: float = 1.6e-4
    """Step size of the centres at the start of this stage, in scene extents; falls to a hundredth at the end."""
    lr_factor: float = FEW_STEPS
    """Step sizes of sizes, rotations, opacities and colours, as a factor of 3DGS's, which are meant for 30,000 steps. Layers have 3DGS's."""
    densify: bool = True
    """Add Gaussians where the views ask for detail."""
    densify_grad_threshold: float = 2e-4
    """2D gradient above which a Gaussian is cloned or split. Lower grows more."""
    max_gaussians: int = 100_000
    """Never grow beyond this number."""
    backdrop: bool = True
    """Put a far sphere of smooth colours behind the finished scene, so that what no kept photo shows is not black. With --layers it is part of the first one."""
    optim_pose: bool = False
    """Also learn where the kept photos were taken, on from stage 1's cameras."""
    optim_focal: bool = False
    """Also learn the focal lengths, one factor for all photos of a camera."""
    optim_exposure: bool = False
    """Also learn each kept photo's brightness, one factor per colour channel."""
    strategy: Annotated[Strategy, OmitArgPrefixes] = field(default_factory=Strategy)
    """What else few photos need."""
    start_checkpoint: Path | None = no_effect(None)
    """Checkpoint to go on from, ours or one of 3DGS; default: stage 1's."""
    stage1_meta_dir: Path | None = no_effect(None)
    """Not needed: the split is read from OUT/stage0. Accepted because the released command line has it."""
    fixed_dir: Path | None = no_effect(None)
    """Folder of the fixed views; default OUT/stage2/fixed."""
    fixed_mask_dir: Path | None = no_effect(None)
    """Folder of the guidance masks; default OUT/stage2/mask."""
    fixed_confidence_dir: Path | None = no_effect(None)
    """Folder of the confidences of the fixed views, as far as there are any; default OUT/stage2/confidence where trials have measured them, else 1."""
    round: str = no_effect("1/1")
    """Work outward in rounds, 1/2 and then 2/2, each with stages 2 and 3 (docs/stage0.md); each takes its share of the steps."""
    seed: int = 0
    """Seed of the order of the views and of split Gaussians."""
    device: str = no_effect("auto")
    """Where to compute: auto (a GPU if one can be used, else the CPU), cpu, cuda or cuda:N."""
    data_device: DataDevice = no_effect("auto")
    """On a GPU, where photos and fixed views are held: auto (there, if they fit) or cpu (pinned memory of the host)."""
    checkpoint_every: int = no_effect(500)
    """Steps between two checkpoints from which an interrupted run goes on."""
    overwrite: bool = no_effect(False)
    """Rebuild a finished stage 3."""

    def last_step(self, first_step: int) -> int:
        """Where a stage that goes on from `first_step` ends."""
        return first_step + self.steps if self.iterations is None else self.iterations


@dataclass(frozen=True)
class Config(LayerFlags, StageFlags):
    """Stage 3: mixed optimisation on kept photos and fixed views."""


def main(cfg: Config) -> Path:
    """Run stage 3; returns OUT/stage3, of a round before the last OUT/stage3_round<number>."""
    check_config(cfg)
    choice = choose_device(cfg.device)
    at = Round.parse(cfg.round)
    stage0 = require_stage(cfg.model_dir, "stage0")
    reach = reach_of(cfg.model_dir, at, cfg.source)
    if is_left_out(at, reach):
        return cfg.model_dir / f"stage3{at.suffix}"
    cfg, start = start_of_round(cfg, at, reach)
    split = Split.load(stage0.dir / "split.json")
    kept = kept_views(cfg.source, stage0.dir, split)
    novel = Cameras.from_json(stage0.dir / "novel_cameras.json")
    if cfg.agreed_weight is None:
        cfg = replace(cfg, agreed_weight=default_agreed_weight(len(kept)))
    paths = None
    stage2 = f"stage2{at.suffix}"
    if cfg.pseudo_views and (cfg.fixed_dir or is_worth_training_on(cfg.model_dir, stage2)):
        folders = (cfg.fixed_dir, cfg.fixed_mask_dir, cfg.fixed_confidence_dir)
        paths = find_fixed_views(cfg.model_dir, reach.names, *folders, stage2)
        if cfg.agreed_weight < 1:
            paths = paths._replace(models=model_renders(cfg.model_dir, reach.names))
    elif cfg.pseudo_views:
        logger.info("stage3: on the kept photos alone, because trials have switched the fixer off")
    inputs = {"stage0": stage0, "kept photos": list(kept.image_paths)}
    if start is not None:
        inputs["start_checkpoint"] = start
    if paths is not None:
        inputs |= paths.inputs()
    if at.count > 1:
        inputs["round"] = cfg.round
    inputs |= layer_inputs(cfg, cfg.model_dir)
    with open_stage(cfg.model_dir, f"stage3{at.suffix}", cfg, inputs, cfg.overwrite) as stage:
        if not stage.up_to_date:
            fixed = None
            if paths is not None:
                fixed = fixed_view_reader(
                    novel.select(reach.names), paths, cfg.beta, cfg.agreed_weight
                )
            work = (cfg, stage, start, split, kept, novel, fixed, at, reach)
            run_on(choice, lambda on: make(*work, on))
    return cfg.model_dir / f"stage3{at.suffix}"


def make(
    cfg: Config,
    stage: Stage,
    start: Path | None,
    split: Split,
    kept: Scene,
    novel: Cameras,
    fixed: FixedViews | None,
    at: Round,
    reach: Reach,
    device: torch.device,
) -> None:
    """Do the stage's work on a device, from the last checkpoint if there is one."""
    with stage.timer("optimise"):
        first = None if start is None else load_checkpoint(start)
        # Where stage 1 has rendered them, also while the kept cameras are learned on.
        taken = start_refinement(first, kept.cameras, RefinementRates())
        novel = follow_refinement(novel, kept.cameras, taken)
        if cfg.layers:
            views = view_source(kept, novel, fixed)
            with_fixed = fixed is not None
            run = optimise_layers(cfg, stage, first, kept, views, novel, with_fixed, device)
        else:
            reached = novel.select(reach.names)
            run = optimise(cfg, stage, start, first, kept, reached, fixed, device)
    with stage.timer("render"):
        render_views(run.scene, novel, stage.dir / "renders")
    write_outputs(cfg, stage, run, split, kept, novel, at)


def check_config(cfg: Config) -> None:
    """Raise before anything is read or written."""
    check_range("checkpoint_every", cfg.checkpoint_every, 1)
    check_range("steps", cfg.steps, 1)
    check_range("lr_factor", cfg.lr_factor, above=0)
    check_range("alpha", cfg.alpha, 0, 1)
    check_range("beta", cfg.beta, 0, 1)
    if cfg.agreed_weight is not None:
        check_range("agreed_weight", cfg.agreed_weight, 0, 1)
    cfg.strategy.check()
    if cfg.layers:
        check_strategy(cfg.strategy)
        plan_layers(cfg, cfg.max_gaussians)
    elif cfg.foundation is not None:
        raise ValueError("--foundation is what layers are built on. Pass --layers with it.")


def start_of_round(cfg: Config, at: Round, reach: Reach) -> tuple[Config, Path | None]:
    """The settings with this round's share of the steps, and the checkpoint to go on from.

    Layers do without one where neither stage 1 nor a flag gives it and no pseudo view needs it.
    """
    if at.count == 1:
        is_needed = cfg.pseudo_views or not cfg.layers
        return cfg, cfg.start_checkpoint or stage1_checkpoint(cfg.model_dir, is_needed)
    at.refuse(
        layers=cfg.layers,
        no_pseudo_views=not cfg.pseudo_views,
        optim_pose=cfg.optim_pose,  # novel cameras follow stage 1's corrections: they must not change in between
        optim_focal=cfg.optim_focal,
        start_checkpoint=cfg.start_checkpoint,
        fixed_dir=cfg.fixed_dir,
        fixed_mask_dir=cfg.fixed_mask_dir,
        fixed_confidence_dir=cfg.fixed_confidence_dir,
    )
    last_step, start = round_start(cfg.model_dir, at, reach, cfg.last_step)
    return replace(cfg, iterations=last_step), start


def optimise(
    cfg: Config,
    stage: Stage,
    start: Path,
    first: Checkpoint,
    kept: Scene,
    novel: Cameras,
    fixed: FixedViews | None,
    device: torch.device,
) -> TrainingRun:
    """Go on from stage 1's Gaussians on both kinds of views."""
    checkpoint = stage.scratch / "run.pth"
    strategy = cfg.strategy.for_final_scene(has_fixed_views=fixed is not None)
    rates = LearningRates.of_flags(cfg.lr_means, cfg.lr_factor)
    policy = strategy.densify_policy(cfg.densify, cfg.densify_grad_threshold, cfg.max_gaussians)
    sampler = ViewSampler(
        kept.cameras.names, novel.names if fixed else (), cfg.alpha, cfg.sample_drop, cfg.seed
    )
    last_step = cfg.last_step(first.step)
    if first.step >= last_step:
        raise ValueError(
            f"{start} is at step {first.step} already, but --iterations is {last_step}. Expected a later last step: "
            f"pass --iterations {first.step + 3000}, or --steps alone, which are counted from there."
        )
    refined = RefinementRates.of_flags(cfg.optim_pose, cfg.optim_focal, cfg.optim_exposure)
    if checkpoint.exists():
        run = load_run(checkpoint, rates, sampler, refined, device)
    else:
        run = start_run(
            first.gaussians.to(device),
            rates,
            first.scene_extent,
            sampler,
            cfg.seed,
            first.step,
            first.optimizer_state,
            start_refinement(first, kept.cameras, refined, device),
        )
        if cfg.backdrop:
            run.stand_before(saved_backdrop(first))

    memory = TrainingMemory(
        max(cfg.max_gaussians, first.gaussians.num),
        first.gaussians.sh_degree,
        kept.cameras.sizes,
        novel.sizes if fixed else (),
        backdrop=cfg.backdrop,
        by_autograd=strategy.active,
    )
    resident = memory.fit(device, cfg.data_device)
    views = views_on(view_source(kept, novel, fixed), device, resident)
    num_steps = last_step - first.step
    stage0_dir = cfg.model_dir / "stage0"
    points, depth_of = (
        read_points_ply(stage0_dir / "points.ply").points,
        partial(read_depth, stage0_dir),
    )
    use_strategies(*(run, strategy, kept, points, depth_of, last_step, cfg.seed, first, novel))
    with cpus_for_kernels(), progress(last_step, "stage 3", start=run.step) as bar:
        while run.step < last_step:
            set_means_rate(
                run.optimizer, rates, run.scene_extent, (run.step - first.step) / num_steps
            )
            if cfg.backdrop:
                stand_backdrop(run, kept.cameras, kept.image, first.step, last_step)
            is_kept, name = run.sampler.draw()
            camera, target, weight = views(is_kept, name)
            loss = optimise_view(
                run,
                camera,
                target,
                ssim_weight=cfg.ssim_weight,
                sh_degree=active_sh_degree(run.step, cfg.sh_degree_every, run.gaussians.sh_degree),
                gradient_weight=weight,
                opacity_weight=cfg.opacity_weight,
            )
            refine_cameras(run, (run.step - first.step) / num_steps)
            control_density(run, policy, first.step, last_step)
            record(run, loss)
            if run.step % cfg.checkpoint_every == 0 and run.step < last_step:
                save_run(run, checkpoint)
            bar.update(run.step, loss=loss, gaussians=run.gaussians.num)
    finish_run(run)
    logger.info("stage3: share of kept views %.3f (alpha %.2f)", run.sampler.kept_share, cfg.alpha)
    return run


def write_outputs(
    cfg: Config,
    stage: Stage,
    run: TrainingRun,
    split: Split,
    kept: Scene,
    novel: Cameras,
    at: Round,
) -> None:
    """Write the final Gaussians and what viewers want beside them; of a round before the last, what the next one goes on from."""
    cameras = write_refinement(stage.dir, run.refinement, kept.cameras)
    if at.is_last:
        save_checkpoint(stage.extra_path(f"chkpnt{run.step}.pth"), run_checkpoint(run))
        run.scene.save_ply(stage.extra_path(point_cloud_name(run.step)), run.support)
        write_cameras_json(stage.extra_path("cameras.json"), Cameras.cat([cameras, novel]))
        write_cfg_args(
            stage.extra_path("cfg_args.json"),
            cfg.source,
            cfg.model_dir,
            run.gaussians.sh_degree,
            with_test=split.protocol == "eval",
        )
    else:
        save_checkpoint(round_checkpoint(stage.dir, run.step), run_checkpoint(run))
    atomic_write_json(stage.dir / "history.json", run.history)
    stage.info["num_gaussians"] = run.scene.num
    stage.info["iteration"] = run.step
    stage.info["kept_share"] = round(run.sampler.kept_share, 4)


if __name__ == "__main__":
    run_script(main, Config, "stage3_3dgs_mixed_opt")
