"""Stage 1: fit 3D Gaussians to the kept photos, then render every novel camera: images with artifacts.

The scene is fitted several times (--ensemble), and the renders are the mean of all models'; the first one is the scene that is saved.

Reads   SCENE (-s) kept photos; OUT/stage0/ split.json, novel_cameras.json, points.ply, depth/
Writes  OUT/stage1/ renders/<name>.png, kept_cameras.json, train_indices.txt, novel_indices.txt, image_names.txt, history.json; with --init hier and depth also layers/,
        unless --ensemble is 1 members/<model>/<name>.png
        OUT/chkpnt_stage1_<it>.pth, OUT/point_cloud/iteration_<it>/point_cloud.ply, OUT/cameras.json

Example
    python stage1_3dgs_init.py -s data/fern -m out/fern
    python stage1_3dgs_init.py -s demo/study -m out/demo --preset tiny      # seconds: to see that it runs
"""

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import OmitArgPrefixes, arg

from s2d.cameras import Cameras
from s2d.checks import check_range
from s2d.completion import FILL_SHARE, hole_points, starting_points
from s2d.config import no_effect, run_script
from s2d.depth_io import known_depths, read_depth
from s2d.device import choose_device, run_on
from s2d.ensemble import MEMBERS, mean_pictures, member_folders, member_seed
from s2d.files import atomic_write_json, atomic_write_text
from s2d.gaussians import Gaussians, gaussians_from_points, save_checkpoint
from s2d.hier.initialise import hier_start
from s2d.hier.weights import find_weights
from s2d.log import logger, progress
from s2d.memory_plan import DataDevice, TrainingMemory
from s2d.model_folder import copy_results, kept_views, point_cloud_name, write_cameras_json
from s2d.optim import (
    FEW_STEPS,
    LearningRates,
    active_sh_degree,
    scene_extent,
    set_means_rate,
    stage1_steps,
)
from s2d.ply_io import PointCloud, read_points_ply
from s2d.rasterize import cpus_for_kernels
from s2d.refinement import Refinement, RefinementRates, register_cameras, write_refinement
from s2d.renders import render_views
from s2d.sampling import ViewSampler
from s2d.saved_runs import load_run, run_checkpoint, save_run
from s2d.scene import Scene
from s2d.scored_cameras import follow_refinement
from s2d.split import Split, make_split
from s2d.stage_io import Manifest, Stage, open_stage, require_stage
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
from s2d.views import View, views_on


