"""The face that 3DGS code imports is a thin translation: every row says what it must equal in the general face."""

import math

import oracles
import pytest
import torch
from diff_gaussian_rasterization import GaussianRasterizationSettings, GaussianRasterizer
from diff_gaussian_rasterization._C import fusedssim, fusedssim_backward, mark_visible
from diff_gaussian_rasterization.general import rasterize_gaussians_raw
from diff_gaussian_rasterization.reference import (
    BLUR,
    _project,
    _rotations,
    rasterize_reference,
)
from fused_ssim import ssim_map
from torch import Tensor

WIDTH, HEIGHT = 40, 30


def _scene(degree: int = 3) -> dict:
    """A scene with the principal point in the middle: the field-of-view angles cannot say anything else."""
    scene = oracles.make_scene(num_gaussians=50, degree=degree, width=WIDTH, height=HEIGHT)
    scene["Ks"][:, 0, 2], scene["Ks"][:, 1, 2] = WIDTH / 2, HEIGHT / 2
    return oracles.cast(scene, torch.float32)


def _settings(scene: dict, **changes: object) -> GaussianRasterizationSettings:
    """The camera of a scene as 3DGS hands it over: tangents, and matrices for row vectors."""
    viewmat, K = scene["viewmats"][0], scene["Ks"][0]
    tanfovx, tanfovy = WIDTH / (2 * float(K[0, 0])), HEIGHT / (2 * float(K[1, 1]))
    near, far = 0.01, 100.0
    projection = torch.tensor(
        [
            [1 / tanfovx, 0, 0, 0],
            [0, 1 / tanfovy, 0, 0],
            [0, 0, far / (far - near), -far * near / (far - near)],
            [0, 0, 1, 0],
        ]
    )
    values = {
        "image_height": HEIGHT,
        "image_width": WIDTH,
        "tanfovx": tanfovx,
        "tanfovy": tanfovy,
        "bg": scene["background"],
        "scale_modifier": 1.0,
        "viewmatrix": viewmat.T,
        "projmatrix": (projection @ viewmat).T,
        "sh_degree": math.isqrt(1 + scene["shN"].shape[1]) - 1,
        "campos": -viewmat[:3, :3].T @ viewmat[:3, 3],
        "prefiltered": False,
        "debug": False,
        "antialiasing": False,
    }
    return GaussianRasterizationSettings(**{**values, **changes})


def _arguments(scene: dict) -> dict:
    """The activated parameters, as 3DGS hands them over."""
    return {
        "means3D": scene["means"],
        "means2D": torch.zeros_like(scene["means"]),
        "opacities": scene["opacity_logits"].sigmoid()[:, None],
        "shs": torch.cat([scene["sh0"], scene["shN"]], dim=1),
        "scales": scene["log_scales"].exp(),
        "rotations": torch.nn.functional.normalize(scene["quats"], dim=1),
    }


def _covariances(scene: dict, scale_modifier: float = 1.0) -> Tensor:
    """Upper triangles of the 3D covariances in float64. [N, 6]"""
    scales = scale_modifier * scene["log_scales"].double().exp()
    half = _rotations(scene["quats"].double()) * scales[:, None]
    cov = half @ half.mT
    return torch.stack([cov[:, i, j] for i in range(3) for j in range(i, 3)], dim=1)


def _depths(scene: dict) -> Tensor:
    return (scene["means"] @ scene["viewmats"][0, :3, :3].T + scene["viewmats"][0, :3, 3])[:, 2]


def test_colour_and_radii_equal_the_general_face() -> None:
    scene = _scene()
    colour, radii, inv_depth = GaussianRasterizer(_settings(scene))(**_arguments(scene))
    general = rasterize_gaussians_raw(**scene)
    assert colour.shape == (3, HEIGHT, WIDTH)
    assert inv_depth.shape == (1, HEIGHT, WIDTH)
    # exp(log(scale)) and sigmoid(logit) round differently: measured 4e-7.
    assert oracles.relative_l2(colour.permute(1, 2, 0), general.rgb[0]) < 1e-5
    assert radii.dtype == torch.int32
    assert (radii - general.radii[0]).abs().max() <= 1


