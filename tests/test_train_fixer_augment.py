"""Other sizes, other colours, other splits: what makes more of few scenes."""

import shutil

import numpy as np
import pytest
import torch
from tiny_pairs import write_pairs

from s2d.fixer.training.augment import (
    guided_columns,
    recolour,
    recolouring,
    shrink,
    window_size,
)
from s2d.fixer.training.losses import log_error
from s2d.fixer.training.pairs import load_pairs, load_splits
from s2d.fixer.training.samples import ImagePrep, PairSamples
from s2d.metrics import psnr

IMAGES = ("rendered", "guidance", "reference", "target")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two scenes: `scene`, and `other_house` with an underscore in its name."""
    folder = write_pairs(tmp_path_factory.mktemp("pairs"))
    for path in sorted(folder.rglob("scene_sparse_*.png")):
        for scene in ("other_house", "scene"):
            name = path.name.replace("scene_sparse", f"{scene}_sparse-k3-s0")
            shutil.copy(path, path.with_name(name))
        path.unlink()
    return folder


def test_windows_cover_the_range_and_stay_inside():
    generator = np.random.default_rng(0)
    drawn = [window_size(32, 0.5, 60, generator) for _ in range(400)]
    assert min(drawn) == 32 and max(drawn) == 60  # 64 would not fit
    assert np.mean(drawn) == pytest.approx(32 * 2 * np.log(2), rel=0.05)  # of 1 / uniform
    before = generator.bit_generator.state["state"]
    assert window_size(32, 1.0, 60, generator) == 32
    assert generator.bit_generator.state["state"] == before, "nothing drawn where nothing changes"


def test_shrinking_keeps_the_mean_and_hard_masks(generator):
    image = (torch.rand(3, 48, 48, generator=generator) * 255).to(torch.uint8)
    small = shrink(image, 16, is_mask=False)
    assert small.shape == (3, 16, 16)
    assert small.float().mean() == pytest.approx(image.float().mean().item(), abs=1.5)  # 0.6
    assert small.float().std() < 0.6 * image.float().std(), "noise must be averaged away"
    mask = (image[:1] > 100).to(torch.uint8) * 255
    assert set(shrink(mask, 16, is_mask=True).unique().tolist()) == {0, 255}
    assert shrink(image, 48, is_mask=False) is image


def test_colours_change_monotonically_within_the_range():
    generator = np.random.default_rng(1)
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    for _ in range(50):
        table = recolouring(0.2, generator)
        assert torch.equal(recolour(ramp, table)[:, 0], table)
        assert (table[:, 0] == 0).all() and (table.int().diff(dim=1) >= 0).all()
        # Gains of 1.2 · sqrt(1.2) and a gamma between sqrt(0.8) and sqrt(1.2) at 1/2.
        low, high = 0.8 * 0.8**0.5 * 0.5 ** (1.2**0.5), 1.2 * 1.2**0.5 * 0.5 ** (0.8**0.5)
        middle = table[:, 128].float() / 255
        assert (middle > low - 0.01).all() and (middle < high + 0.01).all()


def test_guidance_is_taken_away_as_often_as_asked(dataset):
    generator = np.random.default_rng(2)
    kept = [len(range(100)[guided_columns(100, 0.2, generator)]) for _ in range(2000)]
    # 2000 draws: the standard deviation of a share of 0.2 is 0.009
    assert np.mean(np.array(kept) == 0) == pytest.approx(0.2, abs=0.03)
    assert np.mean(np.array(kept) == 100) == pytest.approx(0.6, abs=0.04)
    partial = [count for count in kept if 0 < count < 100]
    assert np.mean(partial) == pytest.approx(50, abs=5)
    samples = PairSamples(
        load_pairs(dataset, "train", 5), ImagePrep("crop", 24), flip=False, guidance_dropout=0.5
    )
    whole = PairSamples(samples.pairs, samples.prep, flip=False)
    emptied = 0
    for number in range(12):
        sample, before = samples[number], whole[number]
        without = ~sample["coverage_mask"].bool()
        assert (sample["guidance"].masked_select(without.expand(3, -1, -1)) == -1).all()
        for key in ("rendered", "reference", "target"):
            assert torch.equal(sample[key], before[key])
        columns = sample["coverage_mask"].any(dim=(0, 1))
        assert torch.equal(sample["guidance"][..., columns], before["guidance"][..., columns])
        emptied += int(not columns.any() and before["coverage_mask"].any())
    assert 0 < emptied < 12


def test_all_images_of_a_sample_are_treated_alike(dataset):
    """Where all five pictures are one, they are one after cutting, shrinking, mirroring and recolouring."""
    pairs = [pair for pair in load_pairs(dataset, "train", 5) if pair.scene == "scene"]
    same = [
        type(pair)(
            pair.name, pair.target, pair.target, pair.target, None, (pair.target,), pair.size
        )
        for pair in pairs
    ]
    samples = PairSamples(
        tuple(same), ImagePrep("crop", 24), min_scale=0.6, colour_jitter=0.3, flip=True
    )
    plain = PairSamples(tuple(same), ImagePrep("crop", 24))
    for number in range(8):
        sample = samples[number]
        assert all(torch.equal(sample[key], sample["target"]) for key in IMAGES)
        assert sample["target"].shape == (3, 24, 24)
        assert torch.equal(samples[number]["target"], sample["target"]), "a function of its number"
        assert not torch.equal(plain[number]["target"], sample["target"])


def test_test_scenes_are_taken_from_either_folder(dataset):
    train, test = load_splits(dataset, 5, ("other_house",), with_test=True)
    assert {pair.scene for pair in train} == {"scene"}
    assert {pair.scene for pair in test} == {"other_house"}
    folders = {pair.rendered.parent.name for pair in test}
    assert folders == {"train_A", "test_A"}
    as_they_lie = load_splits(dataset, 5, (), with_test=True)
    assert len(train) + len(test) == sum(map(len, as_they_lie))
    assert load_splits(dataset, 5, (), with_test=False)[1] == ()


@pytest.mark.parametrize(
    ("scenes", "words"),
    [
        (
            ("garden",),
            "--test-scenes garden: .* has no pair of that scene. It has other_house, scene",
        ),
        (("scene", "other_house"), "none is left to train on"),
    ],
)
def test_impossible_test_scenes_say_what_there_is(dataset, scenes, words):
    with pytest.raises(ValueError, match=words):
        load_splits(dataset, 5, scenes, with_test=True)


def test_the_log_error_is_psnr_and_every_sample_counts_alike(generator):
    target = torch.rand(2, 3, 16, 16, generator=generator)
    noise = torch.randn(2, 3, 16, 16, generator=generator)
    images = target + noise * torch.tensor([0.02, 0.2])[:, None, None, None]
    expected = (
        -sum(psnr(*(x.permute(1, 2, 0) for x in pair)) for pair in zip(images, target, strict=True))
        / 20
    )
    images = (images * 2 - 1).requires_grad_()
    loss = log_error(images, target * 2 - 1)
    assert loss.item() == pytest.approx(expected, abs=0.01)  # 0.005: the floor of 1e-5
    loss.backward()
    slopes = (
        images.grad.flatten(1).norm(dim=1)
        * noise.flatten(1).norm(dim=1)
        * torch.tensor([0.02, 0.2])
    )
    assert slopes[0] == pytest.approx(
        slopes[1].item(), rel=0.05
    )  # 0.02; ten times apart for the plain error
