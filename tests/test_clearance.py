"""Clear ways: what stands where people look from goes, and nothing else does."""

import math

import pytest
import torch

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians, gaussians_from_points
from s2d.geometry import look_at
from s2d.strategies.clearance import BETWEEN, clear_ways, in_the_way


def facing(centers, target=None) -> Cameras:
    """Cameras that look at a point; without one all look along z."""
    targets = centers + torch.tensor([0.0, 0, 1]) if target is None else target.expand_as(centers)
    viewmats = look_at(centers, targets, torch.tensor([0.0, 1.0, 0.0]))
    num = len(centers)
    K = torch.tensor([[40.0, 0, 24], [0, 40, 18], [0, 0, 1]]).expand(num, 3, 3)
    return Cameras(viewmats.float(), K, ((48, 36),) * num, tuple(str(i) for i in range(num)))


CENTERS = torch.tensor([[0.0, 0, 0], [2, 0, 0], [5, 0, 0]])
# A wall 4 in front of the cameras.
GRID = torch.linspace(-10, 15, 101)
WALL = torch.cat([torch.cartesian_prod(GRID, GRID), torch.full((101**2, 1), 4.0)], 1)


def ball(place, size=(0.01, 0.01, 0.01), quat=(1.0, 0, 0, 0)) -> Gaussians:
    return Gaussians(
        means=torch.tensor([place]),
        log_scales=torch.tensor([size]).log(),
        quats=torch.tensor([quat]),
        opacity_logits=torch.zeros(1),
        sh0=torch.zeros(1, 1, 3),
        shN=torch.zeros(1, 0, 3),
    )


@pytest.fixture(scope="module")
def ways():
    return clear_ways(facing(CENTERS), WALL, 0.5)


def test_places_are_the_cameras_and_the_ways_between_neighbours(ways):
    """Three cameras on a line with two neighbours each: straight ways are on the line, arcs bend away from the wall."""
    assert len(ways.places) == 3 + 2 * 3 * 2 * BETWEEN
    on_the_line = ways.places[:, 1:].abs().amax(1) < 1e-5
    assert int(on_the_line.sum()) == 3 + 3 * 2 * BETWEEN
    assert float(ways.places[:, 0].min()) > -1e-5
    assert float(ways.places[:, 0].max()) < 5 + 1e-5
    assert float(ways.places[:, 2].min()) > -1
    assert float(ways.places[:, 2].max()) < 1e-5
    middle = (ways.places - torch.tensor([1.0, 0, 0])).norm(dim=1).min()
    assert float(middle) < 1e-5
    # The wall is 4 away, and the first percentile of its points hardly farther.
    assert float(ways.radii.min()) >= 2.0 and float(ways.radii.max()) < 2.6  # measured 2.09 to 2.47


def test_novel_cameras_are_places_without_ways():
    """A novel camera far beside the kept ones: its place is clear, the space between is not."""
    novel = facing(torch.tensor([[12.0, 0, 0]]))
    known, ways = (clear_ways(facing(CENTERS), WALL, 0.5, more) for more in (None, novel))
    assert torch.equal(ways.places[:-1], known.places) and torch.equal(ways.radii[:-1], known.radii)
    assert torch.equal(ways.places[-1], novel.centers[0])
    assert 2.0 <= float(ways.radii[-1]) < 2.6
    before_it, between = ball((12.0, 0.0, 1.0)), ball((8.5, 0.0, 0.0))
    assert bool(in_the_way(before_it, ways)) and not bool(in_the_way(before_it, known))
    assert not bool(in_the_way(between, ways))


@pytest.mark.parametrize(
    ("gaussians", "expected"),
    [
        (ball((3.5, 0.0, 1.0)), True),  # between two cameras
        (ball((3.5, 0.0, 3.9)), False),  # at the wall
        (ball((-3.0, 0.0, 0.0)), False),  # beside the rig
        (ball((9.0, 0.0, 0.0), (3.0, 0.1, 0.1)), True),  # its centre is outside, a camera is inside of it
        (ball((9.0, 0.0, 0.0), (0.1, 3.0, 0.1)), False),  # as long, across
        (ball((9.0, 0.0, 0.0), (0.1, 3.0, 0.1), (math.sqrt(0.5), 0, 0, math.sqrt(0.5))), True),  # the same, turned
        (ball((3.0, 2.6, 0.0), (5.0, 0.1, 5.0)), False),  # a floor
    ],
)  # fmt: skip
def test_what_hides_the_scene_goes(ways, gaussians, expected):
    assert bool(in_the_way(gaussians, ways)) is expected


def test_unit_and_place_of_the_world_do_not_matter():
    g = torch.Generator().manual_seed(0)
    points = torch.randn(3000, 3, generator=g) * torch.tensor([4.0, 2, 3])
    gaussians = gaussians_from_points(points, torch.rand(3000, 3, generator=g), 0)
    first = in_the_way(gaussians, clear_ways(facing(CENTERS), WALL, 0.5))
    assert 50 < int(first.sum()) < 1500  # measured 1006
    shift = torch.tensor([30.0, -7, 11])
    gaussians.means = 8 * gaussians.means + shift
    gaussians.log_scales += math.log(8)
    moved = in_the_way(gaussians, clear_ways(facing(8 * CENTERS + shift), 8 * WALL + shift, 0.5))
    assert int((moved != first).sum()) <= 2  # measured 0


def test_around_a_thing_the_ways_are_arcs():
    """Four cameras on a circle around a thing, a quarter turn apart: the arcs make that circle."""
    angles = torch.arange(4) * math.pi / 2
    centers = 5 * torch.stack([angles.cos(), torch.zeros(4), angles.sin()], 1)
    thing = 0.1 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    found = clear_ways(facing(centers, torch.zeros(3)), thing, 0.5)
    circle = found.places[(found.places.norm(dim=1) - 5).abs() < 1e-4]
    assert len(circle) == 4 + 4 * 2 * BETWEEN
    spread = torch.atan2(circle[:, 2], circle[:, 0]).sort().values.diff()
    assert float(spread.max()) < 1.01 * math.pi / 16


def test_two_cameras_and_one(ways):
    assert len(clear_ways(facing(CENTERS[:2]), WALL, 0.5).places) == 2 + 2 * 2 * BETWEEN
    assert len(clear_ways(facing(CENTERS[:1]), WALL, 0.5).places) == 1
