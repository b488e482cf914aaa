"""`--init hier` and `--init depth`: from the kept photos to what stage 1 starts with, in levels.

With weights each kept view is predicted together with those that see most of the same, and gives its own rows; without, stage 0's depth is turned into levels.
Then the views are brought together: what stands in front of a surface that more views believe in goes, and what is left is thinned evenly to the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from s2d.depth_io import depth_path
from s2d.gaussians import Gaussians, concatenate, thin_points
from s2d.geometry import in_picture, project
from s2d.hier.analytic import analytic_levels
from s2d.hier.config import NUM_LEVELS, STRIDES
from s2d.hier.gaussians import OPACITY_MARGIN, HierGaussians
from s2d.hier.kept_views import common_size, kept_views, neighbours, stage0_depths
from s2d.hier.views import Views
from s2d.hier.weights import load_info, load_model
from s2d.layers.levels import write_levels
from s2d.layers.manifest import Levels
from s2d.layers.rows import level_opacities, pick_rows
from s2d.scene import Scene

# What a network looks at where its weights do not say what they were trained on: the published size.
PUBLISHED_SIZE = (256, 256)
# Rows that are made of depth per row that is kept: photos overlap, and what agrees is the same surface several times.
SURPLUS = 3.0
# Neighbours that a view is compared with.
NUM_NEIGHBOURS = 2
# Relative difference of depth up to which two views mean the same surface.
SAME_SURFACE = 0.04
# What is fainter believes in no surface; depth that is guessed has 0.5.
BELIEVED_OPACITY = 0.6


@dataclass
class HierStart:
    """What stage 1 starts from, level after level."""

    parts: list[Gaussians]
    """The rows that each level adds, with their opacities at that level."""
    opacities: list[Tensor | None]
    """Per level, logits of the rows below at that level; None for the first."""
    level_ids: list[int]
    """Which of the model's levels each is."""

    @property
    def gaussians(self) -> Gaussians:
        """All rows, with the opacities of the last level."""
        joined = concatenate(self.parts)
        own = [part.opacity_logits for part in self.parts]
        joined.opacity_logits = level_opacities(own, self.opacities)
        return joined

    @property
    def levels(self) -> Tensor:
        """The level of each row. [N] int64"""
        counts = torch.tensor([part.num for part in self.parts])
        return torch.tensor(self.level_ids).repeat_interleave(counts)

    def save(self, folder: Path) -> Levels:
        """Write them as levels that stage 3's layers can start from (docs/data_formats.md)."""
        rescales = [1 / STRIDES[level] for level in self.level_ids]
        return write_levels(folder, self.parts, self.opacities, rescales)


def hier_start(
    kept: Scene,
    points: Tensor,  # [P, 3]
    stage0_dir: Path,
    weights: Path | None,
    max_gaussians: int,
    sh_degree: int,
    device: torch.device | str = "cpu",
) -> HierStart:
    """Make levels of Gaussians from the kept photos. The same input gives the same result.

    Args:
        kept: The kept views.
        points: Of stage 0, world. [P, 3]
        stage0_dir: OUT/stage0, for the depth of the kept views; read without weights alone.
        weights: Of `HierModel`; None: the analytic levels.
        max_gaussians: Of all levels together.
        sh_degree: Of the result.
        device: Where the network runs; the result is on the CPU.

    Raises:
        FileNotFoundError: The weights, or stage 0's depth where there are none.
        ValueError: A single kept view with weights; too few points to know the range of depth.
    """
    if weights is None:
        # A view of unknown depth has nothing to give; if all are, reading says so.
        known = [name for name in kept.names if depth_path(stage0_dir, name).is_file()]
        kept = kept.subset(known) if known else kept
        rows_per_pixel = sum(1 / stride**2 for stride in STRIDES)
        pixels = SURPLUS * max_gaussians / (rows_per_pixel * len(kept))
        views = kept_views(kept, points, common_size(kept, pixels))
        depths = stage0_depths(stage0_dir, kept, (views.width, views.height))
        found = analytic_levels(views, *depths, sh_degree=sh_degree)
        rows = _Rows.of(found, views, list(range(len(kept))), list(range(len(kept))))
    else:
        # Things have the sizes in pixels that the network knows; what is too many is thinned.
        trained = math.prod(load_info(weights).get("image_size", PUBLISHED_SIZE))
        views = kept_views(kept, points, common_size(kept, trained))
        rows = _predicted(kept, points, views, weights, device)
    contradicted, rows.confirmed = _compared(rows, views)
    return _start(rows.pick(contradicted <= rows.confirmed), max_gaussians, sh_degree)


