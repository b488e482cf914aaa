"""Which pixels of the depth maps to believe. A wrong point is worse than a hole."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from s2d.guidance.kernels import View, check_consistency, complete

MAX_PIXELS = 1.5  # round trip through an agreeing view
MAX_RELATIVE = 0.02  # difference of depth to an agreeing view
MAX_COST = 0.9  # 1 - NCC plus the geometric term
MIN_ANGLE = np.radians(0.5)  # between the rays of agreeing views: below, the depth is a guess
MAX_COLOUR_ERROR = 0.12  # mean over the channels, once the exposures are matched
SPECKLE_PIXELS = 100  # smaller islands are chance
SPECKLE_STEP = 0.03  # relative change of depth that separates islands

CONTINUED_REACH = 24  # pixels that a plane may grow into a plain area
CONTINUED_OWN_COLOUR = 0.05  # change of colour on the way: more is an edge
CONTINUED_OTHER_COLOUR = 0.03  # difference to another photo at the new point
CONTINUED_CONFIDENCE = 0.5  # measured: 0.43 to 0.78 of them are right

SUPPORT_REACH = 3  # pixels to the neighbours that are asked for support
SUPPORT_RELATIVE = 0.01  # of inverse depth
RIGHT = 0.02  # relative error of a depth that is right: what confidence is the probability of
FEATURES = (
    "1",
    "log parallax",
    "log agree",
    "through",
    "colour",
    "log difference",
    "support",
    "log texture",
)

# One per feature, fitted by `benchmarks/depth.py --fit` (docs/stage0.md). The cost of matching adds nothing to these.
COEFFICIENTS = (-2.226, 0.383, 0.289, -0.727, -0.328, -0.317, 2.615, 0.29)
MIN_CONFIDENCE = 0.01  # of what is believed at all: 0 means that there is no depth


class Evidence(NamedTuple):
    """What speaks for and against the depth of each pixel of one view. All [H, W] float32."""

    cost: np.ndarray  # of matching: 1 - NCC plus the geometric term
    agree: np.ndarray  # number of views whose depth agrees
    through: np.ndarray  # number of views that look through the point
    angle: np.ndarray  # widest between the rays of views that agree, radians
    colour_error: np.ndarray  # to the most alike of them
    depth_difference: np.ndarray  # to those that agree, mean of relative ones
    support: np.ndarray  # share of the neighbours whose planes reach the same depth
    texture: np.ndarray  # standard deviation of grey around the pixel


def gather_evidence(views: Sequence[View], costs: Sequence[np.ndarray]) -> list[Evidence]:
    """Ask every view about every other's planes. `views` with planes and rgb, `costs` [H, W] each."""
    result = []
    for index, (view, cost) in enumerate(zip(views, costs, strict=True)):
        exposure = check_consistency(views, index, MAX_PIXELS, MAX_RELATIVE).gains
        found = check_consistency(views, index, MAX_PIXELS, MAX_RELATIVE, exposure)
        counts = (array.astype(np.float32) for array in (found.agree, found.through))
        result.append(
            Evidence(
                cost,
                *counts,
                found.angle,
                found.colour_error,
                found.depth_difference,
                plane_support(view.planes),
                texture(view.rgb),
            )
        )
    return result


def features_of(
    evidence: Evidence,
    focal: float,  # pixels
) -> np.ndarray:
    """What the probability of being right is computed from, FEATURES. [H, W, F] float32"""
    parallax = np.maximum(evidence.angle * focal, 0.1)  # pixels that depth moves the point by
    return np.stack(
        [
            np.ones_like(evidence.cost),
            np.log(parallax),
            np.log(np.maximum(evidence.agree, 1)),
            np.minimum(evidence.through, 1),
            10 * evidence.colour_error,
            np.log(evidence.depth_difference + 1e-4),
            evidence.support,
            np.log(evidence.texture + 1 / 255),
        ],
        -1,
    ).astype(np.float32)


def probability(features: np.ndarray) -> np.ndarray:
    """Probability that the depth is right, RIGHT: logistic in the features [..., F]. [...] float32"""
    return 1 / (1 + np.exp(-(features @ np.array(COEFFICIENTS, np.float32))))


