"""Plane sweep: known depth is found, and what is compared is what a second computation of the geometry says."""

import pytest
import torch
from hier_scenes import random_views, wall

from s2d.geometry import project, unproject
from s2d.hier.decode import scaled_Ks
from s2d.hier.sweep import (
    expected_inverse_depth,
    inverse_depths,
    patch_descriptors,
    plane_sweep,
)


@pytest.mark.parametrize("tilt", [0.0, 0.5])
@pytest.mark.parametrize("xs", [(-0.3, 0.3), (-0.3, 0.0, 0.3)])
def test_the_depth_of_a_textured_wall_is_found(tilt, xs):
    views, depth = wall(xs, tilt=tilt)
    cells, dense = (x[None] for x in patch_descriptors(views.images[0], 4))
    hypotheses = inverse_depths(views.near, views.far, 48)
    scores = plane_sweep(cells, hypotheses, views.viewmats, scaled_Ks(views.Ks, 4), dense)
    inverse, confidence = expected_inverse_depth(1000 * scores, hypotheses)  # the best one
    truth = 1 / depth[:, :, 2::4, 2::4]  # a cell's centre is the corner of its middle pixels
    # Cells that every camera sees; the outer columns are in one picture only.
    error = ((inverse - truth).abs() / truth)[..., 1:-1, 4:-4]
    spacing = float((hypotheses[0, 0, 1] - hypotheses[0, 0, 0]) / truth.mean())
    # measured at most 0.30 and 0.87; 2.2 and 4.9 where the other views are looked up cell by cell
    assert error.median() < 0.5 * spacing
    assert error.quantile(0.9) < 1.2 * spacing
    assert confidence[..., 1:-1, 4:-4].min() > 2 / 48


def test_scores_are_inner_products_at_projected_places(generator):
    views = random_views(generator, 1, 3, 10, 12, torch.float64)
    features = torch.randn(1, 3, 5, 10, 12, generator=generator, dtype=torch.float64)
    hypotheses = torch.tensor([[[0.2, 0.31]] * 3], dtype=torch.float64)
    scores = plane_sweep(features, hypotheses, views.viewmats, views.Ks)
    for d in range(2):
        for v in range(3):
            depth = torch.full((10, 12), 1 / float(hypotheses[0, v, d]), dtype=torch.float64)
            points = unproject(depth, views.Ks[0, v], views.viewmats[0, v])
            total, count = torch.zeros(10, 12).double(), torch.zeros(10, 12).double()
            for other in {0, 1, 2} - {v}:
                xy, _ = project(points, views.Ks[0, other], views.viewmats[0, other])
                inside = (xy > 0).all(-1) & (xy[..., 0] < 12) & (xy[..., 1] < 10)
                found = _bilinear(features[0, other], xy)  # [C, H, W]
                total += inside * (found * features[0, v]).sum(0)
                count += inside
            expected = total / count.clamp(min=1)
            # measured 3e-15
            assert torch.allclose(scores[0, v, d], expected, atol=1e-12)


def _bilinear(picture, xy):
    """Sample [C, H, W] at [h, w, 2], pixel by pixel; what is beyond the last centre is that centre's value."""
    height, width = picture.shape[-2:]
    x, y = (xy - 0.5).unbind(-1)
    result = 0
    for i in (0, 1):
        for j in (0, 1):
            column, row = x.floor() + i, y.floor() + j
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
            value = picture[:, row.long().clamp(0, height - 1), column.long().clamp(0, width - 1)]
            result = result + weight * value
    return result


def test_descriptors_are_the_same_for_a_turned_up_exposure(generator):
    images = torch.rand(1, 3, 32, 32, generator=generator)
    one, other = (patch_descriptors(x, 4)[0] for x in (images, 0.1 + 0.5 * images))
    assert torch.cosine_similarity(one[:, :25], other[:, :25]).min() > 0.9999
    assert torch.allclose(one.norm(dim=1), torch.ones(1, 8, 8))
    # The channel of least contrast has more say where there is less.
    assert (other[:, 25] > one[:, 25]).all()
    plain, _ = patch_descriptors(torch.full((1, 3, 16, 16), 0.5), 4)
    assert plain[:, :25].abs().max() < 1e-5


def test_one_view_has_no_depth(generator):
    views = random_views(generator, 1, 1, 8, 8)
    with pytest.raises(ValueError, match="at least 2 views"):
        plane_sweep(torch.rand(1, 1, 4, 8, 8), torch.rand(1, 1, 3), views.viewmats, views.Ks)
