"""Poison in: finite out, or an error that names the tensor. No silent corruption of the healthy Gaussians."""

import math

import oracles
import pytest
import torch
from diff_gaussian_rasterization.general import rasterize_gaussians_raw
from diff_gaussian_rasterization.reference import rasterize_reference
from hypothesis import given, settings
from hypothesis import strategies as st

INF, NAN = math.inf, math.nan
# Limits of float32, of the algorithm (1/255, 0.99, 0.2) and of a tile (16), each in value and as a logarithm or logit.
EDGE_VALUES = [
    *(0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-20, 1e20, -1e20, 3e38, -3e38),
    *(1 / 255, 0.99, 0.2, 16.0, -16.0, 44.0, 88.0, -88.0, 104.0),
    *(math.log(0.3), -5.537334267018537, 4.59511985013459),
]
POISON = [NAN, INF, -INF]
# Colours are summed, so finite colours near the limit of float32 may end beyond it: that is arithmetic, not corruption.
MAX_COLOUR = 1e20


def _scene(**arguments: object) -> dict:
    return oracles.cast(
        oracles.make_scene(**{"num_gaussians": 20, "degree": 1, **arguments}), torch.float32
    )


def _capped(name: str, value: float) -> float:
    beyond = name in ("sh0", "shN") and MAX_COLOUR < abs(value) < INF
    return math.copysign(MAX_COLOUR, value) if beyond else value


def _assert_finite(scene: dict) -> tuple:
    out = rasterize_gaussians_raw(**scene)
    grads = oracles.gradients(rasterize_gaussians_raw, scene)
    for name in ("rgb", "alpha", "depth"):
        assert torch.isfinite(getattr(out, name)).all(), name
    assert (out.radii >= 0).all()
    assert (out.alpha >= 0).all()
    assert (out.alpha <= 1).all()
    for name, grad in grads.items():
        assert torch.isfinite(grad).all(), f"gradient of {name}"
    return out, grads


def _without(scene: dict, i: int) -> dict:
    keep = [j for j in range(len(scene["means"])) if j != i]
    rest = {**scene, **{name: scene[name][keep] for name in oracles.PARAMETERS}}
    rest["means2d_probe"] = scene["means2d_probe"][:, keep]
    return rest


def _assert_as_if_absent(scene: dict, i: int) -> None:
    """Gaussian i is not drawn, gets zero gradient, and changes nobody else's."""
    out, grads = _assert_finite(scene)
    rest = _without(scene, i)
    rest_out, rest_grads = (
        rasterize_gaussians_raw(**rest),
        oracles.gradients(rasterize_gaussians_raw, rest),
    )
    assert not out.radii[:, i].any()
    for name in ("rgb", "alpha", "depth"):
        assert torch.equal(getattr(out, name), getattr(rest_out, name)), name
    for name in oracles.PARAMETERS:
        assert not grads[name][i].any(), name
        others = torch.cat([grads[name][:i], grads[name][i + 1 :]])
        assert torch.equal(others, rest_grads[name]), name


@pytest.mark.parametrize("value", POISON, ids=str)
@pytest.mark.parametrize("name", oracles.PARAMETERS)
def test_a_parameter_that_is_not_finite(name: str, value: float) -> None:
    scene = _scene()
    assert rasterize_gaussians_raw(**scene).radii[0, 5] > 0
    scene[name][5].view(-1)[-1] = value
    _assert_as_if_absent(scene, 5)


def test_a_zero_quaternion() -> None:
    scene = _scene()
    scene["quats"][5] = 0
    _assert_as_if_absent(scene, 5)


def test_a_faint_gaussian_is_never_visible() -> None:
    scene = _scene()
    scene["opacity_logits"][5] = -5.6  # 0.0037 < 1/255
    _assert_as_if_absent(scene, 5)


@pytest.mark.parametrize("z", [0.2, 0.1999, 0.0, -1.0, -3e38])
def test_before_the_near_plane(z: float) -> None:
    scene = _scene()
    scene["viewmats"] = torch.eye(4)[None]
    scene["means"][:, 2] += 4
    scene["means"][5] = torch.tensor([0.0, 0.0, z])
    _assert_as_if_absent(scene, 5)


def test_all_gaussians_are_poison() -> None:
    scene = _scene()
    scene["means"][:] = NAN
    out, grads = _assert_finite(scene)
    assert torch.equal(out.rgb, scene["background"].expand_as(out.rgb))
    assert not any(grads[name].any() for name in oracles.PARAMETERS)


@pytest.mark.parametrize("value", EDGE_VALUES, ids=str)
@pytest.mark.parametrize("name", oracles.PARAMETERS)
def test_edge_values_stay_finite(name: str, value: float) -> None:
    scene = _scene(num_cameras=2)
    value = _capped(name, value)
    scene[name][3] = value  # all components
    scene[name][8].view(-1)[0] = value  # one
    _assert_finite(scene)


@pytest.mark.parametrize("log_scale", [-100.0, -20.0, 3.0, 10.0])
def test_tiny_and_huge_gaussians_equal_the_twin(log_scale: float) -> None:
    """-100: a standard deviation of zero in float32, drawn as the blur alone. 10: 22,000 units, flat over the image."""
    scene = oracles.make_scene(num_gaussians=12, degree=0, opacity_logit=(-2.0, 0.5))
    scene["log_scales"][4] = log_scale
    scene["means"][4] = 0.01
    with torch.no_grad():
        ours = rasterize_gaussians_raw(**oracles.cast(scene, torch.float32))
        truth = rasterize_reference(**scene)
    assert oracles.relative_l2(ours.rgb, truth.rgb) < 1e-5
    assert oracles.relative_l2(ours.alpha, truth.alpha) < 1e-5
    _assert_finite(oracles.cast(scene, torch.float32))


