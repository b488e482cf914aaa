"""The fixer with a network: `difix` (a diffusion base from a folder) and `compact` (one small file) behind one interface.

Images of any size: they are padded to what the network's halvings need and cropped back, and run in overlapping tiles where
they are larger than `tile_size`. A reference photo is encoded once per photo, size and tile.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.checks import check_range, check_shape
from s2d.device import DTYPES, Precision, to_device
from s2d.files import list_files
from s2d.fixer.compiling import Compilable
from s2d.fixer.interface import Fixer, FixResult, NovelView, as_photos
from s2d.fixer.memory import out_of_memory, views_that_fit
from s2d.fixer.tiles import pad_to_multiple, run_tiled
from s2d.log import logger

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
class DiffusionFixer(Fixer):
    """Repairs views with a `FixerModel`. Make one with `load_compact_fixer` or `load_difix_fixer`."""

    model: FixerModel
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "fp32"
    tile_size: int = DIFIX_TILE_SIZE
    """Longest side in pixels that runs in one piece; larger images run in tiles. Rounded up to the network's multiple."""
    network_size: int | None = None
    """Run at this square size and resize back, as S2D's released weights were trained (512). None keeps the image's size."""
    compiled: bool = False
    """Run what torch.compile makes of the network, once for each size of view: worth it for many views."""
    _references: OrderedDict[tuple, Tensor] = field(default_factory=OrderedDict, repr=False)
    _at_once: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_range("tile_size", self.tile_size, low=MIN_TILE_SIZE)
        if self.network_size is not None:
            check_range("network_size", self.network_size, low=64)
        # Convolutions of channels-last tensors need no reordering: a quarter less time on a CPU.
        self.model = self.model.to(
            self.device, DTYPES[self.precision], memory_format=torch.channels_last
        ).eval()
        self.model.requires_grad_(False)
        self._repair = Compilable(self.model.repair, self.compiled)

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
        view = NovelView(rendered, guidance, coverage_mask, as_photos(reference))
        return self.fix_together([view])[0]

    def views_at_once(self, height: int, width: int) -> int:
        """As many as a GPU has memory for, by `memory.views_that_fit`, or by what has turned out to be too much."""
        if (height, width) not in self._at_once:
            sides = (self.network_size,) * 2 if self.network_size else (height, width)
            pixels = math.prod(min(side, self._tile) for side in sides)
            count = views_that_fit(self.model, pixels, DTYPES[self.precision], self.device)
            self._at_once[height, width] = count
            if count > 1:
                logger.info("fixer: %d views of %dx%d at once", count, width, height)
        return self._at_once[height, width]

    @torch.inference_mode()
    def fix_together(self, views: Sequence[NovelView]) -> list[FixResult]:
        """Repair views of one size, with as many references each, in one pass of the network; in several where memory is short."""
        dims = check_shape("rendered", views[0].rendered, ("H", "W", 3))
        for view in views:
            check_shape("rendered", view.rendered, ("H", "W", 3), dims)
            check_shape("guidance", view.guidance, ("H", "W", 3), dims)
            check_shape("coverage_mask", view.coverage_mask, ("H", "W", 1), dims)
            for photo in view.references:
                check_shape("reference", photo, (None, None, 3))
        masks = [(view.coverage_mask > 0.5).float() for view in views]
        results = [
            FixResult(view.rendered, mask, torch.ones_like(mask))
            for view, mask in zip(views, masks, strict=True)
        ]
        rows = [row for row, mask in enumerate(masks) if self._can_repair(mask)]
        for row, (shown, fixed) in zip(rows, self._in_parts([views[r] for r in rows]), strict=True):
            change = (fixed - shown).abs().mean(-1, keepdim=True)
            confidence = 1.0 - (change / CHANGE).clamp(max=1.0)
            results[row] = FixResult(fixed, masks[row], confidence)
        return results

    def _can_repair(self, mask: Tensor) -> bool:
        return not self.model.config.difference or float(mask.mean()) >= MIN_COVERAGE

    def _in_parts(self, views: Sequence[NovelView]) -> list[tuple[Tensor, Tensor]]:
        """What `_run` says of each view, on the CPU; where memory is short, with half as many views at once from then on."""
        done: list[tuple[Tensor, Tensor]] = []
        count = len(views)
        while len(done) < len(views):
            part = views[len(done) : len(done) + count]
            size = part[0].size
            if self._repair.compiled:
                # A graph is made for one number of views: fill up with copies.
                part = [*part, *part[-1:] * (self.views_at_once(*size) - len(part))]
            try:
                with self._explained_memory(*size) if len(part) == 1 else nullcontext():
                    pairs = [(shown.cpu(), fixed.cpu()) for shown, fixed in self._run(part)]
                done += pairs[: len(views) - len(done)]
                continue
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            # Outside of the handler, whose traceback would keep the tensors alive.
            count = self._at_once[size] = len(part) // 2
            logger.info("%s: too little memory for %d views at once: %d from here on", self.device, len(part), count)  # fmt: skip
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return done

    def _run(self, views: Sequence[NovelView]) -> list[tuple[Tensor, Tensor]]:
        """What the network is shown of each view (the mix) and what it makes of it, on the device. [H, W, 3] each, in [0, 1]"""
        height, width = views[0].size
        images = [
            self._loaded(to_network(image) for image in column)
            for column in zip(*(view[:2] for view in views), strict=True)
        ]
        mask = self._loaded(view.coverage_mask.permute(2, 0, 1)[None] for view in views)
        if self.network_size is not None:
            square = (self.network_size, self.network_size)
            images = [resize(image, *square) for image in images]
            mask = F.interpolate(mask, square, mode="nearest-exact")
        inner = images[0].shape[-2:]
        render, points, mask = (self._padded(image) for image in (*images, mask))
        seen = self.model.show(render, points, mask)
        photos = {id(photo): photo for view in views for photo in view.references}
        keys = {name: hashlib.sha256(p.contiguous().numpy()).digest() for name, p in photos.items()}
        fitted = cache(lambda name: self._fitted(photos[name], height, width))

        def latents_of(photo: Tensor, *place: int) -> Tensor:
            return self._reference_latents(
                (keys[id(photo)], height, width, *place), partial(fitted, id(photo))
            )

        def repair(rows: slice, columns: slice) -> Tensor:
            place = (rows.start, rows.stop, columns.start, columns.stop)
            latents = [
                torch.stack([latents_of(photo, *place) for photo in view.references], dim=1)
                for view in views
            ]
            return self._repair(seen[..., rows, columns], torch.cat(latents)).float()

        fixed = run_tiled(repair, *render.shape[-2:], self._tile, self._tile // OVERLAP_SHARE)
        shown, fixed = (
            resize(images[..., : inner[0], : inner[1]].float().clamp(-1, 1), height, width)
            for images in (seen[:, :3], fixed)
        )
        return [
            (from_network(before), from_network(after))
            for before, after in zip(shown.split(1), fixed.split(1), strict=True)
        ]

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

    @property
    def _tile(self) -> int:
        """Longest side of a tile, in pixels of the network."""
        multiple = self.model.multiple
        return -(-self.tile_size // multiple) * multiple

    def _loaded(self, images: Iterable[Tensor]) -> Tensor:
        """One batch on the device."""
        return to_device(torch.cat(list(images)), self.device)

    def _padded(self, images: Tensor) -> Tensor:
        """As the network takes them."""
        return pad_to_multiple(images, self.model.multiple).to(DTYPES[self.precision])

    def _fitted(self, photo: Tensor, height: int, width: int) -> Tensor:
        """A reference photo as the network takes it beside a view of that size."""
        image = fit_photo(self._loaded([to_network(photo)]), height, width)
        if self.network_size is not None:
            image = resize(image, self.network_size, self.network_size)
        return self._padded(image)

    def _reference_latents(self, place: tuple, photo: Callable[[], Tensor]) -> Tensor:
        """Encode (part of) a reference photo, or remember what it gave. [1, c, h, w]"""
        latents = self._references.pop(place, None)
        if latents is None:
            top, bottom, left, right = place[-4:]
            latents = self.model.encode_photos(photo()[..., top:bottom, left:right])
        self._references[place] = latents  # at the end: the least recently used goes first
        while sum(entry.nbytes for entry in self._references.values()) > CACHE_BYTES:
            self._references.popitem(last=False)
        return latents


def load_compact_fixer(
    weights: Path,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    tile_size: int = COMPACT_TILE_SIZE,
    compiled: bool = False,
) -> DiffusionFixer:
    """Load the compact fixer from its one file; the other arguments as of `DiffusionFixer`.

    Raises:
        FileNotFoundError, ValueError: No, or no usable weights, or a package is missing; the message says what to do.
    """
    with explained_loading(str(weights)):
        from s2d.fixer.network.compact import load_compact

        return DiffusionFixer(
            load_compact(weights), torch.device(device), precision, tile_size, compiled=compiled
        )


def load_difix_fixer(
    base_model: str,
    checkpoint: Path | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    tile_size: int = DIFIX_TILE_SIZE,
    network_size: int | None = None,
    compiled: bool = False,
) -> DiffusionFixer:
    """Load a fixer on a diffusion base.

    Args:
        base_model: Folder of, or name of, nvidia/difix_ref or stabilityai/sd-turbo; a name must be in the local cache.
        checkpoint: `.pkl` of S2D, Difix, img2img-turbo or train_artifact_fixer.py.
        device, precision, tile_size, network_size, compiled: See `DiffusionFixer`.

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
            network_size,
            compiled,
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
