"""`Strategy`: the switches of all strategies, shared by stages 1 and 3."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from s2d.checks import check_range
from s2d.densify import DensifyPolicy

# Share of the Gaussians left out with V kept photos: DROPOUT_VIEWS / V.
LARGEST_DROPOUT = 0.2
DROPOUT_VIEWS = 0.6
# Isolation in stage 3. Stage 1 still places what stage 0 has guessed wrongly (docs/strategies.md).
FINAL_ISOLATION = 0.2

# Growth in stage 3 on fixed views, too. On the kept photos alone, as in stage 1, it invents more where few photos look (docs/strategies.md).
FINAL_GROWTH = "absgrad"
FINAL_RECYCLE = 0.05
# Lengths that do not cancel are longer: the threshold that 3DGS has for the others is doubled, as AbsGS's authors do.
ABSGRAD_FACTOR = 2.0

# Fields that only choose numbers of the ordinary training.
_PLAIN = ("sh_by_views", "densify_from", "densify_every", "densify_until")


@dataclass(frozen=True)
class Strategy:
    """Strategies for few photos. docs/strategies.md says what they do and what they were worth; what won on average is on by default."""

    dropout: float | None = None
    """Share of the Gaussians left out of each training render, growing from 0 towards this, none at the end of the schedule. 0 disables; without: 0.6 / kept photos, at most 0.2."""
    opacity_decay: float = 1.0
    """Factor of every opacity after each step: what no photo holds up fades. 1 disables; 0.9995 halves in 1400 steps."""
    binocular_weight: float = 0.0
    """Weight of the difference between a photo and the render of a camera beside it, warped back by the rendered depth."""
    binocular_from: float = 0.5
    """Share of the schedule after which that starts: the depth must be right in the main first."""
    depth_weight: float = 0.0
    """Weight of the difference between rendered depth and stage 0's, by its confidence."""
    depth_loss: Literal["inverse", "pearson"] = "inverse"
    """inverse: relative difference of inverse depths; pearson: their correlation alone, for depth of unknown scale."""
    normal_weight: float = 0.0
    """Weight of 1 - cosine between the normals of rendered depth and of stage 0's, by its confidence."""
    smooth_weight: float = 0.0
    """Weight of the rendered depth's steps where the photo has no edge."""
    max_scale: float = 0.0
    """Largest standard deviation of a Gaussian, in scene extents. 0 disables."""
    max_elongation: float = 0.0
    """Largest ratio of a Gaussian's longest to its middle axis: needles fit one photo and cross the next view. 0 disables."""
    prune_floaters: bool = False
    """Remove Gaussians that stand where more photos, by stage 0's depth, see through than see a surface."""
    clearance: float = 0.5
    """Nothing stands where people look from: at the kept cameras, on the ways between neighbours and at the novel cameras, this share of the distance to the nearest point of stage 0 is kept clear. 0 disables."""
    isolation: float | None = None
    """Remove Gaussians farther from all surfaces than this share of their distance to the nearest kept camera; surfaces are stage 0's points and the smooth continuation of its depth. 0 disables; without: 0.2 in stage 3, 0 in stage 1 and with layers."""
    grow: Literal["gradient", "absgrad", "residual", "mcmc"] | None = None
    """What asks for more Gaussians: the 2D gradient; its length pixel by pixel, which does not cancel where a blurred patch is wrong all over (AbsGS); the photos' residual; or MCMC, which moves the faint to where opacity is and adds noise. Without: absgrad in stage 3 where it has fixed views, gradient in stage 1, with layers, and on kept photos alone."""
    recycle: float | None = None
    """Share of the Gaussians that make place in each round once --max-gaussians is reached, those that all views show least. Only with --grow gradient and absgrad. 0 disables; without: 0.05 in stage 3 where it has fixed views, else 0."""
    growth: float = 0.05
    """Share of new Gaussians in a round of --grow residual and mcmc, up to --max-gaussians."""
    scale_weight: float = 0.0
    """Weight of the mean standard deviation, in scene extents, in the loss; MCMC's authors use 0.01 with --opacity-weight 0.01."""
    sh_by_views: bool = False
    """Lower the SH degree to what the number of kept photos can tell: 0 up to 3 photos, 1 up to 6, 2 up to 12."""
    smoothing: bool = False
    """Keep every Gaussian at least as large as the photos' pixels can show (Mip-Splatting's 3D filter)."""
    average_last: float = 0.0
    """Share of the steps, the last ones, over which the parameters are averaged for the result. 0 disables."""
    support: bool = False
    """Write into the PLY how many kept photos hold each Gaussian up (`support`)."""
    prune_support: float = 0.0
    """Remove Gaussians with less support than this at the end. 0 disables."""
    densify_from: int = 500
    """First step with density control."""
    densify_every: int = 100
    """Steps between two rounds of density control."""
    densify_until: float = 0.5
    """Last step with density control, as a share of the stage's steps."""

    @property
    def active(self) -> bool:
        """Whether a training step differs from that of plain 3DGS."""
        return self.without_naming_plain()._differs_from(Strategy(dropout=0, clearance=0))

    @property
    def chosen(self) -> bool:
        """Whether a training step differs from that of the defaults."""
        return self._differs_from(Strategy())

    @property
    def wants_support(self) -> bool:
        return self.support or self.prune_support > 0

    def _differs_from(self, other: "Strategy") -> bool:
        return any(
            getattr(self, field.name) != getattr(other, field.name)
            for field in fields(self)
            if field.name not in _PLAIN
        )

    def for_views(self, num_kept: int) -> "Strategy":
        """The same with the numbers that follow from how many photos are kept: the more, the less there is to overfit."""
        if self.dropout is not None:
            return self
        return replace(self, dropout=min(LARGEST_DROPOUT, DROPOUT_VIEWS / num_kept))

    def for_final_scene(self, has_fixed_views: bool) -> "Strategy":
        """The same with what stage 3 has of its own, where nothing else is asked for."""
        own: dict[str, Any] = {"isolation": FINAL_ISOLATION}
        if has_fixed_views:
            own["grow"] = FINAL_GROWTH
            if self.grow in (None, "gradient", "absgrad"):
                own["recycle"] = FINAL_RECYCLE
        return replace(
            self, **{name: value for name, value in own.items() if getattr(self, name) is None}
        )

    def without_naming_plain(self) -> "Strategy":
        """The same with nothing in place of what names plain 3DGS's way, which stage 1 and layers have without it."""
        return replace(
            self,
            isolation=self.isolation or None,
            grow=None if self.grow == "gradient" else self.grow,
            recycle=self.recycle or None,
        )

    def densify_policy(
        self, enabled: bool, grad_threshold: float, max_gaussians: int
    ) -> DensifyPolicy:
        """When and how the number of Gaussians changes; the arguments are the stages' own settings of it."""
        return DensifyPolicy(
            enabled,
            self.densify_from,
            self.densify_until,
            self.densify_every,
            grad_threshold * (ABSGRAD_FACTOR if self.grow == "absgrad" else 1.0),
            max_gaussians=max_gaussians,
        )

    def sh_degree(self, given: int, num_kept: int) -> int:
        """The highest degree to use with so many kept photos; `given` is what was asked for.

        k coefficients per channel and Gaussian are told apart from geometry by more than k directions only; few photos see a Gaussian
        from as many directions as there are photos, at most.
        """
        if not self.sh_by_views:
            return given
        return min(
            given, 0 if num_kept <= 3 else 1 if num_kept <= 6 else 2 if num_kept <= 12 else 3
        )

    def check(self) -> None:
        """Raise ValueError for a value that makes no sense; called by the stages before anything is read."""
        if self.dropout is not None:
            check_range("dropout", self.dropout, 0, below=1)
        check_range("opacity_decay", self.opacity_decay, 0.5, 1, hint="Try 0.9995.")
        for name in ("binocular_from", "average_last", "densify_until", "clearance"):
            check_range(name, getattr(self, name), 0, 1)
        for name in ("binocular_weight", "depth_weight", "normal_weight", "smooth_weight"):
            check_range(name, getattr(self, name), 0)
        for name in ("max_scale", "growth", "scale_weight", "prune_support"):
            check_range(name, getattr(self, name), 0)
        if self.isolation is not None:
            check_range("isolation", self.isolation, 0)
        if self.recycle is not None:
            check_range("recycle", self.recycle, 0, below=1)
            if self.recycle and self.grow in ("residual", "mcmc"):
                raise ValueError(
                    f"--recycle: no effect with --grow {self.grow}, which has a rule of its own. Leave one of them out."
                )
        if self.max_elongation != 0:
            check_range("max_elongation", self.max_elongation, 1, hint="0 disables.")
        check_range("densify_every", self.densify_every, 1)
