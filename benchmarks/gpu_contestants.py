"""Who is timed on a GPU: the same Gaussians, cameras, photos, loss and learning rates, trained and rendered by each library.

Imports nothing but torch and the kernels' packages, so that it runs on a machine that has little else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from diff_gaussian_rasterization import SparseGaussianAdam, TrainingView, rasterize_gaussians_raw
from fused_ssim import photometric_loss
from torch import Tensor

SSIM_WEIGHT = 0.2
SH_DEGREE = 3
NEAR = 0.2  # world units; csrc/common/constants.h
BETAS, EPS = (0.9, 0.999), 1e-15
RATES = {
    "means": 1.6e-4,
    "log_scales": 5e-3,
    "quats": 1e-3,
    "opacity_logits": 0.05,
    "sh0": 2.5e-3,
    "shN": 1.25e-4,
}


@dataclass(frozen=True)
class Task:
    """What everybody does: N Gaussians, C views of them."""

    gaussians: dict[str, Tensor]
    """Raw parameters by the names of `RATES`."""
    viewmats: Tensor  # [C, 4, 4]
    Ks: Tensor  # [C, 3, 3]
    photos: Tensor  # [C, H, W, 3]

    @property
    def size(self) -> tuple[int, int]:
        """width, height"""
        return self.photos.shape[2], self.photos.shape[1]


class Contestant(Protocol):
    """One way to do it. Each keeps its own copy of the Gaussians and of the optimiser's state."""

    name: str

    def __init__(self, task: Task) -> None: ...

    def step(self, view: int) -> None:
        """Train on one view: render, loss, gradients, statistics of density control, optimiser."""

    def render(self, view: int) -> Tensor:
        """The colours of one view, without gradients. [H, W, 3]"""


class Ours:
    """TrainingView: gradients of the Gaussians are never written to memory."""

    name = "s2d"

    def __init__(self, task: Task) -> None:
        self.task = task
        self.parameters = _leaves(task)
        groups = [
            {"name": name, "params": [tensor], "lr": RATES[name]}
            for name, tensor in self.parameters.items()
        ]
        self.optimizer = SparseGaussianAdam(groups, lr=0.0, eps=EPS)
        means = task.gaussians["means"]
        self.statistics = (means.new_zeros(len(means)), means.new_zeros(len(means)))

    def step(self, view: int) -> None:
        task = self.task
        shown = TrainingView(self.parameters, task.viewmats[view], task.Ks[view], *task.size)
        photometric_loss(shown.rgb, task.photos[view], SSIM_WEIGHT).backward()
        shown.update(self.optimizer, statistics=self.statistics)

    @torch.no_grad()
    def render(self, view: int) -> Tensor:
        task, one = self.task, slice(view, view + 1)
        return rasterize_gaussians_raw(
            **self.parameters, viewmats=task.viewmats[one], Ks=task.Ks[one], width=task.size[0], height=task.size[1]
        ).rgb[0]  # fmt: skip


class OursByAutograd(Ours):
    """As any other code would use it: an autograd function, then the optimiser."""

    name = "s2d, autograd"

    def step(self, view: int) -> None:
        task, one = self.task, slice(view, view + 1)
        means, (grad_sum, num_views) = self.parameters["means"], self.statistics
        width, height = task.size
        probe = means.new_zeros(1, len(means), 2).requires_grad_()
        out = rasterize_gaussians_raw(
            **self.parameters, viewmats=task.viewmats[one], Ks=task.Ks[one], width=width, height=height, means2d_probe=probe
        )  # fmt: skip
        photometric_loss(out.rgb[0], task.photos[view], SSIM_WEIGHT).backward()
        half = probe.new_tensor([0.5 * width, 0.5 * height])
        grad_sum += (probe.grad[0] * half).norm(dim=-1)
        num_views += out.radii[0] > 0
        self.optimizer.step(out.radii[0])
        self.optimizer.zero_grad(set_to_none=True)


