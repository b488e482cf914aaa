"""The CUDA rasteriser, run by the emulator, against the CPU kernels and the float64 twin: images, gradients, one training step."""

import emulation
import oracles
import pipeline
import pytest
import torch
from diff_gaussian_rasterization import general as cpu_face
from diff_gaussian_rasterization.general import RenderOptions, SceneTensors, rasterize_gaussians_raw
from diff_gaussian_rasterization.optimizer import SparseGaussianAdam
from diff_gaussian_rasterization.reference import rasterize_reference
from diff_gaussian_rasterization.training_view import TrainingView
from torch import Tensor

IMAGES = ("rgb", "alpha", "depth")
# name: arguments of make_scene. Each stresses something of its own.
SCENES = {
    "two cameras": {"num_cameras": 2, "num_gaussians": 150, "width": 48, "height": 40},
    "odd size": {"width": 37, "height": 19, "num_gaussians": 100, "seed": 2},
    "opaque": {"opacity_logit": (6.0, 2.0), "num_gaussians": 120, "seed": 3},  # 0.99 and T < 1e-4
    "needles": {"size": (0.002, 1.5), "seed": 5},
    "dust": {"size": (0.001, 0.01), "num_gaussians": 300, "seed": 6},  # smaller than a pixel
    "one pixel": {"width": 1, "height": 1, "size": (0.3, 0.6), "seed": 8},
    # More than 256 instances in a tile: several segments, with and without an early stop.
    "deep": {"num_gaussians": 600, "size": (0.2, 0.6), "opacity_logit": (-4.0, 0.5), "seed": 10},
    "deep, stops": {
        "num_gaussians": 700,
        "size": (0.3, 0.6),
        "opacity_logit": (-1.5, 0.5),
        "seed": 10,
    },
    # More rows of tiles than a thread lists alone, and than a warp has lanes.
    "tall": {"width": 17, "height": 600, "num_gaussians": 12, "size": (3.0, 9.0), "seed": 7},
}
# The twin looks at all pairs of pixels and Gaussians, and would take seconds for "tall".
TWIN_SCENES = [name for name in SCENES if name != "tall"]


def cotangents(images, seed: int = 7) -> list[Tensor]:
    """Those of `oracles.gradients`."""
    g = torch.Generator().manual_seed(seed)
    shapes = [getattr(images, name).shape for name in IMAGES]
    return [torch.randn(shape, generator=g, dtype=torch.float64).float() for shape in shapes]


def assert_images_close(ours, truth, limit: float) -> None:
    for name in IMAGES:
        assert oracles.relative_l2(getattr(ours, name), getattr(truth, name)) < limit, name


@pytest.mark.parametrize("name", SCENES)
def test_equals_the_cpu(name: str) -> None:
    scene = oracles.make_scene(**SCENES[name])
    single = oracles.cast(scene, torch.float32)
    ours = pipeline.render(scene)
    with torch.no_grad():
        truth = rasterize_gaussians_raw(**single)
    assert truth.alpha.max() > 0.01  # there is something to see
    assert_images_close(
        ours.images, truth, 1e-6
    )  # measured 7e-7 for the alpha of "dust", else 2e-7
    # ceil() may fall either way of an integer: the CPU's exponential is its own.
    assert (ours.radii - truth.radii).abs().max() <= 1
    if name.startswith("deep"):
        assert ours.tile_begin.diff().max() > (512 if "stops" in name else 256)  # segments
    values = ours.gradients(*cotangents(truth))
    truths = oracles.gradients(rasterize_gaussians_raw, single)
    # Measured 4e-5 for "one pixel", where the CPU's own rounding shows (the twin is met to 2e-6), 1.4e-5 where segments meet (what is
    # behind a segment is a difference of sums), else 3e-6.
    oracles.assert_gradients_close(values, truths, 1e-4)


@pytest.mark.parametrize("name", TWIN_SCENES)
def test_equals_the_twin(name: str) -> None:
    scene = oracles.make_scene(**SCENES[name])
    ours = pipeline.render(scene)
    with torch.no_grad():
        truth = rasterize_reference(**scene)
    assert_images_close(ours.images, truth, 1e-5)  # measured below 1e-6
    values = ours.gradients(*cotangents(truth))
    truths = oracles.gradients(rasterize_reference, scene)
    oracles.assert_gradients_close(
        values, truths, 1e-4
    )  # measured 1.5e-5 in the deep ones, else 4e-6


