"""Protocol files: every one loads, chooses the published views, and ends in a table with the published numbers."""

import json

import pytest
import torch
import yaml

from benchmarks import protocols
from benchmarks.protocols import PROTOCOLS, Protocols, load_protocol, longest_side, view_flags
from s2d.images import write_image
from s2d.split import read_split_file


@pytest.fixture
def scene(tmp_path):
    """49 photos of 40×30, as many as a scan of DTU has."""
    for row in range(49):
        write_image(
            tmp_path / "data" / "scan8" / "images" / f"{row:03d}.png", torch.zeros(30, 40, 3)
        )
    return tmp_path / "data" / "scan8"


@pytest.mark.parametrize("path", sorted(PROTOCOLS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_is_a_protocol(path):
    protocol = load_protocol(path.stem)
    assert load_protocol(str(path)) == protocol
    for method, values in protocol.published.items():
        assert set(values) <= set(protocol.views), method
        for scores in values.values():
            assert 5 < scores[0] < 40 and all(0 < score < 1 for score in scores[1:])


def chosen(flags, scene):
    names = sorted(path.name for path in (scene / "images").iterdir())
    split = read_split_file(flags[flags.index("--split-file") + 1], names)
    return [int(name[:3]) for name in split.kept], [int(name[:3]) for name in split.test]


def test_dtu_keeps_and_scores_the_published_photos(scene, tmp_path):
    protocol = load_protocol("dtu")
    kept, test = chosen(view_flags(protocol, scene, 3, tmp_path / "out"), scene)
    assert kept == [22, 25, 28]
    six, same = chosen(view_flags(protocol, scene, 6, tmp_path / "out"), scene)
    assert six == [22, 25, 28, 40, 44, 48] and same == test, (
        "scored views do not depend on the kept ones"
    )
    assert len(test) == 25 and not {3, 16, 36, 39, 13, 0} & set(test)
    assert longest_side(protocol, scene) == 10


def test_uniform_keeps_among_all_and_scores_every_eighth_of_the_rest(scene, tmp_path):
    kept, test = chosen(view_flags(load_protocol("dl3dv"), scene, 3, tmp_path / "out"), scene)
    assert kept == [0, 24, 48]
    rest = [row for row in range(49) if row not in kept]
    assert test == rest[::8]
    assert longest_side(load_protocol("dl3dv"), scene) == 960


def test_published_lists_are_read_from_the_scene(scene, tmp_path):
    flags = view_flags(load_protocol("mipnerf360_reconfusion"), scene, 6, tmp_path)
    assert flags == ["--split-file", scene / "train_test_split_6.json"]
    flags = view_flags(load_protocol("llff"), scene, 3, tmp_path)
    assert flags == ["--eval", "--test-every", 8, "--keep-count", 3]


def test_the_table_has_theirs_and_ours(scene, tmp_path, monkeypatch, capsys):
    calls = []

    def run_stages(source, folder, seed, views, scoring, repair, preset):
        calls.append((folder.name, list(scoring)))
        folder.mkdir(parents=True, exist_ok=True)
        test = {"psnr": 18.0 + seed, "ssim": 0.8, "lpips_vgg": None}
        (folder / "results.json").write_text(json.dumps({"stages": {"stage3": {"test": test}}}))

    monkeypatch.setattr(protocols, "run_stages", run_stages)
    cfg = Protocols("dtu", scene.parent, tmp_path / "out", seeds=(0, 1), views=(3,), table=tmp_path / "t.md")  # fmt: skip
    protocols.main(cfg)
    assert [name for name, _ in calls] == ["scan8_3_s0", "scan8_3_s1"]
    assert calls[0][1] == ["--lpips", "vgg", "--mask-dir", scene / "mask"]
    text = (tmp_path / "t.md").read_text()
    assert "| 3DGS | 17.65 / 0.816 / 0.146 |" in text
    assert "| **S2D**, 1 scenes | 18.50 / 0.800 / – ± 0.71 dB |" in text
    assert text.strip() in capsys.readouterr().out


def test_what_is_wrong_is_said(scene, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No protocol x\. Known: dl3dv, dtu, llff"):
        load_protocol("x")
    with pytest.raises(FileNotFoundError, match="holds no scene of LLFF"):
        protocols.main(Protocols("llff", scene.parent))
    values = yaml.safe_load((PROTOCOLS / "dtu.yaml").read_text())
    for change, words in (
        ({"size": 3}, "size.*Known keys"),
        ({"max_side": 100}, "one of downscale and max_side"),
        ({"kept": [1, 2]}, "kept lists 2"),
    ):
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({**values, **change}))
        with pytest.raises(ValueError, match=words):
            load_protocol(str(path))
