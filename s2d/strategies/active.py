"""The strategies of one run: what a training step calls, and what of it must be saved."""

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.densify import DensifyPolicy, DensifyState, densify_and_prune, prune
from s2d.gaussians import Gaussians
from s2d.optim import SparseGaussianAdam
from s2d.rasterize import TrainingView, rasterize, training_view
from s2d.refinement import RefinedView
from s2d.sampling import spread
from s2d.strategies import averaging, binocular, dropout, recycling, smoothing, support
from s2d.strategies.averaging import Average
from s2d.strategies.bounds import bound_scales
from s2d.strategies.clearance import Ways, clear_ways, in_the_way
from s2d.strategies.depth_supervision import (
    depth_loss,
    normal_loss,
    pearson_loss,
    smoothness_loss,
)
from s2d.strategies.evidence import Evidence
from s2d.strategies.floaters import floaters
from s2d.strategies.isolation import Surfaces
from s2d.strategies.mcmc import add_noise, relocate_and_grow
from s2d.strategies.opacity_decay import decay_opacity
from s2d.strategies.residual import most_wanted, residual_scores
from s2d.strategies.settings import Strategy
from s2d.strategies.support import Support
from s2d.strategies.view import StrategyView

# Steps between two looks at how fine the photos show each Gaussian.
FILTER_EVERY = 100


