"""The other CUDA kernels, run by the emulator, against the CPU's: Adam, SSIM with L1, nearest neighbours."""

import emulation
import fused_ssim._native as cpu_ssim
import oracles
import pytest
import torch
from diff_gaussian_rasterization.optimizer import SparseGaussianAdam
from pipeline import blocks
from simple_knn import knn as cpu_knn
from torch import Tensor

LEAF = 16


@pytest.mark.parametrize("visibility", ["all", "radii", "bool"])
@pytest.mark.parametrize("width", [1, 3, 4, 45])
def test_adam(width: int, visibility: str) -> None:
    g = torch.Generator().manual_seed(width)
    n = 61  # 61 * 45 is not a multiple of 4
    param, grad, m = (torch.randn(n, width, generator=g) for _ in range(3))
    v = torch.rand(n, width, generator=g)
    unused = torch.rand(n, width, generator=g) < 0.3  # coefficients of a degree not in use
    for tensor in (grad, m, v):
        tensor[unused] = 0.0
    seen = torch.rand(n, generator=g) < 0.6
    visible = {"all": None, "radii": seen.int() * 7, "bool": seen}[visibility]
    truth = param.clone()
    truth.grad = grad
    optimizer = SparseGaussianAdam([{"params": [truth]}], lr=0.01, eps=1e-15)
    state = {"step": torch.tensor(3.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[truth] = state
    optimizer.step(visible)
    memory = emulation.Memory()
    p, d, new_m, new_v, which = map(memory.copy, (param, grad, m, v, visible))
    beta1, beta2 = 0.9, 0.999
    rates = (0.01, beta1, beta2, 1 - beta1, 1 - beta2, 1e-15)
    size = 1 if visibility == "bool" else 4
    arguments = (n, width, p, d, new_m, new_v, which, size, *rates)
    emulation.launch("adam_rows", blocks(n * width, 1024), 256, *arguments)
    memory.check()
    # The same operations, each rounded once: measured equal to the bit where the CPU has fused multiply-adds.
    for ours, theirs in ((p, truth), (new_m, state["exp_avg"]), (new_v, state["exp_avg_sq"])):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        if visibility != "all":
            before = {id(p): param, id(new_m): m, id(new_v): v}[id(ours)]
            assert torch.equal(ours[~seen], before[~seen])


def _emulated_loss(
    x: Tensor, y: Tensor, *, margin: int = 0, l1: float = 0.0, ssim: float = 1.0, **given
) -> dict[str, Tensor]:
    memory = emulation.Memory()
    planes, height, width, channels = x.shape
    xs, ys, map_gradient, weight, upstream = map(
        memory.copy,
        (x, y, given.get("map_gradient"), given.get("pixel_weight"), given.get("upstream")),
    )
    total = memory.full(1, value=0.0, dtype=torch.float64)
    values, gradient = memory.empty(*x.shape), memory.empty(*x.shape)
    partials = memory.empty(3, *x.shape)
    grid, size = (blocks(width, 32), blocks(height, 32), planes), (height, width, channels)
    backwards = given.get("backwards", False)
    arguments = (*size, margin, l1, ssim, xs, ys, map_gradient, total, values, partials)
    emulation.launch("ssim_forward", grid, 256, *arguments, backwards=backwards)
    factor = given.get("factor", 1.0)
    arguments = (*size, l1, ssim, factor, upstream, xs, ys, weight, partials, gradient)
    emulation.launch("ssim_gradient", grid, 256, *arguments, backwards=backwards)
    memory.check()
    return {"sum": total, "map": values, "gradient": gradient}


@pytest.mark.parametrize("shape", [(1, 33, 47, 3), (2, 20, 70, 1), (1, 5, 4, 2), (1, 1, 1, 3)])
@pytest.mark.parametrize("case", ["loss", "valid", "map"])
def test_ssim(shape: tuple[int, ...], case: str) -> None:
    planes, height, width, channels = shape
    margin = 5 if case == "valid" else 0
    if min(height, width) <= 2 * margin:
        pytest.skip("no pixel to compare")
    g = torch.Generator().manual_seed(height)
    x, y = torch.rand(shape, generator=g), torch.rand(shape, generator=g)
    y[:, ::3] = x[:, ::3]  # where they are equal L1 has no slope
    weight = torch.rand(height, width, 1, generator=g) if case == "loss" and planes == 1 else None
    per_value = torch.randn(shape, generator=g) if case == "map" else None
    l1, ssim = (0.8, -0.2) if case == "loss" else (0.0, 1.0)
    truth = {"map": torch.empty(shape), "gradient": torch.empty(shape)}
    total = cpu_ssim.image_loss(
        x,
        y,
        l1_factor=l1,
        ssim_factor=ssim,
        margin=margin,
        gradient=truth["gradient"],
        gradient_factor=0.5,
        pixel_weight=weight,
        ssim_map=truth["map"],
        map_gradient=per_value,
    )
    ours = _emulated_loss(
        x,
        y,
        margin=margin,
        l1=l1,
        ssim=ssim,
        factor=0.5,
        pixel_weight=weight,
        map_gradient=per_value,
    )
    # Measured 1e-8 of each value of the sum, 1.2e-6 of gradients: other orders of the same sums.
    assert float(ours["sum"]) == pytest.approx(total, abs=1e-7 * planes * height * width * channels)
    for name, value in truth.items():
        assert oracles.relative_l2(ours[name], value) < 2e-6, name


def test_ssim_takes_an_upstream_gradient_and_any_order_of_threads() -> None:
    g = torch.Generator().manual_seed(3)
    x, y = torch.rand(1, 40, 37, 3, generator=g), torch.rand(1, 40, 37, 3, generator=g)
    plain = _emulated_loss(x, y)
    other = _emulated_loss(x, y, upstream=torch.tensor([4.0]), backwards=True)
    assert torch.equal(other["map"], plain["map"])
    assert torch.equal(other["gradient"], 4 * plain["gradient"])


def _emulated_knn(points: Tensor, k: int, backwards: bool = False) -> tuple[Tensor, Tensor]:
    memory = emulation.Memory()
    n = len(points)
    num_leaves = 1
    while num_leaves * LEAF < n:
        num_leaves *= 2
    cloud, low, high = map(memory.copy, (points, points.amin(0), points.amax(0)))
    codes = memory.empty(n, dtype=torch.int64)

    def launch(name: str, grid: int, threads: int, *arguments) -> None:
        emulation.launch(name, grid, threads, *arguments, backwards=backwards)
        memory.check()

    launch("morton_codes", blocks(n, 256), 256, n, cloud, low, high, codes)
    order = memory.copy(codes.sort().indices)
    nearby, boxes = memory.empty(n, 4), memory.empty(2 * num_leaves, 6)
    launch("leaf_boxes", blocks(num_leaves, 256), 256, n, num_leaves, cloud, order, nearby, boxes)
    first = num_leaves // 2
    while first:
        launch("merge_boxes", blocks(first, 256), 256, first, boxes)
        first //= 2
    ids, distances2 = memory.empty(n, k, dtype=torch.int32), memory.empty(n, k)
    launch("search", blocks(n, 128), 128, n, num_leaves, k, nearby, boxes, ids, distances2)
    return ids, distances2


def _cloud(kind: str, n: int) -> Tensor:
    g = torch.Generator().manual_seed(n)
    points = torch.randn(n, 3, generator=g)
    if kind == "surface":
        points[:, 2] *= 1e-3
    elif kind == "outliers":  # many orders of magnitude: most points share a few cells of the order
        points *= torch.exp(3 * torch.randn(n, 1, generator=g))
    elif kind == "duplicates":
        points = points[torch.randint(n // 3, (n,), generator=g)]
    elif kind == "line":
        points[:, 1:] = 7.0
    elif kind == "huge":
        points *= 1e38
    return points


@pytest.mark.parametrize(
    ("kind", "n", "k"),
    [
        ("ball", 1000, 3),
        ("surface", 700, 20),
        ("outliers", 1000, 3),
        ("duplicates", 600, 3),
        ("line", 300, 5),
        ("huge", 100, 3),
        ("ball", 2, 1),
        ("ball", 17, 16),
        ("ball", 16, 15),
    ],
)
def test_nearest_neighbours(kind: str, n: int, k: int) -> None:
    points = _cloud(kind, n)
    ids, distances2 = _emulated_knn(points, k)
    _, truth = cpu_knn(points, k)
    # The same differences of the same numbers: equal but for fused multiply-adds.
    torch.testing.assert_close(distances2, truth, rtol=3e-7, atol=0)
    assert (distances2.diff(dim=1) >= 0).all()
    assert (ids != torch.arange(n)[:, None]).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    if kind != "huge":
        found = (points[ids.long()] - points[:, None]).double().square().sum(-1)
        torch.testing.assert_close(found.float(), distances2, rtol=1e-6, atol=0)


def test_nearest_neighbours_do_not_depend_on_the_order_of_threads() -> None:
    points = _cloud("duplicates", 500)
    for a, b in zip(
        _emulated_knn(points, 4), _emulated_knn(points, 4, backwards=True), strict=True
    ):
        assert torch.equal(a, b)
