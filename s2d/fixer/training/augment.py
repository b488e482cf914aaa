"""What is done to a training sample so that few scenes teach more: other sizes, other colours, less guidance.

All images of a sample are treated alike, so that what the fixer has to learn stays true: the artifacts of a smaller picture are the
smaller artifacts, those of a brighter one the brighter.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GAMMA_SHARE = (
    0.5  # of the range of the gains: gamma moves the middle tones, which gains move already
)


def window_size(size: int, min_scale: float, largest: int, generator: np.random.Generator) -> int:
    """Draw the side of the window that becomes a sample of `size` pixels: up to size / min_scale, at most `largest`."""
    if min_scale >= 1:
        return size
    scale = generator.uniform(min_scale, 1.0)
    return max(size, min(round(size / scale), largest))


def shrink(
    image: Tensor,  # uint8 [C, S', S']
    size: int,
    is_mask: bool,
) -> Tensor:
    """Shrink a window to its final size by averaging areas; a mask stays one of two values. uint8 [C, size, size]"""
    if image.shape[-1] == size:
        return image
    if is_mask:
        return F.interpolate(image[None], (size, size), mode="nearest-exact")[0]
    smaller = F.interpolate(
        image[None].float(), (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return smaller[0].round().clamp(0, 255).to(torch.uint8)


def recolouring(strength: float, generator: np.random.Generator) -> Tensor:
    """Draw a table of colours: for each channel what its 256 values become. uint8 [3, 256]

    A common gain, a gain per channel half as strong, and a gamma, log-uniform within 1 ± strength.
    """
    low, high = np.log(1 - strength), np.log(1 + strength)
    common, *channels, gamma = np.exp(
        generator.uniform(low, high, 5) * (1, 0.5, 0.5, 0.5, GAMMA_SHARE)
    )
    values = np.linspace(0, 1, 256) ** gamma
    table = np.clip(values * common * np.array(channels)[:, None], 0, 1)
    return torch.from_numpy(np.rint(table * 255).astype(np.uint8))


def recolour(
    image: Tensor,  # uint8 [3, H, W]
    table: Tensor,  # uint8 [3, 256]
) -> Tensor:
    """Look every value up. Black stays black, so that holes stay holes. uint8 [3, H, W]"""
    return torch.stack([row[plane.long()] for row, plane in zip(table, image, strict=True)])


def guided_columns(size: int, dropout: float, generator: np.random.Generator) -> slice:
    """Draw which columns of a sample keep their guidance: with probability `dropout` none, as often again one side of a random line, else all.

    A network that always sees guidance learns that a part without any is hopeless; a user's cloud may simply not reach there.
    """
    if dropout <= 0:
        return slice(0, size)
    draw, place = generator.random(2)
    if draw < dropout:
        return slice(0, 0)
    return slice(round(place * size), size) if draw < 2 * dropout else slice(0, size)
