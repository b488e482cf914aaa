"""Nearest neighbours: hand numbers, scipy's k-d tree, invariances, awkward clouds."""

import math
import time

import native_build
import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from simple_knn import knn
from simple_knn._C import distCUDA2
from torch import Tensor

pytestmark = pytest.mark.usefixtures("every_device")


def _cloud(kind: str, n: int) -> Tensor:
    g = torch.Generator().manual_seed(n)
    points = torch.randn(n, 3, generator=g)
    if kind == "surface":  # flat, as clouds from photos are
        points[:, 2] *= 1e-3
    elif (
        kind == "outliers"
    ):  # sizes over many orders of magnitude: the case that defeats a uniform grid
        points *= torch.exp(3 * torch.randn(n, 1, generator=g))
    elif kind == "duplicates":  # one point in three occurs several times
        points = points[torch.randint(n // 3, (n,), generator=g)]
    elif kind == "line":
        points[:, 1:] = 7.0
    return points


def test_four_points_by_hand() -> None:
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])
    # Squared distances: 0-1: 1, 0-2: 4, 0-3: 9, 1-2: 5, 1-3: 10, 2-3: 13.
    expected = [14 / 3, 16 / 3, 22 / 3, 32 / 3]
    assert distCUDA2(points).tolist() == pytest.approx(expected, rel=1e-6)
    ids, distances2 = knn(points, 2)
    assert ids.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
    assert distances2.tolist() == [[1, 4], [1, 5], [4, 5], [9, 10]]


@pytest.mark.parametrize(
    ("n", "expected"), [(0, []), (1, [0.0]), (2, [4.0, 4.0]), (3, [8.5, 4.5, 9.0])]
)
def test_few_points_use_the_neighbours_there_are(n: int, expected: list[float]) -> None:
    points = torch.tensor([[0.0, 0, 0], [2, 0, 0], [2, 0, 3]])
    if n == 3:  # 0-1: 4, 0-2: 13, 1-2: 9 -> means 8.5, 6.5, 11
        expected = [8.5, 6.5, 11.0]
    assert distCUDA2(points[:n]).tolist() == pytest.approx(expected)
    assert knn(points[:n], 5)[0].shape == (n, max(n - 1, 0))


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("kind", ["ball", "surface", "outliers", "duplicates", "line"])
def test_equals_scipy(kind: str, k: int) -> None:
    points = _cloud(kind, 3000)
    ids, distances2 = knn(points, k)
    exact = points.double().numpy()
    truth = cKDTree(exact).query(exact, k=k + 1)[0][:, 1:] ** 2
    # float32 differences of float32 coordinates: measured 2.4e-7.
    np.testing.assert_allclose(distances2.numpy(), truth, rtol=1e-6, atol=1e-12)
    # The ids are those distances, and are other points, none twice.
    own = ((points[:, None].double() - points[ids].double()) ** 2).sum(-1)
    np.testing.assert_allclose(own.numpy(), truth, rtol=1e-6, atol=1e-12)
    assert not (ids == torch.arange(3000)[:, None]).any()
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()


def test_order_of_points_does_not_matter() -> None:
    points = _cloud("outliers", 5000)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(2))
    assert torch.equal(distCUDA2(points)[order], distCUDA2(points[order]))


def test_same_bits_at_any_number_of_threads() -> None:
    points = _cloud("duplicates", 20_000)
    before = native_build.num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            native_build.set_num_threads(threads)
            results.append(knn(points, 4))
    finally:
        native_build.set_num_threads(before)
    for ids, distances2 in results[1:]:
        assert torch.equal(ids, results[0][0])
        assert torch.equal(distances2, results[0][1])


def test_many_equal_points_are_not_slow() -> None:
    """Ties must not make every query visit every point: that would be 4e10 distances here, minutes instead of 0.1 s."""
    start = time.perf_counter()
    assert not distCUDA2(torch.ones(200_000, 3)).any()
    assert time.perf_counter() - start < 20


def test_coordinates_near_the_float_limit_stay_finite() -> None:
    points = torch.tensor([[3e38, 0, 0], [-3e38, 0, 0], [0, 3e38, 0], [0, 0, 1e-45]])
    assert torch.isfinite(distCUDA2(points)).all()
    assert torch.isfinite(knn(points, 3)[1]).all()


def test_far_from_the_origin() -> None:
    """Differences are taken before squaring: an offset that float32 holds exactly costs nothing."""
    points = torch.randint(0, 1000, (2000, 3), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(distCUDA2(points), distCUDA2(points + 2.0**20))


def test_points_that_are_not_finite_are_counted() -> None:
    points = _cloud("ball", 100)
    points[3, 1], points[50, 0], points[50, 2] = math.nan, math.inf, math.nan
    with pytest.raises(ValueError, match="2 of 100 points have non-finite"):
        distCUDA2(points)


@pytest.mark.parametrize(
    ("points", "k", "message"),
    [
        (torch.zeros(4, 2), 3, r"must be \[N, 3\], got \[4, 2\]"),
        (torch.zeros(4), 3, r"must be \[N, 3\], got \[4\]"),
        (torch.zeros(4, 3), 0, "k must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(points: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn(points, k)
