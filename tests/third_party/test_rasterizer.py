"""The kernel in float32 against the twin in float64: images and gradients, and what must hold exactly."""

import diff_gaussian_rasterization
import native_build
import oracles
import pytest
import torch
from diff_gaussian_rasterization.general import rasterize_gaussians_raw
from diff_gaussian_rasterization.reference import rasterize_reference

pytestmark = pytest.mark.usefixtures("every_device")

# name: (arguments of make_scene). Each stresses something of its own.
SCENES = {
    "plain": {},
    "three cameras": {"num_cameras": 3, "seed": 1},
    "many tiles, odd size": {"width": 83, "height": 51, "num_gaussians": 150, "seed": 2},
    "opaque": {"opacity_logit": (6.0, 2.0), "num_gaussians": 120, "seed": 3},  # 0.99 and T < 1e-4
    "faint": {"opacity_logit": (-4.5, 1.0), "seed": 4},  # around 1/255
    "needles": {"size": (0.002, 1.5), "seed": 5},
    "dust": {"size": (0.001, 0.01), "num_gaussians": 300, "seed": 6},  # smaller than a pixel
    "larger than the image": {"size": (0.8, 3.0), "num_gaussians": 15, "seed": 7},
    # Hundreds of splats on one another: lists longer than the kernel's batches, with and without an early stop. With half a
    # million pairs some seeds (9) have one within rounding of 1/255, which is then drawn by one side only.
    "deep": {"num_gaussians": 700, "size": (0.2, 0.6), "opacity_logit": (-4.0, 0.5), "seed": 10},
    "deep, stops": {
        "num_gaussians": 700,
        "size": (0.2, 0.6),
        "opacity_logit": (-2.5, 0.5),
        "seed": 10,
    },
    "one pixel": {"width": 1, "height": 1, "size": (0.3, 0.6), "seed": 8},
}


def _compare_images(ours, truth) -> None:
    """Whole-image closeness, and pixel by pixel up to one skipped or added α of 1/255 where rounding crosses a limit."""
    for name in ("rgb", "alpha", "depth"):
        a, b = getattr(ours, name).double(), getattr(truth, name)
        assert a.shape == b.shape, name
        # Measured at most 2e-6 in every scene here.
        assert oracles.relative_l2(a, b) < 1e-5, name
        assert (a - b).abs().max() < 2e-2 * b.abs().max().clamp_min(1), name


@pytest.mark.parametrize("name", SCENES)
def test_images_equal_the_twin(name: str) -> None:
    scene = oracles.make_scene(**SCENES[name])
    with torch.no_grad():
        ours = rasterize_gaussians_raw(**oracles.cast(scene, torch.float32))
        truth = rasterize_reference(**scene)
    assert truth.alpha.max() > 0.01  # there is something to see
    _compare_images(ours, truth)
    assert ours.rgb.dtype == torch.float32
    assert ours.radii.dtype == torch.int32
    assert ours.radii.shape == truth.radii.shape
    # ceil() may fall either way of an integer in float32.
    assert (ours.radii - truth.radii).abs().max() <= 1
    assert (ours.radii != truth.radii).float().mean() < 0.01


@pytest.mark.parametrize("name", SCENES)
def test_gradients_equal_the_twin(name: str) -> None:
    scene = oracles.make_scene(**SCENES[name])
    ours = oracles.gradients(rasterize_gaussians_raw, oracles.cast(scene, torch.float32))
    truth = oracles.gradients(rasterize_reference, scene)
    # Measured at most 5e-5, nearly all of it from depth: Σ w z / Σ w divides by sums as small as 1/255, which amplifies the
    # rounding of 1 - T. "faint" has only such pixels: measured 1.6e-4. Through rgb and alpha alone: below 3e-6.
    oracles.assert_gradients_close(ours, truth, 5e-4 if name == "faint" else 1e-4)


