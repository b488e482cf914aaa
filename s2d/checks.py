"""Checks of what crosses a public edge, and the one place that words their errors.

An error says: what happened: where. Expected X, got Y. What to do. The function that called the check is named in front. Each check
costs a few comparisons when all is well; `check_finite` and `check_range` of a tensor read it once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import EllipsisType, FrameType
from typing import Any

import torch
from torch import Tensor

Dims = dict[str, tuple[int, str]]  # named size -> (value, the argument it was first seen in)


def check_shape(
    name: str,
    tensor: Any,  # Tensor or numpy array
    spec: Sequence[int | str | EllipsisType | None],
    dims: Dims | None = None,
) -> Dims:
    """Raise unless `tensor` has the shape `spec`.

    Args:
        name: The argument's name, as the caller's caller knows it.
        tensor: Anything with a `shape`.
        spec: One entry per axis: a size, a name such as "N" (equal names must have equal sizes), or None (any size). A first
            entry `...` stands for any number of leading axes.
        dims: What an earlier call returned: its names must agree with this tensor.

    Returns:
        The sizes by name; hand it to the next call.

    Raises:
        ValueError: `rasterize: quats must be [N, 4] with N=1204 (from means), got [1204, 3].`

    Example:
        dims = check_shape("means", means, ("N", 3))
        check_shape("quats", quats, ("N", 4), dims)
    """
    dims = {} if dims is None else dims
    if not hasattr(tensor, "shape"):
        raise ValueError(
            f"{_caller()}: {name} must be an array {_show_spec(spec)}, got {type(tensor).__name__}."
        )
    shape = tuple(tensor.shape)
    axes, sizes = list(spec), shape
    if axes and axes[0] is ...:
        axes = axes[1:]
        sizes = shape[max(len(shape) - len(axes), 0) :]
    good = len(axes) == len(sizes)
    seen: Dims = {}
    for axis, size in zip(axes, sizes, strict=False):
        if isinstance(axis, str):
            expected = {**seen, **dims}.get(axis, (size, name))[0]
            seen.setdefault(axis, (size, name))
        else:
            expected = size if axis is None else axis
        good = good and expected == size
    if not good:
        known = [
            f"{axis}={dims[axis][0]} (from {dims[axis][1]})"
            for axis in dict.fromkeys(a for a in axes if isinstance(a, str))
            if axis in dims
        ]
        given = f" with {', '.join(known)}" if known else ""
        raise ValueError(
            f"{_caller()}: {name} must be {_show_spec(spec)}{given}, got {list(shape)}."
        )
    return {**seen, **dims}


def check_finite(
    name: str, tensor: Any, rows: str = "row", context: str = "", hint: str = ""
) -> None:
    """Raise if `tensor` holds a NaN or an infinity.

    Args:
        name: The argument's name.
        tensor: Tensor or numpy array of any shape.
        rows: What one entry of the first axis is: "Gaussian", "point", "camera".
        context: When it happened: "after step 4100".
        hint: What to do, a sentence.

    Raises:
        ValueError: `optimise: log_scales has 3 non-finite values of 3612 (first at Gaussian 88) after step 4100.`
    """
    bad = ~torch.isfinite(torch.as_tensor(tensor))
    num_bad = int(bad.sum())
    if num_bad:
        first = f" (first at {rows} {_first_row(bad)})" if bad.ndim else ""
        raise ValueError(
            _sentence(
                f"{_caller()}: {name} has {num_bad} non-finite value{'s' * (num_bad > 1)} of {bad.numel()}{first}",
                context,
                hint,
            )
        )


def check_range(
    name: str,
    value: Any,  # a number, Tensor or numpy array
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> None:
    """Raise unless low <= value <= high and above < value < below; NaN is never in range.

    Raises:
        ValueError: `make_split: keep_count must be in [2, 20], got 25. <hint>`, for an array with the first bad index.
    """
    values = torch.as_tensor(value)
    good = torch.ones_like(values, dtype=torch.bool)
    if values.is_floating_point():
        good &= ~torch.isnan(values)
    if low is not None:
        good &= values >= low
    if high is not None:
        good &= values <= high
    if above is not None:
        good &= values > above
    if below is not None:
        good &= values < below
    if bool(good.all()):
        return
    if values.ndim == 0:
        got = f"got {value if not isinstance(value, Tensor) else value.item()}"
    else:
        bad = ~good
        got = f"got {values[bad][0].item():.6g} at index {_first_row(bad)} ({int(bad.sum())} of {bad.numel()} values)"
    raise ValueError(
        _sentence(
            f"{_caller()}: {name} must be {_show_range(low, high, above, below)}, {got}", "", hint
        )
    )


def _sentence(text: str, context: str, hint: str) -> str:
    return f"{text}{' ' + context if context else ''}.{' ' + hint if hint else ''}"


def _first_row(bad: Tensor) -> int:
    return int(bad.reshape(bad.shape[0], -1).any(dim=1).nonzero()[0])


def _show_spec(spec: Sequence[int | str | EllipsisType | None]) -> str:
    special = {None: "*", ...: "..."}
    return f"[{', '.join(special[axis] if axis in special else str(axis) for axis in spec)}]"


def _show_range(
    low: float | None, high: float | None, above: float | None, below: float | None
) -> str:
    if (low is None and above is None) or (high is None and below is None):
        limits = {">=": low, ">": above, "<=": high, "<": below}
        return " and ".join(
            f"{sign} {limit}" for sign, limit in limits.items() if limit is not None
        )
    left = f"[{low}" if low is not None else f"({above}"
    right = f"{high}]" if high is not None else f"{below})"
    return f"in {left}, {right}"


def _caller() -> str:
    """Name of the function that called the check: read only when an error is being worded."""
    frame: FrameType = sys._getframe(2)
    name = frame.f_code.co_name
    if name in ("__init__", "__post_init__") and "self" in frame.f_locals:
        return type(frame.f_locals["self"]).__name__
    return "input" if name == "<module>" else name