@dataclass(frozen=True)
class Config:
    """Stage 1: 3D Gaussians from the kept photos and stage 0's point cloud, and renders of the novel cameras."""

    source: Annotated[Path, arg(aliases=["-s"])] = no_effect()
    """The scene that stage 0 was run on."""
    model_dir: Annotated[Path, arg(aliases=["-m"])] = no_effect()
    """Output folder OUT; stage 0 must have finished there."""
    sample_iteration: int | None = None
    """Number of optimisation steps of each model; the novel cameras are rendered after the last. Default: 2500, and 500 more for each kept photo after the third, up to 4000."""
    init: Literal["points", "hier", "depth"] = "points"
    """points: stage 0's cloud. hier: levels of Gaussians that a network predicts. depth: such levels from stage 0's depth maps (docs/hier.md)."""
    hier_weights: Path | None = no_effect(None)
    """With --init hier: weights as tools/train_hier_init.py writes them. Default: those that come with S2D."""
    max_init_points: int = 40_000
    """Start with at most this many Gaussians; a larger cloud is thinned evenly. More is sharper and slower."""
    ensemble: int = 2
    """Fit so many models, which differ in their seed; the novel renders are their mean, which is nearer to the truth than each. Stage 2 fixes those of each, stage 3 goes on from the first one."""
    fill_share: float = FILL_SHARE
    """Share of these that may stand where stage 0 has no depth, on a smooth continuation: what only one photo shows. 0 disables. Only with --init points."""
    init_opacity: float = 0.1
    """Opacity that every Gaussian starts with. Only with --init points: levels have their own."""
    sh_degree: int = 2
    """Degree of the view-dependent colour, 0 to 3. Few photos can't tell it from geometry: higher overfits."""
    sh_degree_every: int = 1000
    """Steps between two raises of the active degree. 0 uses all from the start."""
    ssim_weight: float = 0.2
    """Share of 1 - SSIM in the loss; the rest is L1."""
    opacity_weight: float = 0.0
    """Weight of the mean opacity in the loss: fades what no photo needs. 0 disables."""
    lr_means: float = 1.6e-4
    """Step size of the centres at the start, in scene extents; falls to a hundredth at the end."""
    lr_factor: float = FEW_STEPS
    """Step sizes of sizes, rotations, opacities and colours, as a factor of 3DGS's, which are meant for 30,000 steps."""
    densify: bool = True
    """Add Gaussians where the photos ask for detail."""
    densify_grad_threshold: float = 2e-4
    """2D gradient above which a Gaussian is cloned or split. Lower grows more."""
    max_gaussians: int = 60_000
    """Never grow beyond this number. Few photos: more Gaussians fit them better and the views between them worse."""
    backdrop: bool = True
    """Put a far sphere of smooth colours behind the finished scene, so that what no kept photo shows is not black."""
    optim_pose: bool = False
    """Also learn where the kept photos were taken: for cameras that are some pixels off."""
    optim_focal: bool = False
    """Also learn the focal lengths, one factor for all photos of a camera."""
    optim_exposure: bool = False
    """Also learn each kept photo's brightness, one factor per colour channel."""
    strategy: Annotated[Strategy, OmitArgPrefixes] = field(default_factory=Strategy)
    """What else few photos need."""
    keep_every: int | None = None
    """Only checked: stage 0 has chosen the kept views."""
    keep_indices: tuple[int, ...] | None = None
    """Only checked, as --keep-every: positions separated by commas."""
    keep_count: int | None = None
    """Only checked, as --keep-every."""
    stage1_meta_dir: Path | None = no_effect(None)
    """Also copy the index files here."""
    stage1_novel_render_dir: Path | None = no_effect(None)
    """Also copy the renders here."""
    seed: int = 0
    """Seed of the order of the views and of split Gaussians."""
    device: str = no_effect("auto")
    """Where to compute: auto (a GPU if one can be used, else the CPU), cpu, cuda or cuda:N."""
    data_device: DataDevice = no_effect("auto")
    """On a GPU, where photos are held: auto (there, if they fit) or cpu (pinned memory of the host)."""
    checkpoint_every: int = no_effect(500)
    """Steps between two checkpoints from which an interrupted run goes on."""
    overwrite: bool = no_effect(False)
    """Rebuild a finished stage 1."""


def main(cfg: Config) -> Path:
    """Run stage 1; returns OUT/stage1."""
    check_config(cfg)
    choice = choose_device(cfg.device)
    stage0 = require_stage(cfg.model_dir, "stage0")
    split = Split.load(stage0.dir / "split.json")
    check_keep_flags(cfg, split, stage0)
    kept = kept_views(cfg.source, stage0.dir, split)
    novel = Cameras.from_json(stage0.dir / "novel_cameras.json")
    if cfg.sample_iteration is None:
        cfg = replace(cfg, sample_iteration=stage1_steps(len(kept)))
    inputs = {"stage0": stage0, "kept photos": list(kept.image_paths)}
    if cfg.init == "hier":
        inputs["hier weights"] = [find_weights(cfg.hier_weights)]
    with open_stage(cfg.model_dir, "stage1", cfg, inputs, cfg.overwrite) as stage:
        if not stage.up_to_date:
            run_on(choice, lambda on: make(cfg, stage, stage0, split, kept, novel, on))
    for name in ("train_indices.txt", "novel_indices.txt", "image_names.txt"):
        copy_results(stage.dir / name, cfg.stage1_meta_dir and cfg.stage1_meta_dir / name)
    copy_results(stage.dir / "renders", cfg.stage1_novel_render_dir)
    return cfg.model_dir / "stage1"


def make(
    cfg: Config,
    stage: Stage,
    stage0: Manifest,
    split: Split,
    kept: Scene,
    novel: Cameras,
    device: torch.device,
) -> None:
    """Do the stage's work on a device, from the last checkpoint if there is one."""
    with stage.timer("optimise"):
        run = optimise(cfg, 0, stage, stage0, kept, novel, device)
    renders = stage.dir / "renders"
    pictures = renders if cfg.ensemble == 1 else stage.dir / MEMBERS / "0"
    followed = follow_refinement(novel, kept.cameras, run.refinement)
    with stage.timer("render"):
        render_views(run.scene, followed, pictures)
    if cfg.ensemble > 1:
        with stage.timer("ensemble"):
            others = [
                render_member(cfg, member, stage, stage0, kept, novel, device)
                for member in range(1, cfg.ensemble)
            ]
            for member, folder in enumerate(others, start=1):
                os.replace(folder, stage.dir / MEMBERS / str(member))
            mean_pictures(member_folders(stage.dir), renders)
    write_outputs(cfg, stage, run, split, kept, followed)


