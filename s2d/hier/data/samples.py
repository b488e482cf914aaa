"""Training samples: sample number k of a run is a function of the seed and k, whoever asks for it and when.

So a batch depends neither on how many processes share the work nor on where an interrupted run took up again
(`s2d.runs.batches` has the loader that goes with it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from s2d.geometry import project
from s2d.hier.data.capture import Capture
from s2d.hier.data.framing import CENTRE, mirrored_cameras
from s2d.hier.data.index import Pick
from s2d.hier.data.samplers import Sampler
from s2d.hier.views import Views

# Draws are keyed by (seed, one of these, counter), so that no two share their numbers.
ORDER, SAMPLE, COUNT = 0, 1, 2
ATTEMPTS = 50  # captures that are tried for one sample: videos can be too short for the gap

Sample = dict[str, Tensor]
ROLES = ("context", "target")
FIELDS = ("images", "viewmats", "Ks", "near", "far")


class Source(Protocol):
    """Captures of one kind."""

    name: str
    sampler: Sampler

    def __len__(self) -> int: ...

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A shuffled order of the captures in which they are read well."""
        ...

    def capture(self, row: int) -> Capture: ...

    def is_usable(self, capture: Capture) -> bool:
        """Whether to train on a capture at all."""
        ...

    def fingerprint(self) -> str:
        """What the samples depend on."""
        ...


@dataclass
class TrainingSamples:
    """The endless, shuffled sequence of samples: what a DataLoader wants of a data set.

    Raises:
        ValueError: there is nothing to draw from.
    """

    sources: Sequence[Source]
    shares: Sequence[float]  # of the samples, by source
    size: tuple[int, int]  # (width, height)
    samples_per_step: int  # over all processes
    num_context: tuple[int, ...] = (2,)
    """Each step has one of these numbers of context views."""
    num_targets: int = 4
    seed: int = 0
    flip: bool = True
    random_crop: bool = False
    """Cut out any part of the photos instead of the middle, the same part of all."""
    unit_baseline: bool = False
    """Scale the world so that the first two context cameras are 1 apart."""
    with_depth: bool = False
    """Add what is known about the depth of the context views."""
    _orders: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.sources or not all(map(len, self.sources)):
            raise ValueError("There is no scene to train on. Check --data and --exclude-scenes.")

    def __getitem__(self, number: int) -> Sample:
        """Draw sample `number` of the run; see `frame_sample` for what is in it.

        Raises:
            ValueError: no capture gives a sample, or a picture cannot be read.
        """
        step = number // self.samples_per_step
        rng = np.random.default_rng((self.seed, SAMPLE, number))
        which = int(rng.choice(len(self.sources), p=np.array(self.shares) / sum(self.shares)))
        source = self.sources[which]
        count = int(np.random.default_rng((self.seed, COUNT, step)).choice(self.num_context))
        for attempt in range(ATTEMPTS):
            # The next in the order: it lies in a chunk that is open.
            capture = source.capture(self._row(which, number + attempt))
            if not source.is_usable(capture):
                continue
            pick = source.sampler.pick(capture, step, count, self.num_targets, rng)
            if pick is not None:
                break
        else:
            raise ValueError(
                f"{source.name}: none of {ATTEMPTS} scenes has {count} context views at step {step}. Their videos are too short, or their "
                "views do not overlap: pass smaller gaps (--min-gap, --max-gap), fewer --context-views, or other data."
            )
        place = tuple(rng.random(2).tolist()) if self.random_crop else CENTRE
        sample = frame_sample(capture, pick, self.size, place, self.with_depth)
        if self.flip and rng.random() < 0.5:
            sample = mirrored(sample)
        return with_unit_baseline(sample) if self.unit_baseline else sample

    def _row(self, which: int, number: int) -> int:
        source = self.sources[which]
        epoch, place = divmod(number, len(source))
        if (which, epoch) not in self._orders:
            if len(self._orders) > 4 * len(self.sources):  # no more than the epochs near by
                self._orders.clear()
            rng = np.random.default_rng((self.seed, ORDER, which, epoch))
            self._orders[which, epoch] = source.order(rng)
        return int(self._orders[which, epoch][place])


