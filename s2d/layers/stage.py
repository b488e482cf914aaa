"""Layers as stage 3 makes them: what OUT holds for them to start from, and where they are left."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from s2d.cameras import Cameras
from s2d.completion import hole_points
from s2d.depth_io import known_depths, read_depth
from s2d.gaussians import Checkpoint
from s2d.layers.options import LayerFlags, plan_layers
from s2d.layers.task import LayerTask, TrainedLayers, initial_rows
from s2d.layers.training import train_layers
from s2d.memory_plan import DataDevice
from s2d.optim import LearningRates, scene_extent
from s2d.ply_io import read_points_ply
from s2d.refinement import Refinement, RefinementRates, start_refinement
from s2d.sampling import SampleDrop
from s2d.scene import Scene
from s2d.stage_io import Stage
from s2d.strategies.settings import Strategy
from s2d.training import TrainingRun, finish_run
from s2d.views import ViewSource


class LayeredConfig(Protocol):
    """What layers heed of stage 3's Config beside their own `LayerFlags`, which it has too."""

    model_dir: Path
    alpha: float
    sample_drop: SampleDrop
    sh_degree_every: int
    opacity_weight: float
    lr_means: float
    densify: bool
    strategy: Strategy
    backdrop: bool
    densify_grad_threshold: float
    max_gaussians: int
    optim_pose: bool
    optim_focal: bool
    optim_exposure: bool
    seed: int
    data_device: DataDevice
    checkpoint_every: int


def check_strategy(strategy: Strategy) -> None:
    """Raise ValueError if a strategy is on that layers do not have; called before anything is read."""
    taken = {"dropout": None, "clearance": Strategy().clearance, "isolation": None}
    if replace(strategy.without_naming_plain(), **taken).chosen:
        raise ValueError(
            "Of the strategies' flags (docs/strategies.md) --layers takes --dropout, --clearance and --isolation alone. Leave the others out."
        )


def layer_inputs(flags: LayerFlags, model_dir: Path) -> dict[str, Path]:
    """What layers depend on beside photos, points and a checkpoint, for `open_stage`."""
    inputs = {}
    if flags.foundation is not None:
        inputs["foundation"] = flags.foundation
    if flags.layers and initial_levels(model_dir).is_dir():
        inputs["stage1 levels"] = initial_levels(model_dir)
    return inputs


def optimise_layers(
    cfg: LayeredConfig,
    stage: Stage,
    first: Checkpoint | None,
    kept: Scene,
    views: ViewSource,
    novel: Cameras,
    trains_on_novel: bool,
    device: torch.device,
) -> TrainingRun:
    """Make the scene anew from stage 0's points, layer by layer; of stage 1 the cameras are taken over, and levels where it has some.

    Args:
        cfg: Stage 3's; a `LayerFlags` too.
        stage: Gets the levels as `layers/`, and their number; its scratch keeps what an interrupted call needs to go on.
        first: Stage 1's checkpoint, if there is one.
        kept: The kept views alone, with the cameras as given.
        views: At full resolution.
        novel: All novel cameras.
        trains_on_novel: Whether `views` has their fixed views.
        device: Where to train.

    Returns:
        The finished run of the last layer.

    Raises:
        FileNotFoundError, ValueError: No points of stage 0, or levels or cameras that do not fit; the message says what to do.
    """
    stage0_dir = cfg.model_dir / "stage0"
    points = read_points_ply(stage0_dir / "points.ply")
    extent = scene_extent(kept.cameras, points.points) if first is None else first.scene_extent
    refined = RefinementRates.of_flags(cfg.optim_pose, cfg.optim_focal, cfg.optim_exposure)
    task = LayerTask(
        flags=cfg,
        views=views,
        kept=kept.cameras,
        points=points,
        scene_extent=extent,
        guessed=hole_points(
            kept, known_depths(stage0_dir, kept.names) if cfg.layer_fill > 0 else {}
        ),
        photos=kept,
        strategy=cfg.strategy,
        backdrop=cfg.backdrop,
        novel=novel.names if trains_on_novel else (),
        novel_cameras=novel,
        initial=initial_rows(initial_levels(cfg.model_dir), len(cfg.layers), cfg.layer_sh_degree),
        depth=partial(read_depth, stage0_dir),
        alpha=cfg.alpha,
        sample_drop=cfg.sample_drop,
        sh_degree_every=cfg.sh_degree_every,
        rates=LearningRates.of_flags(cfg.lr_means, 1.0),
        densify=cfg.densify,
        grad_threshold=cfg.densify_grad_threshold,
        opacity_weight=cfg.opacity_weight,
        seed=cfg.seed,
        checkpoint_every=cfg.checkpoint_every,
        refinement_rates=refined,
        device=device,
        data_device=cfg.data_device,
    )
    if first is not None:
        refinement = start_refinement(first, kept.cameras, refined, device)
    else:
        refinement = Refinement(kept.cameras.to(device), extent, refined) if refined.any else None
    done = TrainedLayers.load(cfg.foundation, cfg.layer_sh_degree)
    layers, run = train_layers(
        task, plan_layers(cfg, cfg.max_gaussians), done, stage.scratch, 0, refinement
    )
    layers.save(stage.dir / "layers")
    finish_run(run)
    stage.info["levels"] = len(layers.parts)
    return run


def initial_levels(model_dir: Path) -> Path:
    """Where stage 1 leaves levels of an initialiser, if it has one that makes them."""
    return model_dir / "stage1" / "layers"
