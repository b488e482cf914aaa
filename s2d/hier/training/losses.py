"""What training minimises: over the cumulative sets of all levels, the error of the target views, and of known depths.

Facts: HiSplat's loss is the sum over its three sets, equally weighted, of MSE + 0.05 LPIPS (VGG) on four target views.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.device import DTYPES, Precision
from s2d.fixer.training.perceptual import TappedBackbone, lpips_distance
from s2d.geometry import project
from s2d.hier.config import STRIDES
from s2d.hier.gaussians import HierGaussians, render
from s2d.hier.views import Views
from s2d.metrics import Lpips


@dataclass(frozen=True)
class HierWeights:
    """Factor of each term; 0 leaves it out."""

    lpips: float = 0.05
    depth: float = 0.0
    """Of the relative error of inverse depths at points that the context views are known to see."""


class HierLoss(nn.Module):
    """The terms, and the network that LPIPS needs.

    Args:
        weights: Which terms, and how much of each.
        lpips: Loaded where its weight is not 0.
        precision: What LPIPS's network computes in.
    """

    def __init__(
        self, weights: HierWeights, lpips: Lpips | None, precision: Precision = "fp32"
    ) -> None:
        super().__init__()
        self.weights = weights
        self.precision = precision
        self.backbone = None if lpips is None or weights.lpips == 0 else TappedBackbone(lpips)

    def forward(
        self,
        levels: list[HierGaussians],
        context: Views,
        target: Views,
        context_depth: Tensor | None = None,  # [B, V, H, W]
    ) -> dict[str, Tensor]:
        """Compute `loss` and, unweighted, what it is the sum of: `mse_0` … of each level, `lpips` and `depth` of all levels. Scalars"""
        terms: dict[str, Tensor] = {}
        renders = [render(gaussians, target) for gaussians in levels]
        for level, rendered in enumerate(renders):
            terms[f"mse_{level}"] = F.mse_loss(rendered, target.images)
        loss = sum(terms.values())
        if self.backbone is not None:
            terms["lpips"] = self._lpips(renders, target.images)
            loss = loss + self.weights.lpips * terms["lpips"]
        if self.weights.depth > 0 and context_depth is not None:
            terms["depth"] = depth_error(levels[-1], context, context_depth)
            loss = loss + self.weights.depth * terms["depth"]
        return {"loss": loss, **terms}

    def _lpips(self, renders: list[Tensor], images: Tensor) -> Tensor:
        """Summed over the levels, averaged over pictures."""
        with torch.autocast(
            images.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"
        ):
            with torch.no_grad():
                truth = self.backbone(images.flatten(0, 1) * 2 - 1)
            distance = torch.zeros((), device=images.device)
            for rendered in renders:
                taps = self.backbone(rendered.clamp(max=1.0).flatten(0, 1) * 2 - 1)
                distance = distance + lpips_distance(taps, truth, self.backbone.heads)
        return distance


def depth_error(
    gaussians: HierGaussians,
    context: Views,
    depth: Tensor,  # [B, V, H, W]
) -> Tensor:
    """How far Gaussians lie from known depths along their rays, as |1/z - 1/d| in units of the searched range.

    A level's Gaussians come view after view, equally many of each; each is compared with the nearest known point in its cell of the level's
    grid. Averaged over what there is to compare in each level, over levels, then over scenes; so it does not matter how scenes are shared
    out among processes. A level without any counts 0. Scalar; differentiable in the means
    """
    errors = []
    for b in range(context.num_scenes):
        for level, stride in enumerate(STRIDES):
            means = gaussians.means[b, gaussians.levels == level]
            if len(means):
                errors.append(_level_error(means, stride, context, depth, b))
    return torch.stack(errors).sum() / (context.num_scenes * len(gaussians.levels.unique()))


def _level_error(
    means: Tensor,  # [V * n, 3]
    stride: int,
    context: Views,
    depth: Tensor,  # [B, V, H, W]
    b: int,
) -> Tensor:
    total, count = means.new_zeros(()), 0
    for v, own in enumerate(means.chunk(context.num_views)):
        xy, z = project(own, context.Ks[b, v], context.viewmats[b, v])
        inverse = torch.where(depth[b, v] > 0, 1 / depth[b, v].clamp(min=1e-9), 0.0)
        # The nearest point of each cell; 0 where there is none.
        known = F.max_pool2d(inverse[None, None], stride, ceil_mode=True)[0, 0]
        column, line = (xy.detach() / stride).floor().long().unbind(-1)
        inside = (z > 0) & (column >= 0) & (column < known.shape[1])
        inside &= (line >= 0) & (line < known.shape[0])
        wanted = known[line[inside], column[inside]]
        here = wanted > 0
        unit = 1 / context.near[b, v] - 1 / context.far[b, v]
        total = total + ((1 / z[inside][here] - wanted[here]).abs() / unit).sum()
        count += int(here.sum())
    return total / max(count, 1)
