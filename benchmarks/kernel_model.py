"""How much arithmetic and how many bytes each phase of a training step cannot do without, and so how fast it could be.

Arithmetic is counted in FLOP as hardware makers count: a fused multiply-add is two, every other operation on a float (add,
multiply, minimum, comparison, rounding, estimate of a reciprocal, root, division) is one. Integer work, selections and moves
count as nothing; neither do lanes that a vector computes in vain, except in the tile passes, where whole blocks are visited.

Bytes are those that pass between a phase and memory if nothing survives in a cache from one phase to the next, and nothing
is moved twice within one: what is read once, what is written once. A phase is bound by its arithmetic at the peak rate of
multiply-adds, or by its bytes at the rate of a copy, whichever takes longer.

The counts are those of the formulas in csrc/, and change with them: see docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass

# The arithmetic of one (pixel, Gaussian) pair: forward.cpp, then backward_tiles.cpp without a gradient of the depth.
FORWARD_PAIR = {
    "u, v: two affine functions of the pixel": 6,
    "log2 alpha = L - u² - v², and whether it counts": 5,
    "2^x: floor, polynomial of degree 5, scaling": 12,
    "alpha <= 0.99; T - alpha T; is the pixel finished": 4,
    "weight, its sum": 2,
    "three colours and the depth": 8,
}
BACKWARD_PAIR = {
    "u, v": 6,
    "-log2 alpha, and whether it counts": 5,
    "2^x": 12,
    "q = alpha / (1 - alpha), limited: difference, limit, estimate of the reciprocal and one Newton step": 7,
    "weight": 1,
    "colour times its cotangent, weighted": 6,
    "G = alpha dL/d alpha where not clamped": 3,
    "what lies behind, transmittance": 2,
    "G u, G v": 2,
    "sums of G, Gu, Gv": 3,
    "sums of Guu, Guv, Gvv": 6,
    "sums of the three colours": 6,
}

# Per Gaussian in front of the camera: gaussian_batch.h, common/projection.h.
ACTIVATE = 186  # exp of three scales 75, unit quaternion 28, rotation 24, half of the covariance 9, opacity's logarithm 50
FOOTPRINT = 122
CULL = 34  # extents of the ellipse, overlap with the image, finite values
DIRECTION = 13  # from the camera, normalised
SH_BASIS = (0, 3, 21, 57)  # by degree
SH_BASIS_GRADIENT = (0, 3, 28, 98)
ADJOINT = 327  # slot sums to conic 33, footprint 181, rotation 75, scales 18, finite values 20
# Per Gaussian in a tile: the interval of its ellipse in each of four rows of blocks (tile_masks.h).
BLOCK_ROWS = 4 * 35
SLOT_SUMS = 10
# Per pixel and channel: four blurs forward (means, squares, product) and three back, each down and along, mirrored taps first: 5 additions,
# a product, 5 multiply-adds; the formula and its three partials 38, L1 3 (ssim.cpp).
LOSS = 7 * 2 * 16 + 38 + 3
ADAM = 13  # per number: two running means, bias corrections, root, division

RAW = 11  # floats of a Gaussian but for its colour: mean 3, scales 3, quaternion 4, opacity
SPLAT = 64  # bytes: a cache line, whatever part of it is read
INSTANCE = 12
SLOT = 64
DEPTH_KEY = 8
RADIX_PASSES = 3


@dataclass(frozen=True)
class Counts:
    """The work of one training step, as a mean over views."""

    gaussians: float
    visible: float
    instances: float
    """Gaussians in tiles."""
    pixels: float
    coefficients: int
    """SH coefficients per channel that are stored."""
    degree: int
    """Degree in use."""
    blended: float
    """Pairs (pixel, Gaussian) that any renderer must blend."""
    forward: float
    """Pairs that the forward pass computes."""
    backward: float
    """Pairs that the backward pass computes."""
    listed: float
    """Pairs of the tile lists, as if no pixel were ever finished."""


@dataclass(frozen=True)
class Work:
    """What a phase must do in one step."""

    flop: float
    bytes: float
    items: float
    """What its speed is counted in."""
    unit: str


def step_work(c: Counts) -> dict[str, Work]:
    """Return the work of each phase of a training step, in order."""
    color = 4 * 3 * c.coefficients  # bytes of a Gaussian's SH coefficients
    raw = 4 * RAW
    used = (c.degree + 1) ** 2
    visible = c.visible
    sh_flop = DIRECTION + SH_BASIS[c.degree] + 6 * used
    return {
        "project": Work(
            flop=c.gaussians * (ACTIVATE + FOOTPRINT + CULL)
            + visible * sh_flop
            + c.instances * BLOCK_ROWS,
            # Raw values, the position's offset; radius and number of tiles. Seen: coefficients, Splat, slot. Tile and mask.
            bytes=c.gaussians * (raw + 8 + 8) + visible * (color + SPLAT + 4) + c.instances * 8,
            items=c.gaussians,
            unit="Gaussians",
        ),
        "bin": Work(
            flop=0.0,
            # Number of tiles; depth out of the Splat; histogram and passes of the radix sort; lists: tile twice, mask, instance.
            bytes=c.gaussians * 4
            + visible * (SPLAT + DEPTH_KEY * (1 + 2 * RADIX_PASSES))
            + c.instances * (4 + 4 + 4 + INSTANCE),
            items=c.instances,
            unit="instances",
        ),
        "forward": Work(
            flop=c.forward * sum(FORWARD_PAIR.values()),
            # Images (colour, alpha, depth) and what the backward pass needs of a pixel (T, where it stopped).
            bytes=c.instances * INSTANCE + visible * SPLAT + c.pixels * (20 + 8),
            items=c.forward,
            unit="pairs",
        ),
        "loss": Work(
            flop=c.pixels * 3 * LOSS,
            bytes=c.pixels * 3 * 12,  # render, photo, gradient
            items=c.pixels,
            unit="pixels",
        ),
        "backward_tiles": Work(
            flop=c.backward * sum(BACKWARD_PAIR.values()),
            bytes=c.instances * (INSTANCE + SLOT) + visible * SPLAT + c.pixels * (12 + 8),
            items=c.backward,
            unit="pairs",
        ),
        "backward_project": Work(  # and the optimiser, in the same pass
            flop=visible
            * (
                ACTIVATE
                + FOOTPRINT
                + ADJOINT
                + sh_flop
                + 2 * used
                + SH_BASIS_GRADIENT[c.degree]
                + (RAW + 3 * c.coefficients) * ADAM
            )
            + c.instances * SLOT_SUMS,
            # Only what was seen moves: value and two moments, in and out; gradients stay in the cache. Two sums of the statistics.
            bytes=c.instances * SLOT + visible * ((RAW + 3 * c.coefficients) * 24 + SPLAT + 16),
            items=visible,
            unit="Gaussians",
        ),
    }
