# SPDX-License-Identifier: Apache-2.0
"""The core on a GPU: what is allocated, sorted and launched in which order. csrc/cuda/*.cu say what each kernel takes and gives.

Notation: C cameras, N Gaussians, T = C tiles_x tiles_y tiles of 16 x 16 pixels, I instances (Gaussian, tile). Nothing waits for the
GPU but the one number I, which sizes the list of instances.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from native_build import cuda
from torch import Tensor

from diff_gaussian_rasterization.general import (
    RasterOutput,
    RenderOptions,
    SceneTensors,
)
from diff_gaussian_rasterization.optimizer import AdamRule

CSRC = Path(__file__).parent / "csrc"
TILE = 16  # pixels
SEGMENT = 256  # instances of a tile between two saved states
STATE_SUMS, SPLAT_WIDTH, SPLAT_GRADS, CAMERA_SUMS = 6, 12, 10, 19  # floats of a record
ALIGNMENT = 16  # bytes that a lane reads at a time
MOST_16_BIT_TILES = 32767
MOST_GAUSSIANS = 2**31 - 1  # C N, the numbers that instances hold


@functools.cache
def kernels() -> cuda.Kernels:
    """The kernels of the rasteriser; each source file is compiled when its first kernel is launched."""
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    return cuda.Kernels("diff_gaussian_rasterization", sources, [CSRC / "common"])


@dataclass
class Frame:
    """What the backward pass needs of one render of all cameras."""

    size: tuple[int, int, int, int]
    """width, height, tiles_x, tiles_y"""
    viewmats: Tensor  # [C, 4, 4] on the GPU, as all others
    Ks: Tensor  # [C, 3, 3]
    background: Tensor  # [3]
    radii: Tensor  # [C, N] int32
    splats: Tensor  # [C, N, SPLAT_WIDTH]
    instances: Tensor  # [I] int32
    tile_begin: Tensor  # [T + 1] int64
    final_T: Tensor | None  # [C, H, W]; these four are None where no gradient was asked for
    stop: Tensor | None  # [C, H, W] int32
    states: Tensor | None  # [I / 256 + 1, STATE_SUMS, 256]
    segment_tile: Tensor | None  # [I / 256 + T + 1] int32
    stream: int
    """On which all this was made."""

    @property
    def saved(self) -> tuple[Tensor | None, ...]:
        return self.final_T, self.stop, self.states, self.segment_tile

    def used_here(self) -> None:
        """Hold the memory for the current stream too, should it be another than at the render."""
        made = (self.viewmats, self.Ks, self.background, self.radii, self.splats, self.instances)
        cuda.belongs_to_stream((*made, self.tile_begin, *self.saved), self.stream)


def render(
    scene: SceneTensors,
    viewmats: Tensor,  # [C, 4, 4]
    Ks: Tensor,  # [C, 3, 3]
    background: Tensor,  # [3]
    means2d_probe: Tensor | None,  # [C, N, 2]
    options: RenderOptions,
    keep: bool,
) -> tuple[RasterOutput, Frame]:
    """Run the forward pass on contiguous, checked tensors.

    Args:
        scene: On one GPU.
        viewmats, Ks, background: There or on the CPU.
        means2d_probe: Added to the projected means.
        options: See `RenderOptions`.
        keep: Also save what a backward pass needs.
    """
    device = scene.means.device
    viewmats, Ks, background = (
        cuda.to_gpu(t.detach(), device).contiguous() for t in (viewmats, Ks, background)
    )
    num_cameras, n = len(viewmats), len(scene.means)
    if num_cameras * n > MOST_GAUSSIANS:
        raise ValueError(
            f"rasterize: {num_cameras} cameras times {n} Gaussians are too many at once. Expected up to {MOST_GAUSSIANS}. "
            "Render fewer cameras at a time."
        )
    width, height = options.width, options.height
    tiles_x, tiles_y = cuda.blocks(width, TILE), cuda.blocks(height, TILE)
    num_tiles = num_cameras * tiles_x * tiles_y
    floats, integers = (
        {"dtype": dtype, "device": device} for dtype in (torch.float32, torch.int32)
    )
    splats = torch.empty(num_cameras, n, SPLAT_WIDTH, **floats)
    depth_keys, tile_counts, radii = (torch.empty(num_cameras, n, **integers) for _ in range(3))
    kernels().launch(
        "project_forward",
        (cuda.blocks(n, 128), num_cameras),
        128,
        *_scene_numbers(scene, options),
        *_readable(scene),
        viewmats,
        Ks,
        means2d_probe,
        splats,
        depth_keys,
        tile_counts,
        radii,
    )
    instances, tile_begin = _bin(depth_keys, tile_counts, splats, tiles_x, tiles_y)
    shape = (num_cameras, height, width)
    rgb, alpha, depth = (torch.empty(*shape, width_, **floats) for width_ in (3, 1, 1))
    saved: tuple[Tensor | None, ...] = (None,) * 4
    if keep:
        segments = len(instances) // SEGMENT
        saved = (
            torch.empty(shape, **floats),
            torch.empty(shape, **integers),
            torch.empty(segments + 1, STATE_SUMS, SEGMENT, **floats),
            torch.full((segments + num_tiles + 1,), -1, **integers),
        )
    frame = Frame(
        (width, height, tiles_x, tiles_y),
        viewmats,
        Ks,
        background,
        radii,
        splats,
        instances,
        tile_begin,
        *saved,
        stream=cuda.current_stream(device),
    )
    kernels().launch(
        "rasterize_forward",
        num_tiles,
        256,
        *frame.size,
        int(options.inverse_depth),
        background,
        splats,
        instances,
        tile_begin,
        rgb,
        alpha,
        depth,
        *saved,
    )
    return RasterOutput(rgb, alpha, depth, radii), frame


def _bin(
    depth_keys: Tensor,  # [C, N] int32
    tile_counts: Tensor,  # [C, N] int32
    splats: Tensor,  # [C, N, SPLAT_WIDTH]
    tiles_x: int,
    tiles_y: int,
) -> tuple[Tensor, Tensor]:
    """List the instances by tile, nearest first. -> instances [I] int32, tile_begin [T + 1] int64"""
    num_cameras, n = depth_keys.shape
    device = depth_keys.device
    num_tiles = num_cameras * tiles_x * tiles_y
    order = depth_keys.sort(dim=1, stable=True).indices
    ends = tile_counts.gather(1, order).flatten().cumsum(0, dtype=torch.int64)
    num_instances = int(ends[-1]) if len(ends) else 0
    bits = 16 if num_tiles <= MOST_16_BIT_TILES else 32
    tiles = torch.empty(
        num_instances, dtype=torch.int16 if bits == 16 else torch.int32, device=device
    )
    gaussians = torch.empty(num_instances, dtype=torch.int32, device=device)
    kernels().launch(
        f"emit_instances_{bits}",
        cuda.blocks(num_cameras * n, 256) if num_instances else 0,
        256,
        num_cameras * n,
        n,
        tiles_x,
        tiles_y,
        order,
        ends,
        splats,
        tiles,
        gaussians,
    )
    tiles, permutation = tiles.sort(stable=True)
    instances = torch.empty_like(gaussians)
    tile_begin = torch.empty(num_tiles + 1, dtype=torch.int64, device=device)
    kernels().launch(
        f"tile_ranges_{bits}",
        cuda.blocks(num_instances + 1, 256),
        256,
        num_instances,
        num_tiles,
        tiles,
        permutation,
        gaussians,
        instances,
        tile_begin,
    )
    return instances, tile_begin


def splat_gradients(
    frame: Frame,
    images: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    options: RenderOptions,
    lengths: Tensor | None = None,  # [C, N]
) -> Tensor:
    """Carry the gradients of the images back to the splats: sums over their pixels. [C, N, SPLAT_GRADS]

    Args:
        frame: Of the render, made with `keep`.
        images: rgb, alpha, depth as rendered.
        cotangents: Of these three; None where there is none.
        options: Of the render.
        lengths: Zeros, to which the lengths of the pixels' gradients are added (`lengths_probe` of `rasterize_gaussians_raw`).
    """
    frame.used_here()
    v_rgb, v_alpha, v_depth = cotangents
    num_cameras, n = frame.radii.shape
    sums = torch.zeros(num_cameras, n, SPLAT_GRADS, device=frame.splats.device)
    num_segments = len(frame.instances) // SEGMENT + len(frame.tile_begin)
    kernels().launch(
        "rasterize_backward"
        + ("" if v_depth is None else "_depth")
        + ("" if lengths is None else "_lengths"),
        num_segments,
        128,
        *frame.size,
        int(options.inverse_depth),
        frame.background,
        frame.splats,
        frame.instances,
        frame.tile_begin,
        *images,
        *frame.saved,
        v_rgb,
        v_alpha,
        v_depth,
        sums,
        lengths,
    )
    return sums


def parameter_gradients(
    scene: SceneTensors,
    frame: Frame,
    sums: Tensor,  # [C, N, SPLAT_GRADS]
    with_depth: bool,
    options: RenderOptions,
    d_means2d: Tensor | None,  # [C, N, 2]
    wants_cameras: bool,
) -> tuple[SceneTensors, tuple[Tensor, Tensor] | None]:
    """From the sums of the splats to the gradients of the scene and of the cameras (viewmats [C, 4, 4], intrinsics [C, 4])."""
    gradients = SceneTensors(*(None if t is None else torch.empty_like(t) for t in scene))
    num_cameras, n = frame.radii.shape
    camera_sums = _camera_sums(frame) if wants_cameras else None
    kernels().launch(
        "project_backward",
        cuda.blocks(n, 128),
        128,
        *_scene_numbers(scene, options),
        int(with_depth),
        num_cameras,
        *_readable(scene),
        frame.viewmats,
        frame.Ks,
        frame.radii,
        sums,
        *map(_or_null, gradients),
        d_means2d,
        camera_sums,
    )
    return gradients, None if camera_sums is None else _finish_cameras(frame, camera_sums)


def update(
    scene: SceneTensors,
    rules: Sequence[AdamRule],
    frame: Frame,
    sums: Tensor,  # [1, N, SPLAT_GRADS]
    with_depth: bool,
    options: RenderOptions,
    opacity_slope: Tensor | None,  # [N]
    opacity_penalty: float,
    statistics: tuple[Tensor, Tensor] | None,  # [N], [N]
    lengths: Tensor | None,  # [1, N]
    wants_camera: bool,
) -> tuple[Tensor, Tensor] | None:
    """From the sums of one camera's splats to new parameters, in place. -> gradients of viewmats [1, 4, 4], intrinsics [1, 4]

    `scene` is what was rendered: the parameters, or with `opacity_slope` these with other opacity logits, of that derivative by them.
    """
    n = len(scene.means)
    drawn_opacity = (None, None)
    if opacity_slope is not None:
        drawn_opacity = (scene.opacity_logits, opacity_slope)
        cuda.belongs_to_stream(drawn_opacity, frame.stream)
    rates = torch.tensor(
        [[r.lr, r.beta1, r.beta2, 1 - r.beta1, 1 - r.beta2, r.eps] for r in rules],
        dtype=torch.float64,
    ).float()
    camera_sums = _camera_sums(frame) if wants_camera else None
    num_coeffs, degree = _scene_numbers(scene, options)[1:3]
    kernels().launch(
        "project_update",
        cuda.blocks(n, 128),
        128,
        n,
        num_coeffs,
        degree,
        options.width,
        options.height,
        int(with_depth),
        frame.viewmats,
        frame.Ks,
        frame.radii,
        sums,
        *map(_or_null, (rule.param for rule in rules)),
        *map(_or_null, (rule.exp_avg for rule in rules)),
        *map(_or_null, (rule.exp_avg_sq for rule in rules)),
        cuda.to_gpu(rates, scene.means.device),
        *drawn_opacity,
        opacity_penalty,
        0.5 * options.width,
        0.5 * options.height,
        *((None, None) if statistics is None else statistics),
        lengths,
        camera_sums,
    )
    return None if camera_sums is None else _finish_cameras(frame, camera_sums)


def adam(rules: Sequence[AdamRule], visible: Tensor | None) -> None:
    """Take Adam's step on the visible rows of every tensor, in place; all rows where `visible` is None. [N] bool or int32"""
    for rule in rules:
        n, width = len(rule.param), rule.param[:1].numel()
        kernels().launch(
            "adam_rows",
            cuda.blocks(n * width, 1024),
            256,
            n,
            width,
            rule.param,
            rule.grad,
            rule.exp_avg,
            rule.exp_avg_sq,
            visible,
            4 if visible is None else visible.element_size(),
            rule.lr,
            rule.beta1,
            rule.beta2,
            1 - rule.beta1,
            1 - rule.beta2,
            rule.eps,
        )


