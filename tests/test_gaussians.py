"""Gaussians: from points, through files, thinned; the picture of a saved scene is the picture of the scene."""

import math

import pytest
import torch
from torch.nn import Parameter

from s2d.cameras import Cameras
from s2d.gaussians import (
    Checkpoint,
    Gaussians,
    gaussians_from_points,
    load_checkpoint,
    save_checkpoint,
    thin_points,
)
from s2d.rasterize import rasterize
from s2d.sh import sh0_to_rgb


def random_gaussians(num=40, sh_degree=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    return Gaussians(
        means=randn(num, 3) * 0.4 + torch.tensor([0.0, 0.0, 3.0]),
        log_scales=randn(num, 3) * 0.3 - 2.0,
        quats=randn(num, 4) * 2,  # not unit: they are stored raw
        opacity_logits=randn(num),
        sh0=randn(num, 1, 3) * 0.5,
        shN=randn(num, (sh_degree + 1) ** 2 - 1, 3) * 0.1,
    )


def camera():
    K = torch.tensor([[[50.0, 0.0, 31.0], [0.0, 52.0, 20.0], [0.0, 0.0, 1.0]]])
    return Cameras(torch.eye(4)[None], K, ((60, 44),), ("a.png",))


def assert_same(one, other):
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor.detach(), other.tensors()[name]), name


@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
def test_render_of_the_written_ply_is_the_render_of_the_memory(tmp_path, sh_degree):
    gaussians = random_gaussians(sh_degree=sh_degree)
    loaded = Gaussians.load_ply(gaussians.save_ply(tmp_path / "a" / "point_cloud.ply"))
    assert loaded.sh_degree == sh_degree
    assert_same(gaussians, loaded)
    one, other = rasterize(gaussians, camera()), rasterize(loaded, camera())
    assert float(one.alpha.max()) > 0.5  # there is something to see
    assert torch.equal(one.rgb, other.rgb)
    assert torch.equal(one.depth, other.depth)


def test_checkpoint_comes_back_bit_for_bit(tmp_path):
    gaussians = random_gaussians()
    optimizer = torch.optim.Adam([gaussians.means.requires_grad_(True)])
    gaussians.means.grad = torch.ones_like(gaussians.means)
    optimizer.step()
    path = save_checkpoint(
        tmp_path / "chkpnt.pth",
        Checkpoint(gaussians, 4000, 1.5, optimizer.state_dict(), {"history": {"step": [20]}}),
    )
    loaded = load_checkpoint(path)
    assert_same(gaussians, loaded.gaussians)
    assert (loaded.step, loaded.scene_extent) == (4000, 1.5)
    assert torch.equal(
        loaded.optimizer_state["state"][0]["exp_avg"],
        optimizer.state_dict()["state"][0]["exp_avg"],
    )
    assert loaded.run_state == {"history": {"step": [20]}}


def test_checkpoint_of_3dgs_is_read(tmp_path):
    gaussians = random_gaussians(num=5)
    capture = (
        3,
        Parameter(gaussians.means),
        Parameter(gaussians.sh0),
        Parameter(gaussians.shN),
        Parameter(gaussians.log_scales),
        Parameter(gaussians.quats),
        Parameter(gaussians.opacity_logits[:, None]),
        torch.zeros(5),
        torch.zeros(5, 1),
        torch.zeros(5, 1),
        {"state": {}, "param_groups": []},
        2.5,
    )
    torch.save((capture, 4000), tmp_path / "chkpnt4000.pth")
    loaded = load_checkpoint(tmp_path / "chkpnt4000.pth")
    assert_same(gaussians, loaded.gaussians)
    assert (loaded.step, loaded.scene_extent, loaded.optimizer_state) == (4000, 2.5, None)
    assert not any(tensor.requires_grad for tensor in loaded.gaussians.tensors().values())