@dataclass
class _Rows:
    """Gaussians with what is known of where they come from."""

    gaussians: Gaussians
    levels: Tensor  # [N]
    views: Tensor  # [N] row of the kept views
    opacities: Tensor  # [N, levels]: at each level; 0 where the row is of a later one
    confirmed: Tensor  # [N] number of other views that have the same surface

    @staticmethod
    def of(
        found: list[HierGaussians], views: Views, members: list[int], wanted: list[int]
    ) -> _Rows:
        """Take the rows of the views `wanted` from what was predicted for the views `members` together."""
        last = found[-1]
        of_view = torch.cat(
            [
                torch.tensor(members).repeat_interleave(int(count) // len(members))
                for count in last.levels.bincount(minlength=NUM_LEVELS)
            ]
        )
        opacities = torch.zeros(last.num, NUM_LEVELS)
        for level in found:
            opacities[: level.num, int(level.levels[-1])] = level.opacities[0]
        unknown = torch.zeros(last.num, dtype=torch.long)
        rows = _Rows(last.scene(0).detached(), last.levels, of_view, opacities, unknown)
        return rows.pick(torch.isin(of_view, torch.tensor(wanted)))

    def pick(self, chosen: Tensor) -> _Rows:
        return _Rows(
            pick_rows(self.gaussians, chosen),
            self.levels[chosen],
            self.views[chosen],
            self.opacities[chosen],
            self.confirmed[chosen],
        )

    @staticmethod
    def joined(parts: list[_Rows]) -> _Rows:
        """Join sets, coarsest level first."""
        whole = _Rows(
            concatenate([part.gaussians for part in parts]),
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("levels", "views", "opacities", "confirmed")
            ),
        )
        return whole.pick(whole.levels.argsort(stable=True))


def _predicted(
    kept: Scene, points: Tensor, views: Views, weights: Path, device: torch.device | str
) -> _Rows:
    """Every view's own rows, predicted together with its neighbours; up to three views are one group."""
    if len(kept) < 2:
        raise ValueError(
            "hier_start: a network needs at least 2 kept views, got 1. Keep more photos, or pass --init depth."
        )
    model = load_model(weights).to(device)
    if len(kept) <= NUM_NEIGHBOURS + 1:
        everything = list(range(len(kept)))
        groups = [(everything, everything)]
    else:
        groups = [
            ([view, *others], [view])
            for view, others in enumerate(neighbours(kept, points, NUM_NEIGHBOURS))
        ]
    parts = []
    for members, wanted in groups:
        with torch.no_grad():
            found = model(views.select(members).to(device))
        on_cpu = [
            HierGaussians(**{name: tensor.cpu() for name, tensor in vars(level).items()})
            for level in found
        ]
        parts.append(_Rows.of(on_cpu, views, members, wanted))
    return _Rows.joined(parts)


def _compared(rows: _Rows, views: Views) -> tuple[Tensor, Tensor]:
    """Count for each row the other views whose surface it stands in front of, and those whose surface it is. [N], [N]

    A view's surface is its own finest rows, cell by cell. Behind a surface is no contradiction: it may be hidden.
    """
    own = (rows.levels[:, None] == NUM_LEVELS - 1) & (
        rows.views[:, None] == torch.arange(views.num_views)
    )
    contradicted = torch.zeros(len(rows.levels), dtype=torch.long)
    confirmed = torch.zeros_like(contradicted)
    for view in range(views.num_views):
        K, viewmat = views.Ks[0, view], views.viewmats[0, view]
        surface = rows.gaussians.means[own[:, view]]
        believed = rows.opacities[own[:, view], -1] >= BELIEVED_OPACITY
        depth_map = (project(surface, K, viewmat)[1] * believed).reshape(views.height, views.width)
        xy, depth = project(rows.gaussians.means, K, viewmat)
        inside = in_picture(xy, depth, (views.width, views.height)) & (rows.views != view)
        column, row = xy[inside].long().unbind(1)
        there = torch.zeros_like(depth)
        there[inside] = depth_map[row, column]
        known = inside & (there > 0)
        contradicted += known & (depth < there * (1 - SAME_SURFACE))
        confirmed += known & ((depth - there).abs() <= there * SAME_SURFACE)
    return contradicted, confirmed


def _start(rows: _Rows, max_gaussians: int, sh_degree: int) -> HierStart:
    """Thin every level by the same share, and let what is left grow so that surfaces stay closed."""
    share = min(1.0, max_gaussians / len(rows.levels))
    level_ids = rows.levels.unique().tolist()
    parts, kept_opacities = [], []
    for level in level_ids:
        members = torch.nonzero(rows.levels == level)[:, 0]
        budget = max(1, int(share * len(members)))
        means = rows.gaussians.means[members]
        chosen = members[thin_points(means, budget, rows.opacities[members, -1])]
        part = _with_degree(pick_rows(rows.gaussians, chosen), sh_degree)
        # On a surface n times fewer Gaussians have each n times the area; of those that lie on each other, one is enough.
        copies = 1 + rows.confirmed[members].float().mean()
        grown = 0.5 * torch.log((len(members) / len(chosen) / copies).clamp(min=1))
        logits = torch.logit(rows.opacities[chosen], eps=OPACITY_MARGIN)
        parts.append(
            replace(part, log_scales=part.log_scales + grown, opacity_logits=logits[:, level])
        )
        kept_opacities.append(logits)
    below: list[Tensor | None] = [None]
    for number, level in list(enumerate(level_ids))[1:]:
        below.append(torch.cat([logits[:, level] for logits in kept_opacities[:number]]))
    return HierStart(parts, below, level_ids)


def _with_degree(gaussians: Gaussians, sh_degree: int) -> Gaussians:
    """Cut or extend the spherical harmonics."""
    wanted = (sh_degree + 1) ** 2 - 1
    shN = gaussians.shN[:, :wanted]
    missing = shN.new_zeros(len(shN), wanted - shN.shape[1], 3)
    return replace(gaussians, shN=torch.cat([shN, missing], 1))
