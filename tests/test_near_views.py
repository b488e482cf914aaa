"""How much of the fixer's change stays in views that are near to kept photos: closed forms and invariances."""

import pytest
import torch

from s2d.cameras import Cameras
from s2d.ensemble import disagreement
from s2d.fixer.near_views import distance_shares, write_faded
from s2d.images import read_image, write_image

HALF_STEP = 0.5 / 255 + 1e-6  # of what 8 bits tell apart


def cameras(places, unit=1.0):
    """Side by side on a line, looking the same way."""
    viewmats = torch.eye(4).repeat(len(places), 1, 1)
    viewmats[:, 0, 3] = -unit * torch.tensor(places)
    intrinsics = torch.tensor([[50.0, 0, 32], [0, 50.0, 24], [0, 0, 1]]).repeat(len(places), 1, 1)
    names = tuple(f"{row}.png" for row in range(len(places)))
    sizes = torch.tensor([[64, 48]]).repeat(len(places), 1)
    return Cameras(names=names, viewmats=viewmats, Ks=intrinsics, sizes=sizes)


def test_shares_are_distances_in_gaps_between_photos():
    kept = cameras([0.0, 1.0, 2.0, 5.0])  # nearest neighbours 1, 1, 1 and 3 away: 1.5 on average
    novel = cameras([0.0, 0.3, 1.5, 3.5, 9.0])
    expected = [0.0, 0.2, 1 / 3, 1.0, 1.0]
    assert distance_shares(novel, kept).tolist() == pytest.approx(expected, abs=1e-5)
    larger = distance_shares(
        cameras([0.0, 0.3, 1.5, 3.5, 9.0], 7.0), cameras([0.0, 1.0, 2.0, 5.0], 7.0)
    )
    assert larger.tolist() == pytest.approx(expected, abs=1e-5)
    assert distance_shares(novel, cameras([1.0, 1.0]))[1:].eq(1).all()  # both in one place


def test_a_view_from_a_kept_place_that_looks_aside_is_not_near():
    kept, novel = cameras([0.0, 1.0]), cameras([0.0])
    turn = torch.tensor(1.2)
    novel.viewmats[0, :3, :3] = torch.tensor(
        [[turn.cos(), 0, turn.sin()], [0, 1, 0], [-turn.sin(), 0, turn.cos()]]
    )
    assert distance_shares(novel, kept).item() > 0.5


def test_the_change_stays_by_distance_or_by_disagreement(tmp_path, generator):
    """Left half: the models agree, right half: they differ by far more than it takes."""
    base = 0.3 + 0.2 * torch.rand(40, 160, 3, generator=generator)
    other = base.clone()
    other[:, 80:] += 0.3
    rendered, fixed = [base, other], [base + 0.1, other + 0.2]
    names = ("near.png", "between.png", "far.png")
    shares = dict(zip(names, (0.0, 0.4, 1.0), strict=True))
    folders = [[tmp_path / kind / str(model) for model in range(2)] for kind in ("render", "fixed")]
    for paths, pictures in zip(folders, (rendered, fixed), strict=True):
        for path, picture in zip(paths, pictures, strict=True):
            for name in names:
                write_image(path / name, picture)
    write_faded(*folders, shares, tmp_path / "out")
    out = {name: read_image(tmp_path / "out" / name) for name in names}
    mean, change = (base + other) / 2, 0.15
    for name, share in shares.items():
        left = (out[name] - mean)[:, :75]
        assert (left - share * change).abs().max() <= 3 * HALF_STEP  # read, read, written
        right = (out[name] - mean)[:, 85:]
        assert (right - change).abs().max() <= 3 * HALF_STEP
    seam = disagreement(torch.stack(rendered))[:, 75:85]
    assert seam.min() == 0 and seam.max() == 1  # both sides of it
