"""One run of the optimisation: its state, and one step of it.

Stages 1 and 3 write their own loops; what both do the same lies here. A run is a function of its config, its inputs and its
seed. `s2d.saved_runs` saves it mid-way. It is where its Gaussians are; `s2d.device` says what a step may not do on a GPU.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2d.backdrop import backdrop
from s2d.cameras import Cameras
from s2d.checks import check_finite
from s2d.densify import (
    DensifyPolicy,
    DensifyState,
    densify_and_prune,
    reset_opacity,
)
from s2d.device import on_gpu
from s2d.gaussians import Checkpoint, Gaussians, concatenate
from s2d.losses import photometric_loss
from s2d.optim import LearningRates, SparseGaussianAdam, create_optimizer
from s2d.rasterize import TrainingView, rasterize, training_view
from s2d.refinement import Refinement
from s2d.sampling import ViewSampler
from s2d.scene import Scene
from s2d.strategies.active import ActiveStrategies
from s2d.strategies.evidence import Evidence, ReadDepth
from s2d.strategies.settings import Strategy
from s2d.strategies.view import StrategyView

HISTORY_EVERY = 20
# Share of a stage's schedule that is trained in front of black: before it is done, what stays open says little about what must.
BACKDROP_FROM = 0.8


@dataclass
class TrainingRun:
    """Everything a step reads or changes, apart from the photos."""

    gaussians: Gaussians
    optimizer: SparseGaussianAdam
    scene_extent: float
    sampler: ViewSampler
    generator: torch.Generator
    step: int
    """Finished steps, counted over stages 1 and 3."""
    densify_state: DensifyState
    refinement: Refinement | None = None
    """Corrections of the kept cameras; None where they are taken as given."""
    strategies: ActiveStrategies | None = None
    """What a step does beyond plain 3DGS; None: nothing."""
    strategy_state: dict | None = None
    """Of a run that was saved, for `use_strategies`."""
    support: Tensor | None = None  # [N]
    """Of the finished run's scene, where it was asked for."""
    backdrop: Gaussians | None = None
    """What is drawn behind the scene, and not trained."""
    backgrounds: dict[str, Tensor] = field(default_factory=dict)
    """Its pictures [H, W, 3] in the views that were trained on since it is there; not saved."""
    scene: Gaussians | None = None
    """Of a finished run: what is drawn and saved for viewers. `gaussians` is what another stage goes on with."""
    unread: list[tuple[int, str, Tensor]] = field(default_factory=list)
    """Step, view and loss of the last steps on a GPU, which are looked at together."""
    history: dict[str, list[float]] = field(
        default_factory=lambda: {"step": [], "loss": [], "num_gaussians": [], "seconds": []}
    )
    seconds_before: float = 0.0
    """Time spent before this process took over."""
    started: float = field(default_factory=time.monotonic)

    def stand_before(self, backdrop: Gaussians | None) -> None:
        """Train in front of this from now on; None is black."""
        self.backdrop = None if backdrop is None else backdrop.to(self.gaussians.means.device)
        self.backgrounds = {}

    def background(self, camera: Cameras) -> Tensor:
        """The backdrop's picture in a view; one size per view. [H, W, 3]"""
        name = camera.names[0]
        if name not in self.backgrounds:
            with torch.no_grad():
                camera = camera.to(self.gaussians.means.device)
                self.backgrounds[name] = rasterize(self.backdrop, camera).rgb[0]
        return self.backgrounds[name]

    @property
    def seconds(self) -> float:
        """Optimisation time, over all processes that worked on it."""
        return self.seconds_before + time.monotonic() - self.started


def start_run(
    gaussians: Gaussians,
    rates: LearningRates,
    scene_extent: float,
    sampler: ViewSampler,
    seed: int,
    step: int = 0,
    optimizer_state: dict | None = None,
    refinement: Refinement | None = None,
) -> TrainingRun:
    """Begin a run; with `optimizer_state` Adam keeps the moments of the run before, at the new rates."""
    optimizer = create_optimizer(gaussians, rates, scene_extent)
    if optimizer_state is not None:
        _load_moments(optimizer, optimizer_state)
    generator = torch.Generator().manual_seed(seed)
    state = DensifyState.zeros(gaussians.num, gaussians.means.device)
    return TrainingRun(
        gaussians, optimizer, scene_extent, sampler, generator, step, state, refinement
    )


