"""Provider `mapanything` (Keetha et al. 2025, *MapAnything*): metric geometry from photos, and from cameras where there are any.

Poses are camera to world in the frame of the first photo. Intrinsics count pixels from 0 at their centres.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.geometry import invert_rigid
from s2d.guidance.providers.canvas import Canvas, fit_canvas
from s2d.guidance.providers.interface import (
    Geometry,
    confidence_from_expp1,
    explained_package,
    explained_weights,
    make_cameras,
)

PATCH = 14
SIDE = 518  # longest side in training
REPOSITORY = "facebook/map-anything-apache"
# What its image encoder (DINOv2) was trained with; the package calls this normalisation "dinov2".
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_PIXEL = torch.tensor([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])  # ours minus theirs
GET_PACKAGE = (
    "Clone https://github.com/facebookresearch/map-anything and run: pip install -e map-anything"
)
GET_WEIGHTS = (
    "Download config.json and model.safetensors of https://huggingface.co/facebook/map-anything-apache (Apache-2.0; "
    "facebook/map-anything is better and non-commercial) into a folder and pass --weight-path FOLDER."
)


@dataclass
class MapAnythingProvider:
    """A MapAnything network; fulfils `interface.Provider`. Cameras are a hint to it."""

    model: torch.nn.Module
    device: torch.device
    side: int = SIDE

    @torch.no_grad()
    def predict(self, photos: Sequence[Tensor], cameras: Cameras | None = None) -> Geometry:
        canvas = fit_canvas(photos, PATCH, max_side=self.side)
        found = self.model.infer(
            self._views(canvas, cameras),
            use_amp=self.device.type == "cuda",
            apply_mask=True,
            mask_edges=False,  # `filters` does that, and does not leave nothing
        )
        depth, points, confidence, poses, Ks = (
            torch.cat([view[key].detach().float().cpu() for view in found])
            for key in ("depth_z", "pts3d", "conf", "camera_poses", "intrinsics")
        )
        confidence = confidence_from_expp1(confidence)
        if all("mask" in view for view in found):
            masks = torch.cat([view["mask"].detach().cpu() for view in found])
            confidence = confidence * masks[..., 0].bool()
        return Geometry(
            make_cameras(
                torch.linalg.inv(poses.double()),
                canvas.photo_intrinsics(Ks + HALF_PIXEL),
                canvas.sizes,
                cameras,
            ),
            canvas.cut(depth[..., 0]),
            canvas.cut(points),
            canvas.cut(confidence),
            canvas.rgbs(),
        )

    def _views(self, canvas: Canvas, cameras: Cameras | None) -> list[dict[str, object]]:
        images = (canvas.images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
            :, None, None
        ]
        views: list[dict[str, object]] = [
            {"img": image[None].to(self.device), "data_norm_type": ["dinov2"]} for image in images
        ]
        if cameras is not None:
            Ks = canvas.intrinsics(cameras) - HALF_PIXEL
            c2w = invert_rigid(cameras.viewmats.double()).float()
            for view, K, pose in zip(views, Ks, c2w, strict=True):
                view["intrinsics"] = K[None].to(self.device)
                view["camera_poses"] = pose[None].to(self.device)
                # The unit of a scene from COLMAP is not the metre.
                view["is_metric_scale"] = torch.tensor([False], device=self.device)
        return views


def load_mapanything(weight_path: Path | None, device: torch.device) -> MapAnythingProvider:
    """Make a provider from the installed package and a folder of weights (None: the hub's).

    Raises:
        ValueError: the package or the weights are not there; says how to get them.
    """
    with explained_package("mapanything", GET_PACKAGE):
        from mapanything.models import MapAnything
    with explained_weights("mapanything", str(weight_path or REPOSITORY), GET_WEIGHTS):
        if weight_path is not None and not Path(weight_path).is_dir():
            raise FileNotFoundError("not a folder")
        model = MapAnything.from_pretrained(str(weight_path or REPOSITORY))
    return MapAnythingProvider(model.to(device).eval(), device)