def believable(views: Sequence[View], costs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Confidence of every pixel of every view, 0 where its depth should not be used.

    Args:
        views: With planes.
        costs: Matching cost per pixel, [H, W] each.

    Returns:
        The probability that the depth is within RIGHT of the truth. [H, W] float32 in [0, 1] each.
    """
    result = []
    for view, found in zip(views, gather_evidence(views, costs), strict=True):
        good = (found.agree >= 1) & (found.through <= found.agree) & (found.angle > MIN_ANGLE)
        good &= (found.cost < MAX_COST) & (found.colour_error < MAX_COLOUR_ERROR)
        good = without_speckles(view.depth, good)
        sure = np.maximum(probability(features_of(found, view.K[0, 0])), MIN_CONFIDENCE)
        result.append(np.where(good, sure, np.float32(0)))
    return result


def believe(views: Sequence[View], costs: Sequence[np.ndarray]) -> None:
    """Give every view (planes, rgb) its confidence, empty the planes that are not believable, and continue the others, in place."""
    confidences = believable(views, costs)
    for view, confidence in zip(views, confidences, strict=True):
        view.planes[confidence == 0] = 0
        view.confidence = confidence
    continue_planes(views)


def continue_planes(views: Sequence[View]) -> None:
    """Let the believed planes of all views (planes, rgb, confidence) grow into the plain areas beside them, in place.

    What grew gets the confidence CONTINUED_CONFIDENCE.
    """
    grown = []
    for index in range(len(views)):
        exposure = check_consistency(views, index, MAX_PIXELS, MAX_RELATIVE).gains
        grown.append(
            complete(
                views,
                index,
                reach=CONTINUED_REACH,
                own_colour=CONTINUED_OWN_COLOUR,
                other_colour=CONTINUED_OTHER_COLOUR,
                max_pixels=MAX_PIXELS,
                max_relative=MAX_RELATIVE,
                gains=exposure,
            )
        )
    for view, planes in zip(views, grown, strict=True):
        new = (view.planes[..., 0] == 0) & (planes[..., 0] > 0)
        view.planes = planes
        view.confidence = np.where(new, np.float32(CONTINUED_CONFIDENCE), view.confidence)


def plane_support(planes: np.ndarray) -> np.ndarray:
    """Share of eight neighbours, SUPPORT_REACH pixels away, whose planes continue to this pixel's depth. [H, W] float32 in [0, 1]"""
    reach = SUPPORT_REACH
    height, width = planes.shape[:2]
    around = np.pad(planes, ((reach, reach), (reach, reach), (0, 0)))  # inverse depth 0: no support
    own = planes[..., 0]
    total = np.zeros_like(own)
    for dy in (-reach, 0, reach):
        for dx in (-reach, 0, reach):
            if dx == dy == 0:
                continue
            there = around[reach + dy : reach + dy + height, reach + dx : reach + dx + width]
            continued = there[..., 0] - there[..., 1] * dx - there[..., 2] * dy
            known = there[..., 0] > 0
            total += known & (np.abs(continued - own) < SUPPORT_RELATIVE * own)
    return total / 8


def texture(rgb: np.ndarray) -> np.ndarray:
    """Standard deviation of grey within 7 x 7 pixels. [H, W] float32"""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    mean, square = (cv2.boxFilter(array, cv2.CV_32F, (7, 7)) for array in (grey, grey * grey))
    return np.sqrt(np.maximum(square - mean * mean, 0))


def without_speckles(depth: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Drop islands of fewer than SPECKLE_PIXELS pixels over which depth changes gradually. [H, W] bool"""
    # filterSpeckles wants 16-bit numbers: a thousandth of the logarithm of depth spans e^±32.
    level = np.full(depth.shape, -32768, np.int16)
    level[good] = np.clip(np.log(depth[good]) * 1000, -32000, 32000).astype(np.int16)
    cv2.filterSpeckles(level, -32768, SPECKLE_PIXELS, int(SPECKLE_STEP * 1000))
    return good & (level != -32768)