def test_finite_differences() -> None:
    """Central differences of the emulated forward pass itself, along one random direction per parameter. No splat ends in the image:
    pixels jump by 1/255 of a colour there."""
    scene = oracles.make_scene(
        num_gaussians=6, width=16, height=12, seed=40, size=(2.5, 4.0), opacity_logit=(0.5, 0.5)
    )
    ours = pipeline.render(scene)
    weights = cotangents(ours.images)
    values = ours.gradients(*weights)
    g = torch.Generator().manual_seed(41)

    def loss(**changes: Tensor) -> float:
        images = pipeline.render({**scene, **changes}, training=False).images
        parts = zip(weights, (getattr(images, name) for name in IMAGES), strict=True)
        return sum(float((w.double() * image.double()).sum()) for w, image in parts)

    step = 1e-2
    report = []
    for name in (*pipeline.PARAMETERS, "background", "means2d_probe"):
        direction = torch.randn(scene[name].shape, generator=g, dtype=torch.float64)
        ahead, behind = (loss(**{name: scene[name] + s * direction}) for s in (step, -step))
        slope = (ahead - behind) / (2 * step)
        report.append((name, slope, float((values[name].double() * direction).sum())))
    # Measured at most 8e-4 of the larger of slope and 1: float32 images, and the third derivative.
    assert all(abs(a - b) < 5e-3 * max(abs(b), 1.0) for _, a, b in report), report


def test_centres_are_placed_with_all_digits_that_a_float_has() -> None:
    """Far from the origin of the world, where the terms of W x + t cancel. What is lost there is lost in every sum over Gaussians."""
    scene = oracles.make_scene(num_gaussians=200, seed=51)
    shift = torch.tensor([3.0, -5.0, 9.0], dtype=torch.float64)
    scene["means"] = scene["means"] + shift
    scene["viewmats"][0, :3, 3] -= scene["viewmats"][0, :3, :3] @ shift
    scene = {k: v.float().double() if isinstance(v, Tensor) else v for k, v in scene.items()}
    ours = pipeline.render(scene, training=False)
    seen = ours.radii[0] > 0
    assert seen.sum() > 100
    viewmat, K = scene["viewmats"][0], scene["Ks"][0]
    places = (scene["means"][seen] @ viewmat[:3, :3].T + viewmat[:3, 3]) @ K.T
    exact = places[:, :2] / places[:, 2:]
    error = (ours.splats[0, seen, :2].double() - exact).abs().max()
    print(f"off by {error:.1e} pixels")
    assert error < 2e-6  # measured 9.5e-7, half of the last place; 6.8e-6 in plain float32


def test_order_of_threads_does_not_matter() -> None:
    """Images to the bit. Gradients but for rounding: sums over tiles are taken in any order."""
    scene = oracles.make_scene(**SCENES["deep, stops"])
    one, other = pipeline.render(scene), pipeline.render(scene, backwards=True)
    for a, b in zip(one.images, other.images, strict=True):
        assert torch.equal(a, b)
    weights = cotangents(one.images)
    values, truths = one.gradients(*weights), other.gradients(*weights)
    oracles.assert_gradients_close(values, truths, 1e-6)  # measured at most 1.8e-7


def test_wide_tile_numbers_and_rendering_alone_draw_the_same() -> None:
    scene = oracles.make_scene(**SCENES["two cameras"])
    plain = pipeline.render(scene).images
    for variant in ({"wide_tiles": True}, {"training": False}):
        for a, b in zip(pipeline.render(scene, **variant).images, plain, strict=True):
            assert torch.equal(a, b), variant


@pytest.mark.parametrize("only", IMAGES)
def test_gradient_of_each_image_alone(only: str) -> None:
    scene = oracles.make_scene(**SCENES["deep"])
    ours = pipeline.render(scene)
    chosen = [
        v if name == only else None for name, v in zip(IMAGES, cotangents(ours.images), strict=True)
    ]
    values = ours.gradients(*chosen)

    def one_image(**arguments):
        out = rasterize_gaussians_raw(**arguments)
        return out._replace(**{n: getattr(out, n).detach() for n in IMAGES if n != only})

    truths = oracles.gradients(one_image, oracles.cast(scene, torch.float32))
    oracles.assert_gradients_close(values, truths, 1e-4)  # measured 4e-6 of depth, else 1e-6


