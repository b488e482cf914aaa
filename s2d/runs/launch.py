"""Devices and processes, as `accelerate launch` sets them up."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from s2d.device import Precision
from s2d.log import logger

if TYPE_CHECKING:  # takes seconds to import
    from accelerate import Accelerator


def make_accelerator(
    precision: Precision, on_cpu: bool, *, compiled: bool = False, some_unused: bool = False
) -> Accelerator:
    """Set up devices and processes; all but the main process are quiet from here on.

    Args:
        precision: Of forward and backward pass.
        on_cpu: Even where there is a GPU.
        compiled: Compile what is prepared with torch.compile.
        some_unused: Some trainable parameters get no gradient, which processes must know to stay together.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        cpu=on_cpu,
        dynamo_backend="inductor" if compiled else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=some_unused)],
    )
    if not accelerator.is_main_process:
        logger.setLevel(logging.CRITICAL + 1)
    logger.info(
        "device: %s, %d process%s, %s",
        accelerator.device,
        accelerator.num_processes,
        "es" * (accelerator.num_processes > 1),
        precision,
    )
    return accelerator
