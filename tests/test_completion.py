"""Depth where stereo has none: against a direct solver, against what is known exactly, and points that no photo sees through."""

from pathlib import Path

import numpy as np
import pytest
import torch

from s2d import completion
from s2d.cameras import Cameras
from s2d.completion import complete_depth, hole_points, seen_through
from s2d.geometry import project
from s2d.scene import Scene


def test_solver_against_elimination(monkeypatch):
    """The sum of squares written out as one matrix, pixel by pixel, and solved by LAPACK."""
    rng = np.random.default_rng(0)
    height, width = 11, 9
    values, image = rng.random((height, width)), rng.random((height, width, 3))
    weight = np.where(rng.random((height, width)) < 0.3, rng.random((height, width)), 0)
    index = np.arange(height * width).reshape(height, width)
    matrix = np.diag(weight.ravel())
    for axis in (0, 1):
        size = index.shape[axis] - 1
        first = index.take(range(size), axis).ravel()
        second = index.take(range(1, size + 1), axis).ravel()
        edge = np.abs(np.diff(image, axis=axis)).mean(-1).ravel()
        for i, j, g in zip(first, second, np.exp(-30 * edge) + 1e-3, strict=True):
            matrix[[i, j], [i, j]] += g
            matrix[[i, j], [j, i]] -= g
    expected = np.linalg.solve(matrix, (weight * values).ravel()).reshape(height, width)
    monkeypatch.setattr(completion, "RESIDUAL", 1e-12)
    found = completion._continue(values, weight, image)
    # Measured 4e-11; with the residual of 1e-5 that is enough in use, 5e-4.
    assert np.linalg.norm(found - expected) < 1e-9 * np.linalg.norm(expected)


def test_a_plane_continues_as_a_plane():
    """Inverse depth is linear in the picture; known all around, the smoothest continuation is linear, too."""
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    truth = 1 / (0.2 + 0.001 * x + 0.002 * y)
    hole = (x > 20) & (x < 60) & (y > 15) & (y < 45)
    depth = torch.where(hole, torch.zeros(()), truth)
    found = complete_depth(depth, torch.ones(60, 80), torch.full((60, 80, 3), 0.5))
    # At the picture's own border nothing pulls outwards; measured 4e-4 in the hole.
    assert float(((found - truth) / truth)[hole].abs().max()) < 2e-3


def test_depth_steps_where_the_photo_does():
    photo = torch.zeros(40, 40, 3)
    photo[:, 20:] = 1.0
    depth = torch.zeros(40, 40)
    depth[:, :4], depth[:, 36:] = 2.0, 10.0
    found = complete_depth(depth, torch.ones(40, 40), photo)
    assert float((found[:, :19] - 2).abs().max()) < 0.2
    assert float((found[:, 21:] - 10).abs().max()) < 1.5
    even = complete_depth(depth, torch.ones(40, 40), torch.zeros(40, 40, 3))
    assert 3 < float(even[20, 19]) < 4  # without the edge: halfway in inverse depth, 3.3


def test_nothing_known_is_an_error():
    with pytest.raises(ValueError, match="none of the 16 pixels has a depth"):
        complete_depth(torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(4, 4, 3))


def two_views(shift: float) -> tuple[Scene, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Two cameras, side by side, in front of the wall z = 4; the left one has a hole in its depth."""
    K = torch.tensor([[40.0, 0, 24], [0, 40, 18], [0, 0, 1]])
    right = torch.eye(4)
    right[0, 3] = -shift
    cameras = Cameras(
        torch.stack([torch.eye(4), right]), torch.stack([K, K]), ((48, 36),) * 2, ("a", "b")
    )
    photos = {
        "a": torch.rand(36, 48, 3, generator=torch.manual_seed(0)),
        "b": torch.zeros(36, 48, 3),
    }
    scene = Scene("wall", cameras, (Path("a"), Path("b")), None, photos)
    wall = torch.full((36, 48), 4.0)
    holed = wall.clone()
    holed[10:20, 20:30] = 0
    return scene, {"a": (holed, torch.ones(36, 48)), "b": (wall, torch.ones(36, 48))}


def test_points_lie_where_the_hole_is():
    scene, depths = two_views(0.5)
    points, colours = hole_points(scene, depths)
    assert len(points) == 6  # every fourth pixel: rows 12, 16; columns 20, 24, 28
    xy, z = project(points, scene.cameras.Ks[0], scene.cameras.viewmats[0])
    assert float((z - 4).abs().max()) < 1e-2
    column, row = xy.long().unbind(1)
    assert bool(((row >= 10) & (row < 20) & (column >= 20) & (column < 30)).all())
    assert torch.equal(colours, scene.image("a")[row, column])


def test_points_that_another_photo_sees_through_are_left_out():
    scene, depths = two_views(0.5)
    depths["b"] = (torch.full((36, 48), 8.0), torch.ones(36, 48))
    assert len(hole_points(scene, depths)[0]) == 0
    depths["b"] = (torch.full((36, 48), 2.0), torch.ones(36, 48))  # hidden there: no say
    assert len(hole_points(scene, depths)[0]) == 6


def test_seen_through_needs_a_surface_behind():
    scene, depths = two_views(0.0)
    points = torch.tensor(
        [[0.0, 0, 3.7], [0.0, 0, 3.9], [0.0, 0, 5.0], [9.0, 0, 1.0], [0.0, 0, -1]]
    )
    camera = [scene.cameras[1:]]
    # 7.5 % in front; 2.5 %; behind; beside the picture; behind the camera.
    assert seen_through(points, camera, depths).tolist() == [True, False, False, False, False]
