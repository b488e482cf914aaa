"""The fixer with a network: `difix` (a diffusion base from a folder) and `compact` (one small file) behind one interface.

Images of any size: they are padded to what the network's halvings need and cropped back, and run in overlapping tiles where
they are larger than `tile_size`. A reference photo is encoded once per photo, size and tile.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.checks import check_range, check_shape
from s2d.device import DTYPES, Precision
from s2d.files import list_files
from s2d.fixer.interface import FixResult, as_photos
from s2d.fixer.tiles import pad_to_multiple, run_tiled

if TYPE_CHECKING:  # diffusers takes seconds to import
    from s2d.fixer.network.model import FixerModel

# The folders of a base model that are read; such a download may hold the same weights a second time beside them.
MODEL_PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")

# Mean absolute change of colour by which the network has painted something else than it was shown.
CHANGE = 0.25
# A network that sees guidance and coverage apart has learned that a view without any is hopeless, and paints it over. Down to this
# coverage every view of the left-out scenes gained (docs/fixer.md); below it the render stays.
MIN_COVERAGE = 0.1
# Neighbouring tiles fade into each other over this part of a tile.
OVERLAP_SHARE = 8
# Longest sides that run in one piece by default: what the models take then is in docs/fixer.md.
COMPACT_TILE_SIZE, DIFIX_TILE_SIZE = 1536, 1024
# Below this a tile shows the network too little to tell an artifact from what belongs there.
MIN_TILE_SIZE = 64
# Latents are 1/48 of an image's bytes or less, so this is more than any scene's kept photos and tiles need.
CACHE_BYTES = 256 * 2**20


@dataclass
class DiffusionFixer:
    """Repairs views with a `FixerModel`; fulfils `interface.Fixer`. Make one with `load_compact_fixer` or `load_difix_fixer`."""

    model: FixerModel
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "fp32"
    tile_size: int = DIFIX_TILE_SIZE
    """Longest side in pixels that runs in one piece; larger images run in tiles. Rounded up to the network's multiple."""
    network_size: int | None = None
    """Run at this square size and resize back, as S2D's released weights were trained (512). None keeps the image's size."""
    _references: OrderedDict[tuple, Tensor] = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        check_range("tile_size", self.tile_size, low=MIN_TILE_SIZE)
        if self.network_size is not None:
            check_range("network_size", self.network_size, low=64)
        # Convolutions of channels-last tensors need no reordering: a quarter less time on a CPU.
        self.model = self.model.to(
            self.device, DTYPES[self.precision], memory_format=torch.channels_last
        ).eval()
        self.model.requires_grad_(False)

    @torch.inference_mode()
    def fix(
        self,
        rendered: Tensor,  # [H, W, 3]
        guidance: Tensor,  # [H, W, 3]
        coverage_mask: Tensor,  # [H, W, 1]
        reference: Tensor | Sequence[Tensor],  # [H', W', 3] each
    ) -> FixResult:
        """Repair a view. See `Fixer.fix`; the confidence falls where the network changed what it was shown.

        A compact network leaves a view as it is of which guidance covers less than `MIN_COVERAGE`.
        """
        dims = check_shape("rendered", rendered, ("H", "W", 3))
        check_shape("guidance", guidance, ("H", "W", 3), dims)
        check_shape("coverage_mask", coverage_mask, ("H", "W", 1), dims)
        photos = as_photos(reference)
        for photo in photos:
            check_shape("reference", photo, (None, None, 3))
        supported = (coverage_mask > 0.5).float()
        if self.model.config.difference and float(supported.mean()) < MIN_COVERAGE:
            return FixResult(rendered, supported, torch.ones_like(supported))
        with self._explained_memory(*rendered.shape[:2]):
            shown, fixed = self._run(rendered, guidance, coverage_mask, photos)
        change = (fixed - shown).abs().mean(-1, keepdim=True)
        return FixResult(fixed, supported, 1.0 - (change / CHANGE).clamp(max=1.0))

    def _run(
        self, rendered: Tensor, guidance: Tensor, coverage_mask: Tensor, photos: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What the network is shown (the mix) and what it makes of it. [H, W, 3] each, in [0, 1]"""
        height, width = rendered.shape[:2]
        keys = [hashlib.sha256(photo.contiguous().numpy()).digest() for photo in photos]
        images = [to_network(image) for image in (rendered, guidance)]
        mask = coverage_mask.permute(2, 0, 1)[None]
        photos = [fit_photo(to_network(photo), height, width) for photo in photos]
        if self.network_size is not None:
            square = (self.network_size, self.network_size)
            images, photos = ([resize(image, *square) for image in row] for row in (images, photos))
            mask = F.interpolate(mask, square, mode="nearest-exact")
        inner = images[0].shape[-2:]
        render, points, mask, *photos = (
            self._on_device(pad_to_multiple(image, self.model.multiple))
            for image in (*images, mask, *photos)
        )
        seen = self.model.show(render, points, mask)
        multiple = self.model.multiple
        tile = -(-self.tile_size // multiple) * multiple

        def repair(rows: slice, columns: slice) -> Tensor:
            crop = (..., rows, columns)
            place = (height, width, rows.start, rows.stop, columns.start, columns.stop)
            latents = [
                self._reference_latents((key, *place), photo[crop])
                for key, photo in zip(keys, photos, strict=True)
            ]
            return self.model.repair(seen[crop], torch.stack(latents, dim=1)).float()

        fixed = run_tiled(repair, *render.shape[-2:], tile, tile // OVERLAP_SHARE)
        shown, fixed = (
            image[..., : inner[0], : inner[1]].cpu().float().clamp(-1, 1)
            for image in (seen[:, :3], fixed)
        )
        return tuple(from_network(resize(image, height, width)) for image in (shown, fixed))

    @contextmanager
    def _explained_memory(self, height: int, width: int) -> Iterator[None]:
        """Turn running out of memory into a message that says which settings need less."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            side = min(self.tile_size, self.network_size or max(height, width))
            advice = ["--precision bf16"] if self.precision == "fp32" else []
            if (smaller := side // 2 // 64 * 64) >= MIN_TILE_SIZE and self.network_size is None:
                advice.insert(0, f"--tile-size {smaller}")
            cure = f"Pass {' and '.join(advice)}" if advice else "Close other programs"
            raise ValueError(
                f"Not enough memory on {self.device} for a view of {width}x{height} in tiles of up to {self.tile_size} "
                f"pixels in {self.precision}. {cure}, or use a smaller fixer: --fixer compact, --fixer analytic."
            ) from error

    def _on_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, DTYPES[self.precision])

    def _reference_latents(self, place: tuple, photo: Tensor) -> Tensor:
        """Encode (part of) a reference photo, or remember what it gave. [1, c, h, w]"""
        latents = self._references.pop(place, None)
        if latents is None:
            latents = self.model.encode_photos(photo)
        self._references[place] = latents  # at the end: the least recently used goes first
        while sum(entry.nbytes for entry in self._references.values()) > CACHE_BYTES:
            self._references.popitem(last=False)
        return latents


def load_compact_fixer(
    weights: Path,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    tile_size: int = COMPACT_TILE_SIZE,
) -> DiffusionFixer:
    """Load the compact fixer from its one file.

    Raises:
        FileNotFoundError, ValueError: No, or no usable weights, or a package is missing; the message says what to do.
    """
    with explained_loading(str(weights)):
        from s2d.fixer.network.compact import load_compact

        return DiffusionFixer(load_compact(weights), torch.device(device), precision, tile_size)


def load_difix_fixer(
    base_model: str,
    checkpoint: Path | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    tile_size: int = DIFIX_TILE_SIZE,
    network_size: int | None = None,
) -> DiffusionFixer:
    """Load a fixer on a diffusion base.

    Args:
        base_model: Folder of, or name of, nvidia/difix_ref or stabilityai/sd-turbo; a name must be in the local cache.
        checkpoint: `.pkl` of S2D, Difix, img2img-turbo or train_artifact_fixer.py.
        device, precision, tile_size, network_size: See `DiffusionFixer`.

    Raises:
        FileNotFoundError, ValueError: No, or no usable weights, or a package is missing; the message says what to do.
    """
    with explained_loading(base_model):
        from s2d.fixer.network.difix import load_difix

        return DiffusionFixer(
            load_difix(base_model, checkpoint),
            torch.device(device),
            precision,
            tile_size,
            network_size=network_size,
        )


def difix_weights(base_model: str) -> list[Path]:
    """All files of a base model that a fixer is made of, for a hash of its content. Errors as of `load_difix_fixer`."""
    with explained_loading(base_model):
        from s2d.fixer.network.folder import find_folder

        folder = find_folder(base_model)
    return [path for part in MODEL_PARTS for path in list_files(folder / part)]


@contextmanager
def explained_loading(model: str) -> Iterator[None]:
    """Turn a missing package, or too little memory, into a message that says what to do."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"A fixer with a network needs packages that are not there or do not fit: {error}. Run: pip install -r "
            "requirements.txt, or use --fixer analytic, which needs none of them."
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(
            f"Not enough memory to load the fixer from {model}. Pass --precision bf16, or use a smaller fixer: "
            "--fixer compact, --fixer analytic."
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whichever device: torch has a type of its own for GPUs alone."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in ("allocate memory", "not enough memory", "out of memory"))


def to_network(
    image: Tensor,  # [H, W, C] in [0, 1]
) -> Tensor:
    """The layout and range inside networks: [1, C, H, W] in [-1, 1]."""
    return image.permute(2, 0, 1)[None] * 2 - 1


def from_network(
    images: Tensor,  # [1, C, H, W] in [-1, 1]
) -> Tensor:
    """The inverse of `to_network`, clamped. [H, W, C] in [0, 1]"""
    return (images[0].permute(1, 2, 0) / 2 + 0.5).clamp(0.0, 1.0)


def resize(
    images: Tensor,  # [B, C, H, W]
    height: int,
    width: int,
) -> Tensor:
    """Resize smoothly (bicubic, low-passed where it shrinks). [B, C, height, width]"""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True)


def fit_photo(
    photo: Tensor,  # [1, 3, H', W']
    height: int,
    width: int,
) -> Tensor:
    """Scale a photo until it covers height × width and cut the middle out: nothing is stretched. [1, 3, height, width]"""
    scale = max(height / photo.shape[-2], width / photo.shape[-1])
    rows, columns = (round(side * scale) for side in photo.shape[-2:])
    resized = resize(photo, max(rows, height), max(columns, width))
    top, left = (resized.shape[-2] - height) // 2, (resized.shape[-1] - width) // 2
    return resized[..., top : top + height, left : left + width]
