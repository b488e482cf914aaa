"""Ctrl-C and a plain `kill` between two steps instead of within one, so that a finished step is never lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from s2d.log import logger


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Hand out a function that says whether to stop. A second signal stops at once, with a KeyboardInterrupt."""
    asked: list[int] = []

    def answer(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        logger.info("stopping after this step; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():  # where no signals arrive
        yield lambda: False
        return
    before = {number: signal.signal(number, answer) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
