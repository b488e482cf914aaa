"""What layers do about few photos, as stages 1 and 3 do: starts in holes, dropout, clearance, a backdrop."""

from dataclasses import replace

import pytest
import torch
from interrupted_layers import assert_same_bits, train_until

from s2d import backdrop as backdrop_module
from s2d.backdrop import NUM
from s2d.completion import FILL_SHARE
from s2d.geometry import fibonacci_sphere
from s2d.layers.options import LayerFlags, LayerPlan, plan_layers
from s2d.layers.task import LayerTask, TrainedLayers
from s2d.layers.training import new_rows, train_layers
from s2d.ply_io import PointCloud
from s2d.rasterize import rasterize
from s2d.scene import load_scene, retriangulate
from s2d.strategies.active import ActiveStrategies
from s2d.strategies.settings import Strategy
from s2d.views import View

BUDGET = 700


@pytest.fixture(scope="module")
def task(tiny_scene):
    scene = load_scene(tiny_scene)
    points, rgbs, _ = retriangulate(scene)
    return LayerTask(
        LayerFlags(layers=(3.0, 1.0), layer_iters=(120, 170)),
        lambda _, name: View(scene.cameras.select([name]), scene.image(name), None),
        scene.cameras,
        PointCloud(points, rgbs, None),
        scene_extent=3.0,
        guessed=(points + 0.437, 1 - rgbs),
        photos=scene,
        strategy=Strategy(dropout=0.3),
        backdrop=True,
        grad_threshold=1e-5,
        checkpoint_every=50,
    )


def train(task, scratch):
    scratch.mkdir(exist_ok=True)
    plan = plan_layers(task.flags, BUDGET)
    return train_layers(task, plan, TrainedLayers.load(None, 2), scratch)


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    return train(task, tmp_path_factory.mktemp("trained"))


def test_new_rows_start_in_holes_too(task):
    task = replace(task, guessed=(task.points.points + 1000, task.points.rgbs))
    layer = LayerPlan(1.0, 10, 0.2, 200)
    most = int(task.flags.layer_points * layer.budget)
    for share in (FILL_SHARE, 0.0):
        filled = replace(task, flags=replace(task.flags, layer_fill=share))
        rows = new_rows(filled, layer, 1, is_first=False)
        assert rows.num <= most
        assert int((rows.means[:, 0] > 900).sum()) == round(share * most)


def test_the_backdrop_is_part_of_the_first_layer_and_stays(task, trained):
    layers, run = trained
    first, second = layers.parts
    assert first.num > NUM and second.num <= 525
    sphere = slice(first.num - NUM, first.num)
    directions = torch.nn.functional.normalize(
        first.means[sphere] - task.kept.centers.mean(0), dim=1
    )
    # Measured 2e-7.
    torch.testing.assert_close(directions, fibonacci_sphere(NUM).float(), atol=1e-5, rtol=0)
    assert run.backdrop is None  # the second layer has it among its rows
    for name in ("means", "log_scales", "quats", "sh0", "shN"):
        assert torch.equal(getattr(run.gaussians, name)[sphere], getattr(first, name)[sphere])
    with torch.no_grad():
        seen = rasterize(run.gaussians.detached(), task.kept.select([task.kept.names[0]]))
    assert float(seen.alpha.min()) > 0.9  # without one 0


def test_one_layer_has_its_backdrop_once(task, tmp_path):
    one = replace(task, flags=LayerFlags(layers=(1.0,), layer_iters=(20,)))
    layers, run = train(one, tmp_path / "scratch")
    assert layers.parts[0].num == run.gaussians.num + run.backdrop.num
    assert torch.equal(layers.parts[0].means[-NUM:], run.backdrop.means)


def test_photos_and_cameras_of_the_backdrop_are_the_layers(task, tmp_path, monkeypatch):
    given = []

    def spy(gaussians, cameras, photos):
        given.extend(zip(cameras.sizes, photos, strict=True))
        return backdrop_module.backdrop(gaussians, cameras, photos)

    monkeypatch.setattr("s2d.training.backdrop", spy)
    train(replace(task, flags=replace(task.flags, layer_iters=(10,))), tmp_path / "scratch")
    for (size, photo), full in zip(given, task.kept.sizes, strict=True):
        assert size == (photo.shape[1], photo.shape[0]) == tuple(round(n / 3) for n in full)


def test_what_stands_in_the_way_goes_and_the_foundation_does_not(task, tmp_path, monkeypatch):
    """Every row is called in the way: new ones go as far as one may, those below stay."""
    monkeypatch.setattr(
        ActiveStrategies,
        "in_the_way",
        lambda _, gaussians: torch.arange(gaussians.num) % 2 == 0,
    )
    short = replace(task, flags=replace(task.flags, layer_iters=(30, 30)), backdrop=False)
    layers, run = train(short, tmp_path / "scratch")
    below = layers.parts[0]
    assert torch.equal(run.gaussians.means[: below.num], below.means)
    started = new_rows(short, plan_layers(short.flags, BUDGET)[1], 1, False).num
    assert layers.parts[1].num <= 0.5 * started + 1


@pytest.mark.parametrize("stop_at", [100, 120, 250])
def test_interrupted_they_end_with_the_same_bits(task, trained, tmp_path, monkeypatch, stop_at):
    """In the first layer in front of its backdrop, between the two, and in the second."""
    train_until(lambda: train(task, tmp_path), stop_at, 120, monkeypatch)
    layers, _ = train(task, tmp_path)
    assert_same_bits(layers, trained[0])
