"""One layer's step, with what is done to its rows every so many of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from s2d.densify import DensifyPolicy
from s2d.layers.density import ResetRule, density_round, remove_rows, reset_opacities
from s2d.layers.depth import DepthTarget, depth_target, depth_weight, relative_depth_loss
from s2d.layers.foundation import Foundation
from s2d.layers.options import LayerPlan
from s2d.layers.pyramid import Pyramid
from s2d.layers.reduce import (
    IMPORTANCE_SHARES,
    SH_CULL_SHARE,
    contributions,
    cull_colours,
    least_important,
    redundant_rows,
)
from s2d.layers.task import LayerTask
from s2d.log import logger
from s2d.memory_plan import TrainingMemory
from s2d.optim import active_sh_degree, set_means_rate
from s2d.rasterize import TrainingView
from s2d.training import TrainingRun, optimise_view, refine_cameras, stand_backdrop
from s2d.views import views_on

# Density control from a tenth to six tenths of a layer's steps: layers are short, and what they add needs the rest to settle.
DENSIFY_START, DENSIFY_STOP = 0.1, 0.6


class LayerLoop:
    """The state of one layer's training beside its run."""

    def __init__(
        self,
        task: LayerTask,
        layer: LayerPlan,
        run: TrainingRun,
        foundation: Foundation,
        first_step: int,
    ) -> None:
        self.task, self.layer, self.run, self.foundation = task, layer, run, foundation
        self.first_step = first_step
        self.device = run.gaussians.means.device
        self.kept = task.kept.scaled(1 / layer.factor).to(self.device)
        memory = TrainingMemory(
            foundation.num + layer.budget,
            task.flags.layer_sh_degree,
            self.kept.sizes,
            self.kept.sizes[:1] * len(task.novel),  # novel views are about as large
            backdrop=task.backdrop and foundation.num == 0,
            by_autograd=run.strategies is not None,
        )
        resident = memory.fit(self.device, task.data_device)
        self.views = views_on(Pyramid(task.views, layer.factor), self.device, resident)
        self.policy = DensifyPolicy(
            task.densify,
            grad_threshold=task.grad_threshold,
            max_gaussians=foundation.num + layer.budget,
        )
        self.resets = ResetRule(
            task.flags.layer_reset, task.flags.layer_reset_every, task.flags.layer_reset_to
        )
        self.depths: dict[str, DepthTarget] = {}
        # As after the culling, also where a run goes on: culled coefficients are the zeros.
        self.flat: Tensor | None = None
        if task.flags.layer_sh_cull and self.done >= self._at(SH_CULL_SHARE):
            self.flat = (run.gaussians.shN.detach() == 0).all(-1, keepdim=True)

    @property
    def done(self) -> int:
        """Finished steps of this layer."""
        return self.run.step - self.first_step

    def _at(self, share: float) -> int:
        return round(share * self.layer.steps)

    def _everyone(self) -> Tensor:
        return torch.ones(self.run.gaussians.num, dtype=torch.bool, device=self.device)

    def step(self, all_degrees: bool) -> Tensor:
        """Take one step towards the next view; returns the photometric loss.

        Args:
            all_degrees: Use the whole of the view-dependent colour, as layers on a finished foundation must. Else its degree rises with the
                steps of all layers so far, as in a run without layers.
        """
        task, run, share = self.task, self.run, self.done / self.layer.steps
        if task.backdrop and self.foundation.num == 0:
            self._stand_backdrop()
        set_means_rate(run.optimizer, task.rates, run.scene_extent, share)
        is_kept, name = run.sampler.draw()
        degree = task.flags.layer_sh_degree
        if not all_degrees:
            degree = active_sh_degree(run.step, task.sh_degree_every, degree)
        weight = depth_weight(task.flags.layer_depth_weight, share) if is_kept else 0.0
        view = self.views(is_kept, name)
        loss = optimise_view(
            run,
            view.camera,
            view.target,
            ssim_weight=self.layer.ssim_weight,
            sh_degree=degree,
            gradient_weight=view.weight,
            opacity_weight=task.opacity_weight,
            extra_loss=self._depth_loss(name, weight) if weight > 0 else None,
        )
        self.foundation.hold(run.gaussians)
        if self.flat is not None:
            run.gaussians.shN.detach().masked_fill_(self.flat, 0)
        refine_cameras(run, share)
        self.change_rows()
        return loss

    def clear(self) -> bool:
        """Remove new rows that stand where people look from; returns whether there were any."""
        strategies = self.run.strategies
        hides = None if strategies is None else strategies.in_the_way(self.run.gaussians)
        return hides is not None and remove_rows(self.run, hides, self.foundation) > 0

    def _stand_backdrop(self) -> None:
        layer = self.layer
        stand_backdrop(
            self.run,
            self.task.kept,
            lambda name: self.views(True, name).target.cpu(),
            self.first_step,
            self.first_step + layer.steps,
            1 / layer.factor,
        )

    def _depth_loss(self, name: str, weight: float) -> Callable[[TrainingView], Tensor]:
        if name not in self.depths:
            assert self.task.depth is not None
            size = self.kept.sizes[self.kept.names.index(name)]
            target = depth_target(*self.task.depth(name), *size)
            self.depths[name] = DepthTarget(*(t.to(self.device) for t in target))
        target = self.depths[name]
        return lambda drawn: weight * relative_depth_loss(drawn.depth, drawn.alpha, target)

    def change_rows(self) -> None:
        """Density control, resets and the reduced mode's rules, where this step is one of theirs."""
        run, flags, done = self.run, self.task.flags, self.done
        gaussians = run.gaussians
        changed = True
        if (
            self._at(DENSIFY_START) <= done <= self._at(DENSIFY_STOP)
            and done % self.policy.every == 0
        ):
            density_round(run, self.policy, self.foundation)
            if flags.layer_redundancy:
                first = self.foundation.mask(gaussians.num, self.device)
                remove_rows(run, redundant_rows(gaussians, self.kept, first), self.foundation)
        elif flags.layer_importance > 0 and done in map(self._at, IMPORTANCE_SHARES):
            new = self.foundation.not_removed(self._everyone())
            weights = contributions(gaussians, self.kept)
            doomed = least_important(weights, new, flags.layer_importance)
            remove_rows(run, doomed, self.foundation)
        elif flags.layer_sh_cull and done == self._at(SH_CULL_SHARE):
            rows = self.foundation.not_culled(self._everyone())
            culled = cull_colours(gaussians.detached(), self.kept, rows)
            self.flat = (gaussians.shN.detach() == 0).all(-1, keepdim=True)
            logger.info("layer: %d of %d new Gaussians have one colour", culled, int(rows.sum()))
        else:
            changed = False
        # Not near the end: what is lowered needs the steps to come back.
        if (
            done % self.resets.every == 0
            and done <= self._at(DENSIFY_STOP)
            and flags.layer_reset != "none"
        ):
            reset_opacities(run, self.resets, self.foundation)
            changed = True
        if done % self.policy.every == 0 and self.clear():
            changed = True
        if changed:
            self.foundation.check(run.gaussians, f"step {run.step}")