class ActiveStrategies:
    """The strategies that are on, their random numbers apart from the run's own, and their state.

    Steps are counted over stages 1 and 3, and a share of the schedule is one of all steps up to `last_step`.
    """

    def __init__(
        self,
        settings: Strategy,
        evidence: Evidence,
        gaussians: Gaussians,
        scene_extent: float,
        last_step: int,
        seed: int,
    ) -> None:
        self.settings = settings.for_views(len(evidence.kept.cameras))
        self.evidence = evidence
        self.scene_extent = scene_extent
        self.last_step = last_step
        self.generator = torch.Generator().manual_seed(seed)
        self.average = Average()
        self.support = Support(gaussians.num, gaussians.means.device)
        self._variances: Tensor | None = None

    @property
    def counts_lengths(self) -> bool:
        """Whether growth is asked for by the lengths of the pixels' gradients."""
        return self.settings.grow == "absgrad"

    # ------------------------------------------------------------------------------------------------------- one step

    def render(
        self,
        gaussians: Gaussians,
        camera: Cameras,
        sh_degree: int,
        refined: RefinedView | None,
        step: int,
    ) -> TrainingView | StrategyView:
        """Render a training view as the strategies want it."""
        settings, logits = self.settings, gaussians.opacity_logits
        rate = dropout.drop_rate(settings.dropout, step / self.last_step)
        kept = dropout.draw_kept(logits, rate, self.generator) if rate > 0 else None
        if not (settings.smoothing or settings.scale_weight or self._binocular(camera, step)):
            opacity = None if kept is None else dropout.dropped_opacity(logits, kept, rate)
            return training_view(gaussians, camera, sh_degree, refined, opacity)
        drawn = Gaussians(**gaussians.tensors())
        if settings.smoothing:
            drawn.log_scales, drawn.opacity_logits = smoothing.filtered(
                drawn.log_scales, drawn.opacity_logits, self._filter(gaussians, step)
            )
        if kept is not None:
            drawn.opacity_logits = dropout.dropped_logits(drawn.opacity_logits, kept, rate)
        return StrategyView(gaussians, drawn, camera, sh_degree, refined, self.counts_lengths)

    def extra_loss(
        self,
        view: TrainingView | StrategyView,
        camera: Cameras,
        photo: Tensor,  # [H, W, 3]
        sh_degree: int,
        refined: RefinedView | None,
        step: int,
    ) -> Tensor | None:
        """Sum of the strategies' terms for this view; None where there are none."""
        settings, terms = self.settings, []
        if settings.scale_weight:
            scales = view.drawn.log_scales.exp()
            terms.append(settings.scale_weight / self.scene_extent * scales.mean())
        if camera.names[0] not in self.evidence:  # fixed views: what they show may be made up
            return sum(terms) if terms else None
        depth, alpha = view.depth.squeeze(-1), view.alpha.squeeze(-1)
        if settings.depth_weight or settings.normal_weight:
            hint = self.evidence.depths[camera.names[0]]
            if settings.depth_weight:
                loss = depth_loss if settings.depth_loss == "inverse" else pearson_loss
                terms.append(settings.depth_weight * loss(depth, alpha, *hint))
            if settings.normal_weight:
                terms.append(
                    settings.normal_weight * normal_loss(depth, alpha, *hint, camera.Ks[0])
                )
        if settings.smooth_weight:
            terms.append(settings.smooth_weight * smoothness_loss(depth, alpha, photo))
        if self._binocular(camera, step):
            viewmats, Ks, gain = camera.viewmats, camera.Ks, None
            if refined is not None:  # as a constant: the view itself moves it
                viewmats, Ks = refined.viewmat.detach()[None], refined.K.detach()[None]
                gain = refined.gain
            focal = Ks[0, 0, 0]
            shift = binocular.draw_shift(depth, focal, self.generator)
            beside = rasterize(
                view.drawn,
                camera,
                sh_degree=sh_degree,
                viewmats=binocular.shifted(viewmats, shift),
                Ks=Ks,
            )
            view.add_seen(beside.radii.squeeze(0))
            image = beside.rgb.squeeze(0)
            image = image if gain is None else image * gain.detach()
            loss = binocular.binocular_loss(image, depth, photo, focal, shift)
            terms.append(settings.binocular_weight * loss)
        return sum(terms) if terms else None

    def after_step(
        self,
        gaussians: Gaussians,
        optimizer: SparseGaussianAdam,
        camera: Cameras,
        gradient_weight: Tensor | None,  # [H, W, 1]
        step: int,
    ) -> None:
        """Change the parameters after the optimiser has, and gather what is gathered over steps; `step` is the finished one's number."""
        settings = self.settings
        if settings.opacity_decay < 1:
            decay_opacity(gaussians.opacity_logits, settings.opacity_decay)
        if settings.max_scale or settings.max_elongation:
            largest = settings.max_scale * self.scene_extent
            log_largest = math.log(largest) if largest > 0 else None
            bound_scales(gaussians.log_scales, log_largest, settings.max_elongation)
        if settings.grow == "mcmc":
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            add_noise(gaussians, rates["means"], self.scene_extent, self.generator)
        if settings.wants_support and step % support.EVERY == 0:
            is_kept = camera.names[0] in self.evidence
            self.support.add(gaussians, camera, is_kept, gradient_weight)
        first = self.last_step - settings.average_last * self.last_step
        if settings.average_last and step > first and step % averaging.EVERY == 0:
            self.average.add(gaussians)

    # --------------------------------------------------------------------------------------------------------- rounds

    def control_density(
        self,
        policy: DensifyPolicy,
        gaussians: Gaussians,
        optimizer: SparseGaussianAdam,
        state: DensifyState,
        generator: torch.Generator,
    ) -> DensifyState:
        """Run one round of density control; arguments as `densify_and_prune`."""
        settings = self.settings
        if settings.grow == "mcmc" and policy.enabled:
            state = relocate_and_grow(
                gaussians, optimizer, settings.growth, policy.max_gaussians, self.generator
            )
        else:
            grow = doomed = None
            if settings.grow == "residual" and policy.enabled:
                scores = residual_scores(gaussians, self.evidence.photos())
                grow = most_wanted(scores, settings.growth, policy.max_gaussians)
            full = gaussians.num > recycling.FULL * policy.max_gaussians
            if settings.recycle and policy.enabled and full:
                state = self._make_place(gaussians, optimizer, state)
            if settings.prune_floaters:
                doomed = self._floaters(gaussians)
            hides = self.in_the_way(gaussians)
            if hides is not None:
                doomed = hides if doomed is None else doomed | hides
            state = densify_and_prune(
                policy, gaussians, optimizer, state, self.scene_extent, generator, grow, doomed
            )
        self.support.follow(state.parents)
        self._variances = None
        return state

    def _make_place(
        self, gaussians: Gaussians, optimizer: SparseGaussianAdam, state: DensifyState
    ) -> DensifyState:
        """Remove what the views show least; returns the statistics of what stays."""
        cameras, novel = list(self.evidence.kept.cameras), self.evidence.novel
        if novel is not None:
            rows = spread(len(novel), recycling.MOST_NOVEL)
            cameras += novel.select([novel.names[row] for row in rows])
        count = int(self.settings.recycle * gaussians.num)
        goes = recycling.least_seen(gaussians, cameras, count)
        return state.rows(self._remove(gaussians, optimizer, goes))

    def _remove(self, gaussians: Gaussians, optimizer: SparseGaussianAdam, goes: Tensor) -> Tensor:
        """Remove the Gaussians in the mask `goes` [N], here and in what is kept per Gaussian; returns the rows that stay [M]."""
        prune(gaussians, optimizer, goes)
        stay = (~goes).nonzero()[:, 0]
        self.support.follow(stay)
        self._variances = None
        return stay

    def in_the_way(self, gaussians: Gaussians) -> Tensor | None:
        """Whether each stands where people look from, or alone in the open [N]; None without --clearance and --isolation."""
        settings, found = self.settings, None
        if settings.clearance:
            found = in_the_way(gaussians, self._ways)
        if settings.isolation:
            alone = self._surfaces.isolated(gaussians, settings.isolation)
            found = alone if found is None else found | alone
        return found

    def clear(self, gaussians: Gaussians, optimizer: SparseGaussianAdam) -> Tensor | None:
        """Remove what has come to stand where people look from; returns the rows that stay [M], None if all do."""
        hides = self.in_the_way(gaussians)
        if hides is None or not bool(hides.any()) or bool(hides.all()):
            return None
        return self._remove(gaussians, optimizer, hides)

    def finish(self, gaussians: Gaussians, optimizer: SparseGaussianAdam) -> Tensor | None:
        """Make the result of the last step's Gaussians, in place; returns their support [N] if it was asked for."""
        settings = self.settings
        if settings.average_last:
            self.average.write_to(gaussians)
        self.clear(gaussians, optimizer)
        if settings.smoothing:
            self._set_shape(gaussians, smoothing.filtered)
        if not settings.wants_support:
            return None
        values = self.support.of(gaussians, self.evidence.kept.cameras)
        doomed = values < settings.prune_support
        if settings.prune_support > 0 and not bool(doomed.all()):
            values = values[self._remove(gaussians, optimizer, doomed)]
        return values

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors, lists and numbers that restore this in the middle of a run."""
        return {
            "generator": self.generator.get_state(),
            "average": self.average.state_dict(),
            "support": self.support.state_dict(),
            "variances": self._variances,
            "smoothed": self.settings.smoothing,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.generator.set_state(state["generator"])
        device = self.support.weights.device
        self.average.load_state_dict(state["average"], device)
        self.support.load_state_dict(state["support"])
        variances = state["variances"]
        self._variances = None if variances is None else variances.to(device)

    def take_over(self, state: dict[str, Any] | None, gaussians: Gaussians) -> None:
        """Begin with the result of another stage, whose last state this is: its support goes on, its filter comes off."""
        if state is None or len(state["support"]["weights"]) != gaussians.num:
            return
        self.support.load_state_dict(state["support"])
        if state["smoothed"] and self.settings.smoothing:
            self._set_shape(gaussians, smoothing.unfiltered)

    # -------------------------------------------------------------------------------------------------------- helpers

    @cached_property
    def _ways(self) -> Ways:
        known = self.evidence
        return clear_ways(known.kept.cameras, known.points, self.settings.clearance, known.novel)

    @cached_property
    def _surfaces(self) -> Surfaces:
        known = self.evidence
        return Surfaces(known.kept, known.points, known.known_depths())

    def _binocular(self, camera: Cameras, step: int) -> bool:
        settings = self.settings
        started = step >= settings.binocular_from * self.last_step
        return settings.binocular_weight > 0 and started and camera.names[0] in self.evidence

    def _filter(self, gaussians: Gaussians, step: int) -> Tensor:
        if self._variances is None or step % FILTER_EVERY == 0:
            self._variances = smoothing.filter_variances(
                gaussians.means.detach(), self.evidence.kept.cameras
            )
        return self._variances

    def _set_shape(self, gaussians: Gaussians, change: Any) -> None:
        with torch.no_grad():
            variances = smoothing.filter_variances(gaussians.means, self.evidence.kept.cameras)
            shape = change(gaussians.log_scales, gaussians.opacity_logits, variances)
            gaussians.log_scales.copy_(shape[0])
            gaussians.opacity_logits.copy_(shape[1])

    def _floaters(self, gaussians: Gaussians) -> Tensor:
        depths = self.evidence.depths
        return floaters(
            gaussians,
            ((camera, *depths[camera.names[0]]) for camera in self.evidence.kept.cameras),
        )
