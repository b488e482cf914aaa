# SPDX-License-Identifier: Apache-2.0
"""The general face of the rasteriser: raw parameters, any pinhole cameras, RGB + alpha + depth, all gradients.

Conventions are those of `reference.py`, which states the algorithm. Here is only checking and the bridge to the compiled core: that
for CPUs, or where the Gaussians are on a GPU, `_cuda_autograd.py`.
"""

import math
from typing import Any, NamedTuple

import torch
from native_build import cuda
from torch import Tensor

from diff_gaussian_rasterization import _native

MAX_DEGREE = 3


class RasterOutput(NamedTuple):
    """Images of C cameras."""

    rgb: Tensor  # [C, H, W, 3]
    alpha: Tensor  # [C, H, W, 1] in [0, 1)
    depth: Tensor  # [C, H, W, 1] expected camera-z, world units; 0 where alpha is 0
    radii: Tensor  # [C, N] int32 pixels; 0 = not visible


class SceneTensors(NamedTuple):
    """What the core reads of the Gaussians. `colors` replaces SH, `covars` replaces scales and rotations."""

    means: Tensor  # [N, 3]
    log_scales: Tensor | None  # [N, 3]
    quats: Tensor | None  # [N, 4]
    opacity_logits: Tensor  # [N]
    sh0: Tensor | None  # [N, 1, 3]
    shN: Tensor | None  # [N, K-1, 3]
    colors: Tensor | None = None  # [N, 3]
    covars: Tensor | None = None  # [N, 6] xx xy xz yy yz zz


class RenderOptions(NamedTuple):
    """What is not a tensor."""

    width: int
    height: int
    degree: int
    activated: bool = False  # log_scales are scales and opacity_logits are opacities
    scale_modifier: float = 1.0
    inverse_depth: bool = False  # depth is sum w / z
    antialiasing: bool = False  # opacity times sqrt(det cov / det blurred cov)


def rasterize_gaussians_raw(
    means: Tensor,  # [N, 3]
    log_scales: Tensor,  # [N, 3]
    quats: Tensor,  # [N, 4]
    opacity_logits: Tensor,  # [N]
    sh0: Tensor,  # [N, 1, 3]
    shN: Tensor,  # [N, K-1, 3]
    viewmats: Tensor,  # [C, 4, 4]
    Ks: Tensor,  # [C, 3, 3]
    width: int,
    height: int,
    *,
    background: Tensor | None = None,  # [3]
    sh_degree: int | None = None,
    means2d_probe: Tensor | None = None,  # [C, N, 2]
    lengths_probe: Tensor | None = None,  # [C, N]
) -> RasterOutput:
    """Render Gaussians into every camera.

    Deterministic on a CPU: the same inputs give the same bits at any thread count. Gaussians with non-finite parameters or a zero
    quaternion are not drawn and get zero gradients.

    Args:
        means: Centres, world. [N, 3]
        log_scales: Natural logarithms of the standard deviations, world units. [N, 3]
        quats: Rotations wxyz, any norm but zero. [N, 4]
        opacity_logits: Opacity is their sigmoid. [N]
        sh0: Colour coefficients of degree 0. [N, 1, 3]
        shN: Those of the higher degrees, K = (degree + 1)². [N, K-1, 3]
        viewmats: World-to-camera, OpenCV axes. [C, 4, 4]
        Ks: Intrinsics in pixels, first pixel centre at (0.5, 0.5), no skew. [C, 3, 3]
        width: Image width in pixels.
        height: Image height in pixels.
        background: Colour behind everything; black where None. [3]
        sh_degree: Degree in use, 0-3; all that sh0 and shN hold where None.
        means2d_probe: Zeros that require grad: receives the gradient of the pixel positions. [C, N, 2]
        lengths_probe: Anything that requires grad: receives the length of that gradient pixel by pixel, in half image sizes, added up
            over the pixels (as AbsGS, Ye et al. 2024, but for lengths instead of components). Not a derivative of anything: gradients
            of pixels that pull a Gaussian to different sides cancel in the one, and add up in this. [C, N]

    Returns:
        `RasterOutput`. Its `radii` carry no gradient.

    Raises:
        ValueError: A shape, type or device is wrong, or a camera or the background is not finite (which is not looked at where they
            are on a GPU: that would wait for it).

    Differentiable in every float argument; of `Ks` in focal lengths and principal point. float32, on the CPU or on one GPU; cameras and
    background may stay on the CPU.
    """
    scene = SceneTensors(means, log_scales, quats, opacity_logits, sh0, shN)
    options = raw_options(scene, width, height, sh_degree)
    if background is None:
        background = means.new_zeros(3)
    return render(scene, viewmats, Ks, background, means2d_probe, options, lengths_probe)


