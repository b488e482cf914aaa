"""Which pixels of a model's depth maps become points. Thresholds give way before a photo loses nearly everything."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.checks import check_range


@dataclass(frozen=True)
class FilterSettings:
    """What is dropped, and how much must stay."""

    min_confidence: float = 0.1
    """Pixels of less confidence are dropped, in [0, 1]."""
    max_depth_step: float = 0.03
    """Pixels where inverse depth bends by more than this part of itself are dropped: edges, where networks put points between surfaces."""
    min_share: float = 0.3
    """So much of a photo's depth always stays, the best of it: the two thresholds above give way first."""

    def __post_init__(self) -> None:
        check_range("min_confidence", self.min_confidence, 0, 1)
        check_range("max_depth_step", self.max_depth_step, above=0)
        check_range("min_share", self.min_share, 0, 1)


def believed_pixels(
    depth: Tensor,  # [h, w]
    confidence: Tensor,  # [h, w]
    settings: FilterSettings,
) -> tuple[Tensor, str]:
    """Choose the pixels of one photo that become points.

    Args:
        depth: Camera z, 0 = none.
        confidence: In [0, 1].
        settings: Thresholds.

    Returns:
        - chosen [h, w] bool; at least min_share² of the pixels that have a depth
        - which thresholds gave way, for the log; empty if none
    """
    has_depth = depth.isfinite() & (depth > 0)
    if not bool(has_depth.any()):
        return has_depth, "no depth at all"
    gave_way = []
    # Zero confidence is a model's own mask (sky, reflections): no share of it must stay unless there is nothing else.
    candidates = has_depth & (confidence > 0)
    if not bool(candidates.any()):
        candidates = has_depth
        gave_way.append("confidence is 0 everywhere")
    # Both quantiles are rounded towards keeping more, so that the promised share holds to the pixel.
    enough = float(
        torch.quantile(_some(confidence[candidates]), 1 - settings.min_share, interpolation="lower")
    )
    threshold = min(settings.min_confidence, enough)
    if threshold < settings.min_confidence:
        gave_way.append(f"confidence {threshold:.3g}")
    chosen = candidates & (confidence >= threshold)
    bend = depth_edges(depth)
    enough = float(torch.quantile(_some(bend[chosen]), settings.min_share, interpolation="higher"))
    limit = max(settings.max_depth_step, enough)
    if limit > settings.max_depth_step:
        gave_way.append(f"depth step {limit:.3g}")
    return chosen & (bend <= limit), ", ".join(gave_way)


def depth_edges(depth: Tensor) -> Tensor:
    """How much inverse depth bends around each pixel, relative to itself. [h, w] -> [h, w]

    The second difference along rows and columns, the largest within one pixel. A plane has none however steep it is seen (its inverse depth is
    linear in the pixel), a step of x % has about x %, also where a network has smeared it over two pixels. Pixels without depth say nothing.
    """
    inverse = torch.where(depth > 0, 1 / depth, torch.nan)[None, None]
    rows = F.pad(inverse, (0, 0, 1, 1), mode="replicate")
    columns = F.pad(inverse, (1, 1, 0, 0), mode="replicate")
    across = columns[..., 2:] - 2 * inverse + columns[..., :-2]
    along = rows[..., 2:, :] - 2 * inverse + rows[..., :-2, :]
    # At the border the copied neighbour would turn a slope into a bend.
    across[..., [0, -1]] = 0
    along[..., [0, -1], :] = 0
    bend = torch.maximum(across.abs().nan_to_num(0), along.abs().nan_to_num(0)) / inverse
    return F.max_pool2d(bend.nan_to_num(0), 3, 1, 1)[0, 0]


def _some(values: Tensor) -> Tensor:
    """At most a million of them, evenly: torch.quantile takes no more than 16 million and sorts them all."""
    return values[:: max(1, len(values) // 1_000_000)]
