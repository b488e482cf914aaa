"""The same levels without a network: stage 0's depth, sizes from the footprint, fading by the error.

The order of things is the model's: a level is placed, its error in the context views is measured, the next level is added, and what is older fades where
it was wrong. It is what `--init depth` starts from, and what weights have to beat.
"""

import torch
from torch import Tensor

from s2d.checks import check_shape
from s2d.completion import complete_depth
from s2d.hier.blocks import padded, reduced
from s2d.hier.config import NUM_LEVELS, STRIDES
from s2d.hier.decode import START_SCALE, GaussianGrid, decode, flatten, num_raw, scaled_Ks
from s2d.hier.fusion import context_error
from s2d.hier.gaussians import HierGaussians
from s2d.hier.views import Views

# Opacity of a cell whose depth is fully believed, and of one whose depth is a guess from its surroundings.
BELIEVED_OPACITY, GUESSED_OPACITY = 0.9, 0.5
# Confidence from which a depth is fully believed: more likely right than wrong, as stage 0's is calibrated.
FULL_CONFIDENCE = 0.5
# Five steps of an 8-bit picture.
TOLERATED_ERROR = 0.02


def analytic_levels(
    context: Views,
    depth: Tensor,  # [B, V, H, W]
    confidence: Tensor,  # [B, V, H, W]
    sh_degree: int = 0,
    levels: tuple[int, ...] = tuple(range(NUM_LEVELS)),
) -> list[HierGaussians]:
    """Place Gaussians at depths that are known.

    Args:
        context: B scenes of V views; one view will do.
        depth: Camera z in world units, <= 0 where there is none; guessed from the surroundings there. [B, V, H, W]
        confidence: In [0, 1]; how much to trust the depth. [B, V, H, W]
        sh_degree: Of the result; colour does not depend on the view.
        levels: Which to make; (2,) is a prediction of one level.

    Returns:
        As `HierModel`: per level, all Gaussians up to it, older ones faded.
    """
    dims = check_shape("depth", depth, context.images.shape[:2] + context.images.shape[3:])
    check_shape("confidence", confidence, tuple(depth.shape), dims)
    shape, multiple = context.images.shape[:2], STRIDES[0]
    images = padded(context.images.flatten(0, 1), multiple)
    height, width = images.shape[-2:]
    inverse, belief = filled_inverse_depth(
        *(tensor.flatten(0, 1) for tensor in (depth, confidence, context.images, context.far))
    )
    inverse, belief = (padded(x[:, None], multiple) for x in (inverse, belief))

    result: list[HierGaussians] = []
    grids: list[GaussianGrid] = []
    for level in levels:
        stride = STRIDES[level]
        error = context_error(result[-1] if result else None, context, height, width)
        weight = reduced(belief, stride)
        # Believed depth counts most where a cell covers both.
        place = (reduced(inverse * belief, stride) / weight)[:, 0].unflatten(0, shape)
        opacities = GUESSED_OPACITY + (BELIEVED_OPACITY - GUESSED_OPACITY) * weight
        raw = images.new_zeros(*shape, num_raw(sh_degree), *place.shape[-2:])
        raw[:, :, 2:5] = START_SCALE[level]
        grid = decode(
            raw,
            opacities[:, 0].unflatten(0, shape),
            place,
            reduced(images, stride).unflatten(0, shape),
            context.viewmats,
            scaled_Ks(context.Ks, stride),
            level,
        )
        grids = [old.faded(_fading(error, STRIDES[old.level])) for old in grids]
        grids.append(grid)
        result.append(flatten(grids, context.height, context.width))
    return result


def _fading(error: Tensor, stride: int) -> Tensor:
    """Weights in (0, 1]: 1 where nothing is wrong, a quarter at an error of TOLERATED_ERROR. [B, V, 3, H, W] -> [B, V, h, w]"""
    here = reduced(error.flatten(0, 1).mean(1, keepdim=True), stride)
    weights = (TOLERATED_ERROR / (TOLERATED_ERROR + here)).square()
    return weights[:, 0].unflatten(0, error.shape[:2])


def filled_inverse_depth(
    depth: Tensor,  # [M, H, W]
    confidence: Tensor,  # [M, H, W]
    photos: Tensor,  # [M, 3, H, W]
    far: Tensor,  # [M]
) -> tuple[Tensor, Tensor]:
    """Continue depth into what has none (`complete_depth`); a view that has none at all is far away.

    Returns:
        - inverse depth, > 0 everywhere [M, H, W]
        - belief: 1 where the depth is trusted, a little above 0 where it is guessed [M, H, W]
    """
    filled = [
        complete_depth(*(tensor.cpu() for tensor in (own, trust, photo.permute(1, 2, 0)))).to(depth)
        if bool((own > 0).any())
        else edge.expand_as(own)
        for own, trust, photo, edge in zip(depth, confidence, photos, far, strict=True)
    ]
    known = depth > 0
    belief = known * (confidence / FULL_CONFIDENCE).clamp(max=1)
    return 1 / torch.where(known, depth, torch.stack(filled)), belief.clamp(min=1e-3)
