"""The twin is the oracle of the kernels, so it is tested with what shares no code with it: hand numbers, gradcheck, invariances."""

import math

import numpy as np
import oracles
import pytest
import torch
from diff_gaussian_rasterization.reference import rasterize_reference, sh_basis
from torch import Tensor

F64 = torch.float64


def _one_gaussian(**changes: object) -> dict:
    """A round Gaussian of standard deviation 0.1 on the axis of a camera with focal length 40, 2 units away: 2 pixels wide."""
    scene = {
        "means": torch.tensor([[0.0, 0.0, 2.0]], dtype=F64),
        "log_scales": torch.full((1, 3), math.log(0.1), dtype=F64),
        "quats": torch.tensor([[2.0, 0.0, 0.0, 0.0]], dtype=F64),
        "opacity_logits": torch.tensor([math.log(0.8 / 0.2)], dtype=F64),
        "sh0": torch.full((1, 1, 3), 0.25 / 0.28209479177387814, dtype=F64),  # colour 0.75
        "shN": torch.zeros(1, 0, 3, dtype=F64),
        "viewmats": torch.eye(4, dtype=F64)[None],
        "Ks": torch.tensor([[[40.0, 0, 10.5], [0, 40, 8.5], [0, 0, 1]]], dtype=F64),
        "width": 21,
        "height": 17,
    }
    return {**scene, **changes}


def test_one_round_gaussian_by_hand() -> None:
    out = rasterize_reference(**_one_gaussian())
    variance = (40 * 0.1 / 2) ** 2 + 0.3
    i, j = torch.meshgrid(torch.arange(17), torch.arange(21), indexing="ij")
    expected = 0.8 * torch.exp(-0.5 * ((j - 10) ** 2 + (i - 8) ** 2).to(F64) / variance)
    expected[expected < 1 / 255] = 0
    torch.testing.assert_close(out.alpha[0, :, :, 0], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(out.rgb[0, :, :, 1], 0.75 * expected, atol=1e-12, rtol=0)
    seen = expected > 0
    assert 0 < seen.sum() < seen.numel()
    torch.testing.assert_close(out.depth[0, :, :, 0], 2 * seen.to(F64), atol=1e-12, rtol=0)
    assert out.radii.tolist() == [[math.ceil(math.sqrt(2 * math.log(255 * 0.8) * variance))]]


def test_long_gaussian_turned_by_a_quarter() -> None:
    """Long along x, turned by 90° about z: long along y in the image."""
    log_scales = torch.tensor([[0.2, 0.05, 0.05]], dtype=F64).log()
    quats = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=F64)
    alpha = rasterize_reference(**_one_gaussian(log_scales=log_scales, quats=quats)).alpha[
        0, ..., 0
    ]
    across, along = (40 * 0.05 / 2) ** 2 + 0.3, (40 * 0.2 / 2) ** 2 + 0.3
    assert alpha[8, 12].item() == pytest.approx(0.8 * math.exp(-0.5 * 4 / across), abs=1e-12)
    assert alpha[10, 10].item() == pytest.approx(0.8 * math.exp(-0.5 * 4 / along), abs=1e-12)


def test_two_layers_by_hand() -> None:
    """The nearer one wins although it comes second in the list."""
    both = _one_gaussian()
    for name in oracles.PARAMETERS:
        both[name] = both[name].repeat(2, *[1] * (both[name].ndim - 1))
    both["means"][:, 2] = torch.tensor([3.0, 2.0], dtype=F64)
    both["opacity_logits"] = torch.tensor([0.5 / 0.5, 0.25 / 0.75], dtype=F64).log()
    both["sh0"] = torch.tensor([[[1.0, 0, 0]], [[0, 1.0, 0]]], dtype=F64)
    background = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    out = rasterize_reference(**both, background=background)
    bright, grey = 0.5 + 0.28209479177387814, 0.5
    # Weights at the centre pixel: 0.25 for the near (green), 0.75 * 0.5 for the far (red), 0.375 left for the background.
    expected = [0.25 * grey + 0.375 * bright, 0.25 * bright + 0.375 * grey, 0.625 * grey + 0.375]
    assert out.rgb[0, 8, 10].tolist() == pytest.approx(expected, abs=1e-12)
    assert out.depth[0, 8, 10].item() == pytest.approx((0.25 * 2 + 0.375 * 3) / 0.625, abs=1e-12)


