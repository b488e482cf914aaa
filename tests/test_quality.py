"""`tools/benchmark.py quality`: which flags reach the stages, what is compared with what, and that it goes on where it was."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import quality, quality_tables, results
from benchmarks.fixer import weights_for
from benchmarks.quality import DEFAULT, Quality, Setting
from s2d.config import CONFIG_DIR, parse_config
from s2d.fixer.choice import choose_fixer
from s2d.images import read_image, write_image
from s2d.model_folder import render_name
from s2d.scene import load_scene
from s2d.split import Split


def scores(psnr, lpips=None, num=10):
    return {"psnr": psnr, "ssim": 0.5, "lpips": lpips, "num_gaussians": num}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "quality").iterdir()))
def test_the_variants_of_the_repository_are_flags_of_the_stages(name):
    variants = quality.read_variants(Quality(variants=name))
    assert next(iter(variants)) == DEFAULT and variants[DEFAULT] == {}
    assert len(variants) > (10 if name == "strategies" else 1)
    for stage, script in quality.STAGES.items():
        for flags in variants.values():
            mine = quality.own_flags(stage, flags)
            argv = quality.arguments({"source": "a", "model_dir": "b", **mine})
            cfg = quality.parse_config(script.Config, script.__name__, argv)
            if script is not quality.stage2:  # which checks its flags as it goes
                script.check_config(cfg)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {droput: 0.2}", "a: none of stages 1, 2 and 3 has a flag droput"),
        (
            "a: {stage3: {sample_iteration: 5}}",
            "none of stages 1, 2 and 3 has a flag sample_iteration for stage3",
        ),
        ("- a", "expected lines"),
        ("a: 3", "expected lines"),
        ("a: {stage3: 3}", "expected lines"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        quality.read_variants(Quality(variants=str(path)))


def test_an_unknown_variant_lists_what_there_is():
    with pytest.raises(ValueError, match=r"has no variant dropuot. Expected: default, dropout"):
        quality.read_variants(Quality(only=("dropuot",)))
    assert list(quality.read_variants(Quality(only=("mcmc",)))) == [DEFAULT, "mcmc"]


def test_a_flag_of_two_stages_can_be_set_in_one():
    flags = {"max_gaussians": 7, "alpha": 0.5, "stage3": {"max_gaussians": 9}}
    own = {stage: quality.own_flags(stage, flags) for stage in quality.STAGES}
    assert own["stage1"] == {"max_gaussians": 7} and own["stage2"] == {}
    assert own["stage3"] == {"max_gaussians": 9, "alpha": 0.5}


def test_flags_as_a_command_line_has_them():
    assert quality.arguments({"densify": False, "smoothing": True, "max_scale": 0.1}) == [
        "--no-densify", "--smoothing", "--max-scale", "0.1",
    ]  # fmt: skip


def test_scale_one_changes_nothing_and_less_shrinks_schedule_and_budget():
    assert quality.scaled_flags("stage1", 1.0, 3) == {}
    flags = quality.scaled_flags("stage1", 0.25, 3)
    assert flags["sample_iteration"] == 625 and flags["max_gaussians"] == 15000
    assert flags["densify_from"] == 125 and flags["densify_every"] == 25
    assert quality.scaled_flags("stage1", 0.25, 6)["sample_iteration"] == 1000
    assert quality.scaled_flags("stage3", 0.25, 6)["steps"] == 1125


def test_differences_are_paired_by_setting_and_seed():
    easy, hard = Setting("easy", 3), Setting("hard", 3)
    runs = {
        easy: {DEFAULT: {0: scores(30.0, 0.1), 1: scores(31.0, 0.1)}, "a": {0: scores(31.0, 0.2)}},
        hard: {DEFAULT: {0: scores(10.0, 0.3)}, "a": {0: scores(13.0, 0.2)}},
    }
    # Seed 1 has no counterpart: 31 - 30, not 31 - 30.5.
    assert quality_tables.paired(runs[easy], "a", "psnr") == pytest.approx(1.0)
    table = quality_tables.paired_table(runs)
    # Mean of 1 and 3; their standard deviation 1.41 over the root of 2.
    assert "| a | +1.00 | +3.00 | +2.00 ± 1.00 | 2 of 2 | +0.0000 ± 0.1000 |" in table
    assert "| easy 3 | hard 3 |" in table
    assert "\n| --- | ---: | ---: |" in table


def test_means_are_over_settings_that_all_variants_have():
    a, b = Setting("a", 3), Setting("b", 6)
    runs = {
        a: {DEFAULT: {0: scores(20.0), 1: scores(22.0)}, "x": {0: scores(23.0)}},
        b: {DEFAULT: {0: scores(90.0)}},
    }
    table = quality_tables.mean_table(runs)
    assert "Means over 1 settings (a 3)" in table
    assert "| default | 21.00 ± 1.41 | 0.500 ± 0.000 | – | 10 |" in table
    assert "| x | 23.00 | 0.500 | – | 10 |" in table


def test_what_stage3_adds_is_a_table_where_it_was_run():
    runs = {
        Setting("a", 3): {DEFAULT: {0: {**scores(21.0, 0.2), "stage1": scores(20.0, 0.3)}}},
        Setting("b", 6): {DEFAULT: {0: {**scores(30.0, 0.1), "stage1": scores(30.5, 0.1)}}},
    }
    text = quality_tables.tables(runs)
    assert "| a 3 | 20.00 → 21.00 / 0.300 → 0.200 |" in text
    # Ratios 2/3 and 1, the root of their product 0.816.
    assert "| gain | +0.25 ± 0.75, 1 of 2 / -18.4% |" in text
    assert "Novel views" not in text
    del runs[Setting("a", 3)][DEFAULT][0]["stage1"], runs[Setting("b", 6)][DEFAULT][0]["stage1"]
    assert "→" not in quality_tables.tables(runs)


def test_what_the_fixer_adds_is_a_table_where_photos_show_the_novel_views():
    stages = {"stage1": scores(20.0, 0.4), "stage2": scores(20.5, 0.3), "stage3": scores(20.4, 0.2)}
    runs = {
        Setting("a", 3): {DEFAULT: {0: {**scores(21.0, 0.2), "novel": stages}}},
        Setting("b", 6): {DEFAULT: {0: scores(30.0, 0.1)}},  # no photos there
    }
    text = quality_tables.tables(runs)
    assert "| a 3 | 20.00 → 20.50 → 20.40 / 0.400 → 0.300 → 0.200 |" in text
    assert "| b 6 | – |" in text and "| gain | +0.50, 1 of 1 / -25.0% |" in text
    assert "final scene" not in text


def test_weights_are_those_that_have_not_seen_the_scene():
    weights = ("w/a.safetensors:fern,fox", "w/b.safetensors:lund")
    assert weights_for(weights, "lund") == Path("w/b.safetensors")
    assert weights_for((), "lund") is None
    # As a command line that cuts lists at commas hands them on.
    argv = ["--weights", *weights]
    assert weights_for(parse_config(results.Config, "results", argv).weights, "fox") == Path(
        "w/a.safetensors"
    )
    with pytest.raises(ValueError, match="expected FILE:SCENE,SCENE, got fern"):
        weights_for(("fern",), "fern")
    with pytest.raises(ValueError, match="none for kitchen"):
        weights_for(weights, "kitchen")


def test_weights_are_tried_as_the_shipped_ones_are(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(quality, "run_script", lambda _, flags: calls.append(flags))
    weights = tmp_path / "b.safetensors"
    weights.touch()
    quality.repair(tmp_path, weights, 0, {"trial_views": 0, "alpha": 1})
    quality.repair(tmp_path, weights, 0, {"trial_steps": 5})
    untried, tried = calls
    assert untried["weights"] == weights and untried["trial_views"] == 0
    assert not {"alpha", "expected_gain"} & set(untried)
    shipped = choose_fixer("compact", {}).expected
    given = choose_fixer("compact", {"weights": weights}).with_expectation(
        tried["expected_gain"], tried["expected_spread"]
    )
    assert tried["trial_steps"] == 5 and given.expected == shipped


def test_the_command_runs_each_variant_once(tiny_scene, tmp_path, monkeypatch, capsys):
    cfg = Quality(
        only=("dropout_strong",), scenes=(tiny_scene.name,), keep=(4,), seeds=(0,), scale=0.01, lpips="none",
        data_dir=tiny_scene.parent, out_dir=tmp_path / "out", table=tmp_path / "table.md",
    )  # fmt: skip
    text = quality.main(cfg)
    assert text == (tmp_path / "table.md").read_text()
    assert "| dropout_strong |" in text and "– |" in text  # no LPIPS
    folder = tmp_path / "out" / f"{tiny_scene.name}_4_s0"
    assert (folder / "dropout_strong/stage0/manifest.json").samefile(
        folder / "base/stage0/manifest.json"
    )
    found = json.loads((folder / "dropout_strong/scores.json").read_text())
    assert found["key"]["flags"] == {"dropout": 0.4}
    assert 5 < found["psnr"] < 40
    manifest = json.loads((folder / "dropout_strong/stage1/manifest.json").read_text())
    assert manifest["config"]["dropout"] == 0.4 and manifest["config"]["sample_iteration"] == 30
    monkeypatch.setattr(quality, "run_script", pytest.fail)  # all is there
    assert quality.main(cfg) == text


def test_a_variant_of_later_stages_goes_on_from_the_defaults(tiny_scene, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("photos: {alpha: 1}\nunmixed: {guidance_share: 0}\n")
    cfg = Quality(
        variants=str(mine), scenes=(tiny_scene.name,), keep=(4,), seeds=(0,), scale=0.01, lpips="none",
        data_dir=tiny_scene.parent, out_dir=tmp_path / "out",
    )  # fmt: skip
    for _ in range(2):  # also over what an earlier run has left
        text = quality.main(cfg)
        folder = tmp_path / "out" / f"{tiny_scene.name}_4_s0"
        for stage in ("stage1", "stage2"):
            assert (folder / "photos" / stage).samefile(folder / "default" / stage)
        assert (folder / "unmixed/stage1").samefile(folder / "default/stage1")
        assert not (folder / "unmixed/stage2").is_symlink()
        (folder / "photos/scores.json").unlink()
    gains = text[text.index("Stage 1 →") :]
    cells = [cell.split(" → ")[0] for cell in gains.splitlines()[4].split("|")[2:5]]
    assert len(set(cells)) == 1  # one stage 1
    manifest = json.loads((folder / "unmixed/stage2/manifest.json").read_text())
    assert manifest["config"]["guidance_share"] == 0 and manifest["config"]["trial_views"] == 0
    before = (folder / "default/stage2/manifest.json").read_bytes()
    mine.write_text("photos: {alpha: 1, guidance_share: 0}\n")
    quality.main(cfg)  # a stage 2 of its own now, beside the default's
    assert not (folder / "photos/stage2").is_symlink()
    assert (folder / "default/stage2/manifest.json").read_bytes() == before


def test_novel_views_are_scored_with_the_photos_that_no_stage_has_read(tiny_scene, tmp_path):
    photos, out = load_scene(tiny_scene), tmp_path / "out"
    test, *novel = photos.names[:3]
    split = Split(
        kept=tuple(photos.names[4:]), novel=(*novel, "planned"), test=(test,), protocol="eval"
    )
    (out / "stage0").mkdir(parents=True)
    split.save(out / "stage0/split.json")
    for index, folder in enumerate(quality.NOVEL_PICTURES.values()):
        for name in novel:
            error = (index + 1) / 16
            picture = photos.image(name) * (1 - 2 * error) + error  # between the two ends
            write_image(out / folder / render_name(name), picture)
    found = quality.score_novel(out, tiny_scene, None)
    assert list(found) == list(quality.NOVEL_PICTURES)
    for stage, folder in quality.NOVEL_PICTURES.items():
        errors = [
            (read_image(out / folder / render_name(name)) - photos.image(name)).square().mean()
            for name in novel
        ]
        expected = sum(-10 * error.log10() for error in errors) / len(errors)
        assert found[stage]["psnr"] == pytest.approx(float(expected), abs=1e-3)
        assert found[stage]["num_views"] == len(novel) and found[stage]["lpips"] is None
    assert found["stage1"]["psnr"] > found["stage2"]["psnr"] > found["stage3"]["psnr"]
    dataclasses.replace(split, novel=("planned",)).save(out / "stage0/split.json")
    assert quality.score_novel(out, tiny_scene, None) == {}
