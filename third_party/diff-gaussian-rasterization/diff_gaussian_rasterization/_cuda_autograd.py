# SPDX-License-Identifier: Apache-2.0
"""The core on a GPU as an autograd function."""

from typing import Any

import torch
from torch import Tensor

from diff_gaussian_rasterization._cuda import parameter_gradients, render, splat_gradients
from diff_gaussian_rasterization.general import RenderOptions, SceneTensors, intrinsics_matrix


class Rasterize(torch.autograd.Function):
    """Inputs: (options, Ks, viewmats, background, means2d_probe, lengths_probe, *SceneTensors), as of the function for CPUs."""

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
        probe = None if means2d_probe is None else means2d_probe.contiguous()
        keep = any(ctx.needs_input_grad)
        outputs, frame = render(scene, viewmats, Ks, background, probe, options, keep)
        if keep:
            ctx.frame, ctx.options = frame, options
            ctx.devices = [t.device for t in (Ks, viewmats, background)]
            # Saved by autograd, which notices when somebody changes them in place.
            ctx.save_for_backward(outputs.rgb, outputs.alpha, outputs.depth, *scene)
        ctx.mark_non_differentiable(outputs.radii)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        v_rgb: Tensor | None,
        v_alpha: Tensor | None,
        v_depth: Tensor | None,
        _: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        rgb, alpha, depth, *saved = ctx.saved_tensors
        scene, frame, options = SceneTensors(*saved), ctx.frame, ctx.options
        cotangents = [None if v is None else v.contiguous() for v in (v_rgb, v_alpha, v_depth)]
        _, needs_Ks, needs_viewmats, needs_background, needs_probe, needs_lengths, *_ = (
            ctx.needs_input_grad
        )
        lengths = frame.splats.new_zeros(frame.radii.shape) if needs_lengths else None
        sums = splat_gradients(frame, (rgb, alpha, depth), cotangents, options, lengths)
        d_means2d = sums.new_empty(*frame.radii.shape, 2) if needs_probe else None
        gradients, cameras = parameter_gradients(
            scene,
            frame,
            sums,
            v_depth is not None,
            options,
            d_means2d,
            needs_Ks or needs_viewmats,
        )
        d_Ks = d_viewmats = d_background = None
        if needs_viewmats:
            d_viewmats = cameras[0].to(ctx.devices[1])
        if needs_Ks:
            d_Ks = intrinsics_matrix(cameras[1]).to(ctx.devices[0])
        if needs_background:
            zero = alpha.new_zeros(3)
            d_background = (
                zero if v_rgb is None else (frame.final_T[..., None] * v_rgb).sum((0, 1, 2))
            ).to(ctx.devices[2])
        return None, d_Ks, d_viewmats, d_background, d_means2d, lengths, *gradients