@pytest.mark.parametrize(
    ("degree", "active"),
    [(degree, active) for degree in range(4) for active in (None, *range(degree + 1))],
)
def test_every_degree_of_spherical_harmonics(degree: int, active: int | None) -> None:
    scene = oracles.make_scene(degree=degree, num_gaussians=30, seed=10 + degree)
    scene["shN"] = 2 * scene["shN"]  # cut at zero here and there
    scene["sh_degree"] = active
    single = oracles.cast(scene, torch.float32)
    with torch.no_grad():
        _compare_images(rasterize_gaussians_raw(**single), rasterize_reference(**scene))
    ours = oracles.gradients(rasterize_gaussians_raw, single)
    truth = oracles.gradients(rasterize_reference, scene)
    oracles.assert_gradients_close(ours, truth, max_relative_l2=1e-4)  # measured 3e-5, by depth


@pytest.mark.parametrize("only", ["rgb", "alpha", "depth"])
def test_gradient_of_each_output_alone(only: str) -> None:
    scene = oracles.make_scene(seed=20)

    def one_output(rasterize, dtype: torch.dtype) -> dict:
        def wrapped(**arguments):
            out = rasterize(**arguments)
            return out._replace(
                **{n: getattr(out, n).detach() for n in ("rgb", "alpha", "depth") if n != only}
            )

        return oracles.gradients(wrapped, oracles.cast(scene, dtype))

    ours = one_output(rasterize_gaussians_raw, torch.float32)
    truth = one_output(rasterize_reference, torch.float64)
    # Measured: rgb and alpha 2e-6, depth 3e-5 (see above).
    oracles.assert_gradients_close(ours, truth, 1e-4 if only == "depth" else 1e-5)


def test_gaussians_around_and_behind_the_camera() -> None:
    """The camera in the middle of the ball: near plane, clamped Jacobians, splats that only graze the image."""
    scene = oracles.make_scene(num_gaussians=200, seed=21, size=(0.03, 0.2))
    scene["viewmats"][:, :3, 3] *= 0.1
    single = oracles.cast(scene, torch.float32)
    with torch.no_grad():
        truth = rasterize_reference(**scene)
        _compare_images(rasterize_gaussians_raw(**single), truth)
    assert (truth.radii == 0).any()
    assert (truth.radii > 0).any()
    ours = oracles.gradients(rasterize_gaussians_raw, single)
    hidden = truth.radii[0] == 0
    assert not any(ours[name][hidden].any() for name in oracles.PARAMETERS)
    # Splats close to the eye have large, ill-conditioned gradients.
    oracles.assert_gradients_close(ours, oracles.gradients(rasterize_reference, scene), 1e-3)


def test_no_background_is_black() -> None:
    scene = oracles.cast(oracles.make_scene(), torch.float32)
    black = {**scene, "background": torch.zeros(3)}
    nothing = {**scene, "background": None}
    assert torch.equal(rasterize_gaussians_raw(**nothing).rgb, rasterize_gaussians_raw(**black).rgb)


def test_a_camera_of_a_batch_sees_what_it_sees_alone() -> None:
    scene = oracles.cast(oracles.make_scene(num_cameras=3), torch.float32)
    together = rasterize_gaussians_raw(**scene)
    for c in range(3):
        alone = {
            k: v[c : c + 1] if k in ("viewmats", "Ks", "means2d_probe") else v
            for k, v in scene.items()
        }
        for a, b in zip(rasterize_gaussians_raw(**alone), together, strict=True):
            assert torch.equal(a[0], b[c])


def test_same_bits_at_any_number_of_threads_and_every_time() -> None:
    scene = oracles.make_scene(
        num_gaussians=2000, num_cameras=2, width=150, height=97, size=(0.01, 0.2)
    )
    scene = oracles.cast(scene, torch.float32)
    before = native_build.num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7, 2):
            diff_gaussian_rasterization.set_num_threads(threads)
            results.append(
                (
                    rasterize_gaussians_raw(**scene),
                    oracles.gradients(rasterize_gaussians_raw, scene),
                )
            )
    finally:
        diff_gaussian_rasterization.set_num_threads(before)
    for out, grads in results[1:]:
        for a, b in zip(out, results[0][0], strict=True):
            assert torch.equal(a, b)
        for name, grad in grads.items():
            assert torch.equal(grad, results[0][1][name]), name


