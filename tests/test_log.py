"""Progress and log lines: what a person sees, on a terminal and in a file."""

import io
import logging
import re

import pytest
import torch
from rich.console import Console

from s2d import log


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="s2d")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(log.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(log, "console", Console(file=io.StringIO(), force_terminal=False))


def test_plain_progress_shows_share_speed_time_left_and_columns(plain, clock, lines):
    with log.progress(4000, "optimise") as bar:
        clock.now += 3.0
        bar.update(200, loss=torch.tensor(1.0))
        clock.now += 16.0
        bar.update(1000, loss=torch.tensor(0.03125), gaussians=51234)
    assert (
        lines()[0] == "optimise: 1000/4000 (25 %), 50/s, 1:00 left, loss 0.03125, gaussians 51,234"
    )


def test_plain_progress_is_silent_between_lines(plain, clock, lines):
    with log.progress(100, "optimise") as bar:
        for step in range(100):
            clock.now += 0.3  # 30 s in all: lines after 10 s and 20 s, and one at the end
            bar.update(step + 1)
    assert [re.match(r"optimise: (\d+)/100", line).group(1) for line in lines()] == [
        "34",
        "68",
        "100",
    ]


def test_a_short_job_writes_no_line(plain, clock, lines):
    with log.progress(10, "load") as bar:
        bar.update(10)
    assert lines() == []


def test_columns_are_not_read_until_a_line_is_drawn(plain, clock):
    class Costly:
        def __float__(self):
            raise AssertionError("read although nothing was drawn")

    with log.progress(10, "optimise") as bar:
        bar.update(1, loss=Costly())
        bar.update(2, loss=0.5)


def test_speed_of_a_resumed_job_counts_its_own_steps_only(plain, clock, lines):
    with log.progress(4000, "optimise", start=3000) as bar:
        bar.update(3001)
        clock.now += 10.0
        bar.update(3501)
    assert lines() == ["optimise: 3501/4000 (87 %), 50/s, 0:10 left"]


def test_a_slow_first_step_does_not_spoil_the_speed(plain, clock, lines):
    """Kernels are compiled in it: `27 minutes left` was said of a job of one minute."""
    with log.progress(60, "stage 1") as bar:
        clock.now += 30.0
        bar.update(1)
        clock.now += 10.0
        bar.update(21)
    assert lines() == ["stage 1: 1/60 (1 %)", "stage 1: 21/60 (35 %), 2/s, 0:20 left"]


def test_terminal_progress_draws_a_bar_with_columns(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=screen, force_terminal=True, width=120))
    with log.progress(20, "optimise") as bar:
        bar.update(20, loss=0.25, gaussians=1234)
    shown = screen.getvalue()
    for part in ("optimise", "━", "20/20", "loss 0.25", "gaussians 1,234"):
        assert part in shown


def test_an_exception_leaves_the_loop_and_the_bar(plain):
    with pytest.raises(KeyError, match="mine"), log.progress(5, "optimise"):
        raise KeyError("mine")


def test_plain_lines_name_the_level_only_where_it_matters(capsys, plain, monkeypatch):
    monkeypatch.setattr(log.logger, "handlers", [])
    log.setup_logging()
    log.logger.info("read %d photos", 3)
    log.logger.warning("one is dark")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d read 3 photos", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: one is dark", second)


def test_set_up_twice_writes_once(capsys, plain, monkeypatch):
    monkeypatch.setattr(log.logger, "handlers", [])
    log.setup_logging()
    log.setup_logging()
    log.logger.info("once")
    assert capsys.readouterr().err.count("once") == 1


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (7384, "2:03:04")],
)
def test_clock(seconds, shown):
    assert log._clock(seconds) == shown


def test_versions_and_machine_are_json_ready():
    assert set(log.versions()) == {"python", "s2d", "torch", "numpy"}
    machine = log.describe_machine()
    assert machine["cores"] >= 1
    assert machine["memory_gb"] > 0
    assert machine["cpu"]
