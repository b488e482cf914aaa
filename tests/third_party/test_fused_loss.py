"""The fused L1 + SSIM loss: float64 autograd, finite differences, invariances, other instruction sets, bad pixels."""

import platform

import native_build
import oracles
import pytest
import torch
from fused_ssim import _native, fused_ssim, photometric_loss
from native_build import compilers
from torch import Tensor

pytestmark = pytest.mark.usefixtures("every_device")

# Around the window, the vectors' lanes, the kernel's steps of rows, and two tiles of columns.
SIZES = [(1, 1), (1, 7), (7, 1), (5, 4), (11, 11), (33, 16), (37, 65), (101, 83), (18, 700)]


def _images(height: int, width: int, seed: int = 0, channels: int = 3) -> tuple[Tensor, Tensor]:
    """A picture and a noisy copy that overshoots [0, 1]. [H, W, 3]"""
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(height, width, channels, generator=g)
    return target + 0.1 * torch.randn(target.shape, generator=g), target


def _twin(rendered: Tensor, target: Tensor, ssim_weight: float) -> Tensor:
    """The definition, in float64, with torch's convolution."""
    x, y = (image.double().permute(2, 0, 1)[:, None] for image in (rendered, target))
    window = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(window, window)[None, None] / window.sum() ** 2

    def blur(image: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(image, window, padding=5)

    mx, my = blur(x), blur(y)
    variances, covariance = blur(x * x + y * y) - mx**2 - my**2, blur(x * y) - mx * my
    luminance = (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
    ssim = (luminance * (2 * covariance + 9e-4) / (variances + 9e-4)).mean()
    return (1 - ssim_weight) * (x - y).abs().mean() + ssim_weight * (1 - ssim)


def _value_and_gradient(
    rendered: Tensor, target: Tensor, *args: float | Tensor
) -> tuple[Tensor, Tensor]:
    leaf = rendered.clone().requires_grad_()
    value = photometric_loss(leaf, target, *args)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("ssim_weight", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_equals_the_float64_definition(height: int, width: int, ssim_weight: float) -> None:
    rendered, target = _images(height, width)
    value, gradient = _value_and_gradient(rendered, target, ssim_weight)
    leaf = rendered.double().requires_grad_()
    expected = _twin(leaf, target, ssim_weight)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=3e-7)  # measured 9e-8
    assert oracles.relative_l2(gradient, leaf.grad) < 5e-6  # measured 6e-7
    assert oracles.cosine(gradient, leaf.grad) > 0.999999


def test_equals_the_parts() -> None:
    """Torch's L1 and the drop-in SSIM, combined by autograd."""
    rendered, target = _images(61, 47)
    value, gradient = _value_and_gradient(rendered, target, 0.3)
    leaf = rendered.clone().requires_grad_()
    planes = [image.permute(2, 0, 1)[None] for image in (leaf, target)]
    parts = 0.7 * (leaf - target).abs().mean() + 0.3 * (1 - fused_ssim(*planes))
    parts.backward()
    assert value.item() == pytest.approx(parts.item(), abs=3e-7)  # measured 1.5e-8
    assert oracles.relative_l2(gradient, leaf.grad) < 1e-6  # measured 3e-8


def test_gradient_equals_finite_differences() -> None:
    """Along directions that change many pixels at once, so that the float32 value has digits to spare; off the kink of L1."""
    rendered, target = _images(24, 31, seed=4)
    rendered = torch.where((rendered - target).abs() < 0.02, target + 0.03, rendered)
    _, gradient = _value_and_gradient(rendered, target)
    g = torch.Generator().manual_seed(5)
    numeric, analytic = [], []
    for _ in range(10):
        chosen = torch.rand(rendered.shape, generator=g) < 0.3
        direction = gradient.sign() * chosen
        ahead, behind = (
            photometric_loss(rendered + step * direction, target).double() for step in (5e-3, -5e-3)
        )
        numeric.append((ahead - behind) / 1e-2)
        analytic.append((gradient * direction).double().sum())
    numeric, analytic = torch.stack(numeric), torch.stack(analytic)
    assert oracles.relative_l2(analytic, numeric) < 1e-4  # measured 1.4e-5
    assert oracles.cosine(analytic, numeric) > 0.99999


def test_gradient_weight_scales_pixels_and_keeps_the_value() -> None:
    rendered, target = _images(40, 29)
    weight = torch.rand(40, 29, 1, generator=torch.Generator().manual_seed(1))
    value, gradient = _value_and_gradient(rendered, target)
    weighted_value, weighted = _value_and_gradient(rendered, target, 0.2, weight)
    assert torch.equal(value, weighted_value)
    assert torch.equal(weighted, gradient * weight)


def test_upstream_gradient_scales() -> None:
    rendered, target = _images(20, 30)
    _, gradient = _value_and_gradient(rendered, target)
    leaf = rendered.clone().requires_grad_()
    (-3 * photometric_loss(leaf, target)).backward()
    # The same bits on a CPU; on a GPU the factor goes in before the last rounding, measured 6e-8.
    assert oracles.relative_l2(leaf.grad, -3 * gradient) < 1e-6


def test_mirroring_and_turning_move_the_gradient_along() -> None:
    rendered, target = _images(37, 52)
    value, gradient = _value_and_gradient(rendered, target)
    for move in (lambda i: i.flip(0), lambda i: i.flip(1), lambda i: i.transpose(0, 1)):
        moved_value, moved = _value_and_gradient(move(rendered), move(target))
        assert moved_value.item() == pytest.approx(value.item(), abs=1e-7)  # measured 0
        assert oracles.relative_l2(moved, move(gradient)) < 1e-6  # measured 1.8e-7


def test_equal_images_have_no_loss_and_no_gradient() -> None:
    value, gradient = _value_and_gradient(*[_images(30, 40)[1]] * 2)
    assert abs(value.item()) < 1e-7
    assert gradient.abs().max() < 1e-8  # of 2e-4, what L1 gives a pixel


def test_same_bits_at_any_number_of_threads() -> None:
    rendered, target = _images(301, 701)
    results = []
    before = native_build.num_threads()
    try:
        for threads in (1, 2, 3, 7):
            native_build.set_num_threads(threads)
            results.append(_value_and_gradient(rendered, target))
    finally:
        native_build.set_num_threads(before)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])
    without_gradient = photometric_loss(rendered, target)
    assert torch.equal(without_gradient, results[0][0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ssim_weight", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("pixel", [(0, 0), (44, 699), (20, 345)])
def test_a_bad_pixel_makes_the_loss_bad(pixel, ssim_weight: float, bad: float) -> None:
    """Training finds ruined photos and parameters by the loss alone."""
    for which in range(2):
        images = [image.clone() for image in _images(45, 700)]
        images[which][(*pixel, 1)] = bad
        assert not torch.isfinite(photometric_loss(*images, ssim_weight))


def test_any_number_of_channels_and_any_strides() -> None:
    for channels in (1, 2, 4):
        rendered, target = _images(23, 38, channels=channels)
        value, gradient = _value_and_gradient(rendered, target)
        leaf = rendered.permute(2, 1, 0).contiguous().requires_grad_()
        strided = photometric_loss(leaf.permute(2, 1, 0), target)
        strided.backward()
        assert torch.equal(strided.detach(), value)
        assert torch.equal(leaf.grad.permute(2, 1, 0), gradient)
        assert value.item() == pytest.approx(_twin(rendered, target, 0.2).item(), abs=3e-7)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 5, 3), (5, 4, 3)), "of equal shape"),
        (((1, 3, 4, 5), (1, 3, 4, 5)), r"must be \[H, W, 3\]"),
        (((0, 5, 3), (0, 5, 3)), "not empty"),
        (((4, 5, 3), (4, 5, 3), (4, 5)), r"gradient_weight must be \[4, 5, 1\] \(from rendered\)"),
    ],
)
def test_bad_arguments_are_named(shapes: tuple, message: str) -> None:
    rendered, target, *weight = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        photometric_loss(rendered, target, 0.2, *weight)


# name: (flags, compiler, lanes)
BUILDS = {
    "SSE2": (("-march=x86-64",), "system", 4),
    "AVX2": (("-march=x86-64-v3",), "system", 8),
    "ziglang": ((), "zig", None),
}


@pytest.mark.parametrize("name", BUILDS)
def test_other_instruction_sets_agree(name: str, monkeypatch) -> None:
    flags, compiler, lanes = BUILDS[name]
    if compiler == "system" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the flags are for x86-64")
    monkeypatch.setenv("S2D_COMPILER", compiler)
    if not list(compilers.candidates([])):
        pytest.skip(f"no {compiler} compiler here")
    images = [_images(height, width) for height, width in SIZES]
    here = [_value_and_gradient(*pair) for pair in images]
    library = _native.load_library(flags)
    assert lanes is None or library.s2d_lanes() == lanes
    monkeypatch.setattr(_native, "library", lambda: library)
    there = [_value_and_gradient(*pair) for pair in images]
    for (value, gradient), (other_value, other_gradient) in zip(here, there, strict=True):
        assert other_value.item() == pytest.approx(value.item(), abs=1e-7)  # measured 1.5e-8
        assert oracles.relative_l2(other_gradient, gradient) < 1e-6  # measured 1.6e-7