def use_strategies(
    run: TrainingRun,
    settings: Strategy,
    kept: Scene,
    points: Tensor,  # [P, 3]
    read_depth: ReadDepth,
    last_step: int,
    seed: int,
    first: Checkpoint | None = None,
    novel: Cameras | None = None,
) -> None:
    """Give a run that was started or loaded its strategies, as far as any is on.

    Args:
        run: Changed in place.
        settings: Which, and how much.
        kept: The kept views.
        points: Of stage 0, world. [P, 3]
        read_depth: Stage 0's depth of a kept view, by name; called where a strategy asks for it.
        last_step: Of the stage; shares of the schedule refer to it.
        seed: Of the strategies' own random numbers.
        first: The finished run that this one starts from, if any.
        novel: Where the scene will be looked at from beside the kept views, as far as it is known.
    """
    if not settings.active:
        return
    evidence = Evidence(kept, points, read_depth, run.gaussians.means.device, novel)
    run.strategies = ActiveStrategies(
        settings, evidence, run.gaussians, run.scene_extent, last_step, seed
    )
    if run.strategy_state is not None:
        run.strategies.load_state_dict(run.strategy_state)
    elif first is not None:
        run.strategies.take_over((first.run_state or {}).get("strategies"), run.gaussians)


def stand_backdrop(
    run: TrainingRun,
    kept: Cameras,
    image: Callable[[str], Tensor],
    first_step: int,
    last_step: int,
    rescale: float = 1.0,
) -> None:
    """Put a backdrop behind the scene when BACKDROP_FROM of the schedule is done; to be called before every step of the stage.

    Args:
        run: `backdrop` changes.
        kept: Cameras of the kept views as they were given, at full resolution.
        image: Name of a kept view → its photo. [H, W, 3]
        first_step, last_step: Of the stage.
        rescale: Share of the full resolution that the photos have.
    """
    if run.step != first_step + round(BACKDROP_FROM * (last_step - first_step)):
        return
    cameras, photos = kept, [image(name) for name in kept.names]
    if run.refinement is not None:
        cameras, gains = run.refinement.cameras(), run.refinement.gains()
        photos = [
            photo / torch.tensor(gains[name])
            for name, photo in zip(kept.names, photos, strict=True)
        ]
    run.stand_before(backdrop(run.gaussians.detached(), cameras.scaled(rescale), photos))


def finish_run(run: TrainingRun) -> None:
    """Make the result of the last step's Gaussians: as the strategies say, in front of the backdrop if there is one."""
    read_losses(run)
    if run.strategies is not None:
        run.support = run.strategies.finish(run.gaussians, run.optimizer)
        state = run.densify_state
        run.densify_state = DensifyState.zeros(run.gaussians.num, state.grad_sum.device)
    run.scene = run.gaussians.detached()
    if run.backdrop is None:
        return
    run.scene = concatenate([run.scene, run.backdrop])
    if run.support is not None:  # nobody has seen a backdrop
        run.support = torch.cat([run.support, run.support.new_zeros(run.backdrop.num)])


def optimise_view(
    run: TrainingRun,
    camera: Cameras,
    target: Tensor,  # [H, W, 3]
    *,
    ssim_weight: float,
    sh_degree: int,
    gradient_weight: Tensor | None = None,  # [H, W, 1]
    opacity_weight: float = 0.0,
    extra_loss: Callable[[TrainingView | StrategyView], Tensor] | None = None,
) -> Tensor:
    """Take one step towards one view and gather the density statistics.

    Args:
        run: Its Gaussians, optimiser, statistics and step count change in place.
        camera: The one camera of the view, at any resolution; of a refined one the name and the size count, the rest is taken from
            `run.refinement`. On the CPU, or where the Gaussians are.
        target: Photo or fixed view, where the Gaussians are. [H, W, 3]
        ssim_weight: See `photometric_loss`.
        sh_degree: Active degree.
        gradient_weight: See `photometric_loss`; None is 1 everywhere. [H, W, 1]
        opacity_weight: Weight of the mean opacity in the loss: what no photo needs fades.
        extra_loss: What to add to the photometric loss, of the view as it is drawn (rgb, alpha, depth).

    Returns:
        The photometric loss, detached; on the CPU non-finite values are an error here already.

    Raises:
        ValueError: The loss is not a number; names the tensor that went bad, the step and the view. On a GPU, which nobody waits for in
            between, up to 20 steps later.
    """
    gaussians = run.gaussians
    refined = None if run.refinement is None else run.refinement.view_of(camera)
    strategies = run.strategies
    if strategies is None:
        view = training_view(gaussians, camera, sh_degree, refined)
    else:
        view = strategies.render(gaussians, camera, sh_degree, refined, run.step)
    rgb = view.rgb
    if run.backdrop is not None:
        rgb = rgb + (1 - view.alpha) * run.background(camera)
    if refined is not None and refined.gain is not None:
        rgb = rgb * refined.gain
    loss = photometric_loss(rgb, target, ssim_weight, gradient_weight)
    total = loss
    if strategies is not None:
        extra = strategies.extra_loss(view, camera, target, sh_degree, refined, run.step)
        total = loss if extra is None else loss + extra
    if extra_loss is not None:
        total = total + extra_loss(view)
    if on_gpu(gaussians.means):
        run.unread.append((run.step, camera.names[0], total.detach()))
    elif not bool(torch.isfinite(total)):
        _raise_not_finite(run, run.step, camera.names[0], target)
    total.backward()
    state = run.densify_state
    view.update(
        run.optimizer,
        opacity_penalty=opacity_weight,
        statistics=(state.grad_sum, state.num_views),
        lengths=strategies is not None and strategies.counts_lengths,
    )
    run.step += 1
    if strategies is not None:
        strategies.after_step(gaussians, run.optimizer, camera, gradient_weight, run.step)
    if len(run.unread) >= HISTORY_EVERY:
        read_losses(run)
    return loss.detach()


