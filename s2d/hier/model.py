"""The network: context views in, Gaussians of three levels out.

Pyramid of each picture → transformer between the views → plane sweep at the coarsest level → per level: refine depth, one Gaussian per cell; between
levels: render what there is into the context views, feed the error on, fade older levels. See docs/hier.md for what is published and what is ours.
"""

import torch
from torch import Tensor, nn

from s2d.hier.attention import CrossViewTransformer
from s2d.hier.blocks import padded, reduced, upsampled
from s2d.hier.config import NUM_LEVELS, STRIDES, HierConfig
from s2d.hier.decode import GaussianGrid, decode, flatten, num_raw, scaled_Ks
from s2d.hier.dino import CONTEXT_WIDTH, DinoContext
from s2d.hier.fusion import Fading, context_error
from s2d.hier.gaussians import HierGaussians
from s2d.hier.pyramid import ImagePyramid
from s2d.hier.stages import CoarseDepth, Refined, Refinement
from s2d.hier.views import Views


class HierModel(nn.Module):
    """Predict Gaussians from 2 and more views; the order of the views has no effect but on the order of the rows."""

    def __init__(self, config: HierConfig):
        super().__init__()
        self.config = config
        self.dino = DinoContext() if config.dino else None
        self.pyramid = ImagePyramid(config, CONTEXT_WIDTH if config.dino else 0)
        self.transformer = CrossViewTransformer(config.widths[0], config.attention_blocks)
        self.coarse_depth = CoarseDepth(config)
        self.levels = nn.ModuleList(Refinement(config, level) for level in range(NUM_LEVELS))
        # Everything that is predicted for a Gaussian but its offset in the cell, and its opacity.
        self.fading = Fading(num_raw(config.sh_degree) - 2 + 1)

    def forward(self, context: Views) -> list[HierGaussians]:
        """Predict the Gaussians.

        Args:
            context: B scenes of V >= 2 views of any size; sizes that are not a multiple of `config.multiple` are padded inside.

        Returns:
            Per level that has Gaussians (`config.gaussian_levels`), coarsest first: all Gaussians of this level and of those before, faded.

        Raises:
            ValueError: Fewer than 2 views.
        """
        if context.num_views < 2:
            raise ValueError(
                f"HierModel: expected at least 2 context views, got {context.num_views}. Depth needs parallax."
            )
        shape = context.images.shape[:2]
        images = padded(context.images.flatten(0, 1), self.config.multiple)
        height, width = images.shape[-2:]
        maps = self.pyramid(images, None if self.dino is None else self.dino(images, shape[1]))
        across = self._across(maps[0], shape[1])
        inverse, confidence = self.coarse_depth(
            across.unflatten(0, shape),
            images.unflatten(0, shape),
            context.viewmats,
            scaled_Ks(context.Ks, STRIDES[0]),
            context.near,
            context.far,
        )
        limits = torch.stack([1 / context.far, 1 / context.near], -1).flatten(0, 1)  # [M, 2]
        low, high = limits[:, :, None, None].unbind(1)
        place = ((inverse.flatten(0, 1) - low) / (high - low)).clamp(0, 1)[:, None]
        confidence = confidence.flatten(0, 1)[:, None]

        result: list[HierGaussians] = []
        grids, described, hidden = [], [], None
        for level, refinement in enumerate(self.levels):
            error = context_error(result[-1] if result else None, context, height, width)
            said = refinement(
                images,
                error.flatten(0, 1),
                maps[level],
                across,
                hidden,
                place,
                confidence,
                limits,
                shape[1],
            )
            place, hidden = said.place, said.hidden
            if level not in self.config.gaussian_levels:
                continue
            grid, parameters = self._gaussians(said, images, context, limits, level)
            grids = self._faded(grids, described, parameters, error)
            grids.append(grid)
            described.append(parameters)
            result.append(flatten(grids, context.height, context.width))
        return result

    def _across(self, features: Tensor, num_views: int) -> Tensor:
        """Let the views look at each other, on a grid coarser than the features where the configuration says so. [M, C, h, w]"""
        step = self.config.attention_stride // STRIDES[0]
        small = reduced(features, step)
        looked = self.transformer(small.unflatten(0, (-1, num_views))).flatten(0, 1)
        return features + upsampled(looked - small, step)

    def _gaussians(
        self, said: Refined, images: Tensor, context: Views, limits: Tensor, level: int
    ) -> tuple[GaussianGrid, Tensor]:
        """Decode a level; also its parameters for `Fading`. [B, V, P, h, w]"""
        stride, shape = STRIDES[level], context.images.shape[:2]
        low, high = limits[:, :, None, None].unbind(1)
        # Geometry and colour stay in the pictures' precision where the convolutions run in half of it.
        raw, opacities, inverse, colours = (
            x.to(images.dtype).unflatten(0, shape)
            for x in (
                said.raw,
                said.opacities,
                low + said.place[:, 0] * (high - low),
                reduced(images, stride),
            )
        )
        with torch.autocast(images.device.type, enabled=False):
            Ks = scaled_Ks(context.Ks, stride)
            grid = decode(raw, opacities, inverse, colours, context.viewmats, Ks, level)
        return grid, torch.cat([raw[:, :, 2:], opacities[:, :, None]], 2)

    def _faded(
        self, grids: list[GaussianGrid], described: list[Tensor], new: Tensor, error: Tensor
    ) -> list[GaussianGrid]:
        """Fade every older level by what the new one and the error say."""
        result = []
        for grid, parameters in zip(grids, described, strict=True):
            old = torch.cat([parameters[:, :, :-1], grid.opacities[:, :, None]], 2)
            result.append(grid.faded(self.fading(old, new, error)))
        return result
