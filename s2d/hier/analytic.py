"""The same levels without a network: stage 0's depth, sizes from the footprint, fading by the error.

The order of things is the model's: a level is placed, its error in the context views is measured, the next level is added, and what is older fades where
it was wrong. It is what `--init hier` does without weights, and what weights have to beat.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.checks import check_shape
from s2d.hier.blocks import padded, reduced, upsampled
from s2d.hier.config import NUM_LEVELS, STRIDES
from s2d.hier.decode import START_SCALE, GaussianGrid, decode, flatten, num_raw, scaled_Ks
from s2d.hier.fusion import context_error
from s2d.hier.gaussians import HierGaussians
from s2d.hier.views import Views

# Opacity of a cell whose depth is fully believed, and of one whose depth is a guess from its surroundings.
BELIEVED_OPACITY, GUESSED_OPACITY = 0.9, 0.5
# Confidence from which a depth is fully believed: stage 0's is 1 - exp(-views) times the match, about 0.3 for one good agreement.
FULL_CONFIDENCE = 0.3
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
        depth.flatten(0, 1), confidence.flatten(0, 1), context.far.flatten()
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
    far: Tensor,  # [M]
) -> tuple[Tensor, Tensor]:
    """Continue depth into what has none: from ever larger surroundings, down to the mean of the whole view, or far away.

    Returns:
        - inverse depth, > 0 everywhere [M, H, W]
        - belief: 1 where the depth is trusted, a little above 0 where it is guessed [M, H, W]
    """
    known = (depth > 0).to(depth.dtype)
    belief = known * (confidence / FULL_CONFIDENCE).clamp(1e-3, 1)
    value = torch.where(depth > 0, 1 / depth.clamp(min=1e-12), torch.zeros_like(depth))
    filled = _pull_push((value * belief)[:, None], belief[:, None], 1 / far[:, None, None, None])
    inverse = torch.where(depth > 0, value, filled[:, 0])
    return inverse, belief.clamp(min=1e-3)


def _pull_push(weighted: Tensor, weight: Tensor, empty: Tensor) -> Tensor:
    """Weighted means over squares of growing size, taken from the smallest square that knows anything. [M, 1, H, W]"""
    height, width = weight.shape[-2:]
    if height == width == 1:
        coarser = empty
    else:
        fit = (0, width % 2, 0, height % 2)
        half = [reduced(F.pad(x, fit), 2) for x in (weighted, weight)]
        coarser = upsampled(_pull_push(*half, empty), 2)[..., :height, :width]
    return torch.where(weight > 1e-9, weighted / weight.clamp(min=1e-9), coarser)
