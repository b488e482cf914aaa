"""What a training run will take of a GPU's memory, before it begins.

    training = TrainingMemory(max_gaussians, sh_degree, kept.cameras.sizes, novel.sizes)
    resident = training.fit(device, cfg.data_device)

Counted are the tensors that the kernels' Python allocates (tests/test_device_step.py adds them up on the meta device). The number of
(Gaussian, tile) instances is only known once something is drawn; here it is an assumption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from s2d.device import NotEnoughMemory, free_memory
from s2d.log import logger

DataDevice = Literal["auto", "cpu"]

FLOAT = 4  # bytes
MOMENTS = 2
STATISTICS = 2  # floats of a Gaussian: sum of gradients, number of views
# Floats of a Gaussian in a step: splat 12, gradients of the splat 10, keys, counts and radii 3, order and ends (64 bits) 4, the sort's own 6.
STEP_FLOATS = 35
# Bytes of an instance: tile and Gaussian 6, sorted tile and its place 10, the sort's own 10, Gaussian in order 4, saved states 24.
INSTANCE_BYTES = 54
INSTANCES = 8  # of a Gaussian; the models of few photos have 2.4 at 0.2 MP
# Floats of a pixel in a step: images and their gradients 10, transmittance and last instance 2, loss 12, a factor on the image and its gradient 6.
PIXEL_FLOATS = 30
MARGIN = 1.1  # torch's allocator rounds up and leaves gaps


@dataclass(frozen=True)
class TrainingMemory:
    """What decides the memory of a run."""

    max_gaussians: int
    sh_degree: int
    kept_sizes: Sequence[tuple[int, int]]  # (width, height)
    novel_sizes: Sequence[tuple[int, int]] = ()
    backdrop: bool = False
    """Its picture in every view is kept on the device."""
    by_autograd: bool = False
    """A strategy changes what is drawn, so gradients and changed parameters are kept beside the parameters."""

    @property
    def gaussian_bytes(self) -> int:
        """Of one Gaussian and all that a step needs for it."""
        floats = 11 + 3 * (self.sh_degree + 1) ** 2
        # Density control holds the old rows of a tensor and the new ones at once: less than another copy of the parameters.
        copies = 1 + MOMENTS + 1 + 2 * self.by_autograd
        kept = FLOAT * (copies * floats + STATISTICS + STEP_FLOATS)
        return kept + INSTANCES * INSTANCE_BYTES

    @property
    def step_bytes(self) -> int:
        """Of the images of the largest view, and of what is behind all of them."""
        views = [w * h for w, h in (*self.kept_sizes, *self.novel_sizes)]
        return FLOAT * (PIXEL_FLOATS * max(views, default=0) + 3 * self.backdrop * sum(views))

    @property
    def photo_bytes(self) -> int:
        """Of all photos, and of all fixed views with a weight per pixel."""
        kept, novel = (
            sum(w * h for w, h in sizes) for sizes in (self.kept_sizes, self.novel_sizes)
        )
        return FLOAT * (3 * kept + 4 * novel)

    def fit(self, device: torch.device, data_device: DataDevice) -> bool:
        """Print the plan for a GPU and hold it against the memory that is free there; nothing to do for the CPU.

        Args:
            device: Where to train.
            data_device: `auto` keeps the photos on the GPU where they fit, `cpu` never.

        Returns:
            Whether the photos stay on the device.

        Raises:
            NotEnoughMemory: It cannot fit; says what would.
        """
        if device.type != "cuda":
            return False
        free, total = free_memory(device)
        gaussians = self.max_gaussians * self.gaussian_bytes
        needed = MARGIN * (gaussians + self.step_bytes)
        resident = data_device == "auto" and needed + MARGIN * self.photo_bytes <= free
        logger.info(
            "memory on %s: %s for up to %s Gaussians, %s for the images of a step, %s for %d photos (%s); %s of %s are free",
            device,
            _gib(gaussians),
            f"{self.max_gaussians:,}",
            _gib(self.step_bytes),
            _gib(self.photo_bytes),
            len(self.kept_sizes) + len(self.novel_sizes),
            "on the GPU" if resident else "pinned on the host",
            _gib(free),
            _gib(total),
        )
        if needed > free:
            fitting = int((free / MARGIN - self.step_bytes) / self.gaussian_bytes)
            cure = f"--max-gaussians {fitting // 1000 * 1000}" if fitting >= 1000 else "smaller photos"  # fmt: skip
            raise NotEnoughMemory(
                f"Training would take {_gib(needed)} on {device}, where {_gib(free)} of {_gib(total)} are free. Expected it to fit. "
                f"Close what else uses the GPU, or pass {cure} or --device cpu."
            )
        return resident


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
