"""tools/layers.py and stage 3's --layers on the tiny scene: what they write, that they repeat, resume, and say what is wrong."""

import json

import pytest
import torch

import stage0_point_guidance
import stage3_3dgs_mixed_opt as stage3
from s2d.config import parse_config
from s2d.gaussians import Gaussians
from s2d.layers.levels import gaussians_of_level
from s2d.layers.manifest import load_levels
from tools import layers as tool

FLAGS = ["--layers", "3,1", "--layer-iters", "40", "--max-gaussians", "400", "--no-pseudo-views"]


def run_stage3(scene, out, *arguments):
    argv = ["-s", str(scene), "-m", str(out), *FLAGS, *arguments]
    return stage3.main(parse_config(stage3.Config, "stage3_3dgs_mixed_opt", argv))


@pytest.fixture(scope="module")
def finished(tiny_scene, tmp_path_factory):
    """Stage 0, then layers from its points alone: no stage 1, no stage 2."""
    out = tmp_path_factory.mktemp("layers") / "out"
    argv = ["-s", str(tiny_scene), "-m", str(out), "--preset", "tiny", "--keep-count", "4"]
    stage0_point_guidance.main(
        parse_config(stage0_point_guidance.Config, "stage0_point_guidance", argv)
    )
    run_stage3(tiny_scene, out)
    return out


def test_stage3_writes_layers_and_a_model_folder(finished):
    levels = load_levels(finished / "stage3" / "layers")
    assert [level.rescale for level in levels.levels] == [1 / 3, 1.0]
    assert all(level.metrics["psnr_kept"] > 8 for level in levels.levels)
    manifest = json.loads((finished / "stage3" / "manifest.json").read_text())
    assert manifest["info"]["levels"] == 2 and manifest["info"]["iteration"] == 80
    ply = Gaussians.load_ply(finished / "point_cloud/iteration_80/point_cloud.ply")
    last = gaussians_of_level(levels, 1)
    assert all(torch.equal(t, getattr(ply, name)) for name, t in last.tensors().items())
    assert len(list((finished / "stage3/renders").glob("*.png"))) == 4


def test_finished_layers_are_up_to_date_and_other_flags_are_named(finished, tiny_scene):
    before = (finished / "stage3" / "manifest.json").read_bytes()
    run_stage3(tiny_scene, finished)
    assert (finished / "stage3" / "manifest.json").read_bytes() == before
    with pytest.raises(ValueError, match="freeze: opacity, now all"):
        run_stage3(tiny_scene, finished, "--freeze", "all")


def test_pseudo_views_need_stage_2(finished, tiny_scene):
    argv = ["-s", str(tiny_scene), "-m", str(finished), "--layers", "2,1"]
    with pytest.raises(FileNotFoundError, match="stage1 is not finished"):
        stage3.main(parse_config(stage3.Config, "stage3_3dgs_mixed_opt", argv))
    argv = ["-s", str(tiny_scene), "-m", str(finished), "--foundation", "x"]
    with pytest.raises(ValueError, match="Pass --layers with it"):
        stage3.main(parse_config(stage3.Config, "stage3_3dgs_mixed_opt", argv))


def test_pack_merge_extract_info(finished, tmp_path, capsys):
    assert tool.main(["pack", "-m", str(finished), "-o", str(tmp_path / "packed")]) == 0
    packed = load_levels(tmp_path / "packed")
    assert packed.encoding.rows == "quantised" and packed.encoding.codec == "zstd"
    assert tool.main(["merge", "-m", str(finished), "-o", str(tmp_path / "plys")]) == 0
    plys = [str(tmp_path / "plys" / f"level_{k}.ply") for k in range(2)]
    extract = ["extract", *plys, "-o", str(tmp_path / "again"), "--rescales", "0.5,1"]
    assert tool.main(extract) == 0
    for name in ("rows_0.bin", "rows_1.bin", "opacity_1.bin"):
        original = finished / "stage3" / "layers" / name
        assert (tmp_path / "again" / name).read_bytes() == original.read_bytes()
    assert tool.main(["info", "-m", str(tmp_path / "again")]) == 0
    assert "0.5" in capsys.readouterr().out
    damaged = tmp_path / "again" / "rows_1.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert tool.main(["info", "-m", str(tmp_path / "again")]) == 2


def test_render_measures_test_views_at_their_own_resolution(finished, tmp_path):
    command = ["render", "-m", str(finished), "-o", str(tmp_path), "--views", "test"]
    assert tool.main(command) == 0
    quality = json.loads((tmp_path / "quality.json").read_text())
    assert set(quality) == {"0", "1"} and quality["0"]["psnr"] > 8
    assert len(list((tmp_path / "level_0_rescale_0.333333").glob("*.png"))) == 4
    assert tool.main([*command, "--level", "7"]) == 2
    novel = [
        "render",
        "-m",
        str(finished),
        "-o",
        str(tmp_path / "n"),
        "--views",
        "novel",
        "--level",
        "0",
    ]
    assert tool.main([*novel, "--rescale", "0.5"]) == 0
    assert len(list((tmp_path / "n" / "level_0_rescale_0.5").glob("*.png"))) == 4


def test_train_hands_its_flags_to_the_stages(monkeypatch):
    called = []
    monkeypatch.setattr(tool.subprocess, "run", lambda command, check: called.append(command[1:]))
    flags = ["--layers", "4,1", "--keep-count", "3", "--eval", "--layer-sh-cull", "--freeze", "all"]
    assert tool.main(["train", "-s", "S", "-m", "O", *flags]) == 0
    (stage0, *zeroth), (third, *rest) = called
    assert stage0.endswith("stage0_point_guidance.py") and third.endswith(
        "stage3_3dgs_mixed_opt.py"
    )
    assert zeroth == ["-s", "S", "-m", "O", "--keep-count", "3", "--eval"]
    cfg = parse_config(stage3.Config, "stage3_3dgs_mixed_opt", rest)
    assert cfg.layers == (4.0, 1.0) and cfg.freeze == "all" and cfg.layer_sh_cull
    assert not cfg.pseudo_views and cfg.max_gaussians == stage3.Config.max_gaussians
