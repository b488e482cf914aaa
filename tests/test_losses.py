"""The training loss by hand numbers and against its definition; the weighted gradient against explicit sums."""

import pytest
import torch
import torch.nn.functional as F

from s2d.losses import novel_view_weight, photometric_loss


def naive_ssim(image, target):
    """Window by window, zero padding: the definition in Wang et al. 2004, in float64. [H, W, 3]"""
    x = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2
    a, b = (F.pad(i.double(), (0, 0, 5, 5, 5, 5)) for i in (image, target))
    height, width, _ = image.shape
    values = []
    for row in range(height):
        for column in range(width):
            for channel in range(3):
                p = a[row : row + 11, column : column + 11, channel]
                q = b[row : row + 11, column : column + 11, channel]
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p = (window * p * p).sum() - mean_p**2
                var_q = (window * q * q).sum() - mean_q**2
                covariance = (window * p * q).sum() - mean_p * mean_q
                values.append(
                    ((2 * mean_p * mean_q + 1e-4) * (2 * covariance + 9e-4))
                    / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4))
                )
    return torch.stack(values).mean()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(9, 13, 3, generator=generator), torch.rand(9, 13, 3, generator=generator)


def test_equal_images_cost_nothing(images):
    assert float(photometric_loss(images[0], images[0])) == pytest.approx(0.0, abs=1e-6)


def test_l1_by_hand():
    rendered, target = torch.full((12, 12, 3), 0.25), torch.full((12, 12, 3), 0.75)
    assert float(photometric_loss(rendered, target, ssim_weight=0.0)) == pytest.approx(0.5)


def test_mixture_of_l1_and_ssim_matches_the_definition(images):
    rendered, target = images
    expected = 0.8 * (rendered - target).abs().double().mean() + 0.2 * (
        1 - naive_ssim(rendered, target)
    )
    # Measured difference 3e-8: float32 against float64.
    assert float(photometric_loss(rendered, target)) == pytest.approx(float(expected), abs=1e-6)


def test_shape_mismatch_raises(images):
    with pytest.raises(ValueError, match=r"target must be \[H, W, 3\] with H=9"):
        photometric_loss(images[0], images[1].transpose(0, 1))
    with pytest.raises(ValueError, match="gradient_weight must be"):
        photometric_loss(*images, gradient_weight=torch.ones(9, 13))


def test_novel_view_weight_by_hand():
    mask = torch.tensor([[[0.0], [1.0], [0.5]]])
    assert novel_view_weight(mask, 0.4).flatten().tolist() == pytest.approx([0.4, 1.0, 0.7])
    assert torch.equal(novel_view_weight(mask, 1.0), torch.ones_like(mask))


def test_weighted_gradient_is_the_pixelwise_product_and_keeps_the_loss(images):
    rendered, target = images
    mask = (torch.arange(13) < 6).float()[None, :, None].expand(9, 13, 1)
    weight = novel_view_weight(mask, 0.4)

    # An image that depends on parameters through a known Jacobian: rgb = basis @ parameters.
    generator = torch.Generator().manual_seed(4)
    basis = torch.randn(9 * 13 * 3, 5, generator=generator) * 0.01
    parameters = torch.randn(5, generator=generator, requires_grad=True)

    def image():
        return rendered + (basis @ parameters).view(9, 13, 3)

    plain = photometric_loss(image(), target)
    rgb = image().detach().requires_grad_(True)
    (grad_rgb,) = torch.autograd.grad(photometric_loss(rgb, target), rgb)
    explicit = basis.T @ (grad_rgb * weight).flatten()

    weighted = photometric_loss(image(), target, gradient_weight=weight)
    weighted.backward()
    assert float(weighted.detach()) == float(plain.detach())
    # The same sum in another order: measured relative error 2e-7.
    assert torch.allclose(parameters.grad, explicit, rtol=1e-5, atol=1e-9)
    assert not torch.allclose(parameters.grad, basis.T @ grad_rgb.flatten(), rtol=1e-2)


def test_weight_one_changes_nothing(images):
    rgb = images[0].clone().requires_grad_(True)
    photometric_loss(rgb, images[1], gradient_weight=torch.ones(9, 13, 1)).backward()
    same = images[0].clone().requires_grad_(True)
    photometric_loss(same, images[1]).backward()
    assert torch.equal(rgb.grad, same.grad)
