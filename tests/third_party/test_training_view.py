"""TrainingView: the same bits as autograd and SparseGaussianAdam, and right by the float64 twin and Adam's formula."""

import pytest
import torch
from diff_gaussian_rasterization import (
    SparseGaussianAdam,
    TrainingView,
    rasterize_gaussians_raw,
    set_num_threads,
)
from diff_gaussian_rasterization.reference import rasterize_reference

WIDTH, HEIGHT, N = 50, 38, 700  # more than two chunks of Gaussians, no whole number of vectors
RATES = {
    "means": 1e-3,
    "log_scales": 5e-3,
    "quats": 1e-3,
    "opacity_logits": 0.02,
    "sh0": 3e-3,
    "shN": 1e-3,
}
EPS = 1e-15
K = torch.tensor([[45.0, 0, 24], [0, 46, 19], [0, 0, 1]])


def scene(num=N, seed=0, coefficients=9):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    return {
        "means": normal(num, 3) * torch.tensor([1.2, 0.9, 0.4]) + torch.tensor([0.0, 0.0, 3.0]),
        "log_scales": -2.5 + 0.4 * normal(num, 3),
        "quats": normal(num, 4),
        "opacity_logits": normal(num),
        "sh0": normal(num, 1, 3),
        "shN": 0.2 * normal(num, coefficients - 1, 3),
    }


def viewmat(step):
    """Cameras that look past a part of the Gaussians, another in each step."""
    out = torch.eye(4)
    angle = torch.tensor(0.25 * (step - 1))
    out[0, 0] = out[2, 2] = angle.cos()
    out[0, 2], out[2, 0] = angle.sin(), -angle.sin()
    return out


def optimizer_of(tensors, bias_correction=True):
    groups = [{"name": name, "lr": RATES[name], "params": [t]} for name, t in tensors.items()]
    return SparseGaussianAdam(groups, lr=0.0, eps=EPS, bias_correction=bias_correction)


def leaves(tensors):
    return {name: t.clone().requires_grad_(True) for name, t in tensors.items()}


def loss_of(rgb, alpha, depth, step):
    """Uses all three images, with weights of its own for every pixel."""
    g = torch.Generator().manual_seed(100 + step)
    weights = torch.randn(HEIGHT, WIDTH, 5, generator=g).to(rgb)
    images = torch.cat([rgb, alpha, depth], dim=-1)
    return (images * weights).mean() + images.square().mean()


def drawn_opacity(logits):
    """Opacity logits that are another function of each Gaussian's own, and its derivative; every third is too faint to be drawn."""
    rows = torch.arange(len(logits), device=logits.device)
    slope = (0.5 + rows % 7 / 5) * (rows % 3 != 0)
    return torch.where(rows % 3 != 0, slope * logits + 0.25, torch.full_like(logits, -20.0)), slope


def fused_steps(tensors, num_steps, penalty=0.0, degree=2, bias_correction=True, draw=None):
    """Return (parameters, optimiser, grad_sum, num_views) after some steps; `draw`: own logits -> what is drawn."""
    params = leaves(tensors)
    optimizer = optimizer_of(params, bias_correction)
    sums = torch.zeros(2, len(params["means"]))
    for step in range(num_steps):
        drawn = None if draw is None else draw(params["opacity_logits"].detach())
        camera = (viewmat(step), K, WIDTH, HEIGHT)
        view = TrainingView(params, *camera, sh_degree=degree, drawn_opacity=drawn)
        loss_of(view.rgb, view.alpha, view.depth, step).backward()
        view.update(optimizer, opacity_penalty=penalty, statistics=(sums[0], sums[1]))
    return params, optimizer, *sums


