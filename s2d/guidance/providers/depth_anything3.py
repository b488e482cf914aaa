"""Provider `depth-anything-3` (ByteDance Seed 2025): depth and cameras from any number of photos, with or without given cameras.

Poses are world to camera. Given cameras, it puts them in the place of its own and brings its depths to their unit; where their centres
do not tell a scale it keeps its own cameras. Either way cameras and depths belong together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.guidance.providers.canvas import fit_canvas
from s2d.guidance.providers.interface import (
    Geometry,
    confidence_from_expp1,
    explained_package,
    explained_weights,
    make_cameras,
)

PATCH = 14
SIDE = 504  # the package's default
MAX_SKY = 0.3  # of the sky head: beyond, there is no surface
REPOSITORY = "depth-anything/DA3-BASE"
GET_PACKAGE = "Clone https://github.com/ByteDance-Seed/Depth-Anything-3 and run: pip install -e Depth-Anything-3"
GET_WEIGHTS = (
    "Download config.json and model.safetensors of https://huggingface.co/depth-anything/DA3-BASE (Apache-2.0, as DA3-SMALL; "
    "DA3-LARGE-1.1 and DA3-GIANT-1.1 are better and non-commercial) into a folder and pass --weight-path FOLDER."
)


@dataclass
class DepthAnything3Provider:
    """A Depth Anything 3 network; fulfils `interface.Provider`."""

    model: Any  # depth_anything_3.api.DepthAnything3
    side: int = SIDE

    @torch.no_grad()
    def predict(self, photos: Sequence[Tensor], cameras: Cameras | None = None) -> Geometry:
        canvas = fit_canvas(photos, PATCH, max_side=self.side)
        # Photos of one size, both sides multiples of the patch: the package's own resizing and cropping has nothing left to do.
        pixels = (canvas.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        hints = {}
        if cameras is not None:
            hints = {
                "extrinsics": cameras.viewmats.cpu().numpy(),
                "intrinsics": canvas.intrinsics(cameras).numpy(),
            }
        found = self.model.inference(
            list(pixels), process_res=max(canvas.width, canvas.height), **hints
        )
        if found.extrinsics is None or found.intrinsics is None:
            raise ValueError(
                "--provider depth-anything-3: these weights give depth without cameras. Use DA3-SMALL, BASE, LARGE, GIANT or NESTED."
            )
        depth, viewmats, Ks = (
            torch.as_tensor(array).float()
            for array in (found.depth, found.extrinsics, found.intrinsics)
        )
        confidence = torch.ones_like(depth)
        if found.conf is not None:
            confidence = confidence_from_expp1(torch.as_tensor(found.conf))
        sky = getattr(found, "sky", None)
        if sky is not None:
            confidence = confidence * (torch.as_tensor(sky).float() < MAX_SKY)
        return Geometry.from_depths(
            make_cameras(viewmats, canvas.photo_intrinsics(Ks), canvas.sizes, cameras),
            canvas.cut(depth),
            canvas.cut(confidence),
            canvas.rgbs(),
        )


def load_depth_anything3(weight_path: Path | None, device: torch.device) -> DepthAnything3Provider:
    """Make a provider from the installed package and a folder of weights (None: the hub's).

    Raises:
        ValueError: the package or the weights are not there; says how to get them.
    """
    with explained_package("depth-anything-3", GET_PACKAGE):
        from depth_anything_3.api import DepthAnything3
    with explained_weights("depth-anything-3", str(weight_path or REPOSITORY), GET_WEIGHTS):
        if weight_path is not None and not Path(weight_path).is_dir():
            raise FileNotFoundError("not a folder")
        model = DepthAnything3.from_pretrained(str(weight_path or REPOSITORY))
    return DepthAnything3Provider(model.to(device).eval())
