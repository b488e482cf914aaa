"""One step of a layer, and how well a layer shows the photos that it was trained on."""

from statistics import fmean

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.checks import check_finite
from s2d.gaussians import Gaussians
from s2d.layers.depth import DepthTarget, relative_depth_loss
from s2d.layers.pyramid import View, ViewSource, reduced
from s2d.losses import photometric_loss
from s2d.metrics import psnr
from s2d.rasterize import rasterize, training_view
from s2d.refinement import RefinedView, Refinement
from s2d.training import TrainingRun, check_parameters


def layer_step(
    run: TrainingRun,
    view: View,
    *,
    ssim_weight: float,
    sh_degree: int,
    opacity_weight: float = 0.0,
    depth: DepthTarget | None = None,
    depth_weight: float = 0.0,
) -> Tensor:
    """Take one step towards a view of any resolution: `s2d.training.optimise_view` with depth.

    Args:
        run: Changes in place.
        view: Camera, target and gradient weight of one size.
        ssim_weight, sh_degree, opacity_weight: As there.
        depth, depth_weight: What is known of the view's depth, and how much it counts.

    Returns:
        The photometric loss, detached.

    Raises:
        ValueError: The loss is not a number; names the tensor that went bad and the step.
    """
    name = view.camera.names[0]
    refined = refined_view(run.refinement, view.camera)
    drawn = training_view(run.gaussians, view.camera, sh_degree, refined)
    rgb = drawn.rgb if refined is None or refined.gain is None else drawn.rgb * refined.gain
    loss = photometric_loss(rgb, view.target, ssim_weight, view.weight)
    total = loss
    if depth is not None:
        total = loss + depth_weight * relative_depth_loss(drawn.depth, drawn.alpha, depth)
    if not bool(torch.isfinite(total)):
        when = f"after step {run.step} (view {name})"
        check_finite("target", view.target, "row", when, "Check that photo.")
        check_parameters(run, when)
        raise ValueError(
            f"layer_step: the loss is not finite {when}, though the photo and all parameters are. Try another --seed."
        )
    total.backward()
    state = run.densify_state
    drawn.update(
        run.optimizer,
        opacity_penalty=opacity_weight,
        statistics=(state.grad_sum, state.num_views),
    )
    run.step += 1
    return loss.detach()


def refined_view(refinement: Refinement | None, camera: Cameras) -> RefinedView | None:
    """A learned camera at the resolution of `camera`; None where it is not learned."""
    name = camera.names[0]
    if refinement is None or name not in refinement:
        return None
    full = refinement.view(name)
    width, height = refinement.base.sizes[refinement.base.names.index(name)]
    factors = torch.tensor([[camera.width / width], [camera.height / height], [1.0]])
    return RefinedView(full.viewmat, full.K * factors, full.gain)


@torch.no_grad()
def view_psnr(
    gaussians: Gaussians,
    refinement: Refinement | None,
    kept: Cameras,
    views: ViewSource,
    factor: float,
) -> float:
    """Mean PSNR in dB of the kept views at a layer's resolution, from their learned cameras where there are any."""
    scores = []
    for name in kept.names:
        view = reduced(views(True, name), factor)
        refined = refined_view(refinement, view.camera)
        camera = view.camera
        if refined is not None:
            camera = Cameras(refined.viewmat[None], refined.K[None], camera.sizes, camera.names)
        rgb = rasterize(gaussians, camera).rgb[0]
        rgb = rgb if refined is None or refined.gain is None else rgb * refined.gain
        scores.append(psnr(rgb.clamp(0, 1), view.target))
    return fmean(scores)
