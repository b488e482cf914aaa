"""The learning rate as a function of the step: nothing to save, nothing to go out of step."""

import math
from typing import Literal

LrSchedule = Literal["constant", "cosine"]


def rate_factor(step: int, schedule: LrSchedule, warmup_steps: int, num_steps: int) -> float:
    """Factor on the learning rate of a step, counted from 0: rises linearly to 1 over the warm-up, then stays, or falls to 0 as a cosine."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    share = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * share))
