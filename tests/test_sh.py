"""Orthonormality by quadrature, SciPy's spherical harmonics, behaviour under rotation, and the colour round trip."""

import math

import numpy as np
import pytest
import torch
from scipy.special import sph_harm_y

from s2d.sh import eval_sh, rgb_to_sh0, sh0_to_rgb, sh_basis


def test_orthonormal_over_the_sphere():
    """Gauss-Legendre in z times even angles integrates polynomials of degree 6 exactly."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    angles = np.arange(16) / 16 * 2 * math.pi
    z, angle = np.meshgrid(nodes, angles, indexing="ij")
    r = np.sqrt(1 - z**2)
    directions = torch.from_numpy(np.stack([r * np.cos(angle), r * np.sin(angle), z], -1))
    weight = torch.from_numpy(np.broadcast_to(weights[:, None] * 2 * math.pi / 16, z.shape).copy())
    basis = sh_basis(directions, 3)
    gram = torch.einsum("abi,abj,ab->ij", basis, basis, weight)
    assert torch.allclose(gram, torch.eye(16, dtype=torch.float64), atol=1e-12)  # measured 1e-15


def test_each_function_is_scipys_real_harmonic_in_the_3dgs_order(generator):
    d = torch.nn.functional.normalize(
        torch.randn(50, 3, generator=generator, dtype=torch.float64), dim=-1
    )
    theta, phi = torch.acos(d[:, 2]).numpy(), torch.atan2(d[:, 1], d[:, 0]).numpy()
    basis = sh_basis(d, 3).numpy()
    column = 0
    for degree in range(4):
        for order in range(-degree, degree + 1):
            # SciPy's complex harmonics carry the Condon-Shortley sign, and so do 3DGS's real ones.
            complex_value = sph_harm_y(degree, abs(order), theta, phi)
            real = complex_value.real if order >= 0 else complex_value.imag
            expected = real * (math.sqrt(2) if order else 1)
            np.testing.assert_allclose(basis[:, column], expected, atol=1e-12)
            column += 1


def test_degree_one_turns_with_the_direction(generator):
    """The three functions of degree 1 are -c (y, -z, x): linear in the direction."""
    d = torch.nn.functional.normalize(torch.randn(10, 3, generator=generator), dim=-1)
    c = math.sqrt(3 / (4 * math.pi))
    assert torch.allclose(sh_basis(d, 1)[:, 1:], c * torch.stack([-d[:, 1], d[:, 2], -d[:, 0]], -1))


def test_length_of_the_direction_does_not_matter(generator):
    d = torch.randn(10, 3, generator=generator)
    assert torch.allclose(sh_basis(d, 3), sh_basis(7 * d, 3), atol=1e-6)


def test_rgb_round_trip_and_constant_colour(generator):
    rgbs = torch.rand(20, 3, generator=generator)
    assert torch.allclose(sh0_to_rgb(rgb_to_sh0(rgbs)), rgbs, atol=1e-6)
    seen = eval_sh(rgb_to_sh0(rgbs)[:, None], torch.randn(20, 3, generator=generator))
    assert torch.allclose(seen, rgbs, atol=1e-6)


def test_lower_degrees_are_the_first_columns(generator):
    d = torch.randn(5, 3, generator=generator)
    for degree in range(3):
        assert torch.equal(sh_basis(d, degree), sh_basis(d, 3)[:, : (degree + 1) ** 2])


def test_wrong_degree_and_wrong_count():
    with pytest.raises(ValueError, match="degree must be 0, 1, 2 or 3, got 4"):
        sh_basis(torch.ones(1, 3), 4)
    with pytest.raises(ValueError, match="K must be 1, 4, 9 or 16, got 5"):
        eval_sh(torch.zeros(1, 5, 3), torch.ones(1, 3))
