"""Central differences of the kernel itself, in a scene where it is smooth.

Every Gaussian is wide enough to stay above α = 1/255 on the whole image, faint enough to stay below 0.99 and to leave T above
1e-4, far enough from the others in depth to keep its place, and positive in colour: no limit of the algorithm is crossed by a
step. Tile edges cannot matter where everything touches every tile. The kernel computes in float32, so single differences are
noisy: many random directions per argument are compared as one vector.
"""

import math

import oracles
import pytest
import torch
from diff_gaussian_rasterization.general import rasterize_gaussians_raw
from diff_gaussian_rasterization.reference import rasterize_reference
from torch import Tensor

# Step per argument: large steps curve, small steps drown in float32 rounding.
STEPS = {
    "means": 4e-3,
    "log_scales": 4e-3,
    "quats": 4e-3,
    "opacity_logits": 1e-2,
    "sh0": 2e-2,
    "shN": 2e-2,
    "viewmats": 2e-3,
    "Ks": 0.1,
    "background": 2e-2,
}
NUM_DIRECTIONS = 24
OUTPUTS = ("rgb", "alpha", "depth")
COLOURS = ("sh0", "shN", "background")  # only rgb depends on these


def _smooth_scene() -> dict:
    g = torch.Generator().manual_seed(11)
    n, width, height = 6, 40, 24

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    means = torch.cat([uniform(-0.25, 0.25, n, 2), torch.linspace(-0.8, 0.8, n)[:, None]], dim=1)
    viewmats = oracles.look_at(
        torch.tensor([0.6, 0.3, -4.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    )[None]
    return {
        "means": means,
        "log_scales": uniform(math.log(0.9), math.log(1.8), n, 3),  # 11 to 30 pixels
        "quats": torch.randn(n, 4, generator=g, dtype=torch.float64),
        "opacity_logits": uniform(-1.5, 0.5, n),
        "sh0": uniform(0.2, 1.0, n, 1, 3),
        "shN": uniform(-0.08, 0.08, n, 15, 3),
        "viewmats": viewmats,
        "Ks": torch.tensor([[[50.0, 0, 21.3], [0, 46.0, 11.1], [0, 0, 1]]], dtype=torch.float64),
        "width": width,
        "height": height,
        "background": torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64),
        "means2d_probe": torch.zeros(1, n, 2, dtype=torch.float64),
    }


def test_the_scene_is_smooth() -> None:
    """What this file stands on, checked with the twin: each Gaussian alone is inside both limits of α at every pixel."""
    scene = _smooth_scene()
    for i in range(6):
        alone = {**scene, **{name: scene[name][i : i + 1] for name in oracles.PARAMETERS}}
        alone["means2d_probe"] = None
        alpha = rasterize_reference(**alone).alpha
        assert alpha.min() > 1.5 / 255
        assert alpha.max() < 0.9
    assert rasterize_reference(**scene).alpha.max() < 0.995


@pytest.mark.parametrize(
    ("name", "output"),
    [
        (name, output)
        for name in STEPS
        for output in OUTPUTS
        if output == "rgb" or name not in COLOURS
    ],
)
def test_gradient_equals_central_differences(name: str, output: str) -> None:
    scene = oracles.cast(_smooth_scene(), torch.float32)
    g = torch.Generator().manual_seed(3)
    image = getattr(rasterize_gaussians_raw(**scene), output)
    # Smooth weights: white ones would average the signal away and leave the rounding.
    weights = (
        torch.nn.functional.interpolate(
            torch.randn(1, image.shape[-1], 3, 4, generator=g),
            size=image.shape[1:3],
            mode="bilinear",
        )
        .permute(0, 2, 3, 1)
        .double()
    )

    def loss(value: Tensor) -> Tensor:
        return (
            weights * getattr(rasterize_gaussians_raw(**{**scene, name: value}), output).double()
        ).sum()

    leaf = scene[name].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    numeric, analytic = [], []
    with torch.no_grad():
        for _ in range(NUM_DIRECTIONS):
            direction = torch.randn(leaf.shape, generator=g)
            if name == "viewmats":
                direction[:, 3] = 0  # always 0 0 0 1
            if name == "Ks":
                direction *= torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0]])  # no skew
            ahead, behind = leaf + STEPS[name] * direction, leaf - STEPS[name] * direction
            # The step that float32 took, not the one asked for.
            taken = (ahead.double() - behind.double()) / 2
            numeric.append((loss(ahead) - loss(behind)) / 2)
            analytic.append((gradient.double() * taken).sum())
    numeric, analytic = torch.stack(numeric), torch.stack(analytic)
    report = f"{name} of {output}: {oracles.relative_l2(analytic, numeric):.2e} {oracles.cosine(analytic, numeric):.7f}"
    # Measured at most 2.1e-4 (quats), else below 1e-4.
    assert oracles.relative_l2(analytic, numeric) < 1e-3, report
    assert oracles.cosine(analytic, numeric) > 0.9999, report


def test_probe_gradient_equals_moving_the_principal_point() -> None:
    """The probe's values are not read, so each Gaussian is moved alone, by the camera: no ratio is clamped here."""
    scene = oracles.cast(_smooth_scene(), torch.float32)
    numeric, analytic = [], []
    for i in range(len(scene["means"])):
        alone = {**scene, **{name: scene[name][i : i + 1] for name in oracles.PARAMETERS}}
        alone["means2d_probe"] = torch.zeros(1, 1, 2, requires_grad=True)
        weights = torch.linspace(-1, 2, 40).cos() * torch.linspace(0, 2, 24).exp()[:, None]

        def loss(arguments: dict, weights: Tensor = weights) -> Tensor:
            return (weights[..., None].double() * rasterize_gaussians_raw(**arguments).rgb[0]).sum()

        (gradient,) = torch.autograd.grad(loss(alone), alone["means2d_probe"])
        analytic.extend(gradient[0, 0].double())
        with torch.no_grad():
            for axis in range(2):
                ahead, behind = scene["Ks"].clone(), scene["Ks"].clone()
                ahead[0, axis, 2] += 0.125  # exact in float32 with these cx, cy up to 2e-6
                behind[0, axis, 2] -= 0.125
                change = loss({**alone, "Ks": ahead}) - loss({**alone, "Ks": behind})
                numeric.append(change / 0.25)
    numeric, analytic = torch.stack(numeric), torch.stack(analytic)
    assert oracles.relative_l2(analytic, numeric) < 1e-3  # measured 3e-5
    assert oracles.cosine(analytic, numeric) > 0.9999
