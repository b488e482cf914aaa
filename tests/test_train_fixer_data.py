"""Training pairs: what is refused before training starts, and what a sample is."""

import json
import shutil

import pytest
import torch
from tiny_pairs import HEIGHT, WIDTH, write_pairs

from s2d.fixer.training.pairs import load_pairs
from s2d.fixer.training.samples import ImagePrep, PairSamples
from s2d.images import read_image, write_image
from s2d.runs.batches import Sharing, load_batches


@pytest.fixture(scope="module")
def clean_dataset(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def dataset(clean_dataset, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(clean_dataset, tmp_path / "pairs")


def names(paths):
    return [path.name for path in paths]


# --- what is refused ---------------------------------------------------------------------------------------------------


def remove_one(part):
    def spoil(dataset):
        (dataset / part / "scene_sparse_0003.png").unlink()

    return spoil


def cut_off(dataset):
    path = dataset / "train_B" / "scene_sparse_0002.png"
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(dataset):
    path = dataset / "train_P" / "scene_sparse_0002.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def no_picture(dataset):
    (dataset / "train_A" / "scene_sparse_0001.png").write_text("hello")


def cut_off_jpeg(dataset):
    for part in "ABP":
        folder = dataset / f"train_{part}"
        image = read_image(folder / "scene_sparse_0004.png")
        path = write_image(folder / "scene_sparse_0009.jpg", image)
    path.write_bytes(path.read_bytes()[:30])


def other_size(dataset):
    path = dataset / "train_P" / "scene_sparse_0005.png"
    write_image(path, read_image(path)[:, :-2])


def empty(split):
    def spoil(dataset):
        for part in "ABP":
            for path in (dataset / f"{split}_{part}").iterdir():
                path.unlink()

    return spoil


@pytest.mark.parametrize(
    ("spoil", "split", "words"),
    [
        (remove_one("train_B"), "train", ["train_A have no partner in", "train_B (first: scene_sparse_0003.png)", "add the"]),
        (remove_one("train_A"), "train", ["1 of 8 images in", "train_B have no partner in", "train_A (first: scene_sparse_0003"]),
        (remove_one("train_P"), "train", ["no partner in", "train_P (first: scene_sparse_0003.png)"]),
        (cut_off, "train", ["train_B/scene_sparse_0002.png is damaged", "Write it again"]),
        (flip_a_bit, "train", ["train_P/scene_sparse_0002.png is damaged"]),
        (no_picture, "train", ["train_A/scene_sparse_0001.png is not an image", "Replace the file"]),
        (cut_off_jpeg, "train", ["train_P/scene_sparse_0009.jpg is not an image"]),
        (other_size, "train", ["train_P/scene_sparse_0005.png is 46×40 and", "is 48×40", "resize them again"]),
        (empty("train"), "train", ["train_A is empty", "tools/make_fixer_pairs.py"]),
        (empty("test"), "test", ["test_A is empty", "--eval-freq 0 --viz-freq 0"]),
        (lambda dataset: shutil.rmtree(dataset / "test_B"), "test", ["No folder", "test_B", "--eval-freq 0"]),
    ],
)  # fmt: skip
def test_a_malformed_data_set_is_one_clear_message(dataset, spoil, split, words):
    load_pairs(dataset, split, window=10)
    spoil(dataset)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_pairs(dataset, split, window=10)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_an_image_smaller_than_the_window_is_named(dataset):
    pairs = load_pairs(dataset, "train", window=10)
    with pytest.raises(ValueError, match=r"scene_sparse_0000.png is 48×40, smaller than crop_64"):
        ImagePrep("crop", 64).check(pairs)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("crop_100", "multiples of 32. Pass crop_96"),
        ("resize_8", "Pass resize_32"),
        ("crop", "Expected resize_N, crop_N or none"),
    ],
)
def test_an_impossible_preparation_says_what_is_possible(text, words):
    with pytest.raises(ValueError, match=words):
        ImagePrep.parse(text, multiple=32)


# --- references --------------------------------------------------------------------------------------------------------