@pytest.mark.parametrize(("degree", "active"), [(0, 0), (1, 1), (1, 0), (2, 2), (2, 1), (3, 0)])
def test_every_degree_of_spherical_harmonics(degree: int, active: int) -> None:
    scene = oracles.make_scene(degree=degree, num_gaussians=37, seed=10 + degree)
    scene["shN"] = 2 * scene["shN"]  # cut at zero here and there
    scene["sh_degree"] = active
    single = oracles.cast(scene, torch.float32)
    ours = pipeline.render(scene)
    with torch.no_grad():
        truth = rasterize_gaussians_raw(**single)
    assert_images_close(ours.images, truth, 1e-6)
    values = ours.gradients(*cotangents(truth))
    truths = oracles.gradients(rasterize_gaussians_raw, single)
    oracles.assert_gradients_close(values, truths, 1e-5)  # measured at most 3e-6


@pytest.mark.parametrize("antialiasing", [False, True])
@pytest.mark.parametrize("shape", ["scales", "covariances"])
def test_what_the_inria_face_asks_for(shape: str, antialiasing: bool) -> None:
    """Activated values, given colours and covariances, a factor of the scales, inverse depth, antialiasing."""
    scene = oracles.cast(oracles.make_scene(seed=31, num_cameras=2), torch.float32)
    g = torch.Generator().manual_seed(1)
    halves = 0.2 * torch.randn(60, 3, 3, generator=g)
    covars = (halves @ halves.transpose(1, 2))[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    scales = shape == "scales"
    tensors = {
        "means": scene["means"],
        "log_scales": scene["log_scales"].exp() if scales else None,
        "quats": scene["quats"] if scales else None,
        "opacity_logits": scene["opacity_logits"].sigmoid(),
        "sh0": None,
        "shN": None,
        "colors": torch.rand(60, 3, generator=g),
        "covars": None if scales else covars,
    }
    options = RenderOptions(32, 24, 0, True, 0.9, inverse_depth=True, antialiasing=antialiasing)
    cameras = (scene["viewmats"], scene["Ks"], scene["background"], None)
    leaves = {k: v if v is None else v.requires_grad_() for k, v in tensors.items()}
    truth = cpu_face.render(SceneTensors(**leaves), *cameras, options)
    ours = pipeline.EmulatedRender(SceneTensors(**tensors), *cameras, options)
    assert_images_close(ours.images, truth, 1e-6)  # measured at most 2e-7
    weights = cotangents(truth)
    loss = sum((w * getattr(truth, name)).sum() for w, name in zip(weights, IMAGES, strict=True))
    given = {k: v for k, v in leaves.items() if v is not None}
    truths = dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))
    values = {k: v for k, v in ours.gradients(*weights).items() if k in truths}
    oracles.assert_gradients_close(values, truths, 1e-5)  # measured at most 1.4e-6


def test_poisoned_gaussians_are_not_drawn() -> None:
    scene = oracles.make_scene(num_gaussians=40, seed=50)
    poisoned = 0
    for name, values in {
        "means": (torch.nan, 1e30),
        "log_scales": (torch.inf, 80.0),
        "quats": (0.0,),
        "opacity_logits": (torch.nan,),
        "sh0": (torch.inf,),
        "shN": (torch.nan,),
    }.items():
        for value in values:
            scene[name][poisoned] = value
            poisoned += 1
    single = oracles.cast(scene, torch.float32)
    ours = pipeline.render(scene)
    with torch.no_grad():
        truth = rasterize_gaussians_raw(**single)
    assert torch.equal(ours.radii, truth.radii)
    assert_images_close(ours.images, truth, 1e-6)
    values = ours.gradients(*cotangents(truth))
    assert all(torch.isfinite(value).all() for value in values.values())
    assert not values["means"][:poisoned].any()
    truths = oracles.gradients(rasterize_gaussians_raw, single)
    oracles.assert_gradients_close(values, truths, 1e-5)  # measured 2e-6


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_to_see(count: int) -> None:
    scene = oracles.make_scene(num_gaussians=count, num_cameras=2)
    scene["means"] = scene["means"] + 100.0
    ours = pipeline.render(scene)
    assert ours.num_instances == 0
    background = scene["background"].float()
    assert torch.equal(ours.rgb, background.expand_as(ours.rgb))
    assert not ours.alpha.any()
    assert not ours.depth.any()
    assert not ours.radii.any()
    values = ours.gradients(*cotangents(ours.images))
    assert not any(values[name].any() for name in (*pipeline.PARAMETERS, "viewmats"))