def raw_options(
    scene: SceneTensors, width: int, height: int, sh_degree: int | None
) -> RenderOptions:
    """Check raw parameters and the degree; None is all that they hold."""
    stored = _check_scene(scene)
    if sh_degree is None:
        sh_degree = stored
    elif not 0 <= sh_degree <= stored:
        raise ValueError(
            f"rasterize: sh_degree is {sh_degree}. Expected 0 to {stored}, the degree that shN {list(scene.shN.shape)} holds."
        )
    return RenderOptions(int(width), int(height), sh_degree)


def render(
    scene: SceneTensors,
    viewmats: Tensor,  # [C, 4, 4]
    Ks: Tensor,  # [C, 3, 3]
    background: Tensor,  # [3]
    means2d_probe: Tensor | None,  # [C, N, 2]
    options: RenderOptions,
    lengths_probe: Tensor | None = None,  # [C, N]
) -> RasterOutput:
    """Check cameras and run the core: what both faces share."""
    device = scene.means.device
    check_cameras(viewmats, Ks, background, options, device)
    n, num_cameras = len(scene.means), len(viewmats)
    if means2d_probe is not None:
        check_tensor("means2d_probe", means2d_probe, (num_cameras, n, 2), device)
    if lengths_probe is not None:
        check_tensor("lengths_probe", lengths_probe, (num_cameras, n), device)
    if cuda.on_gpu(scene.means):
        from diff_gaussian_rasterization._cuda_autograd import Rasterize

        function = Rasterize
        if (
            not torch.is_grad_enabled()
        ):  # which the function would not notice: it would keep what a backward pass needs
            scene = SceneTensors(*(None if t is None else t.detach() for t in scene))
            Ks, viewmats, background = Ks.detach(), viewmats.detach(), background.detach()
            means2d_probe = None if means2d_probe is None else means2d_probe.detach()
            lengths_probe = None
    else:
        function = _Rasterize
    inputs = (options, Ks, viewmats, background, means2d_probe, lengths_probe)
    return RasterOutput(*function.apply(*inputs, *scene))


def set_num_threads(count: int | None) -> None:
    """Fix how many threads the kernels of this process use; None goes back to the environment's choice."""
    import native_build

    native_build.set_num_threads(count)


def forward(
    scene: SceneTensors,
    viewmats: Tensor,  # [C, 4, 4]
    Ks: Tensor,  # [C, 3, 3]
    background: Tensor,  # [3]
    means2d_probe: Tensor | None,  # [C, N, 2]
    options: RenderOptions,
) -> tuple[RasterOutput, list[_native.Frame]]:
    """Run the core on contiguous, checked tensors; also return the workspaces from which a backward pass can start."""
    num_cameras, n = len(viewmats), len(scene.means)
    shape = (num_cameras, options.height, options.width)
    rgb = torch.empty(*shape, 3)
    alpha = torch.empty(*shape, 1)
    depth = torch.empty(*shape, 1)
    radii = torch.empty(num_cameras, n, dtype=torch.int32)
    offsets = None if means2d_probe is None else means2d_probe.contiguous()
    frames = []
    args = scene_args(scene, options)
    for c in range(num_cameras):
        frame = _native.Frame()
        camera = _camera_args(viewmats[c], Ks[c], background, options)
        offset = None if offsets is None else offsets[c]
        tensors = (rgb[c], alpha[c], depth[c], radii[c], offset)
        images = _native.ImageArgs(*map(_native.pointer, tensors))
        frame.call(frame.lib.s2d_forward, args, camera, images)
        frames.append(frame)
    return RasterOutput(rgb, alpha, depth, radii), frames