def _scene_numbers(scene: SceneTensors, options: RenderOptions) -> tuple[int | float, ...]:
    return (
        len(scene.means),
        1 if scene.shN is None else 1 + scene.shN.shape[1],
        options.degree,
        int(options.activated),
        options.scale_modifier,
        options.width,
        options.height,
        int(options.inverse_depth),
        int(options.antialiasing),
    )


def _readable(scene: SceneTensors) -> list[Tensor | None]:
    """In the order that the kernels take them, that of the fields. Rows of a larger tensor may begin where no vector can be read: a copy."""
    return [
        tensor.clone() if tensor is not None and tensor.data_ptr() % ALIGNMENT else tensor
        for tensor in map(_or_null, scene)
    ]


def _or_null(tensor: Tensor | None) -> Tensor | None:
    """No coefficients beyond degree 0 are no tensor to a kernel. (No Gaussians are no launch.)"""
    return None if tensor is None or tensor.numel() == 0 else tensor


def _camera_sums(frame: Frame) -> Tensor:
    shape = (len(frame.viewmats), CAMERA_SUMS)
    return torch.zeros(shape, dtype=torch.float64, device=frame.splats.device)


def _finish_cameras(frame: Frame, camera_sums: Tensor) -> tuple[Tensor, Tensor]:
    d_viewmats = torch.empty_like(frame.viewmats)
    d_intrinsics = frame.viewmats.new_empty(len(frame.viewmats), 4)
    kernels().launch(
        "finish_cameras",
        len(frame.viewmats),
        32,
        frame.viewmats,
        camera_sums,
        d_viewmats,
        d_intrinsics,
    )
    return d_viewmats, d_intrinsics
