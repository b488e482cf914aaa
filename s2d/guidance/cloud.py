"""`SurfaceCloud`: points that know how large a piece of surface they stand for. What every provider returns and `render_cloud` draws.

Notation: P points; `steps` [P, 2, 3] are the world vectors from one point to where its neighbours to the right and below are expected.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from s2d.checks import check_finite, check_shape
from s2d.files import atomic_write_bytes


@dataclass(frozen=True, eq=False)
class SurfaceCloud:
    """Coloured points with a patch of surface each. CPU tensors, float32.

    A point without a known orientation has the zero vector as its second step: it is drawn as a disc that faces the camera, with the
    length of the first step as its size.
    """

    points: Tensor  # [P, 3] world
    rgbs: Tensor  # [P, 3] in [0, 1]
    confidence: Tensor  # [P] in [0, 1]
    normals: Tensor  # [P, 3] unit, or zero where unknown
    steps: Tensor  # [P, 2, 3] world

    def __post_init__(self) -> None:
        dims = check_shape("points", self.points, ("P", 3))
        check_shape("rgbs", self.rgbs, ("P", 3), dims)
        check_shape("confidence", self.confidence, ("P",), dims)
        check_shape("normals", self.normals, ("P", 3), dims)
        check_shape("steps", self.steps, ("P", 2, 3), dims)
        check_finite("points", self.points, rows="point")

    def __len__(self) -> int:
        return len(self.points)

    @property
    def sizes(self) -> Tensor:
        """Side of a square as large as the point's patch, world units. [P]"""
        lengths = self.steps.norm(dim=-1)
        return torch.where(lengths[:, 1] > 0, lengths.prod(-1).sqrt(), lengths[:, 0])

    @staticmethod
    def without_orientation(
        points: Tensor,  # [P, 3]
        rgbs: Tensor,  # [P, 3]
        sizes: Tensor,  # [P] distance to the neighbours, world
        confidence: Tensor | None = None,  # [P]; ones
    ) -> "SurfaceCloud":
        """Make a cloud of points of which only the spacing is known."""
        steps = torch.zeros(len(points), 2, 3)
        steps[:, 0, 0] = sizes
        confidence = torch.ones(len(points)) if confidence is None else confidence
        return SurfaceCloud(
            points.float(), rgbs.float(), confidence.float(), torch.zeros(len(points), 3), steps
        )

    def save(self, path: Path) -> Path:
        """Write everything that `render_cloud` needs, atomically; colours and confidence in 8 bits. Layout: docs/stage0.md."""
        buffer = io.BytesIO()
        levels = {
            name: (getattr(self, name).clamp(0, 1) * 255).round().byte().numpy()
            for name in ("rgbs", "confidence")
        }
        # Uncompressed: the digits of float32 positions shrink by a tenth, for a second of work.
        np.savez(buffer, points=self.points.numpy(), steps=self.steps.numpy(), **levels)
        atomic_write_bytes(path, buffer.getvalue())
        return Path(path)

    @staticmethod
    def load(path: Path) -> "SurfaceCloud":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"No surface cloud: {path}. Stage 0 writes it: run it again with --overwrite."
            )
        try:
            with np.load(path) as arrays:
                points, steps, rgbs, confidence = (
                    torch.from_numpy(arrays[name])
                    for name in ("points", "steps", "rgbs", "confidence")
                )
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is not a surface cloud of stage 0 ({error!r}). Run stage 0 again with --overwrite."
            ) from error
        normals = torch.linalg.cross(
            steps[:, 1], steps[:, 0]
        )  # right, down: this one faces the camera
        normals = torch.nn.functional.normalize(normals, dim=-1)
        return SurfaceCloud(points, rgbs.float() / 255, confidence.float() / 255, normals, steps)

    @staticmethod
    def cat(parts: "list[SurfaceCloud]") -> "SurfaceCloud":
        """Join clouds."""
        names = ("points", "rgbs", "confidence", "normals", "steps")
        return SurfaceCloud(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True, eq=False)
class DepthMap:
    """What a provider knows of one kept view's depth."""

    depth: np.ndarray  # [H, W] float32, camera z in world units; 0 = none
    confidence: np.ndarray  # [H, W] float32 in [0, 1]; 0 where there is no depth


class Reconstruction(NamedTuple):
    """What a provider returns."""

    cloud: SurfaceCloud
    depth_maps: dict[str, DepthMap]  # by name of the kept view
