"""Chunks in the published layout: what is read, in which order, and what a damaged one says."""

import json
import pickle

import numpy as np
import pytest
import torch
from tiny_captures import HEIGHT, LENS, WIDTH, chunk_entry, video_viewmats, write_chunks
from tiny_scene import render

from s2d.hier.data.chunks import OPEN_CHUNKS, ChunkFolder, is_chunk_root, load_chunk
from s2d.hier.data.samplers import ArbitrarySampler
from s2d.lenses import Lens


@pytest.fixture
def root(tmp_path):
    return write_chunks(tmp_path / "chunks")


def folder_of(root, split="train"):
    return ChunkFolder(root, split, ArbitrarySampler())


def test_a_scene_is_read_as_it_was_written(root):
    assert is_chunk_root(root)
    folder = folder_of(root)
    assert folder.keys == ("aa", "bb", "cc")
    capture = folder.find("cc")
    assert len(capture) == 12
    assert torch.allclose(capture.viewmats.double(), video_viewmats(12), atol=1e-6)
    assert (capture.near == 1).all() and (capture.far == 100).all()
    assert len(capture.seen_points(0)) == 0
    picture, K = capture.picture(3, (WIDTH, HEIGHT))
    pixels = (LENS[0] * WIDTH, LENS[1] * HEIGHT, LENS[2] * WIDTH, LENS[3] * HEIGHT)
    truth = render(video_viewmats(12)[3], Lens("PINHOLE", WIDTH, HEIGHT, pixels), 1)
    assert torch.equal(picture, (truth.permute(2, 0, 1) * 255).round().to(torch.uint8))
    assert K[0, 0] == pytest.approx(pixels[0]) and K[1, 2] == pytest.approx(pixels[3])


def test_a_range_in_the_chunk_wins(root):
    entry = chunk_entry("dd", 3)
    entry |= {"near": torch.tensor([1.0, 2.0, 3.0]), "far": torch.full((3,), 9.0)}
    torch.save([entry], root / "train/000002.torch")
    index = json.loads((root / "train/index.json").read_text())
    (root / "train/index.json").write_text(json.dumps({**index, "dd": "000002.torch"}))
    assert folder_of(root).find("dd").near.tolist() == [1.0, 2.0, 3.0]


def test_every_scene_comes_once_and_few_chunks_are_open(tmp_path):
    folder = tmp_path / "many/train"
    folder.mkdir(parents=True)
    index = {f"scene{k}": f"{k % 20:06d}.torch" for k in range(100)}
    (folder / "index.json").write_text(json.dumps(index))
    chunks = folder_of(tmp_path / "many")
    order = chunks.order(np.random.default_rng(0))
    assert sorted(order) == list(range(100))
    assert not np.array_equal(order, chunks.order(np.random.default_rng(1)))
    per_group = 5 * OPEN_CHUNKS
    for start in range(0, 100, per_group):
        files = {index[chunks.keys[row]] for row in order[start : start + per_group]}
        assert len(files) <= OPEN_CHUNKS


def test_wide_cameras_are_not_trained_on(root):
    folder = folder_of(root)
    assert folder.is_usable(folder.capture(0))
    torch.save([chunk_entry("cc", 2, (0.3, 0.4, 0.5, 0.5))], root / "train/000001.torch")
    wide = folder_of(root).find("cc")
    assert wide.field_of_view == pytest.approx(118.07, abs=0.01)  # 2 atan(0.5 / 0.3)
    assert not folder.is_usable(wide)


@pytest.mark.parametrize("half", [0, 200, 5000])
def test_a_chunk_that_is_cut_off_says_so(root, half):
    path = root / "train/000001.torch"
    path.write_bytes(path.read_bytes()[:half])
    with pytest.raises(ValueError, match=r"000001\.torch is damaged, or is no chunk .*Fetch"):
        folder_of(root).find("cc")


def test_nothing_in_a_chunk_is_executed(root, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = root / "train/000001.torch"
    path.write_bytes(pickle.dumps([Payload()]))
    with pytest.raises(ValueError, match="damaged, or is no chunk"):
        load_chunk(path)
    torch.save([Payload()], path)
    with pytest.raises(ValueError, match="damaged, or is no chunk"):
        load_chunk(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": torch.zeros(12, 12)}, r"cameras of scene cc are not \[N, 18\]"),
        ({"images": []}, "0 images and 12 cameras"),
        ({"cameras": torch.full((12, 18), torch.nan)}, "not finite"),
    ],
)
def test_a_scene_of_another_form_says_what_is_wrong(root, change, message):
    torch.save([chunk_entry("cc") | change], root / "train/000001.torch")
    with pytest.raises(ValueError, match=message):
        folder_of(root).find("cc")


def test_a_damaged_frame_is_named(root):
    entry = chunk_entry("cc")
    entry["images"][5] = entry["images"][5][:40]
    torch.save([entry], root / "train/000001.torch")
    capture = folder_of(root).find("cc")
    capture.picture(4, (16, 16))
    with pytest.raises(ValueError, match=r"frame 5 of scene cc is not an image.*\(40 bytes\)"):
        capture.picture(5, (16, 16))


def test_missing_files_say_what_to_do(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test/index\.json.*convert_hier_data\.py index"):
        folder_of(root, "test")
    (root / "train/000001.torch").unlink()
    with pytest.raises(FileNotFoundError, match=r"No chunk .*000001\.torch"):
        folder_of(root).find("cc")
    (root / "train/index.json").write_text("[]")
    with pytest.raises(ValueError, match="at least one line"):
        folder_of(root)


def test_chunks_of_the_old_file_format_are_read_too(root):
    torch.save(
        [chunk_entry("cc", 2)], root / "train/000001.torch", _use_new_zipfile_serialization=False
    )
    assert len(folder_of(root).find("cc")) == 2
