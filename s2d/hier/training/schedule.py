"""The learning rate as a function of the step."""

import math
from typing import Literal

RateSchedule = Literal["one_cycle", "constant"]
# Of OneCycle (Smith & Topin 2018), torch's defaults: where it starts and ends, as parts of its peak.
START, END = 1 / 25, 1e-4 / 25
# The published schedule is laid out for ten steps more than are made.
SPARE_STEPS = 10


def rate_factor(step: int, schedule: RateSchedule, warm_up_steps: int, num_steps: int) -> float:
    """Factor on the learning rate of a step, counted from 0: rises as half a cosine over the warm-up, then falls so, or stays."""
    peak = max(warm_up_steps - 1, 0)
    if step < peak:
        return _half_cosine(START, 1.0, step / peak)
    if schedule == "constant":
        return 1.0
    return _half_cosine(1.0, END, (step - peak) / max(num_steps + SPARE_STEPS - 1 - peak, 1))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
