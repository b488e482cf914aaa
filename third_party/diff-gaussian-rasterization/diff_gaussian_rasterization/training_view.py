# SPDX-License-Identifier: Apache-2.0
"""A training step without autograd through the Gaussians: render a view, put any loss on its images, update the Gaussians in place.

    view = TrainingView(scene, viewmat, K, width, height, sh_degree=2)
    loss = my_loss(view.rgb, photo)
    loss.backward()
    view.update(optimizer)

The same bits as rendering with `rasterize_gaussians_raw`, `loss.backward()` and `SparseGaussianAdam.step(radii)`, but the gradients of the
parameters are never written to memory: each small group of Gaussians goes from its image gradients to its new values in the cache.
"""

import ctypes
from collections.abc import Mapping

import torch
from native_build import cuda
from torch import Tensor

from diff_gaussian_rasterization import _native
from diff_gaussian_rasterization.general import (
    SceneTensors,
    check_cameras,
    check_tensor,
    forward,
    intrinsics_matrix,
    raw_options,
    scene_args,
)
from diff_gaussian_rasterization.optimizer import AdamRule, SparseGaussianAdam, adam_tensors

# In the order of csrc/cpu/update.cpp.
PARAMETERS = ("means", "log_scales", "quats", "opacity_logits", "sh0", "shN")