def test_renders_do_not_disturb_each_other() -> None:
    """Several forward passes before any backward pass, backward in another order, and one of them twice."""
    scenes = [oracles.cast(oracles.make_scene(seed=seed), torch.float32) for seed in (30, 31, 32)]
    alone = [oracles.gradients(rasterize_gaussians_raw, scene)["means"] for scene in scenes]
    leaves = [scene["means"].clone().requires_grad_() for scene in scenes]
    losses = []
    for scene, leaf in zip(scenes, leaves, strict=True):
        out = rasterize_gaussians_raw(**{**scene, "means": leaf})
        g = torch.Generator().manual_seed(7)
        losses.append(
            sum(
                (torch.randn(x.shape, generator=g, dtype=torch.float64).float() * x).sum()
                for x in (out.rgb, out.alpha, out.depth)
            )
        )
    for i in (1, 0, 2, 1):
        (grad,) = torch.autograd.grad(losses[i], leaves[i], retain_graph=True)
        assert torch.equal(grad, alone[i])


@pytest.mark.parametrize("only", oracles.DIFFERENTIABLE)
def test_gradient_of_one_argument_alone(only: str) -> None:
    """What is not asked for is skipped, not mixed up."""
    scene = oracles.cast(oracles.make_scene(num_gaussians=20, num_cameras=2), torch.float32)
    every = oracles.gradients(rasterize_gaussians_raw, scene)[only]
    leaf = scene[only].clone().requires_grad_()
    out = rasterize_gaussians_raw(**{**scene, only: leaf})
    g = torch.Generator().manual_seed(7)
    loss = sum(
        (torch.randn(x.shape, generator=g, dtype=torch.float64).float() * x).sum()
        for x in (out.rgb, out.alpha, out.depth)
        if x.requires_grad
    )
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(grad, every, atol=0, rtol=0)


def test_order_of_gaussians_does_not_matter() -> None:
    scene = oracles.cast(oracles.make_scene(num_gaussians=200), torch.float32)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    shuffled = {**scene, **{name: scene[name][order] for name in oracles.PARAMETERS}}
    a, b = rasterize_gaussians_raw(**scene), rasterize_gaussians_raw(**shuffled)
    assert torch.equal(a.rgb, b.rgb)
    assert torch.equal(a.radii[:, order], b.radii)


def test_equal_depths_are_drawn_by_index() -> None:
    """Two splats on one another: the first of the list is in front, whatever its colour."""
    scene = oracles.make_scene(num_gaussians=1, degree=0, size=(0.4, 0.5), opacity_logit=(0.5, 0.0))
    scene = oracles.cast({**scene, "means": 0 * scene["means"]}, torch.float32)
    for name in oracles.PARAMETERS:
        scene[name] = scene[name].repeat(2, *[1] * (scene[name].ndim - 1))
    scene["means2d_probe"], scene["background"] = None, None
    red, green = torch.tensor([1.0, -1.0, 0]), torch.tensor([-1.0, 1.0, 0])
    first_red, first_green = (
        rasterize_gaussians_raw(**{**scene, "sh0": torch.stack(pair)[:, None]}).rgb[0]
        for pair in ((red, green), (green, red))
    )
    i, j = divmod(int(first_red.sum(-1).argmax()), 32)
    assert first_red[i, j, 0] > first_red[i, j, 1] + 0.05
    assert torch.equal(first_red, first_green[..., [1, 0, 2]])


def test_inputs_may_be_strided_and_stay_unchanged() -> None:
    scene = oracles.cast(oracles.make_scene(), torch.float32)
    strided = {
        k: torch.stack([v, v], dim=-1)[..., 0] if isinstance(v, torch.Tensor) else v
        for k, v in scene.items()
    }
    copies = {k: v.clone() for k, v in strided.items() if isinstance(v, torch.Tensor)}
    assert torch.equal(rasterize_gaussians_raw(**strided).rgb, rasterize_gaussians_raw(**scene).rgb)
    assert all(torch.equal(strided[k], v) for k, v in copies.items())
