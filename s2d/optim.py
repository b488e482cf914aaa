"""Learning rates, lengths of the schedule, and the optimiser of the Gaussians.

The table below is the whole of it: which tensor, which rate. The rates are 3DGS's, which takes 30,000 steps; the stages take a few
thousand with larger ones (FEW_STEPS). The one for the centres is in units of the scene extent, because positions have no scale of their own.

The optimiser is Adam on the rows that a view saw. Its bias correction counts all steps, not those of a row, as torch's
does: so a new Gaussian, whose moments start at zero, takes larger steps for a while. The alternatives (a count per row, none
at all, moments and rows that go on while no view sees them) were measured: LOG.md.
"""

import math
from dataclasses import dataclass, replace

import torch
from diff_gaussian_rasterization import SparseGaussianAdam
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians

# 3DGS: gradients of single Gaussians are tiny (means over all pixels), so Adam's usual 1e-8 would damp them.
ADAM_EPS = 1e-15
# Factor of 3DGS's rates with a third or less of its steps (chosen on ten scenes: docs/strategies.md).
FEW_STEPS = 2.0


def stage1_steps(num_kept: int) -> int:
    """Steps of each model of stage 1, where no flag gives them.

    Few photos are soon fitted, and more of the same overfits what lies between them; more photos hold more detail that agrees (docs/optimisation.md).
    """
    return min(2500 + 500 * max(num_kept - 3, 0), 4000)


@dataclass(frozen=True)
class LearningRates:
    """Adam step sizes, per parameter tensor."""

    means: float = 1.6e-4
    """Centres at the first step, in scene extents per step."""
    means_final: float = 1.6e-6
    """Centres at the last step; the rate decays exponentially in between."""
    log_scales: float = 5e-3
    quats: float = 1e-3
    opacity_logits: float = 0.025
    sh0: float = 2.5e-3
    shN: float = 2.5e-3 / 20
    """View-dependent colour: slower, or it explains away geometry."""

    @staticmethod
    def of_flags(lr_means: float, lr_factor: float) -> "LearningRates":
        """The rates of a stage: of its centres at the start, which fall to a hundredth; 3DGS's times a factor for the rest."""
        plain = LearningRates(means=lr_means, means_final=0.01 * lr_means)
        rest = ("log_scales", "quats", "opacity_logits", "sh0", "shN")
        return replace(plain, **{name: lr_factor * getattr(plain, name) for name in rest})


def scene_extent(
    cameras: Cameras,
    points: Tensor,  # [P, 3]
) -> float:
    """Measure how large the scene is: the radius of the rig, or half the median depth where that is more.

    3DGS takes the radius alone. Three photos from one side lie close together against what they show: the radius
    then says nothing about the scene, and centres that move by its fractions hardly move in the picture.

    Args:
        cameras: The kept ones.
        points: World; those behind a camera do not count. [P, 3]

    Returns:
        World units, > 0.
    """
    depths = points @ cameras.viewmats[:, 2, :3].T + cameras.viewmats[:, 2, 3]  # [P, C]
    in_front = depths[depths > 0]
    half_depth = 0.5 * float(in_front.median()) if in_front.numel() else 0.0
    return max(cameras.extent, half_depth, 1e-6)


def create_optimizer(
    gaussians: Gaussians, rates: LearningRates, scene_extent: float
) -> SparseGaussianAdam:
    """Make every tensor of `gaussians` a parameter of one Adam, one named group each.

    The groups keep the order and the names of `Gaussians.tensors()`; `densify.update_rows` relies on the names.

    Returns:
        Call `step(radii)` with the radii [N] of the view: Gaussians that it did not see (0) keep parameters and moments.
        `step()` updates all of them: for losses that reach what no view sees. It takes over the state_dict of a
        `torch.optim.Adam` with the same groups and goes on as that would have.
    """
    table = [
        # name             learning rate
        ("means", rates.means * scene_extent),
        ("log_scales", rates.log_scales),
        ("quats", rates.quats),
        ("opacity_logits", rates.opacity_logits),
        ("sh0", rates.sh0),
        ("shN", rates.shN),
    ]
    tensors = gaussians.tensors()
    groups = [
        {"name": name, "lr": lr, "params": [tensors[name].requires_grad_(True)]}
        for name, lr in table
    ]
    return SparseGaussianAdam(groups, lr=0.0, eps=ADAM_EPS, bias_correction=True)


def decayed_rate(initial: float, final: float, progress: float) -> float:
    """Interpolate log-linearly from `initial` (progress 0) to `final` (progress 1); clamped outside."""
    progress = min(max(progress, 0.0), 1.0)
    return math.exp((1.0 - progress) * math.log(initial) + progress * math.log(final))


def set_means_rate(
    optimizer: torch.optim.Adam, rates: LearningRates, scene_extent: float, progress: float
) -> None:
    """Give the centres the rate of this point of the schedule; the other rates are constant."""
    for group in optimizer.param_groups:
        if group["name"] == "means":
            group["lr"] = scene_extent * decayed_rate(rates.means, rates.means_final, progress)


def active_sh_degree(step: int, degree_every: int, max_degree: int) -> int:
    """Raise the SH degree by one every `degree_every` steps: colour first, then its view dependence."""
    return min(max_degree, step // degree_every) if degree_every > 0 else max_degree