def test_fewer_degrees_in_use() -> None:
    scene = _scene()
    colour, _, _ = GaussianRasterizer(_settings(scene, sh_degree=1))(**_arguments(scene))
    general = rasterize_gaussians_raw(**scene, sh_degree=1)
    assert oracles.relative_l2(colour.permute(1, 2, 0), general.rgb[0]) < 1e-5


def test_inverse_depth_is_the_weighted_sum() -> None:
    """Painting every Gaussian with 1/z on black gives Σ w / z as a colour."""
    scene = _scene(degree=0)
    settings = _settings(scene, bg=torch.zeros(3))
    arguments = {**_arguments(scene), "shs": None}
    arguments["colors_precomp"] = (1 / _depths(scene))[:, None].expand(-1, 3).contiguous()
    colour, _, inv_depth = GaussianRasterizer(settings)(**arguments)
    assert inv_depth.max() > 0.1
    torch.testing.assert_close(colour[:1], inv_depth, atol=1e-6, rtol=1e-5)


def test_given_colours() -> None:
    """Any numbers, not cut at zero, gradient straight through."""
    scene = _scene(degree=0)
    colours = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    arguments = {**_arguments(scene), "shs": None, "colors_precomp": colours}
    colour, _, _ = GaussianRasterizer(_settings(scene))(**arguments)
    positive = {**scene, "sh0": (colours.detach()[:, None] + 9.5) / 0.28209479177387814}
    general = rasterize_gaussians_raw(**positive).rgb - 10 * rasterize_gaussians_raw(**scene).alpha
    torch.testing.assert_close(colour.detach().permute(1, 2, 0), general[0], atol=2e-5, rtol=0)
    (grad,) = torch.autograd.grad(colour[1].sum(), colours)
    weights = grad[:, 1]  # Σ over pixels of each Gaussian's w
    assert not grad[:, [0, 2]].any()
    assert weights.sum().item() == pytest.approx(
        rasterize_gaussians_raw(**scene).alpha.sum().item(), rel=1e-5
    )


@pytest.mark.parametrize("scale_modifier", [1.0, 0.5])
def test_given_covariances(scale_modifier: float) -> None:
    """Upper triangles: xx, xy, xz, yy, yz, zz. `scale_modifier` is already in them, so it must not be applied again."""
    scene = _scene()
    arguments = _arguments(scene)
    triangles = _covariances(scene, scale_modifier).float()
    rasterizer = GaussianRasterizer(_settings(scene, scale_modifier=scale_modifier))
    from_scales, _, _ = rasterizer(**arguments)
    given = {**arguments, "scales": None, "rotations": None, "cov3D_precomp": triangles}
    from_covs, _, _ = rasterizer(**given)
    assert oracles.relative_l2(from_covs, from_scales) < 1e-5


def test_scale_modifier() -> None:
    scene = _scene()
    colour, _, _ = GaussianRasterizer(_settings(scene, scale_modifier=0.5))(**_arguments(scene))
    smaller = {**scene, "log_scales": scene["log_scales"] + math.log(0.5)}
    assert (
        oracles.relative_l2(colour.permute(1, 2, 0), rasterize_gaussians_raw(**smaller).rgb[0])
        < 1e-5
    )


