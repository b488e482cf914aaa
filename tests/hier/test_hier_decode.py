"""From raw numbers to Gaussians: positions, sizes, rotations and colours against what the rest of the library says."""

import pytest
import torch
from hier_scenes import random_views

from s2d.geometry import invert_rigid, project, quat_to_rotation, unproject
from s2d.hier.decode import (
    GaussianGrid,
    decode,
    flatten,
    multiply_quats,
    num_raw,
    rotate_sh,
    scaled_Ks,
)
from s2d.hier.gaussians import render
from s2d.sh import eval_sh, rgb_to_sh0


def decoded(views, stride, level, raw_scale=0.0, sh_degree=1, depth=5.0):
    shape = (*views.images.shape[:2],)
    height, width = views.height // stride, views.width // stride
    raw = views.images.new_zeros(*shape, num_raw(sh_degree), height, width)
    raw[:, :, 2:5] = raw_scale
    ones = views.images.new_ones(*shape, height, width)
    colours = torch.nn.functional.avg_pool2d(views.images.flatten(0, 1), stride).unflatten(0, shape)
    return decode(
        raw, 0.5 * ones, ones / depth, colours, views.viewmats, scaled_Ks(views.Ks, stride), level
    )


def test_raw_zero_is_a_gaussian_of_its_pixels_colour_at_the_cells_centre(generator):
    views = random_views(generator, 1, 2, 8, 12, torch.float64)
    grid = decoded(views, 2, 1)
    for v in range(2):
        depth = torch.full((4, 6), 5.0, dtype=torch.float64)
        expected = unproject(depth, scaled_Ks(views.Ks, 2)[0, v], views.viewmats[0, v])
        assert torch.allclose(grid.means[0, v], expected, atol=1e-12)
        rotation = quat_to_rotation(grid.quats[0, v])
        c2w = invert_rigid(views.viewmats)[0, v, :3, :3]
        assert torch.allclose(rotation, c2w.expand_as(rotation), atol=1e-12)
    colours = views.images.reshape(1, 2, 3, 4, 2, 6, 2).mean((4, 6)).movedim(2, -1)
    assert torch.allclose(grid.sh[..., 0, :], rgb_to_sh0(colours))
    assert grid.sh[..., 1:, :].abs().max() < 1e-12  # measured 1e-16


def test_offsets_stay_within_the_cell(generator):
    views = random_views(generator, 1, 1, 8, 8, torch.float64)
    raw = 100 * torch.randn(1, 1, num_raw(0), 8, 8, generator=generator, dtype=torch.float64)
    ones = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    grid = decode(raw, ones / 2, ones / 3, views.images, views.viewmats, views.Ks, 2)
    xy, depth = project(grid.means[0, 0], views.Ks[0, 0], views.viewmats[0, 0])
    assert torch.allclose(depth, 3 * ones[0, 0])  # z, not the length of the ray
    cells = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1)
    assert ((xy - cells) > -1e-9).all()
    assert ((xy - cells) < 1 + 1e-9).all()


def test_sizes_follow_footprint_and_depth(generator):
    views = random_views(generator, 1, 1, 16, 16, torch.float64)
    coarse, fine = (decoded(views, stride, 0).log_scales.mean().exp() for stride in (4, 1))
    far = decoded(views, 1, 2, depth=10.0).log_scales.mean().exp()
    assert float(coarse / fine) == pytest.approx(4)
    assert float(far / fine) == pytest.approx(2)
    smallest, largest = (
        decoded(views, 1, 2, raw_scale=r).log_scales.mean().exp() for r in (-50.0, 50.0)
    )
    assert float(largest / smallest) == pytest.approx(30)  # 0.5 to 15 tenths of a footprint


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_turned_harmonics_have_the_same_colour_in_the_turned_direction(generator, degree):
    sh = torch.randn(6, (degree + 1) ** 2, 3, generator=generator, dtype=torch.float64)
    quats = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    rotation = quat_to_rotation(quats)
    directions = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    turned = (rotation @ directions[..., None])[..., 0]
    # measured 2e-14 at degree 3
    assert torch.allclose(
        eval_sh(rotate_sh(sh, rotation), turned), eval_sh(sh, directions), atol=1e-11
    )


def test_quaternions_compose_as_their_matrices(generator):
    first, second = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    together = quat_to_rotation(multiply_quats(first, second))
    assert torch.allclose(together, quat_to_rotation(first) @ quat_to_rotation(second), atol=1e-12)


def test_rows_are_level_major_then_view_by_view_and_cropped_to_the_picture(generator):
    views = random_views(generator, 2, 2, 16, 16)
    grids = [decoded(views, stride, level) for level, stride in enumerate((4, 2, 1))]
    # 10 x 7 pixels hold the centres of 2 x 2, 5 x 3 and 10 x 7 cells.
    joined = flatten(grids, 10, 7)
    assert joined.levels.bincount().tolist() == [2 * 2 * 2, 2 * 5 * 3, 2 * 10 * 7]
    assert joined.levels.diff().min() >= 0
    assert torch.equal(joined.means[1, 8 + 15], grids[1].means[1, 1, 0, 0])
    assert joined.sh.shape == (2, joined.num, 4, 3)


def test_a_render_does_not_depend_on_the_unit_of_the_world(generator):
    """The rasteriser's nearest depth, 0.2 units, would else hide scenes that are measured in kilometres."""
    views = random_views(generator, 1, 2, 16, 16)
    # No two at one depth: which of them is in front would be a matter of rounding.
    depth = 4 + 2 * torch.rand(8, 8, generator=generator)
    grid = decoded(views, 2, 1, raw_scale=-1.0, depth=depth)
    picture = render(flatten([grid], 16, 16), views)
    unit = 1e-3
    viewmats = views.viewmats.clone()
    viewmats[..., :3, 3] *= unit
    small = type(views)(views.images, viewmats, views.Ks, views.near * unit, views.far * unit)
    scaled = GaussianGrid(
        grid.means * unit,
        grid.log_scales + torch.log(torch.tensor(unit)),
        grid.quats,
        grid.opacities,
        grid.sh,
        1,
    )
    difference = (render(flatten([scaled], 16, 16), small) - picture).abs()
    assert difference.mean() < 1e-5
    assert difference.max() < 5e-3  # a Gaussian that just reaches a pixel or not: 1/255
    assert picture.max() > 0.1
