"""Jobs spread over processes of one thread each: two small fits side by side are faster than one after the other on two threads.

The parent alone shows progress and moves results. Workers ignore Ctrl-C and end when their parent ends them or is gone.
"""

import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

import cv2
import torch

from s2d import log
from s2d.device import DeviceUnusable, free_memory

WORKER_GPU_BYTES = 1 << 30  # an assumption: half for a process's context, half for a fit
IDLE_SECONDS = 5.0  # stereo reports nothing, and the progress should show that time goes on


class Named(Protocol):
    """A job, as far as it is known here."""

    @property
    def name(self) -> str: ...


class _Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    connection: Connection


def run_jobs(
    work: Callable[..., Any], jobs: Sequence[Named], num_workers: int, advice: str
) -> Iterator[tuple[Any, str, Any]]:
    """Run the jobs; yields (job, "steps", number), (job, "done", record) as they come, and (None, "idle", None) now and then.

    Args:
        work: Called in a worker as work(job, on_steps=...), where on_steps takes the number of steps done since its last call; returns
            the job's record. A function of a module, or a method of an object that can be pickled.
        jobs: Any objects with a name that can be pickled.
        num_workers: Processes at most.
        advice: What to do where a worker dies, which is most often for lack of memory.

    Raises:
        OSError: a worker could not write.
        DeviceUnusable: a worker's GPU failed or was too small; its message.
        ValueError: a worker died: out of memory, or killed.
        RuntimeError: a defect of ours, with the worker's traceback.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of torch's threads
    waiting = list(reversed(jobs))
    workers: list[_Worker] = []
    at_work: dict[Connection, Named] = {}
    try:
        for _ in range(min(num_workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()  # so that its end closes with the process
            workers.append(_Worker(process, ours))
            at_work[ours] = waiting.pop()
            ours.send(at_work[ours])
        while at_work:
            ready = wait(list(at_work), timeout=IDLE_SECONDS)
            if not ready:
                yield None, "idle", None
            for connection in ready:
                job = at_work[connection]
                try:
                    event, value = connection.recv()
                except EOFError:
                    raise _died(job, workers, connection, advice) from None
                if event == "error":
                    raise value
                if event == "defect":
                    raise RuntimeError(f"{job.name} failed:\n{value}")
                yield job, event, value
                if event == "done":
                    del at_work[connection]
                    if waiting:
                        at_work[connection] = waiting.pop()
                        connection.send(at_work[connection])
    finally:
        for worker in workers:
            worker.process.kill()  # not terminate: pycolmap answers SIGTERM with a screenful of stack trace
            worker.connection.close()
        for worker in workers:
            worker.process.join()


def usable_cores() -> int:
    """How many processes can run side by side."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def suitable_workers(num_jobs: int, device: torch.device) -> int:
    """How many processes to fit in: stereo keeps a core each, and on a GPU each takes memory."""
    most = min(num_jobs, usable_cores())
    if device.type == "cuda":
        most = max(1, min(most, free_memory(device)[0] // WORKER_GPU_BYTES))
    return most


def _work(connection: Connection, work: Callable[..., Any]) -> None:
    """A worker's life: take a job, do it, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["S2D_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    # The bars and lines of stereo and fit are for one run, not for many side by side; a job's record says what went wrong.
    log.console.quiet = True
    log.logger.handlers = [logging.NullHandler()]
    log.logger.propagate = False
    try:
        while True:
            job = connection.recv()
            record = work(job, on_steps=lambda num: connection.send(("steps", num)))
            connection.send(("done", record))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except (OSError, DeviceUnusable) as error:
        connection.send(("error", error))
    except Exception:
        connection.send(("defect", traceback.format_exc()))


def _died(
    job: Named, workers: Sequence[_Worker], connection: Connection, advice: str
) -> ValueError:
    process = next(worker.process for worker in workers if worker.connection is connection)
    process.join()
    code = process.exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return ValueError(
        f"The process that made {job.name} {how}. Most often the memory is full: {advice}. "
        "What is finished is kept; the same command goes on from there."
    )