def test_antialiasing_dims_what_the_blur_widens() -> None:
    """Opacity times sqrt(det(cov) / det(cov + 0.3)), as in Mip-Splatting; a round splat on the axis by hand."""
    scene = _scene(degree=0)
    scene = {**scene, **{name: scene[name][:1].clone() for name in oracles.PARAMETERS}}
    scene["viewmats"] = torch.eye(4)[None]
    scene["means"][0] = torch.tensor([0.0, 0.0, 2.0])
    scene["log_scales"][0] = math.log(0.02)
    scene["opacity_logits"][0] = 1.0
    bright = {**_arguments(scene), "shs": None, "colors_precomp": torch.ones(1, 3)}
    settings = _settings(scene, bg=torch.zeros(3), antialiasing=True)
    colour, _, _ = GaussianRasterizer(settings)(**bright)
    fx, fy = float(scene["Ks"][0, 0, 0]), float(scene["Ks"][0, 1, 1])
    vx, vy = (fx * 0.02 / 2) ** 2, (fy * 0.02 / 2) ** 2
    dimmed = 1 / (1 + math.exp(-1)) * math.sqrt(vx * vy / ((vx + 0.3) * (vy + 0.3)))
    # The mean projects to the corner of four pixels.
    expected = dimmed * math.exp(-0.5 * (0.25 / (vx + 0.3) + 0.25 / (vy + 0.3)))
    assert colour[0, HEIGHT // 2, WIDTH // 2].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("antialiasing", [False, True])
def test_gradients_through_the_activations(antialiasing: bool) -> None:
    """Against the twin in float64: raw leaves, activated by torch, through this face.

    Antialiasing: the twin draws with the opacity logit that gives the dimmed opacity.
    """
    scene = _scene(degree=2)
    names = ("means", "log_scales", "quats", "opacity_logits", "sh0", "shN")
    weights = torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))

    leaves = {name: scene[name].clone().requires_grad_() for name in names}
    settings = _settings(scene, antialiasing=antialiasing)
    colour, _, _ = GaussianRasterizer(settings)(**_arguments({**scene, **leaves}))
    ours = dict(
        zip(
            names, torch.autograd.grad((weights * colour).sum(), list(leaves.values())), strict=True
        )
    )

    double = oracles.cast(scene, torch.float64)
    leaves = {name: double[name].clone().requires_grad_() for name in names}
    double.update(leaves)
    drawn = dict(double)
    if antialiasing:
        opacity = double["opacity_logits"].sigmoid() * _compensation(double)
        drawn["opacity_logits"] = torch.logit(opacity)
    rgb = rasterize_reference(**drawn).rgb[0].permute(2, 0, 1)
    truth = dict(
        zip(
            names,
            torch.autograd.grad((weights.double() * rgb).sum(), list(leaves.values())),
            strict=True,
        )
    )
    oracles.assert_gradients_close(ours, truth, max_relative_l2=2e-5)  # measured 2e-6


@pytest.mark.parametrize("antialiasing", [False, True])
def test_gradients_through_given_covariances(antialiasing: bool) -> None:
    """Against the twin in float64: the same raw leaves, their covariances made by torch in between.

    Half of the splats lie far off the axis, where the Jacobian is clamped; some are needles.
    """
    scene = _scene(degree=0)
    scene["means"][::2, :2] *= 3
    scene["log_scales"][::3, 0] -= 4
    names = ("means", "log_scales", "quats", "opacity_logits", "sh0")
    weights = torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))
    results = []
    for dtype in (torch.float32, torch.float64):
        same = oracles.cast(scene, dtype)
        leaves = {name: same[name].clone().requires_grad_() for name in names}
        same.update(leaves)
        if dtype == torch.float64:
            if antialiasing:
                opacity = same["opacity_logits"].sigmoid() * _compensation(same)
                same["opacity_logits"] = torch.logit(opacity)
            colour = rasterize_reference(**same).rgb[0].permute(2, 0, 1)
        else:
            arguments = {**_arguments(same), "scales": None, "rotations": None}
            arguments["cov3D_precomp"] = _covariances(same).float()
            settings = _settings(scene, antialiasing=antialiasing)
            colour, _, _ = GaussianRasterizer(settings)(**arguments)
        loss = (weights.to(dtype) * colour).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        results.append((colour.detach(), dict(zip(names, gradients, strict=True))))
    (colour, ours), (truth, exact) = results
    assert oracles.relative_l2(colour, truth) < 1e-6  # measured 1.1e-7
    oracles.assert_gradients_close(ours, exact, max_relative_l2=1e-5)  # measured 1.1e-6


def test_antialiasing_dims_given_covariances_as_much() -> None:
    scene = _scene()
    arguments = _arguments(scene)
    settings = _settings(scene, antialiasing=True)
    from_scales, _, inv_depth = GaussianRasterizer(settings)(**arguments)
    given = {**arguments, "scales": None, "rotations": None}
    given["cov3D_precomp"] = _covariances(scene).float()
    from_covs, _, inv_depth_from_covs = GaussianRasterizer(settings)(**given)
    assert oracles.relative_l2(from_covs, from_scales) < 1e-6  # measured 1.1e-7
    assert oracles.relative_l2(inv_depth_from_covs, inv_depth) < 1e-6
    sharp, _, _ = GaussianRasterizer(_settings(scene))(**given)
    assert oracles.relative_l2(from_covs, sharp) > 1e-3


