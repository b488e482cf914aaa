"""Image features for the learned mixing: a small convolutional stem, or a frozen vision transformer from a local folder."""

from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureExtractor(Protocol):
    """Anything that turns an image into a coarser map of features."""

    channels: int

    def __call__(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> Tensor:
        """Return features on any regular grid over the image. [B, channels, h, w]"""
        ...


def make_features(name: str, width: int) -> "ConvFeatures | TransformerFeatures":
    """`conv`, or the folder of a vision transformer."""
    return ConvFeatures(width) if name == "conv" else TransformerFeatures.from_folder(Path(name))


class ConvFeatures(nn.Sequential):
    """Three strided convolutions: 1/8 of the image's size. Trained with the rest, no weights to fetch."""

    def __init__(self, channels: int) -> None:
        widths = (3, max(channels // 4, 8), max(channels // 2, 8), channels)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Conv2d(width_in, width_out, 3, stride=2, padding=1), nn.SiLU()]
        super().__init__(*layers[:-1])
        self.channels = channels


class TransformerFeatures(nn.Module):
    """The patch tokens of a frozen vision transformer (DINOv2 and its like). Its weights stay out of checkpoints."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        # In a tuple torch does not see it: no entry in state dicts, nothing to train, always in evaluation mode.
        self._hidden = (backbone.requires_grad_(False).eval(),)
        self.channels: int = backbone.config.hidden_size
        self.patch: int = backbone.config.patch_size
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @classmethod
    def from_folder(cls, folder: Path) -> "TransformerFeatures":
        """Load a folder in transformers' layout."""
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"No vision model in {folder}: config.json is missing. Give the folder of a transformers model "
                "(for example a download of facebook/dinov2-small), or use features: conv."
            )
        from transformers import AutoModel

        return cls(AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32))

    def _apply(self, function, recurse: bool = True) -> "TransformerFeatures":
        """Move along with the network to a device or precision."""
        self._hidden[0]._apply(function, recurse)
        return super()._apply(function, recurse)

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> Tensor:
        """Return one feature per patch; the image is resized to whole patches. Differentiable in `images`. [B, channels, h, w]"""
        rows, columns = (max(1, round(side / self.patch)) for side in images.shape[-2:])
        resized = F.interpolate(
            images,
            (rows * self.patch, columns * self.patch),
            mode="bicubic",
            antialias=True,
        )
        normalised = ((resized + 1) / 2 - self.mean) / self.std
        tokens = self._hidden[0](pixel_values=normalised).last_hidden_state
        # A class token and registers, if there are any, stand before the patches.
        patches = tokens[:, -rows * columns :]
        return patches.transpose(1, 2).unflatten(2, (rows, columns))
