"""Which samples a process sees when: a function of the step alone, however the work is divided and wherever a run went on."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Sharing:
    """How the samples of a step are divided among processes and forward passes.

    A step takes `batch_size · num_micro · num_processes` consecutive samples, however these three divide them.
    """

    batch_size: int
    num_micro: int = 1
    process: int = 0
    num_processes: int = 1

    def samples(self, step: int, micro: int) -> range:
        """Numbers of the samples of one of this process's forward passes."""
        number = (step * self.num_micro + micro) * self.num_processes + self.process
        return range(number * self.batch_size, (number + 1) * self.batch_size)


def load_batches(
    samples: Dataset, steps: range, sharing: Sharing, num_workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches for this process: `sharing.num_micro` per step, in order. `samples[k]` is sample k of the run, whoever asks for it and when."""
    loader = DataLoader(
        samples,
        batch_sampler=[
            sharing.samples(step, micro) for step in steps for micro in range(sharing.num_micro)
        ],
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        yield {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
