"""The pictures and cameras that go into the model and that it is trained against: B scenes of V views, all of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from s2d.checks import check_finite, check_range, check_shape


@dataclass(frozen=True, eq=False)
class Views:
    """B scenes of V views each. One device, one size, float."""

    images: Tensor  # [B, V, 3, H, W] in [0, 1]
    viewmats: Tensor  # [B, V, 4, 4] world to camera, OpenCV axes
    Ks: Tensor  # [B, V, 3, 3] pixels of H x W, corner origin
    near: Tensor  # [B, V] camera z of what is nearest, world units
    far: Tensor  # [B, V] camera z of what is farthest

    def __post_init__(self) -> None:
        """Refuse what no depth can be searched in: wrong shapes, non-finite numbers, near >= far."""
        dims = check_shape("images", self.images, ("B", "V", 3, "H", "W"))
        check_shape("viewmats", self.viewmats, ("B", "V", 4, 4), dims)
        check_shape("Ks", self.Ks, ("B", "V", 3, 3), dims)
        check_shape("near", self.near, ("B", "V"), dims)
        check_shape("far", self.far, ("B", "V"), dims)
        for field in fields(self):
            check_finite(field.name, getattr(self, field.name), rows="scene")
        hint = "They are the smallest and largest camera z of the scene, in world units."
        check_range("near", self.near, above=0.0, hint=hint)
        if not bool((self.far > self.near).all()):
            raise ValueError(f"Views: far must be above near in every view. {hint}")
        check_range("focal lengths", self.Ks.diagonal(dim1=-2, dim2=-1)[..., :2], above=0.0)

    @property
    def num_scenes(self) -> int:
        return self.images.shape[0]

    @property
    def num_views(self) -> int:
        return self.images.shape[1]

    @property
    def height(self) -> int:
        return self.images.shape[3]

    @property
    def width(self) -> int:
        return self.images.shape[4]

    def to(self, device: torch.device | str) -> Views:
        """Return the same views on `device`."""
        return Views(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def select(self, rows: Sequence[int]) -> Views:
        """Return the views `rows` of every scene, in that order."""
        return Views(**{f.name: getattr(self, f.name)[:, list(rows)] for f in fields(self)})
