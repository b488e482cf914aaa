"""What goes into the model is checked where it comes in."""

import dataclasses

import pytest
import torch
from hier_scenes import random_views


def test_sizes_selection_and_refusals(generator):
    views = random_views(generator, 2, 3, 8, 10)
    assert (views.num_scenes, views.num_views, views.height, views.width) == (2, 3, 8, 10)
    picked = views.select([2, 0])
    assert torch.equal(picked.images[:, 1], views.images[:, 0])
    assert picked.near.shape == (2, 2)
    with pytest.raises(ValueError, match="far must be above near"):
        dataclasses.replace(views, far=views.near)
    with pytest.raises(ValueError, match="near must be > 0"):
        dataclasses.replace(views, near=0 * views.near)
    with pytest.raises(ValueError, match="viewmats must be"):
        dataclasses.replace(views, viewmats=views.viewmats[:, :2])
    with pytest.raises(ValueError, match="images has 1 non-finite value"):
        broken = views.images.clone()
        broken[1, 0, 0, 0, 0] = torch.nan
        dataclasses.replace(views, images=broken)