def control_density(
    run: TrainingRun, policy: DensifyPolicy, first_step: int, last_step: int
) -> None:
    """Clone, split, prune and reset as `policy` says for this step of a run from `first_step` to `last_step`."""
    done, num_steps = run.step - first_step, last_step - first_step
    if not policy.start_step <= done <= policy.stop_share * num_steps:
        if run.strategies is not None and done % policy.every == 0:
            stay = run.strategies.clear(run.gaussians, run.optimizer)
            if stay is not None:
                run.densify_state = run.densify_state.rows(stay)
        return
    moves_the_faint = run.strategies is not None and run.strategies.settings.grow == "mcmc"
    if done % policy.every == 0:
        trained = (policy, run.gaussians, run.optimizer, run.densify_state)
        if run.strategies is None:
            run.densify_state = densify_and_prune(*trained, run.scene_extent, run.generator)
        else:
            run.densify_state = run.strategies.control_density(*trained, run.generator)
    if policy.reset_every > 0 and run.step % policy.reset_every == 0 and not moves_the_faint:
        reset_opacity(run.gaussians, run.optimizer)


def refine_cameras(run: TrainingRun, progress: float) -> None:
    """Take the step of the cameras that the last view has asked for, at this share of the schedule."""
    if run.refinement is not None:
        run.refinement.step(progress)


def record(run: TrainingRun, loss: Tensor) -> None:
    """Add a row to the history every 20 steps, and see that all parameters are still numbers.

    The rasteriser does not draw a Gaussian with a non-finite parameter, so the loss alone would not tell.

    Raises:
        ValueError: A parameter is not finite; names the tensor and the step.
    """
    if run.step % HISTORY_EVERY == 0:
        check_parameters(run, f"after step {run.step}")
        row = {
            "step": run.step,
            "loss": round(float(loss), 6),
            "num_gaussians": run.gaussians.num,
            "seconds": round(run.seconds, 3),
        }
        for key, value in row.items():
            run.history[key].append(value)


def _load_moments(optimizer: torch.optim.Adam, state: dict) -> None:
    """Take over Adam's moments but keep this run's rates."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def check_parameters(run: TrainingRun, when: str) -> None:
    """Raise ValueError, naming the tensor, unless every parameter is a number."""
    for name, tensor in run.gaussians.tensors().items():
        check_finite(name, tensor, rows="Gaussian", context=when, hint="Try lower learning rates.")


def read_losses(run: TrainingRun) -> None:
    """Look at the losses of the last steps on a GPU, in one go; `optimise_view` says what is raised."""
    steps, run.unread = run.unread, []
    if not steps:
        return
    finite = torch.isfinite(torch.stack([loss for _, _, loss in steps])).tolist()
    if not all(finite):
        step, view, _ = steps[finite.index(False)]
        _raise_not_finite(run, step, view)


def _raise_not_finite(run: TrainingRun, step: int, view: str, target: Tensor | None = None) -> None:
    """Name what went bad: the photo, a parameter tensor, or else the loss itself."""
    when = f"after step {step} (view {view})"
    if target is not None:
        check_finite("target", target, rows="row", context=when, hint="Check that photo.")
    check_parameters(run, when)
    raise ValueError(
        f"optimise_view: the loss is not finite {when}, though the photo and all parameters are. Try another --seed."
    )
