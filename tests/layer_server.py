"""A real web server on a free port of this machine, in a thread; and a folder of levels small enough for tests."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from s2d.gaussians import Gaussians
from s2d.layers.levels import write_levels
from s2d.layers.manifest import Levels
from s2d.layers.records import Encoding


@contextmanager
def running(app) -> Iterator[str]:
    """Serve an ASGI application; yields http://127.0.0.1:<port>/."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)


def blob(num: int, seed: int, sh_degree: int = 1) -> Gaussians:
    """Random small Gaussians around the origin, most opaque first."""
    g = torch.Generator().manual_seed(seed)
    return Gaussians(
        means=0.5 * torch.randn(num, 3, generator=g),
        log_scales=torch.randn(num, 3, generator=g) * 0.2 - 2.5,
        quats=torch.randn(num, 4, generator=g),
        opacity_logits=torch.randn(num, generator=g).sort(descending=True).values,
        sh0=0.7 * torch.randn(num, 1, 3, generator=g),
        shN=0.1 * torch.randn(num, (sh_degree + 1) ** 2 - 1, 3, generator=g),
    )


def write_small_levels(folder: Path, encoding: Encoding | None = None) -> Levels:
    """Three levels; the last has no opacity list of its own. Several chunks a file."""
    parts = [blob(1500, 0), blob(2500, 1), blob(1200, 2)]
    faded = parts[0].opacity_logits - 2.0
    return write_levels(folder, parts, [None, faded, None], [0.25, 0.5, 1.0], encoding)
