"""Which views are kept, novel and test, in both protocols; by hand and as properties."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2d.split import Split, make_split, read_split_file

NAMES = [f"{i:02d}.png" for i in range(20)]


def rows(names):
    return [int(name[:2]) for name in names]


def test_s2d_protocol_every_other_view_is_novel_and_test():
    split = make_split(NAMES[::-1], keep_indices=[3, 0, 19, 3])
    assert split.protocol == "s2d"
    assert rows(split.kept) == [0, 3, 19]
    assert split.novel == split.test
    assert sorted(split.kept + split.novel) == NAMES


def test_keep_every_and_count():
    assert rows(make_split(NAMES, keep_every=7).kept) == [0, 7, 14]
    assert rows(make_split(NAMES, keep_count=3).kept) == [0, 10, 19]  # 9.5 rounds to the even 10
    assert rows(make_split(NAMES, keep_count=2).kept) == [0, 19]
    assert rows(make_split(NAMES, keep_count=100).kept) == list(range(20))


def test_eval_protocol_as_published_for_llff():
    """LLFF with 3 views: test = every 8th photo, kept = 3 evenly spaced of the rest."""
    split = make_split(NAMES, keep_count=3, eval=True)
    assert rows(split.test) == [0, 8, 16]
    rest = [row for row in range(20) if row not in (0, 8, 16)]
    assert rows(split.kept) == [rest[0], rest[8], rest[16]]
    assert rows(split.novel) == [row for row in rest if row not in rows(split.kept)]


@given(
    num=st.integers(2, 40),
    count=st.integers(2, 45),
    evaluate=st.booleans(),
    test_every=st.integers(2, 9),
)
def test_roles_cover_all_views_and_never_leak(num, count, evaluate, test_every):
    names = [f"{i:03d}" for i in range(num)]
    pool = [name for i, name in enumerate(names) if not (evaluate and i % test_every == 0)]
    if len(pool) < 2:
        with pytest.raises(ValueError, match="Expected at least 2"):
            make_split(names, keep_count=count, eval=evaluate, test_every=test_every)
        return
    split = make_split(names, keep_count=count, eval=evaluate, test_every=test_every)
    assert not set(split.kept) & set(split.test)
    assert not set(split.kept) & set(split.novel)
    assert set(split.kept) | set(split.novel) | set(split.test) == set(names)
    if evaluate:
        assert list(split.test) == names[::test_every]
        assert not set(split.novel) & set(split.test)
    expected = np.unique(np.rint(np.linspace(0, len(pool) - 1, min(count, len(pool)))).astype(int))
    found = [pool.index(name) for name in split.kept]
    assert found[0] == 0 and found[-1] == len(pool) - 1
    # numpy's linspace may miss a tie by a last bit, so compare to within one place.
    assert len(found) == len(expected) and np.abs(np.array(found) - expected).max() <= 1


def test_defaults(caplog):
    assert len(make_split(NAMES).kept) == 6
    few = make_split(NAMES[:12])
    assert len(few.kept) == 12 and few.novel == few.test == ()
    assert len(make_split(NAMES[:12], eval=True).kept) == 6
    with caplog.at_level("INFO", logger="s2d.split"):
        make_split(NAMES)
    assert "keeping 6 of 20 views" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_every": 2, "keep_count": 3}, "--keep-every and --keep-count were both given"),
        (
            {"keep_indices": [0, 20]},
            "--keep-indices 20 is out of range: there are 20 views to choose from. Expected 0 to 19",
        ),
        ({"keep_indices": [0, -1]}, "--keep-indices -1 is out of range"),
        (
            {"keep_indices": [0, 18], "eval": True},
            "there are 17 views to choose from. Expected 0 to 16",
        ),
        ({"keep_indices": []}, "0 of the 20 views would be kept. Expected at least 2"),
        ({"keep_indices": [4]}, "1 of the 20 views would be kept"),
        ({"keep_count": 0}, "0 of the 20 views would be kept"),
        ({"keep_count": 1}, "1 of the 20 views would be kept"),
        ({"keep_count": -3}, "--keep-count must be positive, got -3"),
        ({"keep_every": 0}, "--keep-every must be positive, got 0"),
        ({"keep_every": 50}, "1 of the 20 views would be kept"),
        ({"eval": True, "test_every": 1}, "--test-every must be at least 2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        make_split(NAMES, **options)


def test_an_empty_scene_and_doubled_names():
    with pytest.raises(ValueError, match="0 of the 0 views"):
        make_split([])
    with pytest.raises(ValueError, match="must be unique"):
        make_split(["a", "a"])


def test_round_trip_and_damaged_files(tmp_path):
    split = make_split(["ü/a.png", "b.png", "c.png", "d.png"], keep_count=2)
    path = split.save(tmp_path / "split.json")
    assert Split.load(path) == split
    assert [found.name for found in tmp_path.iterdir()] == ["split.json"]
    for text, message in (
        ("{", "is not a split"),
        ('{"format": 9}', "has format 9"),
        ('{"format": 1}', "is not a split"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Split.load(path)
    with pytest.raises(FileNotFoundError, match=r"Run: python stage0_point_guidance.py"):
        Split.load(tmp_path / "none.json")


def test_a_split_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "train_test_split_3.json"
    path.write_text(json.dumps({"train_ids": [9, 0, "04"], "test_ids": ["07.png", 8]}))
    split = read_split_file(path, NAMES[::-1])
    assert (split.protocol, rows(split.kept), rows(split.test)) == ("eval", [0, 4, 9], [7, 8])
    assert sorted(split.kept + split.novel + split.test) == NAMES


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"train_ids": [0, 20], "test_ids": [1]}',
            "20 is no view of this scene. Expected 0 to 19",
        ),
        ('{"train_ids": [0, "x"], "test_ids": [1]}', "'x' is no view"),
        ('{"train_ids": [0, 1, 2], "test_ids": ["02"]}', "02.png is in train_ids and in test_ids"),
        ('{"train_ids": [0, 0], "test_ids": [2]}', "1 views in train_ids"),
        ('{"train_ids": [0, 1]}', "not a split .*test_ids"),
        ("[0, 1]", "not a split"),
    ],
)
def test_bad_split_files_say_what_is_wrong(tmp_path, content, words):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_split_file(path, NAMES)
    with pytest.raises(FileNotFoundError, match="--split-file"):
        read_split_file(tmp_path / "none.json", NAMES)
