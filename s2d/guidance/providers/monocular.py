"""Provider `monocular`: a depth model of transformers on each photo by itself, for cameras that are known.

What such a model says is right up to a scale per photo (metric models: the metre is not the scene's unit), or up to a scale and a shift of
inverse depth (relative models). `placement` fits both to the sparse points.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.guidance.providers.canvas import fit_canvas
from s2d.guidance.providers.interface import (
    Freedom,
    Geometry,
    explained_package,
    explained_weights,
)

REPOSITORY = "depth-anything/Depth-Anything-V2-Small-hf"
GET_PACKAGE = "Run: pip install -r requirements.txt"
GET_WEIGHTS = (
    "Download config.json, preprocessor_config.json and model.safetensors of a depth model, for instance "
    "https://huggingface.co/depth-anything/Depth-Anything-V2-Small-hf (Apache-2.0), into a folder and pass --weight-path FOLDER."
)


@dataclass(frozen=True)
class Kind:
    """What `predicted_depth` of a family of models is, and how its photos must come."""

    inverse: bool  # inverse depth: large is near
    freedom: Freedom
    side: int  # longest side, pixels
    multiple: int  # equal to `side`: one square size, into which the photo is squeezed


# Families of transformers' AutoModelForDepthEstimation; of Depth Anything there are relative and metric weights.
RELATIVE = Kind(inverse=True, freedom="scale and shift", side=518, multiple=14)
KINDS = {
    "depth_anything": RELATIVE,
    "depth_anything metric": Kind(inverse=False, freedom="scale", side=518, multiple=14),
    "dpt": Kind(inverse=True, freedom="scale and shift", side=384, multiple=384),
    "depth_pro": Kind(inverse=True, freedom="scale", side=1536, multiple=1536),
    "zoedepth": Kind(inverse=False, freedom="scale", side=512, multiple=32),
    "glpn": Kind(inverse=False, freedom="scale", side=640, multiple=32),
}


@dataclass
class MonocularProvider:
    """A depth model; fulfils `interface.Provider`, but only for known cameras."""

    model: torch.nn.Module
    device: torch.device
    kind: Kind
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def predict(self, photos: Sequence[Tensor], cameras: Cameras | None = None) -> Geometry:
        if cameras is None:
            raise ValueError(
                "--provider monocular needs known cameras: it looks at one photo at a time. For photos without cameras use "
                "--provider pi3, vggt, mapanything or depth-anything-3."
            )
        depths, rgbs = [], []
        for photo in photos:
            canvas = fit_canvas([photo], self.kind.multiple, max_side=self.kind.side)
            mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
            found = self.model(
                pixel_values=((canvas.images - mean) / std).to(self.device)
            ).predicted_depth
            value = found.reshape(found.shape[-2:]).float().cpu()
            if self.kind.inverse:
                # Exactly 0 stands for as far as can be, sky mostly: no depth.
                value = torch.where(value > 1e-6 * value.max(), 1 / value, 0.0)
            depths.append(value.nan_to_num(0.0, 0.0, 0.0).clamp(min=0))
            rgb = torch.nn.functional.interpolate(
                canvas.images, value.shape, mode="bilinear", antialias=True, align_corners=False
            )
            rgbs.append(rgb[0].permute(1, 2, 0))
        confidence = [(depth > 0).float() for depth in depths]
        return Geometry.from_depths(cameras, depths, confidence, rgbs, self.kind.freedom)


def load_monocular(weight_path: Path | None, device: torch.device) -> MonocularProvider:
    """Make a provider from a folder of weights or the name of a model on the hub.

    Raises:
        ValueError: the weights are not there, or of a family whose output is not known; says what to do.
    """
    where = str(weight_path or REPOSITORY)
    with explained_package("monocular", GET_PACKAGE):
        from transformers import AutoModelForDepthEstimation
        from transformers.image_processing_base import ImageProcessingMixin
    with explained_weights("monocular", where, GET_WEIGHTS):
        model = AutoModelForDepthEstimation.from_pretrained(where)
        # Only the numbers: the processors themselves may need torchvision.
        settings, _ = ImageProcessingMixin.get_image_processor_dict(where)
    family = model.config.model_type
    if getattr(model.config, "depth_estimation_type", "relative") == "metric":
        family += " metric"
    if family not in KINDS:
        raise ValueError(
            f"--provider monocular: {where} is a {family} model, whose output is not known here. Expected one of {', '.join(KINDS)}."
        )
    mean = tuple(settings.get("image_mean") or (0.0,) * 3)
    std = tuple(settings.get("image_std") or (1.0,) * 3)
    if settings.get("do_normalize") is False:  # GLPN
        mean, std = (0.0,) * 3, (1.0,) * 3
    return MonocularProvider(model.to(device).eval(), device, KINDS[family], mean, std)