def autograd_steps(tensors, num_steps, penalty=0.0, degree=2, bias_correction=True, draw=None):
    """The same with autograd through the Gaussians."""
    params = leaves(tensors)
    optimizer = optimizer_of(params, bias_correction)
    num = len(params["means"])
    sums = torch.zeros(2, num)
    for step in range(num_steps):
        probe = torch.zeros(1, num, 2, requires_grad=True)
        camera = (viewmat(step)[None], K[None], WIDTH, HEIGHT)
        shown = dict(params)
        if draw is not None:
            shown["opacity_logits"] = draw(params["opacity_logits"])[0]
        out = rasterize_gaussians_raw(
            *shown.values(), *camera, sh_degree=degree, means2d_probe=probe
        )
        loss = loss_of(out.rgb[0], out.alpha[0], out.depth[0], step)
        if penalty:
            loss = loss + penalty * torch.sigmoid(params["opacity_logits"]).mean()
        loss.backward()
        seen = out.radii[0] > 0
        half_size = torch.tensor([0.5 * WIDTH, 0.5 * HEIGHT])
        sums[0] += (probe.grad[0] * half_size).norm(dim=-1) * seen
        sums[1] += seen
        optimizer.step(None if penalty else out.radii[0])
        optimizer.zero_grad()
    return params, optimizer, *sums


@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_the_same_bits_as_autograd_and_the_optimiser(degree, bias_correction):
    start = scene()
    options = {"degree": degree, "bias_correction": bias_correction}
    params, optimizer, grad_sum, num_views = fused_steps(start, 4, **options)
    expected, expected_optimizer, expected_sum, expected_views = autograd_steps(start, 4, **options)
    for name in RATES:
        assert torch.equal(params[name], expected[name]), name
        state = optimizer.state[params[name]]
        expected_state = expected_optimizer.state[expected[name]]
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(state[key], expected_state[key]), f"{key} of {name}"
    assert torch.equal(num_views, expected_views)
    assert 0 < int((num_views == 0).sum()) < N, "some are seen by no view, or the test shows little"
    # The norm of two numbers, rounded once more or less: measured 1.8e-7.
    assert torch.allclose(grad_sum, expected_sum, rtol=1e-6, atol=1e-12)


def test_opacity_penalty_moves_what_no_view_sees():
    start = scene()
    params, *_ = fused_steps(start, 3, penalty=0.5)
    expected, *_, num_views = autograd_steps(start, 3, penalty=0.5)
    unseen = num_views == 0
    assert bool((params["opacity_logits"][unseen] < start["opacity_logits"][unseen]).all())
    for name in RATES:
        # The sigmoid's derivative, rounded once more or less: measured 9e-8 of the way moved in opacity_logits, 0 elsewhere.
        moved = (expected[name] - start[name]).detach().norm()
        assert float((params[name] - expected[name]).detach().norm() / moved) < 1e-6, name


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_gradients_go_on_to_the_parameters_of_drawn_opacities(penalty):
    start = scene()
    params, _, grad_sum, num_views = fused_steps(start, 3, penalty, draw=drawn_opacity)
    expected, _, expected_sum, expected_views = autograd_steps(
        start, 3, penalty, draw=drawn_opacity
    )
    assert torch.equal(num_views, expected_views)
    assert not bool(num_views[::3].any()), "what is too faint is not seen"
    assert torch.allclose(grad_sum, expected_sum, rtol=1e-6, atol=1e-12)  # as above
    for name in RATES:
        if penalty == 0:
            assert torch.equal(params[name], expected[name]), name
            assert torch.equal(params[name][::3], start[name][::3]), name
            continue
        # As above: the penalty is one of the parameters' own opacities. Measured 1.2e-7 of the way moved in opacity_logits, 0 elsewhere.
        moved = (expected[name] - start[name]).detach().norm()
        error = float((params[name] - expected[name]).detach().norm() / moved)
        assert error < 1e-6, name
    if penalty:
        assert bool((params["opacity_logits"][::3] < start["opacity_logits"][::3]).all())


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_drawing_the_parameters_own_opacities_changes_no_bit(penalty):
    params, _, *sums = fused_steps(
        scene(), 3, penalty, draw=lambda logits: (logits.clone(), torch.ones_like(logits))
    )
    expected, _, *expected_sums = fused_steps(scene(), 3, penalty)
    assert all(map(torch.equal, [*params.values(), *sums], [*expected.values(), *expected_sums]))


