"""The C++ kernels of stage 0 as functions on numpy arrays. Compiled on first use.

`View` is one photo with its camera and whatever maps the kernels need of it. All arrays are C-contiguous.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import native_build
import numpy as np

CSRC = Path(__file__).parent / "csrc"
MAX_SOURCES = 8  # kMaxSources in patchmatch.cpp

_pointer = ctypes.c_void_p
_int, _long, _unsigned = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
_float, _double = ctypes.c_float, ctypes.c_double


class _ViewData(ctypes.Structure):
    """`s2d::ViewData` of view.h."""

    _fields_ = (
        ("width", _int),
        ("height", _int),
        ("K", _double * 4),
        ("viewmat", _double * 16),
        ("grey", _pointer),
        ("quads", _pointer),
        ("rgb", _pointer),
        ("planes", _pointer),
        ("confidence", _pointer),
    )


@dataclass
class View:
    """A pinhole camera and its maps."""

    width: int
    height: int
    K: np.ndarray  # [3, 3] pixels, no skew
    viewmat: np.ndarray  # [4, 4] world to camera
    rgb: np.ndarray | None = None  # [H, W, 3] float32 in [0, 1]
    grey: np.ndarray | None = None  # [H, W] float32 in [0, 1]
    planes: np.ndarray | None = (
        None  # [H, W, 3] float32: inverse depth at the pixel's centre and its slopes per pixel; 0 = none
    )
    confidence: np.ndarray | None = None  # [H, W] float32
    quads: np.ndarray | None = field(default=None, repr=False)  # made from `grey` when first needed

    @property
    def depth(self) -> np.ndarray:
        """Camera z from `planes`; 0 where there is none. [H, W] float32"""
        inverse = self.planes[..., 0]
        return np.divide(1.0, inverse, out=np.zeros_like(inverse), where=inverse > 0)


class Consistency(NamedTuple):
    """What the other views say about the depth of each pixel of one view. All [H, W]."""

    agree: np.ndarray  # uint8, number of views whose depth agrees
    through: np.ndarray  # uint8, number of views that see something behind the point
    angle: np.ndarray  # float32, largest triangulation angle to those that agree, radians
    colour_error: (
        np.ndarray
    )  # float32, mean difference to the most alike colour of those that agree; 1 where none does
    depth_difference: (
        np.ndarray
    )  # float32, mean relative difference to those that agree; 1 where none does
    gains: np.ndarray  # [V, 3] float64, by how much this view is brighter than each of the others


@functools.cache
def _library() -> ctypes.CDLL:
    sources = [
        CSRC / f"{name}.cpp" for name in ("patchmatch", "smooth", "fuse", "complete", "splat")
    ]
    library = native_build.load("s2d_guidance", sources, [CSRC], ("-Wno-psabi",))
    views, count = ctypes.POINTER(_ViewData), _int
    library.s2d_pack_quads.argtypes = [_pointer, _int, _int, _pointer]
    library.s2d_patchmatch.argtypes = [
        views,
        views,
        count,
        _float,
        _float,
        _float,
        _int,
        _int,
        _float,
        _float,
        _unsigned,
        _int,
        _pointer,
        _pointer,
    ]
    library.s2d_check_consistency.argtypes = [
        views,
        count,
        _int,
        _double,
        _double,
        _pointer,
        _int,
        *[_pointer] * 6,
    ]
    library.s2d_complete.argtypes = [
        views,
        count,
        _int,
        _int,
        *[_double] * 4,
        _pointer,
        _int,
        _pointer,
    ]
    library.s2d_smooth.argtypes = [views, _int, _int, _float, _int, _pointer]
    library.s2d_fuse.argtypes = [views, count, _double, _double, _long, *[_pointer] * 6]
    library.s2d_splat.argtypes = [
        views,
        _long,
        *[_pointer] * 4,
        _float,
        _float,
        _int,
        *[_pointer] * 3,
    ]
    return library


def patchmatch(
    reference: View,
    sources: Sequence[View],
    inverse_depth_range: tuple[float, float],
    *,
    geometric_weight: float,
    num_random: int,
    num_passes: int,
    seed: int,
    shrink: float = 1.0,
    fine_texture: float = math.inf,
) -> tuple[np.ndarray, np.ndarray]:
    """Improve `reference.planes` in place by matching its photo with the sources'.

    Args:
        reference: With grey and planes (inverse depth 0: start from random planes).
        sources: Up to MAX_SOURCES, with grey; with planes where geometric_weight > 0.
        inverse_depth_range: Smallest and largest inverse depth, 1 / world units.
        geometric_weight: Cost per pixel of round trip through a source's depth, beside a matching cost in [0, 2].
        num_random: Random planes per pixel to begin with.
        num_passes: Number of propagations over the whole image.
        seed: Same seed, same result, at any number of threads.
        shrink: Size of the perturbations in the first pass: 1 while planes are searched, less when they only want their last digits.
        fine_texture: Compare 7 x 7 pixels, instead of every second one of 11 x 11, where their grey varies by more (standard deviation).

    Returns:
        - costs, 1 - NCC of the best plane plus the geometric term [H, W] float32
        - view_weights, how much each source counted [H, W, S] float32
    """
    for view in (reference, *sources):
        _pack(view)
    costs = np.empty((reference.height, reference.width), np.float32)
    weights = np.zeros((reference.height, reference.width, len(sources)), np.float32)
    _check(
        _library().s2d_patchmatch(
            _structs([reference]),
            _structs(sources),
            len(sources),
            *inverse_depth_range,
            geometric_weight,
            num_random,
            num_passes,
            shrink,
            fine_texture,
            seed,
            native_build.num_threads(),
            costs.ctypes.data,
            weights.ctypes.data,
        )
    )
    return costs, weights


def check_consistency(
    views: Sequence[View],
    index: int,
    max_pixels: float,
    max_relative: float,
    gains: np.ndarray | None = None,  # [V, 3]
) -> Consistency:
    """Compare the planes of one view with those of all others; see `Consistency`.

    Args:
        views: With planes and rgb.
        index: The view in question.
        max_pixels: Largest round trip of an agreeing view.
        max_relative: Largest relative difference of depth.
        gains: What to multiply the colours of each view with, before they are compared; ones.
    """
    height, width = views[index].height, views[index].width
    gains = np.ones((len(views), 3)) if gains is None else np.ascontiguousarray(gains, np.float64)
    counts = [np.empty((height, width), np.uint8) for _ in range(2)]
    values = [np.empty((height, width), np.float32) for _ in range(3)]
    sums = np.empty((len(views), 2, 3))
    _check(
        _library().s2d_check_consistency(
            _structs(views),
            len(views),
            index,
            max_pixels,
            max_relative,
            gains.ctypes.data,
            native_build.num_threads(),
            *(array.ctypes.data for array in (*counts, *values, sums)),
        )
    )
    found = np.divide(sums[:, 0], sums[:, 1], out=np.ones_like(sums[:, 0]), where=sums[:, 1] > 0)
    return Consistency(*counts, *values, found)


def complete(
    views: Sequence[View],
    index: int,
    *,
    reach: int,
    own_colour: float,
    other_colour: float,
    max_pixels: float,
    max_relative: float,
    gains: np.ndarray,  # [V, 3]
) -> np.ndarray:
    """Continue planes of one view into the plain areas beside them.

    Args:
        views: With planes (0 where not believed) and rgb.
        index: The view in question.
        reach: How far a plane may be continued, pixels.
        own_colour: Largest difference of colour on the way.
        other_colour: Largest difference to the colour in another view.
        max_pixels, max_relative, gains: As in `check_consistency`.

    Returns:
        The view's planes with what was continued. [H, W, 3]
    """
    planes, gains = np.empty_like(views[index].planes), np.ascontiguousarray(gains, np.float64)
    _check(
        _library().s2d_complete(
            _structs(views),
            len(views),
            index,
            reach,
            own_colour,
            other_colour,
            max_pixels,
            max_relative,
            gains.ctypes.data,
            native_build.num_threads(),
            planes.ctypes.data,
        )
    )
    return planes


def smooth_planes(
    view: View,
    reach: int,
    spacing: int,
    colour_sigma: float,
) -> np.ndarray:
    """Give each pixel the plane of its surroundings, its own or a neighbour's, with the median inverse depth here.

    Args:
        view: With planes (0 = none: they stay so, and have no say) and rgb.
        reach: How far away neighbours are asked, pixels.
        spacing: Between those neighbours, pixels; at most 9 x 9 of them.
        colour_sigma: Neighbours whose colour (mean over the channels) differs by more hardly count.

    Returns:
        Planes. [H, W, 3]
    """
    planes = np.empty_like(view.planes)
    _check(
        _library().s2d_smooth(
            _structs([view]),
            reach,
            spacing,
            colour_sigma,
            native_build.num_threads(),
            planes.ctypes.data,
        )
    )
    return planes


def fuse(views: Sequence[View], max_pixels: float, max_relative: float) -> tuple[np.ndarray, ...]:
    """Merge the depth maps of views (with planes, rgb, confidence) into one cloud.

    Returns:
        points [P, 3], rgbs [P, 3], confidence [P], normals [P, 3], steps [P, 2, 3], all float32.
    """
    capacity = sum(int((view.planes[..., 0] > 0).sum()) for view in views)
    arrays = [np.empty((capacity, *shape), np.float32) for shape in ((3,), (3,), (), (3,), (2, 3))]
    count = np.zeros(1, np.int64)
    _check(
        _library().s2d_fuse(
            _structs(views),
            len(views),
            max_pixels,
            max_relative,
            capacity,
            *(array.ctypes.data for array in arrays),
            count.ctypes.data,
        )
    )
    return tuple(array[: count[0]] for array in arrays)


def splat(
    camera: View,
    points: np.ndarray,  # [P, 3]
    rgbs: np.ndarray,  # [P, 3]
    confidence: np.ndarray,  # [P]
    steps: np.ndarray,  # [P, 2, 3]
    near: float,
    tolerance: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a cloud; see `render_cloud`.

    Returns:
        image [H, W, 3] float32, coverage [H, W] uint8 0 or 1, depth [H, W] float32.
    """
    arrays = [
        np.ascontiguousarray(array, np.float32) for array in (points, rgbs, confidence, steps)
    ]
    shape = (camera.height, camera.width)
    image, coverage, depth = (
        np.empty((*shape, 3), np.float32),
        np.empty(shape, np.uint8),
        np.empty(shape, np.float32),
    )
    _check(
        _library().s2d_splat(
            _structs([camera]),
            len(points),
            *(array.ctypes.data for array in arrays),
            near,
            tolerance,
            native_build.num_threads(),
            image.ctypes.data,
            coverage.ctypes.data,
            depth.ctypes.data,
        )
    )
    return image, coverage, depth


