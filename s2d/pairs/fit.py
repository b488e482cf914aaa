"""Stages 0 and 1 in memory: from some views of a scene to a point cloud and Gaussians, with the loop of stage 1 and nothing on disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.completion import FILL_SHARE, hole_points, starting_points
from s2d.densify import DensifyPolicy
from s2d.gaussians import Gaussians, gaussians_from_points
from s2d.guidance.cloud import SurfaceCloud
from s2d.guidance.mvs import reconstruct
from s2d.optim import FEW_STEPS, LearningRates, active_sh_degree, scene_extent, set_means_rate
from s2d.rasterize import cpus_for_kernels
from s2d.sampling import ViewSampler
from s2d.scene import Scene
from s2d.strategies.settings import Strategy
from s2d.training import (
    control_density,
    finish_run,
    optimise_view,
    record,
    stand_backdrop,
    start_run,
    use_strategies,
)
from s2d.views import View, views_on

CPU = torch.device("cpu")
REPORT_EVERY = 25  # steps between two calls of on_steps
SSIM_WEIGHT = 0.2  # as stage 1


@dataclass(frozen=True)
class FitSettings:
    """How long and how large; all else is as in stage 1."""

    num_steps: int
    max_init_points: int
    max_gaussians: int
    sh_degree: int


class Fitted(NamedTuple):
    """What one fit leaves behind."""

    cloud: SurfaceCloud
    depths: dict[str, tuple[Tensor, Tensor]]  # [H, W], and its confidence, by view
    gaussians: Gaussians
    early: list[Gaussians]  # as they were after each of `early_steps`


def fit(
    views: Scene,
    settings: FitSettings,
    seed: int,
    early_steps: Sequence[int] = (),
    on_steps: Callable[[int], None] = lambda num: None,
    device: torch.device = CPU,
    novel: Cameras | None = None,
) -> Fitted:
    """Reconstruct points from the views, and fit Gaussians on them to the views.

    Args:
        views: The inputs alone (`scene.subset(kept)`), two or more.
        settings: See there.
        seed: Same seed, same result, at any number of threads of a CPU.
        early_steps: Steps after which to keep a copy, each between 1 and num_steps.
        on_steps: Called with the number of steps done since the last call.
        device: Where the Gaussians are fitted, and stay; the points are made on the CPU.
        novel: Cameras that will render them, as stage 1 knows them.

    Raises:
        ValueError: the photos share no surface, or the optimisation went astray.
    """
    cloud, maps = reconstruct(views, seed)
    depths = {
        name: (torch.from_numpy(found.depth), torch.from_numpy(found.confidence))
        for name, found in maps.items()
    }
    known = cloud.points, cloud.rgbs, cloud.confidence
    guessed = hole_points(views, depths)
    points, rgbs, _ = starting_points(known, guessed, settings.max_init_points, FILL_SHARE)
    gaussians = gaussians_from_points(points.to(device), rgbs.to(device), settings.sh_degree)
    rates = LearningRates.of_flags(LearningRates.means, FEW_STEPS)
    extent = scene_extent(views.cameras, cloud.points)
    run = start_run(gaussians, rates, extent, ViewSampler(views.names, seed=seed), seed)
    use_strategies(
        *(run, Strategy(), views, cloud.points, depths.__getitem__, settings.num_steps, seed),
        novel=novel,
    )
    policy = DensifyPolicy(max_gaussians=settings.max_gaussians)
    view_of = views_on(
        lambda _, name: View(views.cameras.select([name]), views.image(name), None), device, True
    )
    degree_every = max(1, settings.num_steps // 4)  # stage 1: 1000 of 4000
    early: dict[int, Gaussians] = {}
    with cpus_for_kernels():
        while run.step < settings.num_steps:
            set_means_rate(run.optimizer, rates, extent, run.step / settings.num_steps)
            stand_backdrop(run, views.cameras, views.image, 0, settings.num_steps)
            view = view_of(*run.sampler.draw())
            loss = optimise_view(
                run,
                view.camera,
                view.target,
                ssim_weight=SSIM_WEIGHT,
                sh_degree=active_sh_degree(run.step, degree_every, settings.sh_degree),
            )
            control_density(run, policy, 0, settings.num_steps)
            record(run, loss)
            if run.step in early_steps:
                early[run.step] = copy_of(run.gaussians)
            if run.step % REPORT_EVERY == 0:
                on_steps(REPORT_EVERY)
        on_steps(settings.num_steps % REPORT_EVERY)
    finish_run(run)
    return Fitted(cloud, depths, run.scene, [early[step] for step in early_steps])


def copy_of(gaussians: Gaussians) -> Gaussians:
    """The same values in memory of their own: the next step changes them in place."""
    return Gaussians(
        **{name: tensor.detach().clone() for name, tensor in gaussians.tensors().items()}
    )