def test_references_are_near_frames_of_the_same_sequence(dataset):
    for part in "ABP":
        for name in ("other_x_0004.png", "single.png"):
            shutil.copy(dataset / f"train_{part}/scene_sparse_0000.png", dataset / f"train_{part}" / name)  # fmt: skip
    found = {pair.name: pair.references for pair in load_pairs(dataset, "train", window=2)}
    assert names(found["scene_sparse_0000.png"]) == [
        "scene_sparse_0001.png",
        "scene_sparse_0002.png",
    ]
    assert {path.parent.name for path in found["scene_sparse_0000.png"]} == {"train_B"}
    assert names(found["scene_sparse_0004.png"])[:2] == [
        "scene_sparse_0003.png",
        "scene_sparse_0005.png",
    ]
    assert found["other_x_0004.png"] == () == found["single.png"]


def test_frames_that_are_far_apart_take_any_of_their_sequence(dataset):
    for part in "ABP":
        for frame in (1, 2, 3, 5, 6, 7):
            (dataset / f"train_{part}/scene_sparse_{frame:04d}.png").unlink()
    found = {pair.name: pair.references for pair in load_pairs(dataset, "train", window=2)}
    assert names(found["scene_sparse_0004.png"]) == ["scene_sparse_0000.png"]


def test_a_listing_names_the_references(dataset):
    (dataset / "photos").mkdir()
    for frame in range(5):
        write_image(dataset / f"photos/scene_{frame:04d}.png", torch.full((30, 60, 3), 0.2 * frame))
    lines = [
        {"name": path.name, "references": [f"scene_{frame:04d}.png" for frame in (4, 2, 1, 0)]}
        for path in sorted((dataset / "train_A").iterdir())
    ]
    listing = dataset / "pairs.jsonl"
    listing.write_text("\n".join(map(json.dumps, lines)))
    pairs = load_pairs(dataset, "train", window=10)
    assert names(pairs[0].references) == ["scene_0004.png", "scene_0002.png", "scene_0001.png"]
    # Another size: scaled until it covers the view.
    sample = PairSamples(pairs, ImagePrep("crop", 32)).fixed_sample(0)
    assert torch.allclose(sample["reference"], torch.full((3, 32, 32), 0.6), atol=0.01)

    (dataset / "photos/scene_0001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"photos/scene_0001.png of scene_sparse_0000.png"):
        load_pairs(dataset, "train", window=10)
    listing.write_text(json.dumps(lines[1]))
    with pytest.raises(ValueError, match=r"does not know scene_sparse_0000.png"):
        load_pairs(dataset, "train", window=10)
    listing.write_text('{"name": 3')
    with pytest.raises(ValueError, match=r"line 1: not the description of a pair"):
        load_pairs(dataset, "train", window=10)


# --- samples -----------------------------------------------------------------------------------------------------------


def coordinate_dataset(folder):
    """Every image of a name holds its pixels' coordinates, the reference those of its own frame."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    for frame in range(5):
        picture = torch.stack([rows, columns, torch.full_like(rows, frame)], -1) / 255 + 1 / 255
        for part in "ABP":
            write_image(folder / f"train_{part}/x_{frame}.png", picture)
        # Covered left of the diagonal only.
        write_image(folder / f"train_M/x_{frame}.png", (rows > columns).float())
    return load_pairs(folder, "train", window=1)


def test_all_images_of_a_sample_show_one_window(tmp_path):
    samples = PairSamples(coordinate_dataset(tmp_path), ImagePrep("crop", 16))
    corners, mirrored = set(), set()
    for number in range(40):
        sample = samples[number]
        assert torch.equal(sample["rendered"], sample["target"])
        assert torch.equal(sample["rendered"], sample["guidance"])
        assert torch.equal(sample["rendered"][:2], sample["reference"][:2])
        rows, columns, frame = ((sample["rendered"] + 1) * 127.5).round() - 1
        assert torch.equal(sample["coverage_mask"][0], (rows > columns).float())
        distance = (((sample["reference"][2] + 1) * 127.5).round() - 1 - frame).abs()
        assert (distance == 1).all(), "the reference is a neighbour and never the frame itself"
        assert int(frame[0, 0]) == int(sample["position"])
        corners.add((int(rows.min()), int(columns.min())))
        mirrored.add(bool(columns[0, 0] > columns[0, 1]))
    assert len(corners) > 30
    assert mirrored == {True, False}
    assert {row for row, _ in corners} <= set(range(HEIGHT - 15))
    unmirrored = PairSamples(samples.pairs, samples.prep, flip=False)
    assert all((unmirrored[k]["rendered"][1, 0].diff() > 0).all() for k in range(10))


def test_without_guidance_it_is_black_and_without_reference_it_is_the_render(dataset):
    shutil.rmtree(dataset / "train_P")
    for part in "AB":
        for frame in range(1, 8):
            (dataset / f"train_{part}/scene_sparse_{frame:04d}.png").unlink()
    sample = PairSamples(load_pairs(dataset, "train", 10), ImagePrep("crop", 32))[0]
    assert (sample["guidance"] == -1).all()
    assert (sample["coverage_mask"] == 0).all()
    assert torch.equal(sample["reference"], sample["rendered"])


def test_resize_stretches_and_keeps_the_mask_hard(dataset):
    samples = PairSamples(load_pairs(dataset, "train", 10), ImagePrep("resize", 64))
    sample = samples[3]
    assert sample["rendered"].shape == (3, 64, 64)
    assert set(sample["coverage_mask"].unique().tolist()) == {0.0, 1.0}
    # Resizing a smooth picture keeps its mean: measured 0.004 off.
    whole = read_image(samples.pairs[int(sample["position"])].target).mean() * 2 - 1
    assert float(sample["target"].mean()) == pytest.approx(float(whole), abs=0.02)


def test_a_sample_depends_on_its_number_alone(clean_dataset):
    pairs = load_pairs(clean_dataset, "train", 10)
    prep = ImagePrep("crop", 16)
    forwards = PairSamples(pairs, prep, cache_bytes=2**20)
    in_order = [forwards[number] for number in range(20)]
    backwards = PairSamples(pairs, prep)
    for number in reversed(range(20)):
        sample = backwards[number]
        assert all(torch.equal(sample[key], in_order[number][key]) for key in sample)
    for epoch in (0, 1):
        drawn = [int(sample["position"]) for sample in in_order[8 * epoch : 8 * epoch + 8]]
        assert sorted(drawn) == list(range(8)), "every pair once per epoch"
    other = PairSamples(pairs, prep, seed=1)
    assert not torch.equal(other[0]["target"], in_order[0]["target"])


def test_a_small_cache_forgets_and_stays_small(clean_dataset):
    image_bytes = 3 * WIDTH * HEIGHT
    samples = PairSamples(
        load_pairs(clean_dataset, "train", 10), ImagePrep("crop", 16), cache_bytes=3 * image_bytes
    )
    for number in range(16):
        samples[number]
    kept = sum(image.nbytes for image in samples._cache.values())
    assert 0 < kept == samples._cached <= 3 * image_bytes


def test_processes_and_forward_passes_share_a_step_without_overlap(clean_dataset):
    whole = [list(Sharing(12).samples(step, 0)) for step in range(3)]
    for batch_size, num_micro, num_processes in ((3, 2, 2), (4, 3, 1), (4, 1, 3), (1, 1, 12)):
        for step in range(3):
            parts = [
                number
                for micro in range(num_micro)
                for process in range(num_processes)
                for number in Sharing(batch_size, num_micro, process, num_processes).samples(
                    step, micro
                )
            ]
            assert parts == whole[step]
    samples = PairSamples(load_pairs(clean_dataset, "train", 10), ImagePrep("crop", 16))
    batches = list(load_batches(samples, range(1, 3), Sharing(2), 0, torch.device("cpu")))
    assert len(batches) == 2
    assert torch.equal(batches[1]["target"][1], samples[5]["target"])