def render_member(
    cfg: Config,
    member: int,
    stage: Stage,
    stage0: Manifest,
    kept: Scene,
    novel: Cameras,
    device: torch.device,
) -> Path:
    """Fit one more model of the ensemble and render it; returns the folder, which an interrupted run may have left."""
    folder = stage.scratch / f"renders_{member}"
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.partial")
        run = optimise(cfg, member, stage, stage0, kept, novel, device)
        render_views(run.scene, follow_refinement(novel, kept.cameras, run.refinement), unfinished)
        os.replace(unfinished, folder)
    return folder


def check_config(cfg: Config) -> None:
    """Raise before anything is read or written."""
    if cfg.sample_iteration is not None:
        check_range("sample_iteration", cfg.sample_iteration, 1)
    check_range("checkpoint_every", cfg.checkpoint_every, 1)
    check_range("lr_factor", cfg.lr_factor, above=0)
    check_range("max_init_points", cfg.max_init_points, 1)
    check_range("sh_degree", cfg.sh_degree, 0, 3)
    check_range("ensemble", cfg.ensemble, 1)
    check_range("init_opacity", cfg.init_opacity, 0.01, 0.99)
    check_range("fill_share", cfg.fill_share, 0, below=1)
    cfg.strategy.check()
    if cfg.hier_weights is not None and cfg.init != "hier":
        raise ValueError("--hier-weights is for --init hier. Pass both, or leave it out.")


def optimise(
    cfg: Config,
    member: int,
    stage: Stage,
    stage0: Manifest,
    kept: Scene,
    novel: Cameras,
    device: torch.device,
) -> TrainingRun:
    """Fit Gaussians on the points of stage 0 to the kept photos: a model of the ensemble."""
    checkpoint = stage.scratch / ("run.pth" if member == 0 else f"run_{member}.pth")
    seed = member_seed(cfg.seed, member)
    title = "stage 1" if member == 0 else f"model {member + 1} of {cfg.ensemble}"
    rates = LearningRates.of_flags(cfg.lr_means, cfg.lr_factor)
    policy = cfg.strategy.densify_policy(cfg.densify, cfg.densify_grad_threshold, cfg.max_gaussians)
    sh_degree = cfg.strategy.sh_degree(cfg.sh_degree, len(kept))
    sampler = ViewSampler(kept.cameras.names, seed=seed)
    refined = RefinementRates.of_flags(cfg.optim_pose, cfg.optim_focal, cfg.optim_exposure)
    most, sizes = max(cfg.max_gaussians, cfg.max_init_points), kept.cameras.sizes
    memory = TrainingMemory(
        most, sh_degree, sizes, backdrop=cfg.backdrop, by_autograd=cfg.strategy.active
    )
    resident = memory.fit(device, cfg.data_device)
    views = views_on(
        lambda _, name: View(kept.cameras.select([name]), kept.image(name), None), device, resident
    )
    cloud = read_points_ply(stage0.dir / "points.ply")
    if checkpoint.exists():
        run = load_run(checkpoint, rates, sampler, refined, device)
    else:
        gaussians = initial_gaussians(cfg, stage, stage0, kept, cloud, sh_degree, device)
        extent = scene_extent(kept.cameras, cloud.points)
        run = start_run(gaussians, rates, extent, sampler, seed)
        if refined.any:
            cameras = kept.cameras
            if cfg.optim_pose:
                cameras = register_cameras(gaussians.detached(), cameras, kept.image, extent)
            run.refinement = Refinement(cameras.to(device), extent, refined)

    num_steps = cfg.sample_iteration
    depth_of = partial(read_depth, stage0.dir)
    use_strategies(run, cfg.strategy, kept, cloud.points, depth_of, num_steps, seed, novel=novel)
    with cpus_for_kernels(), progress(num_steps, title, start=run.step) as bar:
        while run.step < num_steps:
            set_means_rate(run.optimizer, rates, run.scene_extent, run.step / num_steps)
            if cfg.backdrop:
                stand_backdrop(run, kept.cameras, kept.image, 0, num_steps)
            view = views(*run.sampler.draw())
            loss = optimise_view(
                run,
                view.camera,
                view.target,
                ssim_weight=cfg.ssim_weight,
                sh_degree=active_sh_degree(run.step, cfg.sh_degree_every, sh_degree),
                opacity_weight=cfg.opacity_weight,
            )
            refine_cameras(run, run.step / num_steps)
            control_density(run, policy, 0, num_steps)
            record(run, loss)
            # Also the last one: what has been fitted stays, while the rest of the ensemble is.
            if run.step % cfg.checkpoint_every == 0 or run.step == num_steps:
                save_run(run, checkpoint)
            bar.update(run.step, loss=loss, gaussians=run.gaussians.num)
    finish_run(run)
    return run


