"""What a sample is cut from: one recording of one place."""

from typing import Protocol

from torch import Tensor

from s2d.hier.data.framing import CENTRE


class Capture(Protocol):
    """N posed photos of one place; `len()` is N."""

    key: str
    viewmats: Tensor  # [N, 4, 4] world to camera
    near: Tensor  # [N] world units
    far: Tensor  # [N]

    def __len__(self) -> int: ...

    def picture(
        self, row: int, size: tuple[int, int], place: tuple[float, float] = CENTRE
    ) -> tuple[Tensor, Tensor]:
        """A photo at a size (width, height), see `framing`: pixels [3, H, W] uint8, and K [3, 3] at that size."""
        ...

    def seen_points(self, row: int) -> Tensor:
        """World points that a view is known to see, for the depth term; none where nobody knows. [P, 3]"""
        ...