def test_opaque_wall_stops_before_the_transmittance_limit() -> None:
    """T is 0.01 after the first splat (capped to 0.99), 1.5e-4 after the second; the third would bring 1.5e-6 and is left out."""
    wall = _one_gaussian()
    for name in oracles.PARAMETERS:
        wall[name] = wall[name].repeat(3, *[1] * (wall[name].ndim - 1))
    wall["means"][:, 2] = torch.tensor([2.0, 2.1, 2.2], dtype=F64)
    wall["opacity_logits"] = torch.tensor([20.0, math.log(0.985 / 0.015), 20.0], dtype=F64)
    out = rasterize_reference(**wall)
    assert out.alpha[0, 8, 10].item() == pytest.approx(1 - 0.01 * 0.015, abs=1e-12)
    assert out.depth[0, 8, 10].item() == pytest.approx(
        (0.99 * 2 + 0.01 * 0.985 * 2.1) / (1 - 1.5e-4), abs=1e-12
    )


def test_jacobian_is_clamped_beyond_the_margin() -> None:
    """A Gaussian far outside the image keeps the shape it would have at the clamped ratio. Closed form from the 2D variance."""
    z, x = 2.0, 2.0  # ratio 1; the image's edge has 10.5 / 40
    limit = 10.5 / 40 + 0.3 * 21 / (2 * 40)
    scene = _one_gaussian(
        means=torch.tensor([[x, 0.0, z]], dtype=F64),
        log_scales=torch.full((1, 3), math.log(0.9), dtype=F64),
    )
    out = rasterize_reference(**scene)
    variance_x = (40 * 0.9 / z) ** 2 * (1 + limit**2) + 0.3
    variance_y = (40 * 0.9 / z) ** 2 + 0.3
    mean_x = 40 * x / z + 10.5
    expected = 0.8 * math.exp(-0.5 * (20.5 - mean_x) ** 2 / variance_x)
    assert expected > 1 / 255
    assert out.alpha[0, 8, 20, 0].item() == pytest.approx(expected, abs=1e-12)
    assert out.radii.item() == math.ceil(
        math.sqrt(2 * math.log(255 * 0.8) * max(variance_x, variance_y))
    )


def test_spherical_harmonics_are_orthonormal() -> None:
    """Quadrature on the sphere: Gauss-Legendre in z, equal steps around it; exact for these polynomials."""
    z, weights = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(8))
    phi = torch.arange(16, dtype=F64) * (2 * math.pi / 16)
    z, phi = torch.meshgrid(z, phi, indexing="ij")
    ring = (1 - z * z).sqrt()
    dirs = torch.stack([ring * phi.cos(), ring * phi.sin(), z], dim=-1).reshape(-1, 3)
    basis = sh_basis(dirs, 3)
    weights = (weights[:, None] * (2 * math.pi / 16)).expand(-1, 16).reshape(-1)
    torch.testing.assert_close(
        basis.T @ (weights[:, None] * basis), torch.eye(16, dtype=F64), atol=1e-12, rtol=0
    )