def initial_gaussians(
    cfg: Config,
    stage: Stage,
    stage0: Manifest,
    kept: Scene,
    cloud: PointCloud,
    sh_degree: int,
    device: torch.device,
) -> Gaussians:
    """Make what the optimisation starts with, on the device."""
    if cfg.init != "points":
        weights = find_weights(cfg.hier_weights) if cfg.init == "hier" else None
        most = cfg.max_init_points
        start = hier_start(kept, cloud.points, stage0.dir, weights, most, sh_degree, device)
        start.save(stage.dir / "layers")
        counts = ", ".join(str(part.num) for part in start.parts)
        logger.info("stage1: levels of %s Gaussians, coarse to fine", counts)
        return start.gaussians.to(device)
    depths = known_depths(stage0.dir, kept.names) if cfg.fill_share > 0 else {}
    points, rgbs, num_guessed = starting_points(
        cloud, hole_points(kept, depths), cfg.max_init_points, cfg.fill_share
    )
    logger.info(
        "stage1: %d Gaussians from the %d points of stage 0, %d where it has none",
        len(points) - num_guessed,
        len(cloud.points),
        num_guessed,
    )
    return gaussians_from_points(points.to(device), rgbs.to(device), sh_degree, cfg.init_opacity)


def write_outputs(
    cfg: Config, stage: Stage, run: TrainingRun, split: Split, kept: Scene, novel: Cameras
) -> None:
    """Write the checkpoint, the Gaussians and the text files."""
    save_checkpoint(stage.extra_path(f"chkpnt_stage1_{run.step}.pth"), run_checkpoint(run))
    run.scene.save_ply(stage.extra_path(point_cloud_name(run.step)), run.support)
    cameras = write_refinement(stage.dir, run.refinement, kept.cameras)
    write_cameras_json(stage.extra_path("cameras.json"), Cameras.cat([cameras, novel]))
    # The release's form: positions in image_names.txt, one per line; all views that training may know of.
    names = sorted({*split.kept, *novel.names})
    atomic_write_text(stage.dir / "image_names.txt", lines(names))
    atomic_write_text(
        stage.dir / "train_indices.txt", lines(names.index(name) for name in split.kept)
    )
    atomic_write_text(
        stage.dir / "novel_indices.txt", lines(names.index(name) for name in novel.names)
    )
    atomic_write_json(stage.dir / "history.json", run.history)
    stage.info["num_gaussians"] = run.scene.num
    stage.info["iteration"] = run.step


def lines(values) -> str:
    return "".join(f"{value}\n" for value in values)


def check_keep_flags(cfg: Config, split: Split, stage0: Manifest) -> None:
    """Accept the released command line's --keep-… here too, if it means what stage 0 has chosen."""
    given = {
        "keep_every": cfg.keep_every,
        "keep_indices": cfg.keep_indices,
        "keep_count": cfg.keep_count,
    }
    if all(value is None for value in given.values()):
        return
    names = {*split.kept, *split.novel, *split.test}
    settings = {"eval": split.protocol == "eval"}
    if settings["eval"]:
        settings["test_every"] = stage0.config["test_every"]
    wanted = make_split(names, **given, **settings)
    if wanted.kept != split.kept:
        raise ValueError(
            f"The --keep-… flag contradicts stage 0: it keeps {', '.join(wanted.kept)}, but {stage0.dir} was made with "
            f"{', '.join(split.kept)}. Leave the flag out, or run stage 0 again with it and --overwrite."
        )


if __name__ == "__main__":
    run_script(main, Config, "stage1_3dgs_init")