def test_what_is_not_a_checkpoint_is_refused_with_a_message(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Checkpoint not found: .*none\.pth\. Run stage 1"):
        load_checkpoint(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        load_checkpoint(tmp_path / "text.pth")
    torch.save({"format": 99}, tmp_path / "new.pth")
    with pytest.raises(ValueError, match=r"expected a checkpoint of format 1 .* got format 99"):
        load_checkpoint(tmp_path / "new.pth")
    path = save_checkpoint(tmp_path / "cut.pth", Checkpoint(random_gaussians(), 1, 1.0))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        load_checkpoint(path)


class Payload:
    """Unpickling this would run code; a checkpoint must not."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code in a checkpoint was run')",)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"format": 1, "gaussians": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        load_checkpoint(tmp_path / "evil.pth")


def test_gaussians_from_points_by_hand():
    # Corners of a unit square: neighbours at 1, 1 and sqrt(2), mean square 4/3.
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    rgbs = torch.tensor([[0.0, 0.5, 1.0]]).repeat(4, 1)
    gaussians = gaussians_from_points(points, rgbs, sh_degree=2, init_opacity=0.25)
    assert torch.allclose(gaussians.log_scales.exp(), torch.tensor(math.sqrt(4 / 3)))
    assert torch.allclose(torch.sigmoid(gaussians.opacity_logits), torch.tensor(0.25))
    assert torch.allclose(sh0_to_rgb(gaussians.sh0[:, 0]), rgbs, atol=1e-6)
    assert gaussians.shN.shape == (4, 8, 3) and gaussians.sh_degree == 2
    assert not gaussians.shN.any()


def test_stray_and_duplicate_points_get_a_sensible_size():
    generator = torch.Generator().manual_seed(0)
    points = torch.cat(
        [torch.rand(200, 3, generator=generator), torch.full((1, 3), 1e4), torch.zeros(5, 3)]
    )
    scales = gaussians_from_points(points, torch.rand(206, 3), sh_degree=0).log_scales.exp()[:, 0]
    median = float(scales.median())
    assert float(scales[200]) == pytest.approx(10 * median, rel=0.05)
    assert torch.isfinite(scales.log()).all() and float(scales.min()) > 0


def test_too_few_points_say_what_to_do():
    with pytest.raises(ValueError, match="expected at least 4 points, got 3"):
        gaussians_from_points(torch.rand(3, 3), torch.rand(3, 3), 0)


def test_thinned_points_are_spread_as_the_cloud_is():
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(9000, 3, generator=generator)
    sparse = torch.rand(1000, 3, generator=generator) + torch.tensor([2.0, 0.0, 0.0])
    rows = thin_points(torch.cat([dense, sparse]), 1000)
    assert len(rows) == 1000 == len(rows.unique())
    assert torch.equal(rows, rows.sort().values)
    assert int((rows >= 9000).sum()) == pytest.approx(100, abs=2)  # each part keeps its share
    # Evenly: nearest neighbours of a random choice of the same size are closer by a third.
    chosen = torch.cat([dense, sparse])[rows]
    at_random = torch.cat([dense, sparse])[torch.randperm(10_000, generator=generator)[:1000]]
    spacing, random_spacing = (
        torch.cdist(cloud, cloud).fill_diagonal_(9.0).amin(1).median()
        for cloud in (chosen, at_random)
    )
    assert float(spacing) > 1.1 * float(random_spacing)


def test_thinning_takes_the_confident_points_and_leaves_small_clouds_alone():
    generator = torch.Generator().manual_seed(0)
    points, confidence = (
        torch.rand(5000, 3, generator=generator),
        torch.rand(5000, generator=generator),
    )
    # The best of five uniform numbers is 5/6 on average.
    assert float(confidence[thin_points(points, 1000, confidence)].mean()) == pytest.approx(
        5 / 6, abs=0.01
    )
    assert torch.equal(thin_points(points, 5000), torch.arange(5000))
    assert len(thin_points(points, 4999)) == 4999
    assert len(thin_points(points, 0)) == 0
    # All points in one place still give a choice.
    assert len(thin_points(torch.zeros(10, 3), 4)) == 4
