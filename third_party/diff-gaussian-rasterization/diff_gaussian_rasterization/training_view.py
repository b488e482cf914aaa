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
from diff_gaussian_rasterization.optimizer import SparseGaussianAdam

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
    ) -> None:
        """Render.

        Args:
            parameters: The raw tensors by name (`PARAMETERS`), shapes as in `rasterize_gaussians_raw`, contiguous.
            viewmat, K: As in `rasterize_gaussians_raw`, of one camera. Where one requires grad, `update` carries the gradient on to
                it and to what it was made of.
            width, height, sh_degree, background: As in `rasterize_gaussians_raw`.

        Raises:
            ValueError: As `rasterize_gaussians_raw`; or a tensor is missing or not contiguous.
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
        background = torch.zeros(3) if background is None else background
        self._viewmat, self._K = viewmat, K
        with torch.no_grad():
            check_cameras(viewmat[None], K[None], background, self._options)
            images, (self._frame,) = forward(
                self._scene, viewmat[None], K[None], background, None, self._options
            )
        self.rgb, self.alpha, self.depth, self.radii = (image.squeeze(0) for image in images)
        for image in (self.rgb, self.alpha, self.depth):
            image.requires_grad_(True)

    def update(
        self,
        optimizer: SparseGaussianAdam,
        *,
        opacity_penalty: float = 0.0,
        statistics: tuple[Tensor, Tensor] | None = None,  # [N], [N]
    ) -> None:
        """Carry the gradients of rgb, alpha and depth back and take the optimiser's step; once per view.

        The gradients of a viewmat and a K that require grad go on by autograd, as those of `backward()`; their parameters are the
        caller's to update.

        Args:
            optimizer: Holds exactly the parameters of this view. Rows that the view does not see (radii 0) stay as they are.
            opacity_penalty: As if the loss had this times the mean opacity; then all rows are updated.
            statistics: Sums of the length of each visible Gaussian's 2D gradient, in half image sizes (3DGS's normalised device
                units), and the number of views that saw it: both are added to, float32. [N], [N]

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
        num = len(self.radii)
        if statistics is not None:
            for name, tensor in zip(("grad_sum", "num_views"), statistics, strict=True):
                check_tensor(name, tensor, (num,))
        d_viewmat = torch.empty(4, 4) if self._viewmat.requires_grad else None
        d_intrinsics = torch.empty(4) if self._K.requires_grad else None
        with optimizer.lent(list(self._parameters.values())) as tensors:
            update = _native.UpdateArgs(
                tensors=ctypes.addressof(tensors),
                radii=self.radii.data_ptr(),
                opacity_penalty=opacity_penalty,
                scale_x=0.5 * self._options.width,
                scale_y=0.5 * self._options.height,
                viewmat=_native.pointer(d_viewmat),
                intrinsics=_native.pointer(d_intrinsics),
            )
            if statistics is not None:
                update.grad_sum, update.num_views = (tensor.data_ptr() for tensor in statistics)
            self._frame.call(
                self._frame.lib.s2d_backward_update,
                scene_args(self._scene, self._options),
                _native.CotangentArgs(*map(_native.pointer, gradients)),
                update,
            )
        self._frame = None
        camera = []
        if d_viewmat is not None:
            camera.append((self._viewmat, d_viewmat))
        if d_intrinsics is not None:
            camera.append((self._K, intrinsics_matrix(d_intrinsics)))
        if camera:
            # In one go: both may come from one graph.
            torch.autograd.backward(*map(list, zip(*camera, strict=True)))