def _rates(optimizer: SparseGaussianAdam, params: dict[str, Tensor]) -> Tensor:
    """What the next step of the optimiser will use; the steps it counts stay as they are."""
    with optimizer.lent(list(params.values())) as described:
        rows = [[t.lr, t.beta1, t.beta2, 1 - t.beta1, 1 - t.beta2, t.eps] for t in described]
    for param in params.values():
        optimizer.state[param]["step"] -= 1
    return torch.tensor(rows, dtype=torch.float64).float()


def _training_step(
    scene: dict, degree: int, penalty: float, with_depth: bool, lengths: bool
) -> tuple[dict, dict]:
    """One update on the CPU, so that there are moments; then the same second one on both sides."""
    single = oracles.cast(scene, torch.float32)
    params = {name: single[name].clone() for name in pipeline.PARAMETERS}
    groups = [{"params": [p], "lr": 0.01 * (1 + i)} for i, p in enumerate(params.values())]
    optimizer = SparseGaussianAdam(groups, lr=0.01, eps=1e-8, bias_correction=True)
    statistics = (torch.rand(len(single["means"])), torch.rand(len(single["means"])))
    viewmat = single["viewmats"][0].clone().requires_grad_()
    K = single["Ks"][0].clone().requires_grad_()
    background, size = single["background"], (scene["width"], scene["height"])
    g = torch.Generator().manual_seed(61)
    weights = [torch.randn(size[1], size[0], c, generator=g) for c in (3, 1, 1)]
    kinds = ("exp_avg", "exp_avg_sq")

    def moments() -> list[Tensor]:
        return [optimizer.state[p][kind] for kind in kinds for p in params.values()]

    def step_on_the_cpu() -> None:
        viewmat.grad = K.grad = None
        view = TrainingView(params, viewmat, K, *size, sh_degree=degree, background=background)
        loss = (weights[0] * view.rgb).sum() + (weights[1] * view.alpha).sum()
        (loss + (weights[2] * view.depth).sum() if with_depth else loss).backward()
        view.update(optimizer, opacity_penalty=penalty, statistics=statistics, lengths=lengths)

    step_on_the_cpu()
    cameras = (viewmat[None], K[None], background, None)
    ours = pipeline.EmulatedRender(
        SceneTensors(*params.values()), *cameras, RenderOptions(*size, degree)
    )
    my_moments = list(map(ours.memory.copy, moments()))
    counted = tuple(map(ours.memory.copy, statistics))
    chosen = [w[None] for w in weights[:2]] + [weights[2][None] if with_depth else None]
    rates = _rates(optimizer, params)
    camera = ours.update(chosen, my_moments, rates, penalty, counted, lengths)
    step_on_the_cpu()

    labels = [*params, *(f"{kind} of {name}" for kind in kinds for name in params)]
    labels += ["grad_sum", "num_views", "viewmat", "K"]
    truths = [*params.values(), *moments(), *statistics, viewmat.grad, K.grad]
    values = [getattr(ours.scene, name) for name in params]
    values += [*my_moments, *counted, *(gradient[0] for gradient in camera)]
    return dict(zip(labels, values, strict=True)), dict(zip(labels, truths, strict=True))


@pytest.mark.parametrize(
    ("stored", "active", "penalty", "with_depth", "lengths"),
    [
        (3, 3, 0.0, True, False),
        (2, 1, 0.1, False, False),
        (0, 0, 0.0, False, True),
        (1, 1, 0.0, True, True),
    ],
)
def test_a_training_step_without_autograd(
    stored: int, active: int, penalty: float, with_depth: bool, lengths: bool
) -> None:
    # Some 200 in a wide ball: several are out of sight, in every warp, and the last warp is not full.
    scene = oracles.make_scene(degree=stored, num_gaussians=203, seed=60, size=(0.02, 0.2))
    scene["means"] = 2.5 * scene["means"]
    values, truths = _training_step(scene, active, penalty, with_depth, lengths)
    # Adam divides by the root of v: where a gradient is nearly zero its rounding shows. Measured at most 2.3e-6.
    oracles.assert_gradients_close(values, truths, 1e-5)


def test_a_launch_is_checked_against_the_source() -> None:
    with pytest.raises(AssertionError, match="takes 4 arguments"):
        emulation.launch("finish_cameras", 1, 32)
