"""`SampleSettings`: how samples are cut from what `--data` names. The defaults are the published ones for RealEstate10K."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s2d.checks import check_range
from s2d.hier.data.overlap import PairRule, PairSampler
from s2d.hier.data.samplers import BoundedSampler
from s2d.hier.data.samples import Source, TrainingSamples
from s2d.hier.data.sources import DataRules


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Flags of the training script."""

    image_size: tuple[int, int] = (256, 256)
    """Width and height of the pictures."""
    context_views: tuple[int, ...] = (2,)
    """Numbers of views that the model is shown; each step has one of them."""
    target_views: int = 4
    """Views that it must render."""
    shares: tuple[float, ...] = ()
    """Share of the samples of each of --data. Default: as many scenes as each has."""
    min_gap: tuple[int, int] = (25, 45)
    """Videos: frames between the outermost context views, at least, at the first step and after --gap-steps."""
    max_gap: tuple[int, int] = (45, 192)
    """At most."""
    gap_steps: int = 150_000
    """Steps over which the gaps grow."""
    near: float = 1.0
    """Videos whose scenes do not bring a range: nearest depth, world units."""
    far: float = 100.0
    """And the farthest."""
    min_overlap: float = 0.5
    """Posed scenes: a pair of views sees at least this share of each other's points."""
    min_angle: float = 1.5
    """With at least so much parallax, degrees."""
    max_angle: float = 35.0
    """And no more."""
    flip: bool = True
    """Mirror every other sample left to right."""
    random_crop: bool = False
    """Cut any part out of the photos instead of the middle."""
    unit_baseline: bool = False
    """Scale each sample so that its first two context cameras are 1 apart."""

    def check(self) -> None:
        """Raise ValueError for numbers that make no sense."""
        check_range("context_views", torch.tensor(self.context_views), 2)
        check_range("target_views", self.target_views, 1)
        check_range("image_size", torch.tensor(self.image_size), 16)
        check_range("gap_steps", self.gap_steps, 0)
        check_range("near", self.near, above=0, below=self.far)
        if self.shares:
            check_range("shares", torch.tensor(self.shares), above=0)

    def rules(self) -> DataRules:
        """How views are chosen."""
        return DataRules(
            BoundedSampler(self.min_gap, self.max_gap, self.gap_steps),
            PairSampler(PairRule(self.min_overlap, self.min_angle, self.max_angle)),
            self.near,
            self.far,
        )

    def samples(
        self, sources: Sequence[Source], samples_per_step: int, seed: int, with_depth: bool
    ) -> TrainingSamples:
        """The sequence of training samples.

        Raises:
            ValueError: nothing to draw from, or not one share per source.
        """
        shares = self.shares or tuple(float(len(source)) for source in sources)
        if len(shares) != len(sources):
            raise ValueError(
                f"--shares has {len(shares)} numbers for {len(sources)} data sets. Give one for each of --data."
            )
        return TrainingSamples(
            sources,
            shares,
            self.image_size,
            samples_per_step,
            self.context_views,
            self.target_views,
            seed,
            self.flip,
            self.random_crop,
            self.unit_baseline,
            with_depth,
        )
