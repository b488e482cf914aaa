"""What layers are trained on and with, and what comes out of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians, concatenate
from s2d.layers.levels import read_parts, write_levels
from s2d.layers.manifest import MANIFEST, Levels, load_levels
from s2d.layers.options import LayerFlags
from s2d.layers.rows import level_opacities
from s2d.memory_plan import DataDevice
from s2d.optim import LearningRates
from s2d.ply_io import PointCloud
from s2d.refinement import RefinementRates
from s2d.sampling import SampleDrop
from s2d.scene import Scene
from s2d.strategies.settings import Strategy
from s2d.views import ViewSource


@dataclass(frozen=True)
class LayerTask:
    """What all layers are trained on and with."""

    flags: LayerFlags
    views: ViewSource
    """Views at full resolution."""
    kept: Cameras
    points: PointCloud
    """What new rows start from."""
    scene_extent: float
    guessed: tuple[Tensor, Tensor] = field(
        default_factory=lambda: (torch.zeros(0, 3), torch.zeros(0, 3))
    )
    """Positions [G, 3] and colours [G, 3] of points where stage 0 has none; new rows start from some of them, too."""
    photos: Scene | None = None
    """The kept views alone, for `strategy`; None: no strategies."""
    strategy: Strategy = field(default_factory=lambda: Strategy(dropout=0, clearance=0))
    """Dropout, clearance and isolation."""
    backdrop: bool = False
    """Put a backdrop behind the first layer, as rows of it."""
    novel: tuple[str, ...] = ()
    """Names of pseudo views, if they are trained on."""
    novel_cameras: Cameras | None = None
    """All of them, trained on or not: their places are kept clear."""
    initial: tuple[Gaussians, ...] = ()
    """New rows per layer, instead of points."""
    depth: Callable[[str], tuple[Tensor, Tensor]] | None = None
    """Kept view → depth and confidence [H, W] at full resolution, for depth supervision."""
    alpha: float = 0.7
    sample_drop: SampleDrop = "normalised"
    sh_degree_every: int = 1000
    rates: LearningRates = field(default_factory=LearningRates)
    densify: bool = True
    grad_threshold: float = 2e-4
    opacity_weight: float = 0.0
    seed: int = 0
    checkpoint_every: int = 500
    refinement_rates: RefinementRates = field(default_factory=RefinementRates)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where to train; all else here, and what comes out, is on the CPU."""
    data_device: DataDevice = "auto"


@dataclass
class TrainedLayers:
    """Finished layers, coarsest first."""

    parts: list[Gaussians]
    """The rows that each adds, with their opacities at that level."""
    opacities: list[Tensor | None]
    """Per layer, logits of the rows below; None for the first, and where opacities are frozen too."""
    rescales: list[float]
    metrics: list[dict[str, Any] | None]

    @staticmethod
    def load(folder: Path | None, sh_degree: int) -> "TrainedLayers":
        """Read finished layers to build on; None is no layers.

        Raises:
            ValueError: They have another SH degree.
        """
        if folder is None:
            return TrainedLayers([], [], [], [])
        levels = load_levels(folder)
        if levels.sh_degree != sh_degree:
            raise ValueError(
                f"The layers in {folder} have SH degree {levels.sh_degree}, the new ones {sh_degree}. Pass --layer-sh-degree {levels.sh_degree}."
            )
        parts, opacities = read_parts(levels, len(levels) - 1, all_lists=True)
        rescales = [level.rescale for level in levels.levels]
        return TrainedLayers(parts, opacities, rescales, [level.metrics for level in levels.levels])

    def save(self, folder: Path) -> Levels:
        """Write them as a folder of levels, bit for bit."""
        return write_levels(folder, self.parts, self.opacities, self.rescales, metrics=self.metrics)

    @property
    def gaussians(self) -> Gaussians | None:
        """All rows, with the opacities of the last level."""
        if not self.parts:
            return None
        joined = concatenate(self.parts)
        own = [part.opacity_logits for part in self.parts]
        joined.opacity_logits = level_opacities(own, self.opacities)
        return joined


def initial_rows(folder: Path, num_layers: int, sh_degree: int) -> tuple[Gaussians, ...]:
    """Read levels of an initialiser as what layers start from; none where there is no such folder.

    Raises:
        ValueError: Another number of levels than layers, or another SH degree.
    """
    if not (folder / MANIFEST).is_file():
        return ()
    levels = load_levels(folder)
    if (len(levels), levels.sh_degree) != (num_layers, sh_degree):
        raise ValueError(
            f"{folder} has {len(levels)} levels of SH degree {levels.sh_degree}. Expected {num_layers}, one per layer, of degree {sh_degree}: "
            "change --layers or --layer-sh-degree."
        )
    parts, _ = read_parts(levels, len(levels) - 1)
    return tuple(parts)
