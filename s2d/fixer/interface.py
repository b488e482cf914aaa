"""What stage 2 asks of a fixer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class FixResult:
    """A pseudo view and how far to trust it."""

    fixed: Tensor  # [H, W, 3] in [0, 1]
    mask: Tensor  # [H, W, 1] 0 or 1: 1 where the point cloud supports the pixel; stage 3 weighs gradients with it
    confidence: Tensor  # [H, W, 1] in [0, 1]: the fixer's own opinion of each pixel


class Fixer(Protocol):
    """Repairs one novel view at a time; holds its settings and, where it has one, its network."""

    def fix(
        self,
        rendered: Tensor,  # [H, W, 3]
        guidance: Tensor,  # [H, W, 3]
        coverage_mask: Tensor,  # [H, W, 1]
        reference: Tensor | Sequence[Tensor],  # [H', W', 3] each
    ) -> FixResult:
        """Return the repaired view.

        Args:
            rendered: Stage 1's render of the novel camera, with artifacts, in [0,1]. [H, W, 3]
            guidance: The point cloud seen by the same camera, black where nothing projects. [H, W, 3]
            coverage_mask: 1 where a point projects, 0 elsewhere: a black point is not a hole. [H, W, 1]
            reference: The nearest kept photo, in [0,1], or several; may have other sizes. [H', W', 3] each
        """
        ...


def as_photos(
    reference: Tensor | Sequence[Tensor],  # [H', W', 3] each
) -> tuple[Tensor, ...]:
    """The reference photos as a tuple, whether one was given or several."""
    photos = (reference,) if isinstance(reference, Tensor) else tuple(reference)
    if not photos:
        raise ValueError("fix: there is no reference photo. Expected one or several, got none.")
    return photos
