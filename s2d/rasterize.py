"""The one way in which S2D renders: `rasterize(gaussians, cameras)`. Only importer of the rasteriser.

Notation: N Gaussians, C cameras, H x W pixels. Conventions of pixels, axes and depth: docs/architecture.md.
"""

import ctypes
import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from diff_gaussian_rasterization import TrainingView, rasterize_gaussians_raw
from torch import Tensor

from s2d.cameras import Cameras

# mallopt's numbers of its parameters (malloc.h), and more than any block of a training step.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEPT_BYTES = -1, -3, 1 << 30


class RawGaussians(Protocol):
    """What is rendered: raw parameters, activated inside the kernel. `s2d.gaussians.Gaussians` is one."""

    means: Tensor  # [N, 3] world
    log_scales: Tensor  # [N, 3]
    quats: Tensor  # [N, 4] wxyz, any norm
    opacity_logits: Tensor  # [N]
    sh0: Tensor  # [N, 1, 3]
    shN: Tensor  # [N, K-1, 3]


@dataclass
class Render:
    """Images of C cameras."""

    rgb: Tensor  # [C, H, W, 3] float32, 0 and above; not clamped at 1
    alpha: Tensor  # [C, H, W, 1] in [0, 1)
    depth: Tensor  # [C, H, W, 1] expected camera-z in world units; 0 where alpha is 0
    radii: Tensor  # [C, N] int32 pixels; 0 = not visible


def rasterize(
    gaussians: RawGaussians,
    cameras: Cameras,
    *,
    background: Tensor | None = None,  # [3]
    sh_degree: int | None = None,
    viewmats: Tensor | None = None,  # [C, 4, 4]
    Ks: Tensor | None = None,  # [C, 3, 3]
    means2d_probe: Tensor | None = None,  # [C, N, 2]
    lengths_probe: Tensor | None = None,  # [C, N]
) -> Render:
    """Render Gaussians into every camera; all cameras have one size.

    The same inputs give the same bits, at any thread count. Gaussians with non-finite parameters are not drawn.

    Args:
        gaussians: Raw parameters; any object with the six tensors of `RawGaussians`.
        cameras: Pinhole cameras of one size.
        background: Colour behind everything in [0, 1]; black where None. [3]
        sh_degree: Active degree, 0-3; all that is stored where None.
        viewmats: World-to-camera, instead of `cameras.viewmats`; may require grad. [C, 4, 4]
        Ks: Likewise, instead of `cameras.Ks`. [C, 3, 3]
        means2d_probe: Zeros that require grad: receives the gradient by pixel position, for density control. [C, N, 2]
        lengths_probe: Likewise, receives the lengths of that gradient pixel by pixel, in half image sizes, added up. [C, N]

    Returns:
        `Render`; differentiable in all of gaussians, background, viewmats and Ks, except for `radii`.

    Raises:
        ValueError: cameras of several sizes, wrong shapes, non-finite cameras.
    """
    out = rasterize_gaussians_raw(
        gaussians.means,
        gaussians.log_scales,
        gaussians.quats,
        gaussians.opacity_logits,
        gaussians.sh0,
        gaussians.shN,
        cameras.viewmats if viewmats is None else viewmats,
        cameras.Ks if Ks is None else Ks,
        cameras.width,
        cameras.height,
        background=background,
        sh_degree=sh_degree,
        means2d_probe=means2d_probe,
        lengths_probe=lengths_probe,
    )
    return Render(out.rgb, out.alpha, out.depth, out.radii)


class CameraTensors(Protocol):
    """One camera whose numbers may require grad. `s2d.refinement.RefinedView` is one."""

    viewmat: Tensor  # [4, 4]
    K: Tensor  # [3, 3]


def training_view(
    gaussians: RawGaussians,
    camera: Cameras,
    sh_degree: int | None = None,
    refined: CameraTensors | None = None,
    drawn_opacity: tuple[Tensor, Tensor] | None = None,  # [N], [N]
) -> TrainingView:
    """Render one camera for a training step without autograd through the Gaussians; `TrainingView` has the rest.

    Args:
        gaussians: N Gaussians; their tensors are updated in place.
        camera: One camera.
        sh_degree: Degree in use; None uses all coefficients.
        refined: Instead of the camera's viewmat and K.
        drawn_opacity: Opacity logits to render instead of the Gaussians' own, and their derivative by these. [N], [N]
    """
    names = ("means", "log_scales", "quats", "opacity_logits", "sh0", "shN")
    return TrainingView(
        {name: getattr(gaussians, name) for name in names},
        camera.viewmats.squeeze(0) if refined is None else refined.viewmat,
        camera.Ks.squeeze(0) if refined is None else refined.K,
        camera.width,
        camera.height,
        sh_degree=sh_degree,
        drawn_opacity=drawn_opacity,
    )


@contextmanager
def cpus_for_kernels() -> Iterator[None]:
    """Give the CPUs to the kernels in a training loop: torch runs on one thread until the block ends.

    Between kernels a training step has only small torch operations. torch's OpenMP workers keep spinning for milliseconds after
    each, on the cores that the kernels' threads need: a step with two threads each takes 1.5 times as long.
    """
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for the rest of the process.

    It hands large blocks back to the system, and the gradients of every step would be faulted in again page by page: about 900
    faults and 3 of 26 ms a step with 60,000 Gaussians. Other C libraries have no such call, or no such habit.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
