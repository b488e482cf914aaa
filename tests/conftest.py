"""What every test may use: seeded numbers, the devices that are there, a tiny scene, and folders of data where they exist."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_scene import build_tiny_scene

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A test run in the background of a shell ignores Ctrl-C, and so would the processes that the tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def logger_as_found() -> Iterator[None]:
    """A script's `setup_logging`, run by a test or a module's fixture, would else decide what later files of the process see of the log."""
    logger = logging.getLogger("s2d")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers = handlers


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    """Numbers that are the same in every run and do not depend on which tests ran before."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COLMAP scene of 8 small photos of three sizes. Shared by all tests: copy it before changing it."""
    return build_tiny_scene(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with real photo sets (scenes/, photos/)."""
    return _folder("S2D_DATA", "real scenes")


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """Folder with the weights of image networks."""
    return _folder("S2D_WEIGHTS", "network weights")


def _folder(variable: str, what: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: no {what}")
    if not Path(value).is_dir():
        pytest.skip(f"{variable}={value} is not a folder: no {what}")
    return Path(value)
