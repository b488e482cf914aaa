"""The sphere behind the scene: closed, of the photos' colours, and invisible to the photos that the scene explains."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from s2d import backdrop as module
from s2d.backdrop import backdrop
from s2d.cameras import Cameras
from s2d.gaussians import Gaussians, concatenate, gaussians_from_points
from s2d.geometry import fibonacci_sphere, look_at
from s2d.optim import LearningRates
from s2d.rasterize import rasterize
from s2d.refinement import Refinement, RefinementRates
from s2d.sampling import ViewSampler
from s2d.scene import Scene
from s2d.sh import sh0_to_rgb
from s2d.training import BACKDROP_FROM, stand_backdrop, start_run

SIZE = (48, 36)
K = torch.tensor([[40.0, 0, 24], [0, 40, 18], [0, 0, 1]])


def camera(direction) -> Cameras:
    """One at the origin, looking that way."""
    up = torch.tensor([0.0, 1, 0], dtype=torch.float64)
    target = torch.tensor(direction, dtype=torch.float64)
    viewmat = look_at(torch.zeros(1, 3, dtype=torch.float64), target[None], up).float()
    return Cameras(viewmat, K[None], (SIZE,), ("a",))


def some_gaussians(means) -> Gaussians:
    points = torch.as_tensor(means, dtype=torch.float32)
    return gaussians_from_points(points, torch.full_like(points, 0.8), 1, init_opacity=0.99)


AHEAD = camera([0.1, 0.0, 1.0])
BEHIND = [[0.0, 0, -1], [0.1, 0, -1], [0, 0.1, -1], [0.1, 0.1, -1]]


def test_sphere_is_even():
    """Moments of the uniform distribution: mean 0, second moments 1/3; and no two directions are near each other."""
    directions = fibonacci_sphere(2000)
    assert float((directions.norm(dim=1) - 1).abs().max()) < 1e-12
    assert float(directions.mean(0).abs().max()) < 1e-3  # measured 6e-6
    moments = directions.T @ directions / 2000
    assert float((moments - torch.eye(3) / 3).abs().max()) < 1e-3  # measured 9e-6
    nearest = torch.cdist(directions, directions).fill_diagonal_(9).amin(1)
    step = (4 * torch.pi / 2000) ** 0.5
    assert 0.7 * step < float(nearest.min())  # measured 0.87


@pytest.mark.parametrize("direction", [[0.1, 0, 1], [1, 0.2, 0], [0.1, 0.2, -1], [0.1, 1, 0.1]])
def test_one_colour_all_around(direction):
    """A photo of one colour in front of nothing: every direction takes it over, and the sphere has no gaps."""
    colour = torch.tensor([0.2, 0.5, 0.7])
    nothing = some_gaussians(BEHIND)
    nothing.opacity_logits.fill_(-20)
    sphere = backdrop(nothing, AHEAD, [colour.expand(SIZE[1], SIZE[0], 3).contiguous()])
    render = rasterize(sphere, camera(direction))
    assert float(render.alpha.min()) > 0.9  # measured 0.97
    shown = render.rgb[0] / render.alpha[0]
    assert float((shown - colour).abs().max()) < 0.01  # measured 4e-7


def test_what_the_photo_shows_stays():
    """Left an opaque wall, right nothing because the photo is black there: the sphere must be black there, too, and is not beside."""
    grid = torch.cartesian_prod(torch.linspace(-2, 0, 40), torch.linspace(-2, 2, 80))
    wall = some_gaussians(torch.cat([grid, torch.full((len(grid), 1), 2.0)], 1))
    view = camera([0.0, 0, 1])
    shown = rasterize(wall, view)
    assert 0.3 < float(shown.alpha.mean()) < 0.7
    photo = shown.rgb[0].detach()
    sphere = backdrop(wall, view, [photo])
    both = rasterize(concatenate([wall, sphere]), view).rgb[0]
    assert float((both - photo).abs().mean()) < 0.01  # measured 0.003
    beside = rasterize(sphere, camera([0.1, 0, -1])).rgb[0]
    assert float(beside.mean()) > 0.05


def test_scale_and_place_of_the_world_do_not_matter():
    photo = torch.rand(SIZE[1], SIZE[0], 3, generator=torch.manual_seed(0))
    view, near = camera([0.0, 0, 1]), some_gaussians([[0.0, 0, 2], [1, 0, 2], [0, 1, 3], [1, 1, 2]])
    first = backdrop(near, view, [photo])
    shift, factor = torch.tensor([3.0, -2.0, 1.0]), 7.0
    moved = replace(near, means=factor * near.means + shift, log_scales=near.log_scales + 1.9459101)
    viewmat = view.viewmats.clone()
    viewmat[0, :3, 3] = -viewmat[0, :3, :3] @ shift
    second = backdrop(moved, replace(view, viewmats=viewmat), [photo])
    expected = factor * first.means + shift
    assert float((second.means - expected).norm() / expected.norm()) < 1e-6
    assert float((second.sh0 - first.sh0).norm() / first.sh0.norm()) < 1e-5


def test_it_is_far_and_has_the_scenes_colour_degree():
    scene = some_gaussians(BEHIND)
    sphere = backdrop(scene, AHEAD, [torch.rand(SIZE[1], SIZE[0], 3)])
    assert sphere.num == module.NUM and sphere.sh_degree == scene.sh_degree
    distances = sphere.means.norm(dim=1)
    assert float(distances.min()) > 4 * float(scene.means.norm(dim=1).max())
    everything = concatenate([scene, sphere])
    assert everything.num == scene.num + module.NUM
    assert torch.equal(everything.means[: scene.num], scene.means)


def test_learned_exposure_is_taken_out_of_the_photos():
    """Two photos of one grey surrounding, the second taken twice as bright: with its gain known, the sphere is that grey in both directions."""
    cameras = Cameras.cat([camera([0.1, 0, 1]), replace(camera([0.1, 0, -1]), names=("b",))])
    photos = {
        "a": torch.full((SIZE[1], SIZE[0], 3), 0.3),
        "b": torch.full((SIZE[1], SIZE[0], 3), 0.6),
    }
    kept = Scene("s", cameras, (Path("a"), Path("b")), None, photos)
    nothing = some_gaussians(BEHIND)
    nothing.opacity_logits.fill_(-20)
    run = start_run(nothing, LearningRates(), 1.0, ViewSampler(("a", "b"), seed=0), 0)
    run.refinement = Refinement(cameras, 1.0, RefinementRates())
    run.refinement._log_gains[1].data.fill_(math.log(2))
    run.step = round(BACKDROP_FROM * 10)
    stand_backdrop(run, kept.cameras, kept.image, 0, 10)
    assert float((sh0_to_rgb(run.backdrop.sh0) - 0.3).abs().max()) < 1e-4  # measured 3e-8
