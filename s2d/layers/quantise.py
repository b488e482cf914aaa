"""Numbers as fewer bytes: what a Gaussian's parameters lose when they become 8 or 16 bits. All arrays are numpy, one row per Gaussian.

| parameter | stored as | largest error |
|---|---|---|
| centres | 16 bits per axis of sign(d) log(1 + |d| / unit), d from the middle | grows with the distance from the middle, as the detail that is seen does |
| log scales | 8 bits, linear | half a step: 2 % of a size where sizes span a factor of 20,000 |
| rotations | the three smallest of the four components in 10 bits each, and which one is left out | 0.001 of a component |
| opacity | 8 bits of opacity, linear | 1/510 |
| higher SH coefficients | 8 bits, root of the magnitude: small ones are most of them | 1/128 of the value and more for small ones |

The constant colour is half precision: 8 bits would show in skies.
"""

from dataclasses import dataclass

import numpy as np

from s2d.gaussians import Gaussians

# Sizes below this share of all are raised to it: they are smaller than a pixel from everywhere.
SMALLEST_SIZES = 1e-3
# Stored 0 and 255 need a finite logit; 0.001 is below what is drawn (1/255), and above 0.99 nothing changes.
OPACITY_OF_0, OPACITY_OF_255 = 0.001, 254.5 / 255
_ROOT2 = 2.0**0.5
_TEN_BITS = 1023


@dataclass(frozen=True)
class Ranges:
    """What the stored whole numbers are counted in. Three numbers per tuple: x, y, z."""

    means_middle: tuple[float, ...]
    means_unit: float
    """World units; finer near the middle, coarser beyond."""
    means_low: tuple[float, ...]
    means_high: tuple[float, ...]
    log_scales_low: float
    log_scales_high: float
    shN_max: float

    @staticmethod
    def of(gaussians: Gaussians) -> "Ranges":
        """Ranges that hold these Gaussians."""
        values = {name: t.detach().cpu().numpy() for name, t in gaussians.tensors().items()}
        means, log_scales, rest = values["means"], values["log_scales"], values["shN"]
        middle = np.median(means, axis=0)
        unit = max(float(np.median(np.linalg.norm(means - middle, axis=1))), 1e-6)
        curved = _curve(means - middle, unit)
        return Ranges(
            means_middle=tuple(map(float, middle)),
            means_unit=unit,
            means_low=tuple(map(float, curved.min(0))),
            means_high=tuple(map(float, curved.max(0))),
            log_scales_low=float(np.quantile(log_scales, SMALLEST_SIZES)),
            log_scales_high=float(log_scales.max()),
            shN_max=max(float(np.abs(rest).max(initial=0.0)), 1e-6),
        )


def to_bytes(values: dict[str, np.ndarray], ranges: Ranges) -> dict[str, np.ndarray]:
    """Quantise the columns `means`, `log_scales` and `shN`; the rest is handed on."""
    curved = _curve(values["means"] - np.array(ranges.means_middle), ranges.means_unit)
    low, high = np.array(ranges.means_low), np.array(ranges.means_high)
    sizes = (ranges.log_scales_low, ranges.log_scales_high)
    share = np.abs(values["shN"]) / ranges.shN_max
    return values | {
        "means": _steps(curved, low, high, 65535).astype(np.uint16),
        "log_scales": _steps(values["log_scales"], *sizes, 255).astype(np.uint8),
        "shN": (np.sign(values["shN"]) * np.rint(127 * np.sqrt(share.clip(0, 1)))).astype(np.int8),
    }


def from_bytes(stored: dict[str, np.ndarray], ranges: Ranges) -> dict[str, np.ndarray]:
    """Undo `to_bytes` as far as that goes."""
    low, high = np.array(ranges.means_low), np.array(ranges.means_high)
    curved = low + (high - low) * (stored["means"] / 65535)
    offsets = np.sign(curved) * ranges.means_unit * np.expm1(np.abs(curved))
    span = ranges.log_scales_high - ranges.log_scales_low
    share = stored["shN"].astype(np.float32) / 127
    return stored | {
        "means": offsets + np.array(ranges.means_middle),
        "log_scales": ranges.log_scales_low + span * (stored["log_scales"] / 255),
        "shN": np.sign(share) * np.square(share) * ranges.shN_max,
    }


def pack_quats(
    quats: np.ndarray,  # [N, 4]
) -> np.ndarray:
    """Pack wxyz quaternions of any norm into 32 bits: bits 30-31 say which component is left out, then the others in order. [N, 1] uint32"""
    unit = quats / np.linalg.norm(quats, axis=1, keepdims=True).clip(1e-12)
    largest = np.abs(unit).argmax(1)
    # q and -q are one rotation: make the component that is left out positive.
    unit = unit * np.where(np.take_along_axis(unit, largest[:, None], 1) < 0, -1.0, 1.0)
    rest = unit[np.arange(4) != largest[:, None]].reshape(-1, 3)
    steps = np.rint((rest * _ROOT2 + 1) / 2 * _TEN_BITS).clip(0, _TEN_BITS).astype(np.uint32)
    bits = largest.astype(np.uint32) << np.uint32(30)
    for place, column in zip((20, 10, 0), steps.T, strict=True):
        bits |= column << np.uint32(place)
    return bits[:, None]


def join_quats(
    bits: np.ndarray,  # [N, 1]
) -> np.ndarray:
    """Undo `pack_quats`. [N, 4] unit quaternions wxyz"""
    word = bits[:, 0].astype(np.uint32)
    steps = np.stack(
        [(word >> np.uint32(place)) & np.uint32(_TEN_BITS) for place in (20, 10, 0)], 1
    )
    rest = (steps / _TEN_BITS * 2 - 1) / _ROOT2
    left_out = np.sqrt((1 - np.square(rest).sum(1)).clip(0))
    largest = (word >> np.uint32(30)).astype(np.int64)
    quats = np.empty((len(word), 4))
    quats[np.arange(4) != largest[:, None]] = rest.reshape(-1)
    np.put_along_axis(quats, largest[:, None], left_out[:, None], 1)
    return quats


def pack_opacities(logits: np.ndarray) -> np.ndarray:
    """Round opacities to 255ths; 0 is what is never drawn. uint8"""
    # Beyond 50 in either direction nothing changes but that exp overflows.
    return np.rint(255 / (1 + np.exp(-logits.astype(np.float64).clip(-50, 50)))).astype(np.uint8)


def join_opacities(stored: np.ndarray) -> np.ndarray:
    """Undo `pack_opacities`: logits."""
    opacities = (stored / 255).clip(OPACITY_OF_0, OPACITY_OF_255)
    return np.log(opacities / (1 - opacities))


def _curve(offsets: np.ndarray, unit: float) -> np.ndarray:
    return np.sign(offsets) * np.log1p(np.abs(offsets) / unit)


def _steps(
    values: np.ndarray, low: np.ndarray | float, high: np.ndarray | float, count: int
) -> np.ndarray:
    span = np.maximum(np.asarray(high) - np.asarray(low), 1e-12)
    return np.rint((values - low) / span * count).clip(0, count)