class _Rasterize(torch.autograd.Function):
    """Inputs: (options, Ks, viewmats, background, means2d_probe, lengths_probe, *SceneTensors)."""

    @staticmethod
    def forward(
        ctx: Any,
        options: RenderOptions,
        Ks: Tensor,
        viewmats: Tensor,
        background: Tensor,
        means2d_probe: Tensor | None,
        lengths_probe: Tensor | None,
        *scene_tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scene = SceneTensors(*(t if t is None else t.contiguous() for t in scene_tensors))
        outputs, frames = forward(scene, viewmats, Ks, background, means2d_probe, options)
        if any(ctx.needs_input_grad):
            ctx.frames = frames
            ctx.options = options
            ctx.num_cameras = len(viewmats)
            ctx.save_for_backward(outputs.alpha, *scene)
        ctx.mark_non_differentiable(outputs.radii)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(
        ctx: Any,
        v_rgb: Tensor | None,
        v_alpha: Tensor | None,
        v_depth: Tensor | None,
        _: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        alpha, *saved = ctx.saved_tensors
        scene = SceneTensors(*saved)
        cotangents = [None if v is None else v.contiguous() for v in (v_rgb, v_alpha, v_depth)]
        _, needs_Ks, needs_viewmats, needs_background, needs_probe, needs_lengths, *_ = (
            ctx.needs_input_grad
        )
        n = len(scene.means)
        gradients = SceneTensors(*(None if t is None else torch.empty_like(t) for t in scene))
        d_viewmats = torch.empty(ctx.num_cameras, 4, 4) if needs_viewmats else None
        d_intrinsics = torch.empty(ctx.num_cameras, 4) if needs_Ks else None
        d_means2d = torch.empty(ctx.num_cameras, n, 2) if needs_probe else None
        lengths = torch.empty(ctx.num_cameras, n) if needs_lengths else None
        args = scene_args(scene, ctx.options)
        for c, frame in enumerate(ctx.frames):
            views = [None if v is None else v[c] for v in cotangents]
            per_camera = [
                None if d is None else d[c] for d in (d_means2d, lengths, d_viewmats, d_intrinsics)
            ]
            pointers = map(_native.pointer, [*gradients, *per_camera])
            frame.call(
                frame.lib.s2d_backward,
                args,
                _native.CotangentArgs(*map(_native.pointer, views), int(needs_lengths)),
                _native.GradientArgs(*pointers, int(c > 0)),
            )
        if not ctx.frames:
            gradients = SceneTensors(*(None if t is None else t.zero_() for t in gradients))
        d_background = None
        if needs_background:
            zero = alpha.new_zeros(3)
            d_background = zero if v_rgb is None else ((1 - alpha) * v_rgb).sum((0, 1, 2))
        d_Ks = None if d_intrinsics is None else intrinsics_matrix(d_intrinsics)
        return None, d_Ks, d_viewmats, d_background, d_means2d, lengths, *gradients


def intrinsics_matrix(
    values: Tensor,  # [..., 4]
) -> Tensor:
    """Put (fx, fy, cx, cy) where they stand in K; zero elsewhere. [..., 3, 3]"""
    out = values.new_zeros(*values.shape[:-1], 3, 3)
    out[..., 0, 0], out[..., 1, 1] = values[..., 0], values[..., 1]
    out[..., :2, 2] = values[..., 2:]
    return out


def scene_args(scene: SceneTensors, options: RenderOptions) -> Any:
    coeffs = 1 if scene.shN is None else 1 + scene.shN.shape[1]
    pointers = dict(zip(SceneTensors._fields, map(_native.pointer, scene), strict=True))
    return _native.SceneArgs(
        n=len(scene.means),
        num_coeffs=coeffs,
        degree=options.degree,
        activated=options.activated,
        scale_modifier=options.scale_modifier,
        **pointers,
    )


def _camera_args(viewmat: Tensor, K: Tensor, background: Tensor, options: RenderOptions) -> Any:
    (fx, _, cx), (_, fy, cy), _ = K.tolist()
    args = _native.CameraArgs(
        fx=fx,
        fy=fy,
        cx=cx,
        cy=cy,
        width=options.width,
        height=options.height,
        inverse_depth=options.inverse_depth,
        antialiasing=options.antialiasing,
    )
    args.viewmat[:] = viewmat.flatten().tolist()
    args.background[:] = background.tolist()
    return args


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device | None = None
) -> None:
    """Raise unless a tensor has this shape and is float32 on this device; None: on any that has kernels."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"rasterize: {name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"rasterize: {name} must be {list(shape)}, got {list(tensor.shape)}.")
    usable = tensor.device.type == "cpu" or cuda.on_gpu(tensor)
    if not usable or tensor.dtype != torch.float32 or device not in (None, tensor.device):
        wanted = "cpu" if device is None else device
        place = (
            "the CPU" if torch.device(wanted).type == "cpu" else f"{wanted}, where the means are"
        )
        raise ValueError(
            f"rasterize: {name} must be float32 on {place}, got {tensor.dtype} on {tensor.device}. "
            f"Pass {name}.float().to({str(wanted)!r})."
        )


def _check_scene(scene: SceneTensors) -> int:
    """Check every tensor against the N of `means`; return the SH degree that is stored."""
    n = len(scene.means) if scene.means.dim() else 0
    check_tensor("means", scene.means, (n, 3))
    device = scene.means.device
    check_tensor("log_scales", scene.log_scales, (n, 3), device)
    check_tensor("quats", scene.quats, (n, 4), device)
    check_tensor("opacity_logits", scene.opacity_logits, (n,), device)
    check_tensor("sh0", scene.sh0, (n, 1, 3), device)
    rest = scene.shN.shape[1] if scene.shN.dim() == 3 else -1
    degree = math.isqrt(rest + 1) - 1 if rest >= 0 else -1
    if not 0 <= degree <= MAX_DEGREE or (degree + 1) ** 2 != rest + 1:
        raise ValueError(
            f"rasterize: shN must be [N, K-1, 3] with K = 1, 4, 9 or 16 (degree 0-3), got {list(scene.shN.shape)}."
        )
    check_tensor("shN", scene.shN, (n, rest, 3), device)
    return degree


def check_cameras(
    viewmats: Tensor,
    Ks: Tensor,
    background: Tensor,
    options: RenderOptions,
    device: torch.device,
) -> None:
    """Check what is not a Gaussian. Each may be on the CPU or where the Gaussians are; values are looked at on the CPU alone."""
    if options.width < 1 or options.height < 1:
        raise ValueError(
            f"rasterize: the image must have pixels, got width {options.width}, height {options.height}."
        )
    num_cameras = len(viewmats) if viewmats.dim() else 0
    shapes = {"viewmats": (num_cameras, 4, 4), "Ks": (num_cameras, 3, 3), "background": (3,)}
    for name, value in (("viewmats", viewmats), ("Ks", Ks), ("background", background)):
        check_tensor(name, value, shapes[name], None if value.device.type == "cpu" else device)
        on_cpu = value.device.type == "cpu"
        if on_cpu and not bool(torch.isfinite(value).all()):
            raise ValueError(f"rasterize: {name} has non-finite values. Check the cameras.")
    if Ks.device.type != "cpu":
        return
    if bool((Ks[:, 0, 1] != 0).any()):
        raise ValueError(
            "rasterize: Ks has skew (K[0, 1] != 0), which is not supported. Undistort the images first."
        )
    if bool((Ks[:, 0, 0] <= 0).any()) or bool((Ks[:, 1, 1] <= 0).any()):
        raise ValueError(
            "rasterize: Ks must have positive focal lengths K[0, 0] and K[1, 1]. Check the cameras."
        )
