"""`--init hier` and `--init depth` in the real stage 1: what they start from, that layers are left for stage 3, and flags that do not go together."""

import importlib

import pytest
import torch

from s2d.config import parse_config
from s2d.gaussians import load_checkpoint
from s2d.hier.config import HierConfig
from s2d.hier.model import HierModel
from s2d.hier.weights import save_model
from s2d.layers.levels import load_levels
from s2d.layers.task import initial_rows

MOST = 2000


def run(stage, scene, out, *arguments):
    script = importlib.import_module(stage)
    argv = ["-s", str(scene), "-m", str(out), *arguments]
    return script.main(parse_config(script.Config, stage, argv))


@pytest.fixture
def started(tiny_scene, tmp_path):
    out = tmp_path / "out"
    run("stage0_point_guidance", tiny_scene, out, "--keep-count", "4", "--eval")
    return out


def stage1(scene, out, *arguments):
    settings = ["--sample-iteration", "20", "--max-init-points", str(MOST), "--no-backdrop"]
    run("stage1_3dgs_init", scene, out, *settings, *arguments)
    return load_checkpoint(out / "chkpnt_stage1_20.pth")


def test_levels_are_what_training_starts_from_and_what_layers_find(started, tiny_scene):
    trained = stage1(tiny_scene, started, "--init", "depth")
    levels = load_levels(started / "stage1/layers")
    assert len(levels) == 3 and levels.sh_degree == 2
    first = initial_rows(started / "stage1/layers", 3, 2)
    assert 0.9 * MOST < sum(part.num for part in first) <= MOST
    # Twenty steps of at most 1.6e-4 scene extents each: the same rows, hardly moved. No density control so early.
    means = torch.cat([part.means for part in first])
    assert trained.gaussians.means.shape == means.shape
    moved = (trained.gaussians.means - means).norm(dim=1) / trained.scene_extent
    assert 0 < float(moved.max()) < 20 * 1.6e-4 * 3
    run("stage3_3dgs_mixed_opt", tiny_scene, started, "--layers", "4,2,1", "--layer-iters", "5", "--no-pseudo-views")  # fmt: skip
    assert len(load_levels(started / "stage3/layers")) == 3


def test_weights_give_another_start_and_count_as_input(started, tiny_scene, tmp_path):
    torch.manual_seed(0)
    weights = save_model(tmp_path / "w.safetensors", HierModel(HierConfig.named("tiny")), {})
    shipped = stage1(tiny_scene, started, "--init", "hier")
    own = ("--init", "hier", "--hier-weights", str(weights))
    with pytest.raises(ValueError, match="hier weights"):
        stage1(tiny_scene, started, *own)
    other = stage1(tiny_scene, started, *own, "--overwrite")
    assert not torch.equal(other.gaussians.means[:100], shipped.gaussians.means[:100])


def test_flags_that_do_not_go_together(started, tiny_scene, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.*--init depth"):
        stage1(tiny_scene, started, "--init", "hier", "--hier-weights", str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="--init hier"):
        stage1(tiny_scene, started, "--hier-weights", str(started))
