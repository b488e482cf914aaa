"""The flags of layered training, and what they say about each layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from s2d.checks import check_range
from s2d.completion import FILL_SHARE
from s2d.config import no_effect

Freeze = Literal["opacity", "all"]
Reset = Literal["none", "new", "all"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LayerFlags:
    """Flags that `--layers` brings into use; part of a script's Config."""

    layers: tuple[float, ...] = ()
    """How many times smaller the photos are for each layer, coarse to fine: 8,4,2,1. None: no layers."""
    layer_iters: tuple[int, ...] = (2500,)
    """Steps of a layer: one number for all, or one each."""
    layer_dssim: tuple[float, ...] = (0.2,)
    """Share of 1 - SSIM in a layer's loss: one for all, or one each. LapisGS's paper has 0.8, which its authors no longer advise."""
    layer_budget: tuple[int, ...] = ()
    """Most Gaussians that each layer adds. Default: --max-gaussians, divided in proportion to the layers' resolutions."""
    layer_points: float = 0.9
    """Share of its budget that a layer starts with as points of stage 0. 0: all but the first layer grow from the layers below alone."""
    layer_fill: float = FILL_SHARE
    """Share of those that starts where stage 0 has no depth, on a guess of it (docs/strategies.md)."""
    layer_sh_degree: int = 2
    """Degree of the view-dependent colour of all layers, 0 to 3."""
    freeze: Freeze = "opacity"
    """What a layer may still change in those below. opacity: nothing but their opacities, kept per level; all: nothing."""
    foundation: Path | None = no_effect(None)
    """Folder of finished layers to build on: the new ones come after these."""
    layer_depth_weight: float = 0.0
    """Weight of stage 0's depth of the kept photos, compared as relative inverse depth, when it sets in; falls to a hundredth. 0 disables."""
    layer_redundancy: bool = False
    """Also remove new Gaussians where several share one pixel's room, the faintest first."""
    layer_importance: float = 0.0
    """Share of the new Gaussians, those that add least to the kept views, removed in each of four rounds after densification. 0 disables."""
    layer_sh_cull: bool = False
    """Also take view-dependent colour from new Gaussians that look alike from everywhere."""
    layer_reset: Reset = "new"
    """Whose opacities are lowered to 0.01 now and then: none, those of the layer's own Gaussians, or all."""
    layer_reset_every: int = 3000
    """Steps of a layer between two resets."""
    layer_reset_to: float | None = None
    """With --layer-reset all: the opacity that Gaussians of the layers below are set to instead."""


@dataclass(frozen=True)
class LayerPlan:
    """What one layer is trained with."""

    factor: float
    """How many times smaller its photos are."""
    steps: int
    ssim_weight: float
    budget: int
    """Most Gaussians that it adds."""


def plan_layers(flags: LayerFlags, max_gaussians: int) -> tuple[LayerPlan, ...]:
    """Check the flags and spell them out per layer.

    Raises:
        ValueError: Factors that do not fall, a list of another length, or a number out of its range.
    """
    factors = flags.layers
    if list(factors) != sorted(set(factors), reverse=True) or min(factors, default=0) < 1:
        raise ValueError(
            f"--layers are factors by which photos are made smaller, coarse to fine, none below 1. Expected such as 8,4,2,1, "
            f"got {','.join(f'{factor:g}' for factor in factors) or 'none'}."
        )
    shares = [1 / factor for factor in factors]
    default_budget = tuple(int(max_gaussians * share / sum(shares)) for share in shares)
    plan = tuple(
        LayerPlan(*row)
        for row in zip(
            factors,
            _per_layer("--layer-iters", flags.layer_iters, factors),
            _per_layer("--layer-dssim", flags.layer_dssim, factors),
            _per_layer("--layer-budget", flags.layer_budget or default_budget, factors),
            strict=True,
        )
    )
    for layer in plan:
        check_range("layer_iters", layer.steps, 1)
        check_range("layer_dssim", layer.ssim_weight, 0, 1)
        check_range("layer_budget", layer.budget, 4)
    check_range("layer_sh_degree", flags.layer_sh_degree, 0, 3)
    check_range("layer_points", flags.layer_points, 0, 1)
    check_range("layer_fill", flags.layer_fill, 0, below=1)
    check_range("layer_importance", flags.layer_importance, 0, 0.9)
    check_range("layer_depth_weight", flags.layer_depth_weight, 0)
    check_range("layer_reset_every", flags.layer_reset_every, 1)
    if flags.layer_reset_to is not None:
        check_range("layer_reset_to", flags.layer_reset_to, above=0, below=1)
        if flags.layer_reset != "all":
            raise ValueError(
                f"--layer-reset-to sets opacities of the layers below, which --layer-reset {flags.layer_reset} leaves alone. "
                "Pass --layer-reset all with it."
            )
    if flags.freeze == "all" and flags.layer_reset == "all":
        raise ValueError(
            "--freeze all keeps the opacities of the layers below, --layer-reset all lowers them. Choose one."
        )
    return plan


def _per_layer(flag: str, values: tuple[T, ...], factors: tuple[float, ...]) -> tuple[T, ...]:
    if len(values) == 1:
        return values * len(factors)
    if len(values) != len(factors):
        raise ValueError(
            f"{flag} has {len(values)} values for {len(factors)} layers. Expected one for all, or one each."
        )
    return values
