"""Training samples: sample number k of a run is a function of the seed and k, whoever asks for it and when.

So a batch does not depend on how many processes share the work or where an interrupted run took up again.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.fixer.diffusion import fit_photo, resize
from s2d.fixer.training.augment import (
    guided_columns,
    recolour,
    recolouring,
    shrink,
    window_size,
)
from s2d.fixer.training.pairs import Pair
from s2d.images import read_image

# Draws are keyed by (seed, one of these, counter), so that no two share their numbers.
ORDER, SAMPLE = 0, 1

Sample = dict[str, Tensor]


@dataclass(frozen=True)
class ImagePrep:
    """How images become samples: `resize_N` stretches them to N×N, `crop_N` cuts a window out, `none` leaves them."""

    kind: str
    size: int = 0

    @classmethod
    def parse(cls, text: str, multiple: int) -> ImagePrep:
        """Read a flag.

        Args:
            text: `resize_512`, `crop_256` or `none`.
            multiple: The network takes sides that are multiples of this.

        Raises:
            ValueError: None of these, or a size that the network cannot take.
        """
        if text == "none":
            return cls("none")
        match = re.fullmatch(r"(resize|crop)_(\d+)", text)
        if match is None:
            raise ValueError(
                f"Image preparation {text!r} is not known. Expected resize_N, crop_N or none, for example crop_256."
            )
        size = int(match[2])
        if size < multiple or size % multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            raise ValueError(
                f"Image preparation {text}: this network takes sides that are multiples of {multiple}. "
                f"Pass {match[1]}_{nearest}."
            )
        return cls(match[1], size)

    def check(self, pairs: tuple[Pair, ...]) -> None:
        """Raise ValueError, naming the file, if an image is smaller than the window to be cut out of it."""
        for pair in pairs if self.kind == "crop" else ():
            if min(pair.size) < self.size:
                raise ValueError(
                    f"{pair.rendered} is {pair.size[0]}×{pair.size[1]}, smaller than crop_{self.size}. Pass a smaller "
                    f"crop, or resize_{self.size}."
                )


@dataclass
class PairSamples:
    """The endless, shuffled sequence of training samples, `samples[k]` its k-th: what a DataLoader wants of a data set."""

    pairs: tuple[Pair, ...]
    prep: ImagePrep
    seed: int = 0
    flip: bool = True
    min_scale: float = 1.0
    """Cut windows up to 1 / min_scale times as large out and shrink them; 1 keeps every pixel as it is."""
    colour_jitter: float = 0.0
    """Change brightness, tint and gamma of a sample's images, all alike, by up to this factor off 1."""
    guidance_dropout: float = 0.0
    """Show this share of the samples without guidance, and as many with guidance on one side only; see `guided_columns`."""
    cache_bytes: int = 0
    """Keep decoded images up to this size, 8 bits a value: decoding takes longer than cutting a window."""
    _order: tuple[int, np.ndarray] = field(default=(-1, np.empty(0, int)), repr=False)
    _cache: OrderedDict[tuple[Path, bool], Tensor] = field(default_factory=OrderedDict, repr=False)
    _cached: int = field(default=0, repr=False)

    def __getitem__(self, number: int) -> Sample:
        """Draw sample `number` of the run.

        Returns:
            `rendered`, `guidance`, `reference`, `target` [3,S,S] in [-1,1] and `coverage_mask` [1,S,S] of 0 and 1, all from one
            window and flipped alike; `position`, that of the pair.
        """
        epoch, place = divmod(number, len(self.pairs))
        if self._order[0] != epoch:
            shuffled = np.random.default_rng((self.seed, ORDER, epoch))
            self._order = (epoch, shuffled.permutation(len(self.pairs)))
        position = int(self._order[1][place])
        pair = self.pairs[position]
        generator = np.random.default_rng((self.seed, SAMPLE, number))
        choice, row, column, mirror = generator.random(4)
        reference = pair.references[int(choice * len(pair.references))] if pair.references else None
        images = self._images(pair, reference)
        if self.prep.kind == "crop":
            size = self.prep.size
            height, width = images["rendered"].shape[-2:]
            window = window_size(size, self.min_scale, min(height, width), generator)
            top, left = int(row * (height - window + 1)), int(column * (width - window + 1))
            images = {
                key: shrink(
                    image[:, top : top + window, left : left + window], size, key == "coverage_mask"
                )
                for key, image in images.items()
            }
        columns = guided_columns(images["rendered"].shape[-1], self.guidance_dropout, generator)
        for key in ("guidance", "coverage_mask"):
            kept = torch.zeros_like(images[key])
            kept[..., columns] = images[key][..., columns]
            images[key] = kept
        if self.flip and mirror < 0.5:
            images = {key: image.flip(-1) for key, image in images.items()}
        if self.colour_jitter > 0:
            table = recolouring(self.colour_jitter, generator)
            images = {
                key: image if key == "coverage_mask" else recolour(image, table)
                for key, image in images.items()
            }
        return {**_floats(images), "position": torch.tensor(position)}

    def fixed_sample(self, position: int) -> Sample:
        """The same every time: nearest reference, middle window, not flipped."""
        pair = self.pairs[position]
        images = self._images(pair, pair.references[0] if pair.references else None)
        if self.prep.kind == "crop":
            size = self.prep.size
            height, width = images["rendered"].shape[-2:]
            top, left = (height - size) // 2, (width - size) // 2
            images = {
                key: image[:, top : top + size, left : left + size] for key, image in images.items()
            }
        return {**_floats(images), "position": torch.tensor(position)}

    def _images(self, pair: Pair, reference: Path | None) -> dict[str, Tensor]:  # uint8 [C, H, W]
        rendered = self._read(pair.rendered)
        if pair.guidance is None:
            guidance = torch.zeros_like(rendered)
            mask = torch.zeros_like(rendered[:1])
        else:
            guidance = self._read(pair.guidance)
            mask = self._read(pair.coverage or pair.guidance, as_mask=True)
        images = {
            "rendered": rendered,
            "guidance": guidance,
            "coverage_mask": mask,
            # Nothing to look at: the render itself, which says nothing new.
            "reference": rendered if reference is None else self._read(reference),
            "target": self._read(pair.target),
        }
        if images["reference"].shape != rendered.shape:
            photo = fit_photo(images["reference"][None].float(), *rendered.shape[-2:])[0]
            images["reference"] = photo.round().clamp(0, 255).to(torch.uint8)
        return images

    def _read(self, path: Path, as_mask: bool = False) -> Tensor:
        """Read a picture, resized if the preparation says so; a mask is what is not black. uint8 [C, H, W]"""
        key = (path, as_mask)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        image = read_image(path).permute(2, 0, 1)
        square = (self.prep.size, self.prep.size)
        if as_mask:
            image = (image > 0).any(0, keepdim=True).float()
        if self.prep.kind == "resize":
            image = (
                F.interpolate(image[None], square, mode="nearest-exact")[0]
                if as_mask
                else resize(image[None], *square)[0]
            )
        image = (image * 255).round().clamp(0, 255).to(torch.uint8)
        if image.nbytes <= self.cache_bytes:
            self._cache[key] = image
            self._cached += image.nbytes
            while self._cached > self.cache_bytes:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        return image


def _floats(images: dict[str, Tensor]) -> Sample:
    """uint8 → [-1, 1], the mask → {0, 1}."""
    return {
        key: image.float() / 255 if key == "coverage_mask" else image.float() / 127.5 - 1
        for key, image in images.items()
    }
