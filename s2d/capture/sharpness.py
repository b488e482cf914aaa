"""How blurred a photo is, in pixels, by the width of its sharpest edges.

An ideal edge that was blurred with a Gaussian of σ has, after another blur of s, the slope 1 / sqrt(2π (σ² + s²)) at its middle. The
ratio of two such slopes gives σ whatever the edge's contrast (Zhuo and Sim 2011), so a photo with little texture is not taken
for a blurred one. Depth of field and faint texture blur some edges of any photo: its sharpest quarter counts. Motion blurs the edges
across it and leaves those along it, so edges are judged by direction, and the worst direction counts.
"""

import math

import cv2
import numpy as np

NARROW, WIDE = 1.0, 2.0  # pixels: the two further blurs
MIN_SLOPE = 0.02  # of the full range per pixel: noise and JPEG blocks stay below
NUM_DIRECTIONS = 6
MIN_EDGE_PIXELS = 60  # fewer say nothing about a direction
SHARPEST = 25  # percent


def edge_blur(
    grey: np.ndarray,  # [H, W] float32 in [0, 1]
) -> float:
    """Measure the σ of a photo's blur in pixels, of the direction that has most; 0 where the photo has no edges to tell by.

    The gradient filter's own variance of 0.4 pixels² is not taken off. What a photo shows as lines rather than edges looks sharper
    than it is, so a photo that is sharp to the pixel gives about 0.
    """
    narrow_x, narrow_y = _gradient(grey, NARROW)
    narrow, wide = np.hypot(narrow_x, narrow_y), np.hypot(*_gradient(grey, WIDE))
    rows, columns = np.mgrid[1 : grey.shape[0] - 1, 1 : grey.shape[1] - 1]
    slope = narrow[rows, columns]
    direction = np.stack([narrow_x, narrow_y])[:, rows, columns] / np.maximum(slope, 1e-9)
    step_x, step_y = np.rint(direction).astype(int)
    # The middle of an edge: nowhere steeper along the gradient.
    middle = (slope >= narrow[rows + step_y, columns + step_x]) & (
        slope >= narrow[rows - step_y, columns - step_x]
    )
    edges = middle & (slope > MIN_SLOPE)
    ratio2 = (slope[edges] / np.maximum(wide[rows, columns][edges], 1e-9)) ** 2
    # Lines and corners lose more than an edge does: as sharp as can be. A blurred ramp may lose nothing at all.
    ratio2 = np.clip(ratio2, 1.01, (WIDE / NARROW) ** 2)
    sigma = np.sqrt((WIDE**2 - ratio2 * NARROW**2) / (ratio2 - 1))
    angle = np.arctan2(direction[1][edges], direction[0][edges]) % math.pi
    bins = np.minimum((angle * (NUM_DIRECTIONS / math.pi)).astype(int), NUM_DIRECTIONS - 1)
    widths = [sigma[bins == k] for k in range(NUM_DIRECTIONS)]
    return max(
        (float(np.percentile(w, SHARPEST)) for w in widths if len(w) >= MIN_EDGE_PIXELS),
        default=0.0,
    )


def _gradient(grey: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    smooth = cv2.GaussianBlur(grey, (0, 0), sigma)
    return tuple(cv2.Sobel(smooth, cv2.CV_32F, *axes, scale=1 / 8) for axes in ((1, 0), (0, 1)))
