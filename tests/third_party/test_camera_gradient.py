"""The camera's gradient: what moves camera and scene together changes nothing, and `TrainingView` has the bits of autograd.

The float64 twin and central differences are in test_rasterizer.py and test_finite_diff.py, for viewmats and Ks as for all else.
"""

import oracles
import pytest
import torch
from diff_gaussian_rasterization import (
    SparseGaussianAdam,
    TrainingView,
    rasterize_gaussians_raw,
    set_num_threads,
)
from torch import Tensor

F64 = torch.float64


def _cross_matrix(v: Tensor) -> Tensor:
    x, y, z = v.tolist()
    return torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=F64)


def _common_motion(scene: dict, turn: Tensor, shift: Tensor, growth: float) -> dict:
    """Derivative of every argument when the world turns, moves and grows, cameras included."""
    means, quats, viewmats = scene["means"], scene["quats"], scene["viewmats"]
    w, v = quats[:, :1], quats[:, 1:]
    turned = torch.cat([-v @ turn[:, None], w * turn + torch.linalg.cross(turn.expand_as(v), v)], 1)
    generator = torch.zeros(4, 4, dtype=F64)
    generator[:3, :3], generator[:3, 3] = _cross_matrix(turn), shift
    d_viewmats = -viewmats @ generator
    d_viewmats[:, :3, 3] += (
        growth * viewmats[:, :3, 3]
    )  # in the larger world t is longer, R the same
    return {
        "means": means @ _cross_matrix(turn).T + shift + growth * means,
        "log_scales": torch.full_like(scene["log_scales"], growth),
        "quats": 0.5 * turned,
        "viewmats": d_viewmats,
    }


@pytest.mark.parametrize(
    ("motion", "degree"),
    # Higher degrees of the colour do not turn with the scene.
    [("turn", 0), ("shift", 3), ("growth", 3)],
)
def test_moving_cameras_and_gaussians_together_changes_nothing(motion: str, degree: int) -> None:
    g = torch.Generator().manual_seed(2)
    zero = torch.zeros(3, dtype=F64)
    turn = torch.randn(3, generator=g, dtype=F64) if motion == "turn" else zero
    shift = torch.randn(3, generator=g, dtype=F64) if motion == "shift" else zero
    scene = oracles.make_scene(num_gaussians=150, degree=degree, num_cameras=2, seed=4)

    def without_depth(**arguments):  # depths grow with the world
        out = rasterize_gaussians_raw(**arguments)
        return out._replace(depth=out.depth.detach()) if motion == "growth" else out

    gradients = oracles.gradients(without_depth, oracles.cast(scene, torch.float32))
    directions = _common_motion(scene, turn, shift, 1.0 if motion == "growth" else 0.0)
    parts = {k: float((gradients[k].double() * d).sum()) for k, d in directions.items()}
    of_camera = abs(parts["viewmats"])
    assert of_camera > 1e-2 * sum(map(abs, parts.values())), "this motion is to be seen"
    # Measured 4e-6 at most, against sums of terms of both signs.
    assert abs(sum(parts.values())) < 1e-4 * of_camera, parts


def _training_view(requires: tuple[bool, bool], threads: int | None = None):
    """Gradients of camera and new parameters of one step: by `TrainingView` and by autograd."""
    scene = oracles.cast(oracles.make_scene(num_gaussians=700, seed=5, width=60), torch.float32)
    weights = torch.randn(24, 60, 5, generator=torch.Generator().manual_seed(6))
    results = []
    for fused in (True, False):
        params = {k: scene[k].clone().requires_grad_() for k in oracles.PARAMETERS}
        groups = [{"name": k, "lr": 1e-2, "params": [p]} for k, p in params.items()]
        optimizer = SparseGaussianAdam(groups, lr=0.0, eps=1e-15)
        camera = [
            scene[k][0].clone().requires_grad_(wanted)
            for k, wanted in zip(("viewmats", "Ks"), requires, strict=True)
        ]
        size = (scene["width"], scene["height"])
        if fused:
            set_num_threads(threads)
            view = TrainingView(params, *camera, *size)
            images = torch.cat([view.rgb, view.alpha, view.depth], -1)
            (images * weights).mean().backward()
            view.update(optimizer)
            set_num_threads(None)
        else:
            out = rasterize_gaussians_raw(*params.values(), *(x[None] for x in camera), *size)
            (torch.cat([out.rgb, out.alpha, out.depth], -1)[0] * weights).mean().backward()
            optimizer.step(out.radii[0])
        results.append((camera, params))
    return results


@pytest.mark.parametrize("requires", [(True, True), (True, False), (False, True), (False, False)])
def test_training_view_has_the_bits_of_autograd(requires: tuple[bool, bool]) -> None:
    (camera, params), (expected_camera, expected) = _training_view(requires)
    for value, truth, wanted in zip(camera, expected_camera, requires, strict=True):
        assert (value.grad is not None) == wanted
        if wanted:
            assert value.grad.abs().max() > 0
            assert torch.equal(value.grad, truth.grad)
    assert all(torch.equal(params[k], expected[k]) for k in params)


def test_the_same_bits_at_any_thread_count() -> None:
    first, *others = (
        [x.grad for x in _training_view((True, True), threads)[0][0]] for threads in (1, 3, 8)
    )
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


def test_the_gradient_goes_on_to_what_the_camera_was_made_of() -> None:
    """Viewmat and K may share what they were made of: both gradients arrive there."""
    scene = oracles.cast(oracles.make_scene(), torch.float32)
    params = {k: scene[k].clone().requires_grad_() for k in oracles.PARAMETERS}
    optimizer = SparseGaussianAdam([{"params": [p]} for p in params.values()], lr=0.0, eps=1e-15)
    knob = torch.tensor(0.0, requires_grad=True)
    nudge = torch.zeros(4, 4)
    nudge[2, 3] = 1.0
    zoom = torch.zeros(3, 3)
    zoom[0, 0] = zoom[1, 1] = 1.0
    shared = 2 * knob
    viewmat, K = scene["viewmats"][0] + shared * nudge, scene["Ks"][0] + shared * zoom
    viewmat.retain_grad(), K.retain_grad()
    view = TrainingView(params, viewmat, K, scene["width"], scene["height"])
    view.rgb.square().mean().backward()
    view.update(optimizer)
    expected = 2 * (viewmat.grad[2, 3] + K.grad[0, 0] + K.grad[1, 1])
    assert knob.grad != 0
    assert torch.allclose(knob.grad, expected, rtol=1e-6)  # one sum in another order