def test_antialiased_covariances_that_cannot_be_drawn_stay_out() -> None:
    scene = _scene(degree=0)
    arguments = {**_arguments(scene), "scales": None, "rotations": None}
    covariances = _covariances(scene).float()
    covariances[0] = 0
    covariances[1] = torch.tensor([1.0, 0, 0, 0, 0, 0])  # a line
    covariances[2, 3] = float("nan")
    covariances[3] = -1
    arguments["means3D"] = arguments["means3D"].clone()
    arguments["means3D"][4] = float("inf")
    arguments["means3D"][5] = -scene["viewmats"][0, :3, :3].T @ scene["viewmats"][0, :3, 3]
    arguments["cov3D_precomp"] = covariances
    leaves = [x.requires_grad_() for x in arguments.values() if x is not None]
    settings = _settings(scene, antialiasing=True)
    colour, radii, inv_depth = GaussianRasterizer(settings)(**arguments)
    assert radii[:6].tolist() == [0] * 6
    assert torch.isfinite(colour).all()
    for grad in torch.autograd.grad(colour.sum() + inv_depth.sum(), leaves, allow_unused=True):
        assert grad is None or torch.isfinite(grad).all()


def _compensation(scene: dict) -> Tensor:
    """sqrt(det(cov2d) / det(cov2d + 0.3)) with the twin's covariances. [N]"""
    coeffs = torch.cat([scene["sh0"], scene["shN"]], dim=1)
    parameters = (scene[name] for name in oracles.PARAMETERS[:4])
    splats = _project(
        *parameters, coeffs, scene["viewmats"][0], scene["Ks"][0], WIDTH, HEIGHT, degree=0
    )
    sharp = splats.covs2d - BLUR * torch.eye(2, dtype=torch.float64)
    return (torch.linalg.det(sharp) / torch.linalg.det(splats.covs2d)).sqrt()


def test_gradient_of_means2d_is_in_half_images() -> None:
    """3DGS's densification threshold is meant for positions in [-1, 1]: dL/d(pixel) times half the image's width or height."""
    scene = _scene()
    arguments = _arguments(scene)
    arguments["means2D"] = torch.zeros(50, 3, requires_grad=True)
    colour, _, _ = GaussianRasterizer(_settings(scene))(**arguments)
    weights = torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))
    (weights * colour).sum().backward()
    probe = torch.zeros(1, 50, 2, requires_grad=True)
    rgb = rasterize_gaussians_raw(**{**scene, "means2d_probe": probe}).rgb[0]
    (weights * rgb.permute(2, 0, 1)).sum().backward()
    expected = probe.grad[0] * torch.tensor([WIDTH / 2, HEIGHT / 2])
    assert oracles.relative_l2(arguments["means2D"].grad[:, :2], expected) < 1e-4
    assert not arguments["means2D"].grad[:, 2].any()


@pytest.mark.parametrize("degree", [0, 2])
def test_dc_apart_from_the_other_coefficients(degree: int) -> None:
    """The style of 3DGS's accelerated branch: `dc` and `shs` as they are stored, nothing concatenated."""
    scene = _scene(degree=degree)
    weights = torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))
    results = []
    for apart in (False, True):
        leaves = [scene[name].clone().requires_grad_() for name in ("sh0", "shN")]
        colours = (
            {"dc": leaves[0], "shs": leaves[1]} if apart else {"shs": torch.cat(leaves, dim=1)}
        )
        colour, *_ = GaussianRasterizer(_settings(scene))(**{**_arguments(scene), **colours})
        results.append((colour, torch.autograd.grad((weights * colour).sum(), leaves)))
    assert torch.equal(results[0][0], results[1][0])
    for together, apart in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(together, apart)
    assert results[0][1][0].any()


