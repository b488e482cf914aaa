"""What stage 2 asks of a fixer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class NovelView(NamedTuple):
    """What a fixer is shown of one view; the arguments of `Fixer.fix`."""

    rendered: Tensor  # [H, W, 3]
    guidance: Tensor  # [H, W, 3]
    coverage_mask: Tensor  # [H, W, 1]
    references: tuple[Tensor, ...]  # [H', W', 3] each, nearest first

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        return tuple(self.rendered.shape[:2])

    def goes_with(self, other: "NovelView") -> bool:
        """Whether both may pass through a network together."""
        return self.size == other.size and len(self.references) == len(other.references)


@dataclass(frozen=True)
class FixResult:
    """A pseudo view and how far to trust it."""

    fixed: Tensor  # [H, W, 3] in [0, 1]
    mask: Tensor  # [H, W, 1] 0 or 1: 1 where the point cloud supports the pixel; stage 3 weighs gradients with it
    confidence: Tensor  # [H, W, 1] in [0, 1]: the fixer's own opinion of each pixel


class Fixer(Protocol):
    """Repairs novel views; holds its settings and, where it has one, its network. One that gains nothing from several views at once inherits."""

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

    def views_at_once(self, height: int, width: int) -> int:
        """How many views of a size to hand to `fix_together`; 1 or more."""
        return 1

    def fix_together(self, views: Sequence[NovelView]) -> list[FixResult]:
        """Return the repaired views, which must go with each other (`NovelView.goes_with`); on the CPU."""
        return [self.fix(*view) for view in views]


def as_photos(
    reference: Tensor | Sequence[Tensor],  # [H', W', 3] each
) -> tuple[Tensor, ...]:
    """The reference photos as a tuple, whether one was given or several."""
    photos = (reference,) if isinstance(reference, Tensor) else tuple(reference)
    if not photos:
        raise ValueError("fix: there is no reference photo. Expected one or several, got none.")
    return photos
