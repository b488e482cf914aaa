"""Which frames make a sample, and the published evaluation indices."""

import json

import numpy as np
import pytest
import torch

from s2d.hier.data.index import Pick, capture_key, read_evaluation_index, write_evaluation_index
from s2d.hier.data.samplers import ArbitrarySampler, BoundedSampler, EvaluationSampler


class Frames:
    """A capture of which nothing but its length is asked."""

    key = "aa"

    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num


def draws(sampler, step, num=300, num_context=2, length=400):
    rng = np.random.default_rng(0)
    return [sampler.pick(Frames(length), step, num_context, 4, rng) for _ in range(num)]


def test_the_gap_grows_as_published():
    sampler = BoundedSampler()
    assert sampler.gaps(0) == (25, 45)
    assert sampler.gaps(75_000) == (35, 118)  # half-way: (45 + 192) / 2 = 118.5, rounded to even
    assert sampler.gaps(150_000) == sampler.gaps(10**7) == (45, 192)


@pytest.mark.parametrize(("step", "low", "high"), [(0, 25, 45), (150_000, 45, 192)])
def test_the_gap_is_not_always_the_smallest(step, low, high):
    """The released configuration overwrote its maximum by its minimum."""
    gaps = [pick.context[1] - pick.context[0] for pick in draws(BoundedSampler(), step, 3000)]
    assert (min(gaps), max(gaps)) == (low, high)
    assert np.mean(gaps) == pytest.approx((low + high) / 2, rel=0.03)  # even


def test_targets_and_further_context_lie_between():
    for pick in draws(BoundedSampler((10, 10), (10, 10)), 0, num_context=4):
        assert len(pick.context) == 4 and list(pick.context) == sorted(set(pick.context))
        assert pick.context[-1] - pick.context[0] == 10
        assert len(pick.target) == 4
        assert all(pick.context[0] <= row <= pick.context[-1] for row in pick.target)
        assert pick.context[0] >= 0 and pick.context[-1] < 400


def test_a_short_video_is_used_as_far_as_it_goes():
    gaps = {p.context[1] - p.context[0] for p in draws(BoundedSampler(), 0, 500, length=31)}
    assert gaps == set(range(25, 31))
    assert draws(BoundedSampler(), 0, 1, length=25) == [None]


def test_an_index_says_which():
    sampler = EvaluationSampler({"aa": Pick((7, 3), (5,)), "bb": None})
    assert draws(sampler, 0, 1) == [Pick((7, 3), (5,))]
    assert EvaluationSampler({}).pick(Frames(9), 0, 2, 1, None) is None


def test_any_rows_or_given_ones():
    for pick in draws(ArbitrarySampler(), 0, 50, num_context=3, length=5):
        assert len(set(pick.context)) == 3 and set(pick.target) <= set(range(5))
    assert draws(ArbitrarySampler((4, 0), (2,)), 0, 1, length=5) == [Pick((4, 0), (2,))]
    assert draws(ArbitrarySampler((5, 0), (2,)), 0, 1, length=5) == [None]


# --- evaluation indices ----------------------------------------------------------------------------------------------------


def test_an_index_is_read_and_written(tmp_path):
    path = tmp_path / "index.json"
    path.write_text('{"s1": {"context": [58, 13], "target": [84, 102]}, "s2": null}')
    index = read_evaluation_index(path)
    assert index == {"s1": Pick((58, 13), (84, 102)), "s2": None}
    write_evaluation_index(tmp_path / "again.json", index)
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected scenes by name"),
        ('{"s": {"context": [1]}}', "scene s must be null or"),
        ('{"s": {"context": [1, -2], "target": [3]}}', "scene s must be null or"),
        ('{"s": {"context": [1, 2], "target": []}}', "scene s must be null or"),
        ('{"s": [1, 2]}', "scene s must be null or"),
    ],
)
def test_an_index_of_another_form_names_the_scene(tmp_path, text, message):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_evaluation_index(tmp_path / "index.json")
    with pytest.raises(FileNotFoundError, match="--index"):
        read_evaluation_index(tmp_path / "nowhere.json")


def test_keys_with_the_number_of_a_pair():
    captures = {"scan1_train": 0, "office_0-Sequence_2": 0, "a_01": 0}
    assert capture_key("scan1_train_03", captures) == "scan1_train"
    assert capture_key("office_0-Sequence_2_35", captures) == "office_0-Sequence_2"
    assert capture_key("a_01", captures) == "a_01"
    assert capture_key("scan9_train_00", captures) is None


# Counted once in the published files: entries, valid ones, context and target views, smallest and largest gap.
PUBLISHED = {
    "re10k": (7194, 6474, 2, 3, 45, 136),
    "acid": (1848, 1595, 2, 3, 45, 136),
    "dtu_nctx2": (64, 64, 2, 1, 2, 2),
    "dtu_nctx3": (64, 64, 3, 1, 12, 12),
    "replica_nctx2": (576, 576, 2, 1, 24, 25),
    "replica_nctx3": (576, 576, 3, 1, 24, 25),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_indices_are_understood(data_dir, name):
    path = data_dir / f"hisplat/evaluation_index_{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    index = read_evaluation_index(path)
    valid = [pick for pick in index.values() if pick]
    gaps = [max(pick.context) - min(pick.context) for pick in valid]
    found = (len(index), len(valid), len(valid[0].context), len(valid[0].target))
    assert (*found, min(gaps), max(gaps)) == PUBLISHED[name]
    assert len({(len(pick.context), len(pick.target)) for pick in valid}) == 1


def test_the_real_pair_becomes_a_chunk_and_comes_back(data_dir, tmp_path):
    """Cameras of the published demonstration (camera to world, by width and height), through our chunk into pixels."""
    path = data_dir / "hisplat/demo_example.pt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    from tiny_captures import encoded

    from s2d.hier.data.chunks import ChunkFolder
    from s2d.hier.data.samples import as_batch, as_views, frame_sample

    context = torch.load(path, map_location="cpu", weights_only=True)["context"]
    K, c2w, images = (context[name][0] for name in ("intrinsics", "extrinsics", "image"))
    lens = torch.stack([K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2]], 1)
    pose = torch.linalg.inv(c2w.double())[:, :3].reshape(2, 12).float()
    entry = {
        "key": "pair",
        "cameras": torch.cat([lens, torch.zeros(2, 2), pose], 1),
        "images": [encoded(image.permute(1, 2, 0)) for image in images],
    }
    (tmp_path / "test").mkdir()
    torch.save([entry], tmp_path / "test/000000.torch")
    (tmp_path / "test/index.json").write_text('{"pair": "000000.torch"}')
    capture = ChunkFolder(tmp_path, "test", ArbitrarySampler()).find("pair")
    views = as_views(as_batch(frame_sample(capture, Pick((0, 1), (0,)), (256, 256))), "context")
    assert torch.equal(views.images[0], images), "8-bit values survive"
    assert torch.allclose(views.Ks[0, :, 0, 0], K[:, 0, 0] * 256)
    assert views.Ks[0, 0, 0, 0] == pytest.approx(259.0, abs=0.1)
    centers = -(views.viewmats[0, :, :3, :3].mT @ views.viewmats[0, :, :3, 3:])[..., 0]
    assert torch.allclose(centers, c2w[:, :3, 3], atol=1e-5)
    assert float((centers[0] - centers[1]).norm()) == pytest.approx(3.438, abs=1e-3)
