"""What stands alone: against exact distances, where depth is guessed, and in a run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from s2d.cameras import Cameras
from s2d.densify import DensifyState
from s2d.gaussians import Gaussians, concatenate
from s2d.geometry import quat_to_rotation
from s2d.optim import LearningRates, create_optimizer
from s2d.strategies.active import ActiveStrategies
from s2d.strategies.evidence import Evidence
from s2d.strategies.isolation import SEARCH_ERROR, Surfaces
from s2d.strategies.settings import Strategy

WIDTH, HEIGHT, FOCAL, DEPTH = 48, 36, 40.0, 4.0
SHARE = 0.1


def cameras(*centers) -> Cameras:
    """Looking along z."""
    viewmats = torch.eye(4).repeat(len(centers), 1, 1)
    viewmats[:, :3, 3] = -torch.tensor(centers)
    K = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    names = tuple(f"view_{i}" for i in range(len(centers)))
    return Cameras(viewmats, K.expand(len(centers), 3, 3), ((WIDTH, HEIGHT),) * len(centers), names)


class Photos:
    """Kept views of one grey, in memory."""

    def __init__(self, cameras: Cameras) -> None:
        self.cameras = cameras

    def __len__(self) -> int:
        return len(self.cameras)

    def image(self, name: str) -> torch.Tensor:
        return torch.full((HEIGHT, WIDTH, 3), 0.5)


def wall_depth(known=slice(None)):
    """The wall z = DEPTH, known in some columns, and full confidence."""
    depth = torch.zeros(HEIGHT, WIDTH)
    depth[:, known] = DEPTH
    return depth, (depth > 0).float()


def at(*places) -> Gaussians:
    num = len(places)
    return Gaussians(
        means=torch.tensor(places),
        log_scales=torch.full((num, 3), -4.0),
        quats=torch.tensor([[1.0, 0, 0, 0]]).repeat(num, 1),
        opacity_logits=torch.zeros(num),
        sh0=torch.zeros(num, 1, 3),
        shN=torch.zeros(num, 0, 3),
    )


GRID = torch.linspace(-4, 4, 81)
WALL = torch.cat([torch.cartesian_prod(GRID, GRID), torch.full((81**2, 1), DEPTH)], 1)
KEPT = Photos(cameras((0.0, 0, 0), (0.5, 0, 0)))
KNOWN = {name: wall_depth() for name in KEPT.cameras.names}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((0.0, 0.0, 4.0), False),  # on the wall
        ((0.0, 0.0, 3.75), False),  # 0.25 before it, which is less than a tenth of 3.75
        ((0.0, 0.0, 3.0), True),  # 1 before it
        ((0.0, 0.0, 4.3), False),  # behind it
        ((0.0, 0.0, 6.0), True),
        ((0.5, 0.0, 0.2), True),  # in front of a lens
    ],
)
def test_share_of_the_distance_to_the_camera(place, expected):
    assert Surfaces(KEPT, WALL, KNOWN).isolated(at(place), SHARE).tolist() == [expected]


def test_search_errs_on_one_side_only_and_not_by_much():
    """Whatever is exactly isolated is found; what is found is isolated at least by the share that the search may be off."""
    generator = torch.Generator().manual_seed(0)
    some = at(*(torch.rand(400, 3, generator=generator) * 6 - torch.tensor([3.0, 3, 0])).tolist())
    found = Surfaces(KEPT, WALL, KNOWN).isolated(some, SHARE).numpy()
    means, centers = some.means.double().numpy(), KEPT.cameras.centers.double().numpy()
    nearest = np.linalg.norm(means[:, None] - WALL.double().numpy(), axis=2).min(1)
    allowed = SHARE * np.linalg.norm(means[:, None] - centers, axis=2).min(1)
    assert found[nearest > allowed * (1 + 1e-6)].all()
    assert not found[nearest * (1 + SEARCH_ERROR) < allowed].any()
    assert 0.3 < found.mean() < 0.95


def test_a_centre_that_is_no_number_is_left_to_training_to_name():
    on_wall, alone, broken = (0.0, 0.0, DEPTH), (0.0, 0.0, 2.0), (0.0, math.nan, math.inf)
    found = Surfaces(KEPT, WALL, KNOWN).isolated(at(on_wall, broken, alone), SHARE)
    assert found.shape == (3,)
    assert found[[0, 2]].tolist() == [False, True]


def test_the_frame_and_the_unit_of_the_world_do_not_matter():
    scale, shift = 7.0, torch.tensor([1.0, -2, 0.5])
    turn = quat_to_rotation(torch.tensor([[0.8, 0.1, 0.5, -0.2]]))[0]
    generator = torch.Generator().manual_seed(1)
    some = at(*(torch.rand(300, 3, generator=generator) * 6 - torch.tensor([3.0, 3, 0])).tolist())

    def carried(points):
        return scale * points @ turn.T + shift

    given = KEPT.cameras
    viewmats = given.viewmats.clone()
    viewmats[:, :3, :3] = given.viewmats[:, :3, :3] @ turn.T
    viewmats[:, :3, 3] = scale * given.viewmats[:, :3, 3] - viewmats[:, :3, :3] @ shift
    there = Photos(replace(given, viewmats=viewmats))
    depths = {name: (scale * depth, trust) for name, (depth, trust) in KNOWN.items()}
    before = Surfaces(KEPT, WALL, KNOWN).isolated(some, SHARE)
    after = Surfaces(there, carried(WALL), depths).isolated(
        Gaussians(**some.tensors() | {"means": carried(some.means)}), SHARE
    )
    assert float((before != after).float().mean()) < 0.03  # an approximate search in another order


def test_guessed_depth_is_a_surface_too():
    """Depth of the left half only, and points there only: the wall's right half is its continuation."""
    half = WALL[WALL[:, 0] < -0.5]
    depths = {name: wall_depth(slice(0, WIDTH // 2)) for name in KEPT.cameras.names}
    surfaces = Surfaces(KEPT, half, depths)
    assert surfaces.isolated(at((1.5, 0.0, 4.0), (1.5, 0.0, 3.0)), SHARE).tolist() == [False, True]


@pytest.mark.parametrize("depths", [{}, {"view_0": wall_depth(), "view_1": wall_depth(slice(0))}])
def test_what_a_photo_without_depth_may_show_stays(depths):
    """In the picture of the second camera nothing goes, because nobody knows what it shows; in the first one's only where that has depth."""
    kept = Photos(cameras((0.0, 0, 0), (40.0, 0, 0)))
    found = Surfaces(kept, WALL, depths).isolated(at((0.0, 0.0, 2.0), (40.0, 0.0, 2.0)), SHARE)
    assert found.tolist() == [bool(depths), False]


@pytest.mark.parametrize("isolation", [0.0, SHARE])
def test_a_round_of_density_control_removes_it(isolation):
    gaussians = concatenate([at(*WALL[::400].tolist()), at((0.0, 0.0, 2.0))])
    evidence = Evidence(KEPT, WALL, KNOWN.__getitem__)
    settings = Strategy(dropout=0, clearance=0, isolation=isolation, support=True)
    strategies = ActiveStrategies(settings, evidence, gaussians, 1.0, 100, seed=0)
    optimizer = create_optimizer(gaussians, LearningRates(), 1.0)
    state = DensifyState.zeros(gaussians.num)
    num = gaussians.num
    strategies.control_density(
        settings.densify_policy(False, math.inf, num),
        gaussians,
        optimizer,
        state,
        torch.Generator(),
    )
    assert gaussians.num == num - (isolation > 0)
    assert bool((gaussians.means.detach()[:, 2] == 2).any()) == (isolation == 0)
