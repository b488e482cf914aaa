"""Several processes that share one job, as `accelerate launch` (or torchrun) starts them: one per GPU, or several on a CPU.

The launcher says in the environment how many there are. They talk over gloo whatever the device is: what they exchange is a
list of names, and waiting for one another must neither block a GPU nor need one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed

# A process may wait for another one as long as its views take.
PATIENCE = timedelta(days=30)

T = TypeVar("T")


@dataclass
class Processes:
    """This process among those of its job."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Its number on its own machine: which GPU it takes."""
    has_plan: bool = False

    @property
    def is_first(self) -> bool:
        """The one that plans, and finishes, what all do."""
        return self.rank == 0

    def share_plan(self, plan: Any = None) -> Any:
        """Hand the first process's plan to all, once; what the others pass is not looked at."""
        self.has_plan = True
        if self.count == 1:
            return plan
        box = [plan]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def share_of(self, jobs: Sequence[T]) -> Sequence[T]:
        """This process's part of the jobs: neighbours stay together, sizes differ by one at most."""
        start, stop = (len(jobs) * rank // self.count for rank in (self.rank, self.rank + 1))
        return jobs[start:stop]

    def wait(self) -> None:
        """Until all have come here.

        Raises:
            ValueError: One of them has ended early.
        """
        if self.count == 1:
            return
        try:
            torch.distributed.barrier()
        except RuntimeError as error:
            raise ValueError(
                "Another process of this job has ended; it says why. Run the same command again to go on."
            ) from error


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Find the other processes of this job. Started without a launcher, a process is alone.

    Where the first one leaves the block without a plan, the others get None: there is nothing to do.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    processes = Processes(rank, count, local_rank)
    try:
        yield processes
    finally:
        if processes.is_first and not processes.has_plan:
            processes.share_plan()
        torch.distributed.destroy_process_group()
