"""Providers `pi3` and `pi3x` (Wang et al. 2025; the release's choice): permutation-equivariant point maps and poses.

The model says no intrinsics: they are fitted to the slopes of its rays. Poses are camera to world. Pi3X can be told cameras; it takes
them as a hint and answers in a frame of its own.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.geometry import invert_rigid, pixel_grid
from s2d.guidance.providers.canvas import fit_canvas
from s2d.guidance.providers.interface import (
    Geometry,
    explained_package,
    explained_weights,
    make_cameras,
    read_weights,
)

Variant = Literal["pi3", "pi3x"]

PATCH = 14
MAX_PIXELS = 255_000  # the loader of the package; trained at about this size
ROOT = Path(__file__).parents[3] / "third_party" / "Pi3"
REPOSITORIES = {"pi3": "yyfz233/Pi3", "pi3x": "yyfz233/Pi3X"}
BELIEVED = 0.1  # confidence from which the package's own examples use a point
GET_PACKAGE = (
    "Clone https://github.com/yyfz/Pi3 to third_party/Pi3, or anywhere and set S2D_PI3_ROOT to that folder; then "
    "install what its requirements.txt lists, without its torch."
)
GET_WEIGHTS = (
    "Download model.safetensors from https://huggingface.co/{repository} and pass --weight-path FILE "
    "(its licence: non-commercial)."
)


@dataclass
class Pi3Provider:
    """A Pi3 or Pi3X network; fulfils `interface.Provider`."""

    model: torch.nn.Module
    device: torch.device
    takes_cameras: bool = False
    max_pixels: int = MAX_PIXELS

    @torch.no_grad()
    def predict(self, photos: Sequence[Tensor], cameras: Cameras | None = None) -> Geometry:
        canvas = fit_canvas(photos, PATCH, max_pixels=self.max_pixels)
        hints = {}
        if cameras is not None and self.takes_cameras:
            c2w = invert_rigid(cameras.viewmats.double()).float()
            hints = {
                "poses": c2w[None].to(self.device),
                "intrinsics": canvas.intrinsics(cameras)[None].to(self.device),
            }
        with torch.random.fork_rng(), autocast(self.device):
            torch.manual_seed(0)  # Pi3X scales the poses that it is told by a random number
            found = self.model(canvas.images[None].to(self.device), **hints)
        local, confidence = found["local_points"][0].float(), found["conf"][0, ..., 0].float()
        confidence = torch.sigmoid(confidence)  # logits
        viewmats = torch.linalg.inv(found["camera_poses"][0].double())
        Ks = torch.stack([fit_intrinsics(*one) for one in zip(local, confidence, strict=True)])
        return Geometry(
            make_cameras(viewmats, canvas.photo_intrinsics(Ks), canvas.sizes, cameras),
            canvas.cut(local[..., 2]),
            canvas.cut(found["points"][0]),
            canvas.cut(confidence),
            canvas.rgbs(),
        )


def fit_intrinsics(local_points: Tensor, confidence: Tensor) -> Tensor:
    """K whose rays are nearest to those of a point map, weighted by confidence. [H, W, 3], [H, W] -> [3, 3]

    Two straight lines: column = fx · x/z + cx, row = fy · y/z + cy. The principal point is free, so that the points project to
    where they were seen whatever the network believes of it.
    """
    height, width = confidence.shape
    grid = pixel_grid(width, height, dtype=torch.float64)  # Pi3 trains with pixel centres at +0.5
    local, weight = local_points.double().cpu(), confidence.double().cpu()
    weight = weight * (weight >= min(BELIEVED, float(weight.median()))) * (local[..., 2] > 0)
    K = torch.eye(3, dtype=torch.float64)
    for axis in (0, 1):
        slope = (local[..., axis] / local[..., 2]).nan_to_num(0.0)
        total = weight.sum().clamp(min=1e-12)
        mean, where = (weight * slope).sum() / total, (weight * grid[..., axis]).sum() / total
        covariance = (weight * (slope - mean) * (grid[..., axis] - where)).sum()
        K[axis, axis] = covariance / (weight * (slope - mean).square()).sum().clamp(min=1e-12)
        K[axis, 2] = where - K[axis, axis] * mean
    if not bool((K.diagonal() > 0).all()):
        raise ValueError(
            "Pi3 returned rays that no camera has (no positive focal length fits). Check that --weight-path belongs to this --provider."
        )
    return K.float()


def autocast(device: torch.device) -> torch.autocast:
    """Half precision on a GPU as the packages use it; float32 on a CPU."""
    if device.type != "cuda":
        return torch.autocast("cpu", enabled=False)
    half = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.autocast("cuda", dtype=half)


def load_pi3(weight_path: Path | None, device: torch.device, variant: Variant) -> Pi3Provider:
    """Make a provider from a checkout and weights; without a path, weights are looked for in (or downloaded to) the hub's cache.

    Raises:
        ValueError: the checkout or the weights are not there; says how to get them.
    """
    root = Path(os.environ.get("S2D_PI3_ROOT") or ROOT)
    if root.is_dir() and str(root) not in sys.path:
        sys.path.insert(0, str(root))
    with explained_package(variant, GET_PACKAGE):
        if variant == "pi3":
            from pi3.models.pi3 import Pi3 as Model
        else:
            from pi3.models.pi3x import Pi3X as Model
    repository = REPOSITORIES[variant]
    how = GET_WEIGHTS.format(repository=repository)
    if weight_path is not None and variant == "pi3":
        how += " Weights of Pi3X need --provider pi3x."
    with explained_weights(variant, str(weight_path or repository), how):
        if weight_path is None:
            model = Model.from_pretrained(repository)
        else:
            weights = read_weights(Path(weight_path))
            model = Model()
            model.load_state_dict(weights)
    return Pi3Provider(model.to(device).eval(), device, takes_cameras=variant == "pi3x")
