"""3DGS as Markov Chain Monte Carlo (Kheradmand et al. 2024): relocation of dead Gaussians, growth to a budget, noise.

Dead Gaussians (opacity at most 0.005) move onto live ones, drawn with probability proportional to opacity; a live one with n - 1 newcomers becomes n
equal Gaussians that look like the old one:

    o' = 1 - (1 - o)^(1/n),   s' = s o / Σ_{k=1..n} C(n, k) (-1)^(k-1) o'^k / √k

which keeps the integral of the blended profile along any line through the centre. (The paper has a double sum; its inner index sums
to C(n, k).) Each step adds noise to the centres of faint Gaussians, along their own covariance Σ:

    μ += λ (lr / L) σ(100 (0.005 - o)) (Σ / L) η,   η ~ N(0, 1)

lr is the centres' current rate in world units and L the scene's extent; the paper has λ lr Σ with λ = 5e5 in scenes of L ≈ 5, which here is 1e7.
"""

import math

import torch
from torch import Tensor

from s2d.densify import DensifyState, update_rows
from s2d.device import generator_on, on_gpu
from s2d.gaussians import Gaussians
from s2d.geometry import quat_to_rotation

DEAD_OPACITY = 0.005
NOISE = 1e7
SHARPNESS = 100.0
# Alternating sums of more terms lose their digits; more than this many in one place are not needed.
MAX_COPIES = 12
# Above this opacity the noise's weight is below 1e-4 of its full size.
NOISE_OPACITY = 0.1


def shared_shape(
    opacities: Tensor,  # [N]
    copies: Tensor,  # [N] int
) -> tuple[Tensor, Tensor]:
    """Opacity of each of `copies` equal Gaussians in one place, and the factor of their scales, so that together they look like one.

    Returns:
        - o' [N]
        - s' / s [N]
    """
    copies = copies.clamp(1, MAX_COPIES)
    old = opacities.double().clamp(1e-6, 1 - 1e-6)
    new = 1 - (1 - old) ** (1 / copies.double())
    k = torch.arange(1, MAX_COPIES + 1, dtype=torch.float64, device=opacities.device)
    table = torch.tensor(
        [
            [math.comb(n, j) * (-1.0) ** (j - 1) for j in range(1, MAX_COPIES + 1)]
            for n in range(MAX_COPIES + 1)
        ],
        dtype=torch.float64,
        device=opacities.device,
    )
    total = (table[copies] * new[:, None] ** k / k.sqrt()).sum(1)
    return new.float(), (old / total).float()


def relocate_and_grow(
    gaussians: Gaussians,
    optimizer: torch.optim.Adam,
    growth: float,
    max_gaussians: int,
    generator: torch.Generator,
) -> DensifyState:
    """Run one round: move the dead onto the living, then add a share of new ones up to the budget.

    Args:
        gaussians, optimizer: Changed in place; moments of everything that changes start at zero.
        growth: New Gaussians per old one.
        max_gaussians: The budget.
        generator: Source of the draws.

    Returns:
        Fresh statistics for the new rows.
    """
    num, device = gaussians.num, gaussians.means.device
    opacities = torch.sigmoid(gaussians.opacity_logits.detach())
    alive = opacities > DEAD_OPACITY
    same = torch.arange(num, device=device)
    added = max(0, min(int(growth * num), max_gaussians - num))
    dead = (~alive).nonzero()[:, 0]
    if len(dead) == num or len(dead) + added == 0:  # nobody to follow, or nothing to do
        return DensifyState.zeros(num, device, same)
    chance = torch.where(alive, opacities, torch.zeros_like(opacities)).cpu()
    drawn = torch.multinomial(chance, len(dead) + added, replacement=True, generator=generator)
    drawn = drawn.to(device)
    source = torch.cat([same, drawn[len(dead) :]])  # row of the old one, per new row
    source[dead] = drawn[: len(dead)]
    copies = source.bincount(minlength=num)
    new_opacity, factor = shared_shape(opacities, copies)
    logits, log_factor = torch.logit(new_opacity, eps=1e-6), factor.log()
    changed = (copies != 1)[source]
    changed[num:] = True
    changed[dead] = True

    def values(name: str, old: Tensor) -> Tensor:
        new = old[source]
        if name == "opacity_logits":
            new = torch.where(changed, logits[source], new)
        elif name == "log_scales":
            new = torch.where(changed[:, None], new + log_factor[source, None], new)
        return new

    def moments(old: Tensor) -> Tensor:
        new = old[source]
        new[changed] = 0
        return new

    update_rows(gaussians, optimizer, values, moments)
    return DensifyState.zeros(gaussians.num, device, source)


@torch.no_grad()
def add_noise(
    gaussians: Gaussians, rate: float, scene_extent: float, generator: torch.Generator
) -> None:
    """Move the centres of faint Gaussians at random, in place.

    Args:
        gaussians: Changed in place.
        rate: The centres' current learning rate, world units.
        scene_extent: L, world units.
        generator: Source of η (`generator_on`); a GPU draws it for all Gaussians, because which are faint it would have to tell first.
    """
    opacities = torch.sigmoid(gaussians.opacity_logits)
    if on_gpu(opacities):
        own = generator_on(opacities.device, generator)
        rows = slice(None)
        noise = torch.randn(len(opacities), 3, 1, generator=own, device=opacities.device)
    else:
        rows = (opacities < NOISE_OPACITY).nonzero()[:, 0]
        noise = torch.randn(len(rows), 3, 1, generator=generator)
    weight = torch.sigmoid(SHARPNESS * (DEAD_OPACITY - opacities[rows]))
    weight = weight * (opacities[rows] < NOISE_OPACITY)
    rotation = quat_to_rotation(gaussians.quats[rows])
    variances = (2 * gaussians.log_scales[rows]).exp()
    moved = (rotation @ (variances[:, :, None] * (rotation.mT @ noise)))[:, :, 0]
    scale = NOISE * (rate / scene_extent) / scene_extent
    gaussians.means[rows] += scale * weight[:, None] * moved
