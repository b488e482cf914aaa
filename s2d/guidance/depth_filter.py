"""Which pixels of the depth maps to believe. A wrong point is worse than a hole."""

from collections.abc import Sequence

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
CONTINUED_CONFIDENCE = 0.1


def believable(views: Sequence[View], costs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Confidence of every pixel of every view, 0 where its depth should not be used.

    Args:
        views: With planes.
        costs: Matching cost per pixel, [H, W] each.

    Returns:
        [H, W] float32 in [0, 1] each.
    """
    result = []
    for index, (view, cost) in enumerate(zip(views, costs, strict=True)):
        exposure = check_consistency(views, index, MAX_PIXELS, MAX_RELATIVE).gains
        found = check_consistency(views, index, MAX_PIXELS, MAX_RELATIVE, exposure)
        good = (found.agree >= 1) & (found.through <= found.agree) & (found.angle > MIN_ANGLE)
        good &= (cost < MAX_COST) & (found.colour_error < MAX_COLOUR_ERROR)
        good = without_speckles(view.depth, good)
        agreement = 1 - np.exp(-found.agree.astype(np.float32))
        result.append(
            np.where(good, agreement * np.exp(-np.maximum(cost, 0) / 0.6), 0).astype(np.float32)
        )
    return result


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


def without_speckles(depth: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Drop islands of fewer than SPECKLE_PIXELS pixels over which depth changes gradually. [H, W] bool"""
    # filterSpeckles wants 16-bit numbers: a thousandth of the logarithm of depth spans e^±32.
    level = np.full(depth.shape, -32768, np.int16)
    level[good] = np.clip(np.log(depth[good]) * 1000, -32000, 32000).astype(np.int16)
    cv2.filterSpeckles(level, -32768, SPECKLE_PIXELS, int(SPECKLE_STEP * 1000))
    return good & (level != -32768)
