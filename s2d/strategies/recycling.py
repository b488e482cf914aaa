"""Room for growth where the budget is full: what the views hardly show makes place for what they ask for.

The number of Gaussians reaches its limit in the first round of density control, when the scene is a blur, and what was cloned then would stay as it is. So before
each round at the limit the Gaussians go whose part in the pictures is least, as in LightGaussian (Fan et al. 2023) and Mini-Splatting (Fang and Wang 2024), and the round
grows others in their place. A Gaussian's part is the largest sum of its blending weights over one view, so that what a single view needs stays.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.strategies.blend_weights import blend_weights

# Share of the budget from which on it counts as full.
FULL = 0.9
# Novel views that are looked at beside all kept ones: each costs a render and its way back.
MOST_NOVEL = 10


@torch.no_grad()
def least_seen(gaussians: Gaussians, cameras: Iterable[Cameras], count: int) -> Tensor:
    """Choose the Gaussians with the smallest part in the pictures.

    Args:
        gaussians: N Gaussians.
        cameras: The views; any sizes.
        count: How many, at most N.

    Returns:
        True for `count` of them. [N] bool
    """
    part = torch.zeros(gaussians.num, device=gaussians.means.device)
    for camera in cameras:
        ones = part.new_ones(camera.height, camera.width, 3)
        torch.maximum(part, blend_weights(gaussians, camera, ones)[:, 0], out=part)
    chosen = torch.zeros_like(part, dtype=torch.bool)
    chosen[part.topk(count, largest=False).indices] = True
    return chosen