def _pack(view: View) -> None:
    if view.quads is None:
        view.quads = np.empty((view.height, view.width), np.uint32)
        _check(
            _library().s2d_pack_quads(
                _address(view.grey, np.float32), view.width, view.height, view.quads.ctypes.data
            )
        )


def _structs(views: Sequence[View]) -> ctypes.Array:
    """An array of ViewData that points into the views' arrays, which outlive the call."""
    structs = (_ViewData * len(views))()
    for struct, view in zip(structs, views, strict=True):
        K, viewmat = np.asarray(view.K, np.float64), np.asarray(view.viewmat, np.float64)
        struct.width, struct.height = view.width, view.height
        struct.K[:] = (K[0, 0], K[1, 1], K[0, 2], K[1, 2])
        struct.viewmat[:] = viewmat.reshape(-1)
        for name in ("grey", "rgb", "planes", "confidence"):
            setattr(struct, name, _address(getattr(view, name), np.float32))
        struct.quads = _address(view.quads, np.uint32)
    return structs


def _address(array: np.ndarray | None, dtype: type) -> int | None:
    if array is None:
        return None
    assert array.dtype == dtype and array.flags.c_contiguous, (
        "kernels take contiguous arrays of their own type"
    )
    return array.ctypes.data


def _check(code: int) -> None:
    if code:
        raise RuntimeError(
            "a kernel of stage 0 ran out of memory. Use fewer or smaller photos (--max-side)."
        )