def test_colour_signs_of_degree_one() -> None:
    """In 3DGS files the coefficients of degree 1 belong to -y, z, -x of the viewing direction."""
    scene = _one_gaussian(sh0=torch.zeros(1, 1, 3, dtype=F64))
    shN = torch.zeros(1, 3, 3, dtype=F64)
    shN[0, 0, 0] = shN[0, 1, 1] = shN[0, 2, 2] = 0.5  # red: -y, green: z, blue: -x
    scene["means"] = torch.tensor([[0.0, 0.0, 2.0]], dtype=F64)
    forward = rasterize_reference(**{**scene, "shN": shN}).rgb[0, 8, 10] / 0.8
    assert forward.tolist() == pytest.approx([0.5, 0.5 + 0.5 * 0.4886025119029199, 0.5], abs=1e-9)
    turned = torch.tensor(
        [[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=F64
    )  # looks along +x
    scene["means"] = torch.tensor([[2.0, 0.0, 0.0]], dtype=F64)
    side = rasterize_reference(**{**scene, "shN": shN, "viewmats": turned[None]}).rgb[0, 8, 10]
    assert (side / 0.8).tolist() == pytest.approx(
        [0.5, 0.5, 0.5 - 0.5 * 0.4886025119029199], abs=1e-9
    )


def test_gradcheck() -> None:
    """Every differentiable argument against torch's own finite differences, in float64; outputs through random projections."""
    scene = oracles.make_scene(
        num_gaussians=3, degree=2, width=5, height=4, seed=3, size=(0.3, 0.8)
    )
    names = oracles.DIFFERENTIABLE
    projections = torch.randn(6, 5 * 4 * 5, generator=torch.Generator().manual_seed(0), dtype=F64)

    def function(*values: Tensor) -> Tensor:
        out = rasterize_reference(**{**scene, **dict(zip(names, values, strict=True))})
        return projections @ torch.cat([out.rgb, out.alpha, out.depth], dim=-1).flatten()

    leaves = [scene[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


def test_order_of_gaussians_does_not_matter() -> None:
    scene = oracles.make_scene()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    shuffled = {**scene, **{name: scene[name][order] for name in oracles.PARAMETERS}}
    a, b = rasterize_reference(**scene), rasterize_reference(**shuffled)
    torch.testing.assert_close(a.rgb, b.rgb, atol=1e-12, rtol=0)
    assert torch.equal(a.radii[:, order], b.radii)


def test_moving_scene_and_cameras_together_changes_nothing() -> None:
    """Degree 0: higher degrees do not turn with the scene."""
    scene = oracles.make_scene(degree=0, num_cameras=2)
    quat = torch.tensor([0.8, -0.3, 0.5, 0.1], dtype=F64)
    quat = quat / quat.norm()
    w, v = quat[0], quat[1:]
    R = torch.stack(  # by rotating the axes with v' = v + 2 u × (u × v + w v), not by the twin's matrix
        [
            e + 2 * torch.linalg.cross(v, torch.linalg.cross(v, e) + w * e)
            for e in torch.eye(3, dtype=F64)
        ],
        dim=1,
    )
    shift = torch.tensor([3.0, -1.0, 2.0], dtype=F64)
    q0, qv = scene["quats"][:, :1], scene["quats"][:, 1:]
    quats = torch.cat(
        [w * q0 - qv @ v[:, None], w * qv + q0 * v + torch.linalg.cross(v.expand_as(qv), qv)], dim=1
    )
    world_from_old = torch.eye(4, dtype=F64)
    world_from_old[:3, :3], world_from_old[:3, 3] = R, shift
    moved = {
        **scene,
        "means": scene["means"] @ R.T + shift,
        "quats": quats,
        "viewmats": scene["viewmats"] @ torch.linalg.inv(world_from_old),
    }
    a, b = rasterize_reference(**scene), rasterize_reference(**moved)
    for x, y in zip(a[:3], b[:3], strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=0)


def test_scaling_the_world_scales_depth_only() -> None:
    scene = oracles.make_scene()
    bigger = {**scene, "means": 3 * scene["means"], "log_scales": scene["log_scales"] + math.log(3)}
    bigger["viewmats"] = scene["viewmats"].clone()
    bigger["viewmats"][:, :3, 3] *= 3
    a, b = rasterize_reference(**scene), rasterize_reference(**bigger)
    torch.testing.assert_close(a.rgb, b.rgb, atol=1e-10, rtol=0)
    torch.testing.assert_close(3 * a.depth, b.depth, atol=1e-9, rtol=0)


def test_background_enters_by_what_alpha_leaves() -> None:
    scene = oracles.make_scene()
    black = rasterize_reference(**{**scene, "background": None})
    out = rasterize_reference(**scene)
    torch.testing.assert_close(
        out.rgb - black.rgb, (1 - out.alpha) * scene["background"], atol=1e-12, rtol=0
    )


def test_shifting_the_principal_point_shifts_the_image() -> None:
    scene = oracles.make_scene()
    shifted = {**scene, "Ks": scene["Ks"].clone()}
    shifted["Ks"][:, 0, 2] += 3
    shifted["Ks"][:, 1, 2] -= 2
    a, b = rasterize_reference(**scene), rasterize_reference(**shifted)
    torch.testing.assert_close(a.rgb[:, 2:, :-3], b.rgb[:, :-2, 3:], atol=1e-12, rtol=0)


def test_twice_the_intrinsics_sample_between_the_pixels() -> None:
    """K[:2] *= 2 is the image at twice the size: pixel corners coincide, so a pixel's centre is where its four children meet.

    Big Gaussians, next to which the blur of 0.3 pixel² does not count, are locally linear: the mean of the four is the parent.
    """
    scene = oracles.make_scene(
        degree=0, num_gaussians=8, size=(0.6, 0.8), opacity_logit=(-1.0, 0.1)
    )
    doubled = {**scene, "Ks": scene["Ks"].clone(), "width": 64, "height": 48}
    doubled["Ks"][:, :2] *= 2
    small = rasterize_reference(**scene).rgb[0]
    large = rasterize_reference(**doubled).rgb[0]
    children = large.reshape(24, 2, 32, 2, 3).mean(dim=(1, 3))
    # Measured 1.8e-3; with centres at integer pixels the two grids would be a quarter of a pixel apart: 8e-3 and more.
    assert (children - small).abs().max() < 3e-3


def test_degree_in_use_ignores_the_higher_coefficients() -> None:
    scene = oracles.make_scene(degree=3)
    a = rasterize_reference(**scene, sh_degree=1)
    b = rasterize_reference(**{**scene, "shN": scene["shN"][:, :3]})
    assert torch.equal(a.rgb, b.rgb)


@pytest.mark.parametrize("name", ["viewmats", "Ks", "background"])
def test_camera_that_is_not_finite_is_named(name: str) -> None:
    scene = oracles.make_scene(num_gaussians=3)
    scene[name] = scene[name].clone()
    scene[name].flatten()[0] = float("nan")
    with pytest.raises(ValueError, match=name):
        rasterize_reference(**scene)
