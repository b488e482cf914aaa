"""What every provider takes and returns: `Geometry` and the `Provider` protocol, and how a missing package or file is told.

Notation: N photos of any sizes; each photo's maps are [h, w] at the model's resolution and cover the whole photo: their camera is
the photo's, `scaled((w, h))`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.checks import check_shape
from s2d.geometry import rigid, unproject

Freedom = Literal["similarity", "scale", "scale and shift"]


@dataclass(frozen=True, eq=False)
class Geometry:
    """What a model saw in N photos. CPU tensors, float32.

    `freedom` is what the model leaves open. "similarity": all photos share one frame of the model's own, right up to a Sim(3).
    "scale": the cameras are the given ones, each photo's depth has a scale of its own. "scale and shift": the same for its inverse
    depth, with an offset besides; then depths and points have no meaning before `placement` has fitted them.
    """

    cameras: Cameras  # of the photos' sizes
    depths: tuple[Tensor, ...]  # [h, w] camera z; 0 = none
    points: tuple[Tensor, ...]  # [h, w, 3] world; meaningless where there is no depth
    confidence: tuple[Tensor, ...]  # [h, w] in [0, 1]
    rgbs: tuple[Tensor, ...]  # [h, w, 3] in [0, 1], the photo as the model saw it
    freedom: Freedom = "similarity"

    def __post_init__(self) -> None:
        for depth, points, confidence, rgb in zip(
            self.depths, self.points, self.confidence, self.rgbs, strict=True
        ):
            dims = check_shape("depths", depth, ("h", "w"))
            check_shape("points", points, ("h", "w", 3), dims)
            check_shape("confidence", confidence, ("h", "w"), dims)
            check_shape("rgbs", rgb, ("h", "w", 3), dims)
        if len(self.depths) != len(self.cameras):
            raise ValueError(
                f"Geometry: {len(self.depths)} depth maps for {len(self.cameras)} cameras. Expected one each."
            )

    @staticmethod
    def from_depths(
        cameras: Cameras,
        depths: Sequence[Tensor],
        confidence: Sequence[Tensor],
        rgbs: Sequence[Tensor],
        freedom: Freedom = "similarity",
    ) -> Geometry:
        """For models whose points are their depths seen through their cameras."""
        points = [
            unproject(
                depth, camera.scaled((depth.shape[1], depth.shape[0])).Ks[0], camera.viewmats[0]
            )
            for camera, depth in zip(cameras, depths, strict=True)
        ]
        return Geometry(
            cameras, tuple(depths), tuple(points), tuple(confidence), tuple(rgbs), freedom
        )


class Provider(Protocol):
    """A model that is ready to run."""

    def predict(self, photos: Sequence[Tensor], cameras: Cameras | None = None) -> Geometry:
        """Look at photos [H, W, 3] in [0, 1].

        Args:
            photos: One or more, sizes may differ.
            cameras: Theirs, in order. Models that can be told cameras are told; the answer is still in the model's own frame
                unless its `freedom` says otherwise. None: the model's cameras are named 0, 1, 2 …

        Raises:
            ValueError: the model needs cameras and there are none, or it returned nothing usable.
        """
        ...


def make_cameras(
    viewmats: Tensor,  # [N, 4, 4] or [N, 3, 4]
    Ks: Tensor,  # [N, 3, 3] for photos of `sizes`
    sizes: Sequence[tuple[int, int]],
    like: Cameras | None,
) -> Cameras:
    """Cameras from what a network said: rotations made orthonormal, names from `like` or numbers.

    Raises:
        ValueError: numbers that are not finite, or focal lengths that are not positive.
    """
    viewmats = viewmats.detach().double().cpu()
    if not bool(viewmats.isfinite().all() and Ks.isfinite().all()):
        raise ValueError(
            "The model returned cameras that are not finite. Check that the weights belong to this model, or run in float32 (--device cpu)."
        )
    u, _, vh = torch.linalg.svd(viewmats[:, :3, :3])
    flip = torch.ones(len(u), 3, dtype=torch.float64)
    flip[:, 2] = torch.linalg.det(u @ vh)
    rotations = u * flip[:, None] @ vh
    names = like.names if like is not None else tuple(str(i) for i in range(len(sizes)))
    return Cameras(
        rigid(rotations, viewmats[:, :3, 3]).float(),
        Ks.detach().float().cpu(),
        tuple(sizes),
        names,
    )


def confidence_from_expp1(values: Tensor) -> Tensor:
    """Confidence of the heads that end in 1 + exp(x), brought to [0, 1): the sigmoid of x. [...]"""
    return (1 - 1 / values.float().clamp(min=1)).nan_to_num(0.0)


@contextmanager
def explained_package(provider: str, how: str) -> Iterator[None]:
    """Say how to get a package that an import in the block did not find."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"--provider {provider} needs a package that is not there ({error}). {how}"
        ) from error


@contextmanager
def explained_weights(provider: str, weights: str, how: str) -> Iterator[None]:
    """Say how to get weights that were not found, do not fit or could not be downloaded."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
        raise ValueError(
            f"--provider {provider}: no usable weights in {weights} ({first}). {how}"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from .pt / .pth / .bin without running code that is in it."""
    if not path.is_file():
        raise FileNotFoundError("no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import pickle

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("not a file of weights, or one that holds code") from error
    return content.get("model", content) if isinstance(content, dict) else content
