"""The `s2d` logger, progress bars, and what a manifest says about the machine.

On a terminal: rich's coloured lines and live bars. Anywhere else (a file, CI, a pipe): plain lines, and a progress line only
every few seconds. Everything goes to stderr, so that stdout stays free for results.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import s2d

logger = logging.getLogger("s2d")
console = Console(
    stderr=True
)  # one console, so that log lines and live bars do not overwrite each other

REDRAW_SECONDS = 0.2  # terminal: smooth to the eye, nothing against a training step
LINE_SECONDS = 10.0  # no terminal: a long job shows life and a log stays short


class _PlainFormatter(logging.Formatter):
    """`12:30:05 message`, with the level only where it is not INFO."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
        return (
            text if record.exc_info is None else f"{text}\n{self.formatException(record.exc_info)}"
        )


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is now, not to what it was when the handler was made."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def setup_logging(level: int = logging.INFO) -> None:
    """Attach the one handler that fits where stderr goes. Calling it again replaces the handler."""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(
            console=console, show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S"
        )
    else:
        handler = _StderrHandler()
        handler.setFormatter(_PlainFormatter())
    logger.handlers = [handler]
    logger.setLevel(level)


class ProgressBar:
    """What `progress` hands out. `update` costs one clock reading unless it is time to draw."""

    def __init__(self, total: int, description: str, start: int, live: Progress | None) -> None:
        self.total = total
        self.description = description
        self._start = start
        self._live = live
        self._task = (
            live.add_task(description, total=total, completed=start, info="") if live else None
        )
        self._interval = REDRAW_SECONDS if live else LINE_SECONDS
        self._started: float | None = (
            None  # when `_start` was done: the first step compiles kernels and would spoil the speed
        )
        self._drawn = time.monotonic()
        self._shown_step: int | None = None
        self._last: tuple[int, dict] = (start, {})

    def update(self, step: int, **columns: object) -> None:
        """Show that `step` steps of `total` are done.

        Args:
            step: Number of finished steps, counted from 0.
            columns: Shown beside the bar as `name value`: `loss=loss, gaussians=len(means)`. A tensor may be given; it is
                read (and a GPU waited for) only when the bar is drawn.
        """
        self._last = (step, columns)
        now = time.monotonic()
        if self._started is None:
            self._start, self._started = step, now
        if now - self._drawn >= self._interval:
            self._drawn = now
            self._draw()

    def _draw(self) -> None:
        step, columns = self._last
        self._shown_step = step
        info = []
        if self._started is not None and step > self._start:
            speed = (step - self._start) / max(time.monotonic() - self._started, 1e-9)
            info.append(f"{speed:.3g}/s")
            if self._live is None and step < self.total:
                info.append(f"{_clock((self.total - step) / speed)} left")
        info += [f"{name} {_show(value)}" for name, value in columns.items()]
        if self._live is not None:
            self._live.update(self._task, completed=step, info="  ".join(info))
            return
        percent = 100 * step // max(self.total, 1)
        state = f"{self.description}: {step}/{self.total} ({percent} %)"
        logger.info("%s", ", ".join([state, *info]))

    def _finish(self) -> None:
        # A job that fitted between two plain lines needs none; the caller logs what came out of it.
        if self._live is not None or self._shown_step not in (None, self._last[0]):
            self._draw()


@contextmanager
def progress(total: int, description: str, start: int = 0) -> Iterator[ProgressBar]:
    """Show the progress of a loop: bar, steps, speed, time left and columns of the caller's choice.

    Args:
        total: Number of steps of the whole job.
        description: What is being done, in one or two words.
        start: Steps already done (a resumed job).

    Example:
        with progress(num_steps, "optimise") as bar:
            for step in range(num_steps):
                ...
                bar.update(step + 1, loss=loss, gaussians=len(gaussians.means))
    """
    if not console.is_terminal:
        bar = ProgressBar(total, description, start, None)
        yield bar
        bar._finish()
        return
    live = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[info]}"),
        console=console,
        refresh_per_second=1 / REDRAW_SECONDS,
    )
    with live:
        bar = ProgressBar(total, description, start, live)
        yield bar
        bar._finish()


def versions() -> dict[str, str]:
    """Versions of what a result depends on: python, s2d, torch, numpy."""
    found = {"python": platform.python_version(), "s2d": s2d.__version__}
    for package in ("torch", "numpy"):
        found[package] = metadata.version(package)
    return found


def describe_machine() -> dict[str, object]:
    """Processor, usable cores, memory and operating system, as stored in every manifest."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):  # not Linux, or an architecture that names no model
        return platform.processor() or platform.machine()


def _show(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str):
        return value
    return f"{float(value):.4g}"  # a float or a tensor of one element


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
