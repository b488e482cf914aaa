"""Provider `vggt` (Wang et al. 2025, *VGGT: Visual Geometry Grounded Transformer*).

Depth seen through the predicted cameras, which its authors find more accurate than the head for points. Poses are world to camera,
as a translation, a quaternion xyzw and two fields of view; the principal point is the middle of the canvas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.geometry import quat_to_rotation, rigid
from s2d.guidance.providers.canvas import fit_canvas
from s2d.guidance.providers.interface import (
    Geometry,
    confidence_from_expp1,
    explained_package,
    explained_weights,
    make_cameras,
    read_weights,
)
from s2d.guidance.providers.pi3 import autocast

PATCH = 14
SIDE = 518  # longest side in training and in the package's loader
REPOSITORY = "facebook/VGGT-1B"
GET_PACKAGE = (
    "Clone https://github.com/facebookresearch/vggt and run: pip install --no-deps -e vggt"
)
GET_WEIGHTS = (
    "Download model.pt or model.safetensors from https://huggingface.co/facebook/VGGT-1B (non-commercial; the checkpoint "
    "facebook/VGGT-1B-Commercial has other terms) and pass --weight-path FILE."
)


@dataclass
class VggtProvider:
    """A VGGT network; fulfils `interface.Provider`. It cannot be told cameras."""

    model: torch.nn.Module
    device: torch.device
    side: int = SIDE

    @torch.no_grad()
    def predict(self, photos: Sequence[Tensor], cameras: Cameras | None = None) -> Geometry:
        canvas = fit_canvas(photos, PATCH, max_side=self.side)
        with autocast(self.device):
            found = self.model(canvas.images[None].to(self.device))
        viewmats, Ks = decode_pose(found["pose_enc"][0], canvas.width, canvas.height)
        return Geometry.from_depths(
            make_cameras(viewmats, canvas.photo_intrinsics(Ks), canvas.sizes, cameras),
            canvas.cut(found["depth"][0, ..., 0]),
            canvas.cut(confidence_from_expp1(found["depth_conf"][0])),
            canvas.rgbs(),
        )


def decode_pose(encoding: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Read poses [N, 9]: t (3), q xyzw (4), vertical and horizontal field of view.

    Returns:
        - world to camera [N, 4, 4] float64
        - K on the canvas, corner origin [N, 3, 3]
    """
    encoding = encoding.double().cpu()
    rotation = quat_to_rotation(encoding[:, [6, 3, 4, 5]])
    K = torch.eye(3, dtype=torch.float64).repeat(len(encoding), 1, 1)
    for axis, (side, field) in enumerate(((width, encoding[:, 8]), (height, encoding[:, 7]))):
        K[:, axis, axis] = side / 2 / torch.tan(field / 2)
        # The middle of the picture, where a photo has it. The package's own lifting of depth counts pixels from 0 with this same
        # number, half a pixel off (its issue 354); poses, fields of view and depth do not depend on that.
        K[:, axis, 2] = side / 2
    return rigid(rotation, encoding[:, :3]), K


def load_vggt(weight_path: Path | None, device: torch.device) -> VggtProvider:
    """Make a provider from the installed package and weights (None: the hub's).

    Raises:
        ValueError: the package or the weights are not there; says how to get them.
    """
    with explained_package("vggt", GET_PACKAGE):
        from vggt.models.vggt import VGGT
    with explained_weights("vggt", str(weight_path or REPOSITORY), GET_WEIGHTS):
        if weight_path is None:
            model = VGGT.from_pretrained(REPOSITORY)
        else:
            weights = read_weights(Path(weight_path))
            model = VGGT()
            model.load_state_dict(weights)
    return VggtProvider(model.to(device).eval(), device)