def frame_sample(
    capture: Capture,
    pick: Pick,
    size: tuple[int, int],
    place: tuple[float, float] = CENTRE,
    with_depth: bool = False,
) -> Sample:
    """Read the views of a pick.

    Args:
        capture: The scene.
        pick: Its rows.
        size: Width and height of the pictures.
        place: Which part of the photos, see `framing`.
        with_depth: Add `context_depth` [V, H, W]: camera z at the pixels of points that the views are known to see, 0 elsewhere.

    Returns:
        `context_images` [V, 3, H, W] in [0, 1], `context_viewmats`, `context_Ks`, `context_near`, `context_far`, and `target_…`.

    Raises:
        ValueError: a row that the capture does not have, or a picture that cannot be read.
    """
    sample: Sample = {}
    for role, rows in zip(ROLES, pick, strict=True):
        if max(rows) >= len(capture):
            raise ValueError(
                f"Scene {capture.key} has {len(capture)} views and no view {max(rows)}: another data set than its evaluation index was made "
                "for? Check --index."
            )
        pictures, Ks = zip(*(capture.picture(row, size, place) for row in rows), strict=True)
        chosen = list(rows)
        sample |= {
            f"{role}_images": torch.stack(pictures).float() / 255,
            f"{role}_viewmats": capture.viewmats[chosen].float(),
            f"{role}_Ks": torch.stack(Ks),
            f"{role}_near": capture.near[chosen].float(),
            f"{role}_far": capture.far[chosen].float(),
        }
    if with_depth:
        depths = [
            point_depths(capture.seen_points(row), K, viewmat, size)
            for row, K, viewmat in zip(
                pick.context, sample["context_Ks"], sample["context_viewmats"], strict=True
            )
        ]
        sample["context_depth"] = torch.stack(depths)
    return sample


def point_depths(
    points: Tensor,  # [P, 3] world
    K: Tensor,  # [3, 3]
    viewmat: Tensor,  # [4, 4]
    size: tuple[int, int],
) -> Tensor:
    """Depth of the nearest point in each pixel, 0 where there is none. [H, W]"""
    xy, z = project(points, K, viewmat)
    column, line = xy.floor().long().unbind(-1)
    inside = (z > 0) & (column >= 0) & (column < size[0]) & (line >= 0) & (line < size[1])
    cells = (line * size[0] + column)[inside]
    depth = torch.full((size[0] * size[1],), torch.inf)
    depth = depth.scatter_reduce(0, cells, z[inside], "amin").reshape(size[1], size[0])
    return torch.where(depth.isinf(), 0.0, depth)


def mirrored(sample: Sample) -> Sample:
    """The same sample of the mirrored world: pictures flipped, cameras moved (`framing.mirrored_cameras`)."""
    result = dict(sample)
    for name in ("context_images", "target_images", "context_depth"):
        if name in sample:
            result[name] = sample[name].flip(-1)
    for role in ROLES:
        width = sample[f"{role}_images"].shape[-1]
        viewmats, Ks = mirrored_cameras(sample[f"{role}_viewmats"], sample[f"{role}_Ks"], width)
        result |= {f"{role}_viewmats": viewmats, f"{role}_Ks": Ks}
    return result


def with_unit_baseline(sample: Sample) -> Sample:
    """The same sample in another unit: the first two context cameras are 1 apart. Unchanged where they stand in one place."""
    viewmats = sample["context_viewmats"][:2]
    centers = -(viewmats[:, :3, :3].mT @ viewmats[:, :3, 3:])[..., 0]
    baseline = (centers[0] - centers[1]).norm()
    if baseline == 0:
        return sample
    result = dict(sample)
    for role in ROLES:
        result[f"{role}_viewmats"] = sample[f"{role}_viewmats"].clone()
        result[f"{role}_viewmats"][:, :3, 3] /= baseline
        for name in (f"{role}_near", f"{role}_far"):
            result[name] = sample[name] / baseline
    if "context_depth" in sample:
        result["context_depth"] = sample["context_depth"] / baseline
    return result


def as_views(batch: Sample, role: str) -> Views:
    """The context or the target views of a batch of samples."""
    return Views(**{name: batch[f"{role}_{name}"] for name in FIELDS})


def as_batch(sample: Sample) -> Sample:
    """A batch of one."""
    return {name: tensor[None] for name, tensor in sample.items()}
