"""SSIM: a naive window loop in float64, torch's convolutions with autograd, finite differences, invariances."""

import math

import native_build
import numpy as np
import oracles
import pytest
import torch
from fused_ssim import fused_ssim, ssim_map
from torch import Tensor

pytestmark = pytest.mark.usefixtures("every_device")


def _images(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A smooth picture and a noisy copy, in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(*shape[:2], 3, 3, generator=g)
    truth = torch.nn.functional.interpolate(coarse, size=shape[2:], mode="bicubic").clamp(0, 1)
    image = (truth + 0.1 * torch.randn(*shape, generator=g)).clamp(0, 1)
    return image, truth


def _ssim_by_loop(x: np.ndarray, y: np.ndarray, padding: str) -> np.ndarray:
    """Straight from the paper: weighted means, variances and covariance of each 11 x 11 window."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    if padding == "same":
        x, y = np.pad(x, 5), np.pad(y, 5)
    out = np.empty((x.shape[0] - 10, x.shape[1] - 10))
    for i, j in np.ndindex(*out.shape):
        a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        cov = (window * (a - mean_a) * (b - mean_b)).sum()
        out[i, j] = ((2 * mean_a * mean_b + 0.01**2) * (2 * cov + 0.03**2)) / (
            (mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)
        )
    return out


def _ssim_by_conv(x: Tensor, y: Tensor, padding: str) -> Tensor:
    kernel = torch.exp(-((torch.arange(11, dtype=x.dtype) - 5) ** 2) / (2 * 1.5**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    kernel = kernel.expand(x.shape[1], 1, 11, 11)

    def blur(image: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(
            image, kernel, padding=5 if padding == "same" else 0, groups=x.shape[1]
        )

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_equals_the_window_loop(padding: str) -> None:
    image, truth = _images(1, 2, 19, 26)
    loops = [
        _ssim_by_loop(image[0, c].double().numpy(), truth[0, c].double().numpy(), padding)
        for c in range(2)
    ]
    values = ssim_map(image, truth, padding)[0].numpy()
    # float32 variances as differences of means of squares, next to C2 = 9e-4: measured 9e-6.
    np.testing.assert_allclose(values, np.stack(loops), atol=3e-5)
    mean = fused_ssim(image, truth, padding).item()
    assert mean == pytest.approx(np.mean(loops), abs=1e-6)  # measured 6e-8


@pytest.mark.parametrize("shape", [(1, 1, 11, 11), (2, 3, 45, 70), (1, 3, 33, 16), (3, 1, 64, 13)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_gradients_equal_autograd(shape: tuple[int, ...], padding: str) -> None:
    """Widths around the lanes and heights around the strips of the kernel."""
    image, truth = _images(*shape)
    ours, theirs = image.clone().requires_grad_(), image.double().requires_grad_()
    fused_ssim(ours, truth, padding).backward()
    _ssim_by_conv(theirs, truth.double(), padding).mean().backward()
    # Measured relative L2 up to 6e-6 (float32 variances again).
    assert oracles.relative_l2(ours.grad, theirs.grad) < 5e-5
    assert oracles.cosine(ours.grad, theirs.grad) > 0.999999

    ours.grad, theirs.grad = None, None
    values, truths = ssim_map(ours, truth, padding), _ssim_by_conv(theirs, truth.double(), padding)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    (weights * values).sum().backward()
    (weights * truths).sum().backward()
    assert oracles.relative_l2(ours.grad, theirs.grad) < 5e-5
    assert oracles.cosine(ours.grad, theirs.grad) > 0.999999


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_gradients_equal_finite_differences(padding: str) -> None:
    """Central differences of the kernel itself along random directions; step 1e-3 balances float32 noise and curvature."""
    image, truth = _images(1, 3, 24, 31, seed=4)
    leaf = image.clone().requires_grad_()
    fused_ssim(leaf, truth, padding).backward()
    g = torch.Generator().manual_seed(5)
    numeric, analytic = [], []
    for _ in range(20):
        direction = torch.randn(image.shape, generator=g) * (
            torch.rand(image.shape, generator=g) < 0.05
        )
        ahead, behind = (
            ssim_map(image + step * direction, truth, padding).double().mean()
            for step in (1e-3, -1e-3)
        )
        numeric.append((ahead - behind) / 2e-3)
        analytic.append((leaf.grad * direction).double().sum())
    numeric, analytic = torch.stack(numeric), torch.stack(analytic)
    assert (
        oracles.relative_l2(analytic, numeric) < 6e-3
    )  # measured 1.5e-3, float32 noise over the step
    assert oracles.cosine(analytic, numeric) > 0.9999


def test_equal_images_score_one_with_no_gradient() -> None:
    image = _images(1, 3, 30, 40)[0].requires_grad_()
    score = fused_ssim(image, image.detach().clone())
    score.backward()
    assert score.item() == pytest.approx(1, abs=1e-6)
    assert image.grad.abs().max() < 1e-7  # 1/3600 of a pixel's own gradient, which cancels


def test_symmetric_in_its_images_and_in_the_axes() -> None:
    image, truth = _images(2, 3, 37, 52)
    score = fused_ssim(image, truth).item()
    assert fused_ssim(truth, image).item() == pytest.approx(score, abs=1e-6)
    assert fused_ssim(image.flip(-1), truth.flip(-1)).item() == pytest.approx(score, abs=1e-6)
    assert fused_ssim(image.mT, truth.mT).item() == pytest.approx(score, abs=1e-6)


def test_same_bits_at_any_number_of_threads() -> None:
    image, truth = _images(1, 3, 150, 101)
    before = native_build.num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            native_build.set_num_threads(threads)
            leaf = image.clone().requires_grad_()
            score = fused_ssim(leaf, truth)
            score.backward()
            results.append((score.detach(), leaf.grad))
    finally:
        native_build.set_num_threads(before)
    for score, grad in results[1:]:
        assert torch.equal(score, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_strided_and_expanded_images() -> None:
    """A renderer hands over [H, W, 3] viewed as [1, 3, H, W]; the gradient comes back in that layout's values."""
    image, truth = _images(1, 3, 20, 30)
    leaf = image[0].permute(1, 2, 0).contiguous().requires_grad_()
    fused_ssim(leaf.permute(2, 0, 1)[None], truth).backward()
    plain = image.clone().requires_grad_()
    fused_ssim(plain, truth).backward()
    assert torch.equal(leaf.grad.permute(2, 0, 1), plain.grad[0])


def test_without_training_there_is_no_backward() -> None:
    image, truth = _images(1, 3, 20, 30)
    score = fused_ssim(image.requires_grad_(), truth, train=False)
    assert score.item() == fused_ssim(image, truth).item()
    with pytest.raises(ValueError, match="Pass train=True"):
        score.backward()


@pytest.mark.parametrize(
    ("shapes", "padding", "message"),
    [
        (((1, 3, 20, 20), (1, 3, 20, 21)), "same", "of equal shape"),
        (((3, 20, 20), (3, 20, 20)), "same", r"must be \[B, C, H, W\]"),
        (((1, 3, 10, 20), (1, 3, 10, 20)), "valid", "at least 11 x 11"),
        (((1, 0, 20, 20), (1, 0, 20, 20)), "same", "no pixel to compare"),
        (((1, 3, 20, 20), (1, 3, 20, 20)), "reflect", "got 'reflect'"),
    ],
)
def test_bad_arguments_are_named(shapes: tuple, padding: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_ssim(torch.zeros(shapes[0]), torch.zeros(shapes[1]), padding)


def test_one_pixel_image() -> None:
    """The window sees one pixel and 120 zeros. Closed form with w0 = the window's centre."""
    x, y = 0.6, 0.2
    w0 = (1 / sum(math.exp(-(i**2) / 4.5) for i in range(-5, 6))) ** 2
    mx, my = w0 * x, w0 * y
    a, b = 2 * mx * my + 1e-4, 2 * (w0 * x * y - mx * my) + 9e-4
    c, d = mx**2 + my**2 + 1e-4, w0 * (x * x + y * y) - mx**2 - my**2 + 9e-4
    score = fused_ssim(torch.full((1, 1, 1, 1), x), torch.full((1, 1, 1, 1), y))
    assert score.item() == pytest.approx(a * b / (c * d), rel=1e-5)