class Gsplat:
    """gsplat as its own trainer uses it, with its optimiser of visible Gaussians; `packed` is its way to save memory."""

    name = "gsplat"
    packed = False

    def __init__(self, task: Task) -> None:
        import gsplat
        from gsplat.optimizers import SelectiveAdam

        self.rasterization = gsplat.rasterization
        self.task = task
        self.parameters = _leaves(task)
        self.optimizers = [
            SelectiveAdam([{"name": n, "params": [t], "lr": RATES[n]}], eps=EPS, betas=BETAS)
            for n, t in self.parameters.items()
        ]
        means = task.gaussians["means"]
        self.statistics = (means.new_zeros(len(means)), means.new_zeros(len(means)))

    def _rasterize(self, view: int) -> tuple[Tensor, dict]:
        p, task, one = self.parameters, self.task, slice(view, view + 1)
        width, height = task.size
        colours, _, info = self.rasterization(
            means=p["means"],
            quats=p["quats"],
            scales=p["log_scales"].exp(),
            opacities=p["opacity_logits"].sigmoid(),
            colors=torch.cat([p["sh0"], p["shN"]], dim=1),
            viewmats=task.viewmats[one],
            Ks=task.Ks[one],
            width=width,
            height=height,
            near_plane=NEAR,
            sh_degree=SH_DEGREE,
            packed=self.packed,
        )
        return colours[0], info

    def step(self, view: int) -> None:
        rgb, info = self._rasterize(view)
        info["means2d"].retain_grad()
        photometric_loss(rgb, self.task.photos[view], SSIM_WEIGHT).backward()
        width, height = self.task.size
        grad_sum, num_views = self.statistics
        with torch.no_grad():
            gradient = info["means2d"].grad
            lengths = (gradient * gradient.new_tensor([0.5 * width, 0.5 * height])).norm(dim=-1)
            if self.packed:
                ids = info["gaussian_ids"]
                seen = torch.zeros_like(grad_sum, dtype=torch.bool).index_fill_(0, ids, True)
                grad_sum.index_add_(0, ids, lengths)
            else:
                seen = (info["radii"][0] > 0).reshape(len(grad_sum), -1).all(-1)
                grad_sum += lengths[0]
            num_views += seen
        for optimizer in self.optimizers:
            optimizer.step(seen)
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def render(self, view: int) -> Tensor:
        return self._rasterize(view)[0]


class GsplatPacked(Gsplat):
    """With intermediate results for visible Gaussians alone."""

    name = "gsplat, packed"
    packed = True


CONTESTANTS: tuple[type[Contestant], ...] = (Ours, OursByAutograd, Gsplat, GsplatPacked)


def made_up_task(
    num: int, width: int, height: int, device: torch.device, num_views: int = 4
) -> Task:
    """Gaussians as a trained scene has them, seen by cameras that step sideways; photos are perturbed renders.

    The same for the same numbers, on every machine.
    """
    from benchmarks.made_up import synthetic_tensors

    torch.manual_seed(0)
    gaussians = {name: tensor.to(device) for name, tensor in synthetic_tensors(num).items()}
    focal = 0.85 * width  # about 60 degrees, as phone photos have
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    viewmats = torch.eye(4).repeat(num_views, 1, 1)
    for view in range(num_views):
        angle = 0.06 * (view - (num_views - 1) / 2)
        viewmats[view, 0, 0] = viewmats[view, 2, 2] = math.cos(angle)
        viewmats[view, 0, 2], viewmats[view, 2, 0] = math.sin(angle), -math.sin(angle)
        viewmats[view, 0, 3] = 0.1 * view
    viewmats, Ks = viewmats.to(device), K.repeat(num_views, 1, 1).to(device)
    empty = Task(gaussians, viewmats, Ks, torch.empty(num_views, height, width, 3, device=device))
    plain = Ours(empty)
    for view in range(num_views):
        noise = 0.1 * torch.randn(height, width, 3).to(device)
        empty.photos[view] = (plain.render(view) + noise).clamp(0, 1)
    return empty


def _leaves(task: Task) -> dict[str, Tensor]:
    return {name: task.gaussians[name].clone().requires_grad_(True) for name in RATES}


def usable(names: Callable[[str], bool]) -> tuple[list[type[Contestant]], list[str]]:
    """The contestants whose name is wanted and that can be imported here; and why others cannot."""
    found, missing = [], []
    for contestant in CONTESTANTS:
        if not names(contestant.name):
            continue
        try:
            if issubclass(contestant, Gsplat):
                import gsplat  # noqa: F401 - only whether it is there
        except ImportError as error:
            missing.append(f"{contestant.name}: {error}")
            continue
        found.append(contestant)
    return found, missing
