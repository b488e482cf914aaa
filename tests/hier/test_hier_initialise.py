"""From kept photos to what stage 1 starts with: counts, levels, agreement between views, and that it looks like the photos."""

import pytest
import tiny_scene as truth
import torch

from s2d.depth_io import depth_path, write_depth
from s2d.geometry import invert_rigid, pixel_grid, project
from s2d.hier.config import HierConfig
from s2d.hier.initialise import hier_start
from s2d.hier.kept_views import depth_ranges, neighbours
from s2d.hier.model import HierModel
from s2d.hier.weights import save_model
from s2d.layers.task import initial_rows
from s2d.rasterize import rasterize
from s2d.scene import load_scene

MOST = 3000
POINTS = torch.from_numpy(truth.tiny_model().points).float()


@pytest.fixture
def stage0(tmp_path):
    """Exact depth of all views."""
    viewmats, lenses = truth.cameras()
    for name, viewmat, lens in zip(truth.NAMES, viewmats, lenses, strict=True):
        depth = exact_depth(viewmat, lens)
        write_depth(depth_path(tmp_path, name), depth.float().numpy(), (0 * depth + 0.8).numpy())
    return tmp_path


def exact_depth(viewmat, lens):
    fx, fy, cx, cy = lens.params
    grid = pixel_grid(lens.width, lens.height, dtype=torch.float64)
    rays = torch.stack(
        [(grid[..., 0] - cx) / fx, (grid[..., 1] - cy) / fy, 0 * grid[..., 0] + 1], -1
    )
    c2w = invert_rigid(viewmat)
    directions = rays @ c2w[:3, :3].T
    points = truth.cast(c2w[:3, 3].expand_as(directions), directions)
    return points @ viewmat[2, :3] + viewmat[2, 3]


def test_without_weights_it_looks_like_the_photos_and_layers_can_start_from_it(
    tiny_scene, stage0, tmp_path
):
    kept = load_scene(tiny_scene).subset(truth.NAMES[2:6])
    start = hier_start(kept, POINTS, stage0, None, MOST, 1)
    gaussians, levels = start.gaussians, start.levels
    assert 0.9 * MOST < gaussians.num <= MOST
    assert gaussians.sh_degree == 1
    assert levels.unique().tolist() == [0, 1, 2]
    assert levels.diff().min() >= 0

    for name in (truth.NAMES[3], truth.NAMES[4]):
        picture = rasterize(gaussians, kept.cameras.select([name])).rgb[0]
        psnr = -10 * (picture.clamp(0, 1) - kept.image(name)).square().mean().log10()
        assert psnr > 21  # measured 22.7 and 22.9

    start.save(tmp_path / "layers")
    parts = initial_rows(tmp_path / "layers", 3, 1)
    assert [part.num for part in parts] == levels.bincount().tolist()
    assert torch.equal(parts[2].means, start.parts[2].means)
    again = hier_start(kept, POINTS, stage0, None, MOST, 1).gaussians
    assert torch.equal(again.means, gaussians.means)


def test_what_stands_before_surfaces_that_others_believe_in_goes(tiny_scene, stage0):
    names = truth.NAMES[3:6]
    kept = load_scene(tiny_scene).subset(names)
    viewmats, lenses = truth.cameras()
    wrong = exact_depth(viewmats[4], lenses[4])
    height, width = wrong.shape
    block = (slice(height // 3, 2 * height // 3), slice(width // 3, 2 * width // 3))
    clean = hier_start(kept, POINTS, stage0, None, MOST, 0).gaussians
    wrong[block] *= 0.4
    write_depth(depth_path(stage0, names[1]), wrong.float().numpy(), (0 * wrong + 0.8).numpy())
    cleaned = hier_start(kept, POINTS, stage0, None, MOST, 0).gaussians
    camera = kept.cameras.select([names[1]])
    nearest = [project(g.means, camera.Ks[0], camera.viewmats[0])[1] for g in (clean, cleaned)]
    floating = (nearest[1] < 0.7 * nearest[0].min()).sum()
    assert floating == 0


def test_with_weights_every_view_gives_its_own_rows(tiny_scene, stage0, tmp_path):
    torch.manual_seed(0)
    weights = save_model(tmp_path / "w.safetensors", HierModel(HierConfig.named("tiny")), {})
    kept = load_scene(tiny_scene).subset(truth.NAMES[2:6])  # four: predicted in groups of three
    start = hier_start(kept, POINTS, stage0, weights, 1000, 2)
    gaussians, levels = start.gaussians, start.levels
    assert 0 < gaussians.num <= 1000
    assert gaussians.sh_degree == 2
    assert levels.unique().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 2 kept views"):
        hier_start(kept.subset(truth.NAMES[2:3]), POINTS, stage0, weights, 1000, 2)


def test_ranges_hold_what_is_seen_and_neighbours_see_the_same(tiny_scene, stage0):
    kept = load_scene(tiny_scene)
    near, far = depth_ranges(kept, POINTS)
    viewmats, lenses = truth.cameras()
    for v, (viewmat, lens) in enumerate(zip(viewmats, lenses, strict=True)):
        depth = exact_depth(viewmat, lens)
        inside = (depth > near[v]) & (depth < far[v])
        assert inside.double().mean() > 0.97  # measured 1 in every view
    for v, others in enumerate(neighbours(kept, POINTS, 2)):
        assert v not in others
        assert all(abs(v - other) <= 4 for other in others)  # on an arc, in order
    with pytest.raises(ValueError, match="--init points"):
        depth_ranges(kept, POINTS[:5])
