"""A training view by autograd, for strategies that change shapes, have a loss of parameters, or render more than one picture.

The same interface as the rasteriser's `TrainingView`, and without a strategy the same bits; that one is faster, because gradients never
leave the cache.
"""

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.device import to_device
from s2d.gaussians import Gaussians
from s2d.optim import SparseGaussianAdam
from s2d.rasterize import CameraTensors, rasterize


class StrategyView:
    """One view's render, until its update.

    Attributes:
        rgb [H, W, 3], alpha [H, W, 1], depth [H, W, 1]: As drawn; a loss of them reaches the parameters by `backward()`.
        drawn: The Gaussians as they were drawn, for further renders that belong to this step.
    """

    def __init__(
        self,
        leaves: Gaussians,
        drawn: Gaussians,
        camera: Cameras,
        sh_degree: int,
        refined: CameraTensors | None = None,
        lengths: bool = False,
    ) -> None:
        """Render.

        Args:
            leaves: The parameters.
            drawn: What they become in this step, differentiable in `leaves`.
            camera: One camera.
            sh_degree: Degree in use.
            refined: Instead of the camera's viewmat and K.
            lengths: `update` will want those of the pixels' gradients.
        """
        self.drawn = drawn
        self._leaves = leaves
        half_size = torch.tensor([0.5 * camera.width, 0.5 * camera.height])
        self._half_size = to_device(half_size, leaves.means.device)
        self._probe = leaves.means.new_zeros(1, leaves.num, 2).requires_grad_()
        self._lengths = leaves.means.new_zeros(1, leaves.num).requires_grad_() if lengths else None
        render = rasterize(
            drawn,
            camera,
            sh_degree=sh_degree,
            viewmats=None if refined is None else refined.viewmat[None],
            Ks=None if refined is None else refined.K[None],
            means2d_probe=self._probe,
            lengths_probe=self._lengths,
        )
        self.rgb, self.alpha, self.depth = (
            image.squeeze(0) for image in (render.rgb, render.alpha, render.depth)
        )
        self.radii = render.radii.squeeze(0)
        self._seen = self.radii > 0

    def add_seen(self, radii: Tensor) -> None:
        """Count what another render of this step has shown [N] as seen, too: the optimiser moves only what is seen."""
        self._seen = self._seen | (radii > 0)

    def update(
        self,
        optimizer: SparseGaussianAdam,
        *,
        opacity_penalty: float = 0.0,
        statistics: tuple[Tensor, Tensor] | None = None,  # [N], [N]
        lengths: bool = False,
    ) -> None:
        """Take the optimiser's step with the gradients of `backward()`; arguments as in `TrainingView.update`."""
        if opacity_penalty:
            logits = self._leaves.opacity_logits
            opacities = torch.sigmoid(logits.detach())
            logits.grad += opacity_penalty / len(logits) * opacities * (1 - opacities)
        if statistics is not None and self._probe.grad is not None:
            visible = self.radii > 0
            if lengths:
                length = self._lengths.grad[0]
            else:
                length = (self._probe.grad[0] * self._half_size).norm(dim=-1)
            statistics[0].add_(torch.where(visible, length, torch.zeros_like(length)))
            statistics[1].add_(visible.float())
        optimizer.step(None if opacity_penalty else self._seen)
        optimizer.zero_grad()