def test_no_gaussians_at_all() -> None:
    scene = _scene(num_gaussians=0, num_cameras=2)
    scene["background"].requires_grad_()
    scene["means"].requires_grad_()
    out = rasterize_gaussians_raw(**scene)
    assert out.radii.shape == (2, 0)
    assert torch.equal(out.rgb, scene["background"].expand(2, 24, 32, 3))
    assert not out.alpha.any()
    assert not out.depth.any()
    out.rgb.sum().backward()
    assert scene["background"].grad.tolist() == [2 * 24 * 32] * 3


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 40), (40, 1), (16, 16), (17, 15), (33, 31)]
)
def test_images_of_every_size_equal_the_twin(width: int, height: int) -> None:
    scene = oracles.make_scene(num_gaussians=20, degree=1, size=(0.2, 0.6))
    scene.update(width=width, height=height)
    scene["Ks"][:, 0, 2], scene["Ks"][:, 1, 2] = width / 2, height / 2
    ours = rasterize_gaussians_raw(**oracles.cast(scene, torch.float32))
    truth = rasterize_reference(**scene)
    assert ours.rgb.shape == (1, height, width, 3)
    assert truth.alpha.max() > 0.1
    assert oracles.relative_l2(ours.rgb, truth.rgb) < 1e-5
    _assert_finite(oracles.cast(scene, torch.float32))


@pytest.mark.parametrize(
    ("cx", "cy"), [(-40.0, 12.0), (16.0, 90.0), (0.0, 0.0), (31.9, 23.9), (1e6, -1e6)]
)
def test_principal_points_at_and_beyond_the_edges_equal_the_twin(cx: float, cy: float) -> None:
    """A crop of a larger photo: the field of view is not around the axis."""
    scene = oracles.make_scene(num_gaussians=60, degree=1, size=(0.2, 0.9))
    scene["means"] = 3 * scene["means"]
    scene["Ks"][:, 0, 2], scene["Ks"][:, 1, 2] = cx, cy
    single = oracles.cast(scene, torch.float32)
    _, grads = _assert_finite(single)
    truth = rasterize_reference(**scene)
    assert oracles.relative_l2(rasterize_gaussians_raw(**single).rgb, truth.rgb) < 1e-5
    if truth.alpha.max() > 0.1:
        # Measured 1e-5; far off the axis pixel positions are large numbers, so float32 keeps fewer digits of d.
        oracles.assert_gradients_close(grads, oracles.gradients(rasterize_reference, scene), 3e-4)


@pytest.mark.parametrize("value", POISON, ids=str)
@pytest.mark.parametrize("name", ["viewmats", "Ks", "background"])
def test_a_camera_that_is_not_finite_is_named(name: str, value: float) -> None:
    scene = _scene(num_cameras=2)
    scene[name].view(-1)[1] = value
    with pytest.raises(ValueError, match=name):
        rasterize_gaussians_raw(**scene)


@pytest.mark.parametrize(
    "edits", [{"focal": 1e-6}, {"focal": 1e9}, {"shift": 1e30}, {"shift": -1e30}, {"scale": 1e15}]
)
def test_extreme_cameras_stay_finite(edits: dict) -> None:
    scene = _scene(num_cameras=2)
    if "focal" in edits:
        scene["Ks"][:, 0, 0] = scene["Ks"][:, 1, 1] = edits["focal"]
    scene["viewmats"][:, 0, 3] += edits.get("shift", 0.0)
    scene["viewmats"][:, :3, :3] *= edits.get("scale", 1.0)
    _assert_finite(scene)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 1000),
    edits=st.lists(
        st.tuples(
            st.sampled_from(oracles.PARAMETERS),
            st.integers(0, 10**6),
            st.sampled_from(EDGE_VALUES + POISON),
        ),
        min_size=1,
        max_size=40,
    ),
)
def test_any_mixture_of_values_stays_finite(seed: int, edits: list) -> None:
    scene = _scene(seed=seed, width=20, height=18)
    for name, place, value in edits:
        flat = scene[name].view(-1)
        flat[place % len(flat)] = _capped(name, value)
    _assert_finite(scene)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quats": torch.zeros(20, 3)}, "quats"),
        ({"log_scales": torch.zeros(19, 3)}, "log_scales"),
        ({"opacity_logits": torch.zeros(20, 1)}, "opacity_logits"),
        ({"sh0": torch.zeros(20, 3)}, "sh0"),
        ({"shN": torch.zeros(20, 4, 3)}, "shN"),
        ({"viewmats": torch.eye(4)}, "viewmats"),
        ({"Ks": torch.zeros(2, 3, 3)}, "Ks"),
        ({"background": torch.zeros(1)}, "background"),
        ({"means2d_probe": torch.zeros(20, 2)}, "means2d_probe"),
        ({"Ks": torch.tensor([[[30.0, 1, 16], [0, 30, 12], [0, 0, 1]]])}, "skew"),
        ({"Ks": torch.tensor([[[0.0, 0, 16], [0, 30, 12], [0, 0, 1]]])}, "focal"),
        ({"width": 0}, "width"),
        ({"height": -3}, "height"),
        ({"sh_degree": 2}, "sh_degree"),
        ({"sh_degree": -1}, "sh_degree"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_shapes_and_numbers_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rasterize_gaussians_raw(**{**_scene(), **changes})
