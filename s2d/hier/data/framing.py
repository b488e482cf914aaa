"""Photos at the size of the model: scaled until they cover it, cropped, mirrored; the cameras follow exactly.

Notation: a *place* (u, v) in [0, 1]² says where the crop lies in what covers it; (0.5, 0.5) is the middle.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CENTRE = (0.5, 0.5)


@dataclass(frozen=True)
class Framing:
    """How photos of one size become pictures of another. All sizes are (width, height) in pixels."""

    source: tuple[int, int]
    scaled: tuple[int, int]
    offset: tuple[int, int]  # of the crop's corner in the scaled photo
    size: tuple[int, int]

    @staticmethod
    def cover(
        source: tuple[int, int], size: tuple[int, int], place: tuple[float, float] = CENTRE
    ) -> "Framing":
        """Scale by the larger of the two ratios and cut the rest off."""
        factor = max(size[0] / source[0], size[1] / source[1])
        scaled = tuple(max(s, round(old * factor)) for s, old in zip(size, source, strict=True))
        offset = tuple(int((b - s) * p) for b, s, p in zip(scaled, size, place, strict=True))
        return Framing(source, scaled, offset, size)

    def scale(
        self,
        photo: np.ndarray,  # [H, W, 3] uint8
    ) -> np.ndarray:
        """Resize a photo by Lanczos's filter, which averages where it shrinks. [H', W', 3] uint8"""
        if self.scaled == self.source:
            return photo
        return np.asarray(Image.fromarray(photo).resize(self.scaled, Image.Resampling.LANCZOS))

    def crop(
        self,
        scaled: np.ndarray,  # [H', W', 3] uint8
    ) -> Tensor:
        """Cut the picture out of what `scale` returned. [3, h, w] uint8"""
        x, y = self.offset
        window = scaled[y : y + self.size[1], x : x + self.size[0]]
        return torch.from_numpy(np.ascontiguousarray(window.transpose(2, 0, 1)))

    def intrinsics(
        self,
        K: Tensor,  # [3, 3] pixels of the source
    ) -> Tensor:
        """Change intrinsics as the pixels change: exact also where the rounded sides scale unequally. [3, 3] float32"""
        moved = K.double().clone()
        moved[0] *= self.scaled[0] / self.source[0]
        moved[1] *= self.scaled[1] / self.source[1]
        moved[0, 2] -= self.offset[0]
        moved[1, 2] -= self.offset[1]
        return moved.float()


def mirrored_cameras(
    viewmats: Tensor,  # [..., 4, 4]
    Ks: Tensor,  # [..., 3, 3]
    width: int,
) -> tuple[Tensor, Tensor]:
    """Cameras of the world mirrored at its yz plane: each sees at column `width - x` what it saw at x before.

    Both sides of a viewmat are mirrored, so rotations stay rotations.
    """
    mirror = torch.diag(viewmats.new_tensor([-1.0, 1.0, 1.0, 1.0]))
    flipped = Ks.clone()
    flipped[..., 0, 2] = width - Ks[..., 0, 2]
    return mirror @ viewmats @ mirror, flipped
