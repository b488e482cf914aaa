"""Measure the kernels on this machine: what it can do at best, how long a training step takes, and where the time goes.

Reads   nothing, or finished models (--model-dir), a 3DGS PLY (--ply), a scene's SfM points (--scene)
Writes  nothing; prints tables. --json FILE keeps the numbers, --svg FILE the chart of `scaling`

Example
    python tools/benchmark.py machine                               # peak multiply-adds, copy bandwidth, two copies side by side
    python tools/benchmark.py kernels --model-dir out/fern out/fox  # whole training steps of real models; each phase against its limit
    python tools/benchmark.py scaling                               # threads, pixels, Gaussians, memory
    python tools/benchmark.py step                                  # one synthetic step, and the plain PyTorch twin beside it
    python tools/benchmark.py step --scene $S2D_DATA/scenes/fern
    python tools/benchmark.py quality --scale 0.25 --max-side 320 --last-stage 1    # what each strategy is worth, in reduced runs
    python tools/benchmark.py protocol --protocol llff --data-dir data/nerf_llff_data     # a paper's table, with ours below
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import tyro

from benchmarks import kernels, machine, protocols, quality, scaling, step
from s2d.config import describe_error
from s2d.log import logger, setup_logging

# Each measurement is a dataclass of settings, of which tyro makes a subcommand, and a module's main.
MEASUREMENTS = {
    "machine": (machine.Machine, machine.main),
    "kernels": (kernels.Kernels, kernels.main),
    "quality": (quality.Quality, quality.main),
    "scaling": (scaling.Scaling, scaling.main),
    "step": (step.Step, step.main),
    "protocol": (protocols.Protocols, protocols.main),
}


def main() -> None:
    """Parse the command line and run one measurement."""
    settings = {name: config for name, (config, _) in MEASUREMENTS.items()}
    cfg = tyro.extras.subcommand_cli_from_dict(settings)
    run = {config: function for config, function in MEASUREMENTS.values()}
    setup_logging()
    try:
        run[type(cfg)](cfg)
    except (ValueError, OSError) as error:  # what a user can cause, as in s2d.config.run_script
        logger.error("%s", describe_error(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