class TrainingView:
    """One view's render, until its update.

    Attributes:
        rgb: Linear blend as drawn; a leaf that collects the gradient of a loss. [H, W, 3]
        alpha: Opacity in [0, 1); likewise. [H, W, 1]
        depth: Expected camera-z, world units, 0 where alpha is 0; likewise. [H, W, 1]
        radii: Pixels; 0 = not visible. [N] int32
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        viewmat: Tensor,  # [4, 4]
        K: Tensor,  # [3, 3]
        width: int,
        height: int,
        *,
        sh_degree: int | None = None,
        background: Tensor | None = None,  # [3]
        drawn_opacity: tuple[Tensor, Tensor] | None = None,  # [N], [N]
    ) -> None:
        """Render.

        Args:
            parameters: The raw tensors by name (`PARAMETERS`), shapes as in `rasterize_gaussians_raw`, contiguous.
            viewmat, K: As in `rasterize_gaussians_raw`, of one camera. Where one requires grad, `update` carries the gradient on to
                it and to what it was made of.
            width, height, sh_degree, background: As in `rasterize_gaussians_raw`.
            drawn_opacity: Opacity logits to render instead of the parameters' own, of which they are a function Gaussian by
                Gaussian, and its derivative: `update` goes back through it. [N], [N]

        Raises:
            ValueError: As `rasterize_gaussians_raw`; or a tensor is missing or not contiguous; wrong drawn_opacity.
        """
        missing = [name for name in PARAMETERS if name not in parameters]
        if missing:
            raise ValueError(
                f"TrainingView: parameters has no {', '.join(missing)}. Give all of {PARAMETERS}."
            )
        self._parameters = {name: parameters[name] for name in PARAMETERS}
        for name, tensor in self._parameters.items():
            if not tensor.is_contiguous():
                raise ValueError(
                    f"TrainingView: {name} must be contiguous, because it is updated in place; got strides {tensor.stride()}."
                )
        self._scene = SceneTensors(**self._parameters)
        self._options = raw_options(self._scene, width, height, sh_degree)
        means = self._scene.means
        self._opacity_slope = None
        if drawn_opacity is not None:
            for name, tensor in zip(("drawn logits", "opacity slope"), drawn_opacity, strict=True):
                check_tensor(name, tensor, (len(means),), means.device)
            logits, self._opacity_slope = (tensor.contiguous() for tensor in drawn_opacity)
            self._scene = self._scene._replace(opacity_logits=logits)
        background = means.new_zeros(3) if background is None else background
        self._viewmat, self._K = viewmat, K
        cameras = (viewmat[None], K[None], background)
        with torch.no_grad():
            check_cameras(*cameras, self._options, means.device)
            if cuda.on_gpu(means):
                from diff_gaussian_rasterization import _cuda

                images, self._frame = _cuda.render(
                    self._scene, *cameras, None, self._options, keep=True
                )
            else:
                images, (self._frame,) = forward(self._scene, *cameras, None, self._options)
        self.rgb, self.alpha, self.depth, self.radii = (image.squeeze(0) for image in images)
        for image in (self.rgb, self.alpha, self.depth):
            image.requires_grad_(True)

    def update(
        self,
        optimizer: SparseGaussianAdam,
        *,
        opacity_penalty: float = 0.0,
        statistics: tuple[Tensor, Tensor] | None = None,  # [N], [N]
        lengths: bool = False,
    ) -> None:
        """Carry the gradients of rgb, alpha and depth back and take the optimiser's step; once per view.

        The gradients of a viewmat and a K that require grad go on by autograd, as those of `backward()`; their parameters are the
        caller's to update.

        Args:
            optimizer: Holds exactly the parameters of this view. Rows that the view does not see (radii 0) stay as they are.
            opacity_penalty: As if the loss had this times the mean opacity, of the parameters; then all rows are updated.
            statistics: Sums of the length of each visible Gaussian's 2D gradient, in half image sizes (3DGS's normalised device
                units), and the number of views that saw it: both are added to, float32. [N], [N]
            lengths: Of that gradient pixel by pixel, added up over the pixels: `lengths_probe` of `rasterize_gaussians_raw`.

        Raises:
            ValueError: No image has a gradient; a second update; the optimiser holds other tensors; wrong statistics.
        """
        if self._frame is None:
            raise ValueError(
                "TrainingView.update: this view was used up by an update. Render a new one."
            )
        gradients = [image.grad for image in (self.rgb, self.alpha, self.depth)]
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                "TrainingView.update: neither rgb, alpha nor depth has a gradient. Call backward() of a loss on them first."
            )
        gradients = [None if gradient is None else gradient.contiguous() for gradient in gradients]
        if statistics is not None:
            for name, tensor in zip(("grad_sum", "num_views"), statistics, strict=True):
                check_tensor(name, tensor, (len(self.radii),), self.radii.device)
        step = self._update_on_gpu if cuda.on_gpu(self.radii) else self._update_on_cpu
        with optimizer.lent(list(self._parameters.values())) as rules, torch.no_grad():
            d_viewmat, d_intrinsics = step(gradients, rules, opacity_penalty, statistics, lengths)
        self._frame = None
        camera = []
        if self._viewmat.requires_grad:
            camera.append((self._viewmat, d_viewmat.to(self._viewmat.device)))
        if self._K.requires_grad:
            camera.append((self._K, intrinsics_matrix(d_intrinsics).to(self._K.device)))
        if camera:
            # In one go: both may come from one graph.
            torch.autograd.backward(*map(list, zip(*camera, strict=True)))

    def _update_on_cpu(
        self,
        gradients: list[Tensor | None],
        rules: list[AdamRule],
        opacity_penalty: float,
        statistics: tuple[Tensor, Tensor] | None,
        lengths: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """-> gradients of the viewmat [4, 4] and the intrinsics [4], where they are wanted"""
        d_viewmat = torch.empty(4, 4) if self._viewmat.requires_grad else None
        d_intrinsics = torch.empty(4) if self._K.requires_grad else None
        tensors = adam_tensors(rules)
        update = _native.UpdateArgs(
            tensors=ctypes.addressof(tensors),
            radii=self.radii.data_ptr(),
            opacity_slope=_native.pointer(self._opacity_slope),
            opacity_penalty=opacity_penalty,
            scale_x=0.5 * self._options.width,
            scale_y=0.5 * self._options.height,
            lengths=lengths,
            viewmat=_native.pointer(d_viewmat),
            intrinsics=_native.pointer(d_intrinsics),
        )
        if statistics is not None:
            update.grad_sum, update.num_views = (tensor.data_ptr() for tensor in statistics)
        self._frame.call(
            self._frame.lib.s2d_backward_update,
            scene_args(self._scene, self._options),
            _native.CotangentArgs(*map(_native.pointer, gradients), lengths),
            update,
        )
        return d_viewmat, d_intrinsics

    def _update_on_gpu(
        self,
        gradients: list[Tensor | None],
        rules: list[AdamRule],
        opacity_penalty: float,
        statistics: tuple[Tensor, Tensor] | None,
        lengths: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """As `_update_on_cpu`."""
        from diff_gaussian_rasterization import _cuda

        images = (self.rgb, self.alpha, self.depth)
        found = torch.zeros_like(self._frame.radii, dtype=torch.float32) if lengths else None
        sums = _cuda.splat_gradients(self._frame, images, gradients, self._options, found)
        cameras = _cuda.update(
            self._scene,
            rules,
            self._frame,
            sums,
            gradients[2] is not None,
            self._options,
            self._opacity_slope,
            opacity_penalty,
            statistics,
            found,
            self._viewmat.requires_grad or self._K.requires_grad,
        )
        return (None, None) if cameras is None else (cameras[0][0], cameras[1][0])