def test_dc_alone_is_degree_zero() -> None:
    scene = _scene(degree=0)
    arguments = {**_arguments(scene), "shs": None, "dc": scene["sh0"]}
    colour, *_ = GaussianRasterizer(_settings(scene))(**arguments)
    assert torch.equal(colour, GaussianRasterizer(_settings(scene))(**_arguments(scene))[0])
    arguments["dc"] = arguments["dc"][:, :, :2]
    with pytest.raises(ValueError, match=r"dc must be \[50, 1, 3\]"):
        GaussianRasterizer(_settings(scene))(**arguments)
    with pytest.raises(ValueError, match=r"dc must be .* dc counted and at least 4"):
        GaussianRasterizer(_settings(scene, sh_degree=1))(**arguments)


def test_settings_of_older_code_give_two_results() -> None:
    """Before there was `antialiasing` there was no inverse depth: `image, radii = rasterizer(...)`."""
    scene = _scene()
    older = GaussianRasterizationSettings(*_settings(scene)[:-1])
    colour, radii = GaussianRasterizer(older)(**_arguments(scene))
    expected = GaussianRasterizer(_settings(scene))(**_arguments(scene))
    assert torch.equal(colour, expected[0])
    assert torch.equal(radii, expected[1])


def test_visible_is_what_lies_beyond_the_near_plane() -> None:
    scene = _scene()
    scene["means"][::5] -= 5 * scene["viewmats"][0, 2, :3]  # behind the camera
    settings = _settings(scene)
    expected = _depths(scene) > 0.2
    assert 0 < expected.sum() < 50
    assert torch.equal(GaussianRasterizer(settings).markVisible(scene["means"]), expected)
    visible = mark_visible(scene["means"], settings.viewmatrix, settings.projmatrix)
    assert torch.equal(visible, expected)


@pytest.mark.parametrize("shape", [(3, 20, 17), (2, 3, 20, 17)])
def test_ssim_in_two_halves(shape: tuple[int, ...]) -> None:
    """`fusedssim` and `fusedssim_backward` are the value and the gradient of `fused_ssim.ssim_map`."""
    g = torch.Generator().manual_seed(0)
    image, truth, weights = (torch.rand(*shape, generator=g) for _ in range(3))
    leaf = image.clone().requires_grad_()
    values = ssim_map(leaf.reshape(-1, 3, 20, 17), truth.reshape(-1, 3, 20, 17)).reshape(shape)
    assert torch.equal(fusedssim(0.01**2, 0.03**2, image, truth), values)
    (expected,) = torch.autograd.grad((weights * values).sum(), leaf)
    assert torch.equal(fusedssim_backward(0.01**2, 0.03**2, image, truth, weights), expected)
    with pytest.raises(ValueError, match="Scale the images"):
        fusedssim(6.5025, 58.5225, 255 * image, 255 * truth)


def test_zero_scales_and_poison_stay_finite() -> None:
    scene = _scene()
    arguments = {k: v.clone() for k, v in _arguments(scene).items()}
    arguments["scales"][0] = 0
    arguments["scales"][1, 1] = 0
    arguments["rotations"][2] = 0
    arguments["opacities"][3] = float("nan")
    arguments["opacities"][4] = 0
    arguments["opacities"][5] = 1
    arguments["means3D"][6] = float("inf")
    leaves = [x.requires_grad_() for x in arguments.values()]
    colour, radii, inv_depth = GaussianRasterizer(_settings(scene))(**arguments)
    assert torch.isfinite(colour).all()
    assert torch.isfinite(inv_depth).all()
    assert radii[[2, 3, 4, 6]].tolist() == [0, 0, 0, 0]
    for grad in torch.autograd.grad(colour.sum() + inv_depth.sum(), leaves):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colors_precomp": torch.zeros(50, 3)}, "colors_precomp"),
        ({"shs": None}, "colors_precomp"),
        ({"scales": None}, "cov3D_precomp"),
        ({"cov3D_precomp": torch.zeros(50, 6)}, "cov3D_precomp"),
    ],
)
def test_one_of_two_ways_must_be_given(changes: dict, message: str) -> None:
    scene = _scene()
    with pytest.raises(ValueError, match=message):
        GaussianRasterizer(_settings(scene))(**{**_arguments(scene), **changes})