def test_a_slope_that_is_not_a_number_moves_nothing():
    start = scene()

    def draw(logits):
        return logits.clone(), torch.full_like(logits, torch.nan)

    params, *_ = fused_steps(start, 1, draw=draw)
    assert torch.equal(params["opacity_logits"], start["opacity_logits"])
    assert not torch.equal(params["means"], start["means"])


def test_one_step_is_adams_formula_on_the_float64_twins_gradient():
    start = scene(num=120)
    params, *_ = fused_steps(start, 1, bias_correction=False)
    twin = {name: t.double().requires_grad_(True) for name, t in start.items()}
    out = rasterize_reference(
        *twin.values(), viewmat(0)[None].double(), K[None].double(), WIDTH, HEIGHT, sh_degree=2
    )
    loss_of(out.rgb[0], out.alpha[0], out.depth[0], 0).backward()
    seen = out.radii[0] > 0
    assert 0 < int(seen.sum()) < 120
    for name, tensor in twin.items():
        gradient = tensor.grad
        # From zero moments: m = 0.1 g, v = 0.001 g². The sign of a gradient that is all rounding tells nothing.
        certain = gradient.abs() > 1e-4 * gradient.abs().max()
        step = RATES[name] * 0.1 * gradient / ((0.001 * gradient.square()).sqrt() + EPS)
        moved = (start[name].double() - params[name].detach().double())[seen]
        wanted, certain = step[seen], certain[seen]
        # Float32 positions near 3 hold a move of 3e-3 to 1e-4 of it; measured 3e-5.
        assert torch.allclose(moved[certain], wanted[certain], rtol=2e-4), name
        assert torch.equal(params[name].detach()[~seen], start[name][~seen])


def test_the_same_bits_at_any_thread_count():
    outcomes = []
    try:
        for threads in (1, 2, 5):
            set_num_threads(threads)
            params, _, *sums = fused_steps(scene(), 3)
            outcomes.append([*params.values(), *sums])
    finally:
        set_num_threads(None)
    for outcome in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], outcome))


def test_a_scene_without_view_dependence_and_an_empty_one():
    flat = scene(coefficients=1)
    params, *_ = fused_steps(flat, 2, degree=0)
    expected, *_ = autograd_steps(flat, 2, degree=0)
    assert all(torch.equal(params[name], expected[name]) for name in RATES)
    fused_steps(scene(num=0), 1)


def test_wrong_use_is_told():
    params = leaves(scene(num=20))
    optimizer = optimizer_of(params)

    def view():
        return TrainingView(params, viewmat(0), K, WIDTH, HEIGHT)

    with pytest.raises(ValueError, match=r"Call backward\(\)"):
        view().update(optimizer)
    used = view()
    used.rgb.sum().backward()
    with pytest.raises(ValueError, match=r"grad_sum must be \[20\]"):
        used.update(optimizer, statistics=(torch.zeros(3), torch.zeros(20)))
    others = optimizer_of(leaves(scene(num=20)))
    with pytest.raises(ValueError, match="optimiser of exactly the 6 tensors"):
        used.update(others)
    used.update(optimizer)
    with pytest.raises(ValueError, match="Render a new one"):
        used.update(optimizer)
    with pytest.raises(ValueError, match="parameters has no shN"):
        TrainingView({k: v for k, v in params.items() if k != "shN"}, viewmat(0), K, WIDTH, HEIGHT)
    for pair, words in (
        ((torch.zeros(3), torch.zeros(20)), r"drawn logits must be \[20\], got \[3\]"),
        ((torch.zeros(20), torch.zeros(20).double()), "opacity slope must be float32"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainingView(params, viewmat(0), K, WIDTH, HEIGHT, drawn_opacity=pair)
    strided = {**params, "means": torch.zeros(3, 20).T}
    with pytest.raises(ValueError, match="means must be contiguous"):
        TrainingView(strided, viewmat(0), K, WIDTH, HEIGHT)
