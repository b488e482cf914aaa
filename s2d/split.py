"""Which views are kept (inputs), novel (pseudo views are made there) and test (only the evaluation reads their photos)."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from s2d.files import atomic_write_json

logger = logging.getLogger("s2d.split")

FORMAT = 1  # of split.json
SMALL_SCENE = (
    12  # a scene of at most this many photos is somebody's few photos: by default all are kept
)
DEFAULT_KEEP_COUNT = 6


@dataclass(frozen=True)
class Split:
    """View names by role, each in name order. Kept and test never share a view; `novel` may be empty (generate cameras then)."""

    protocol: Literal["s2d", "eval"]
    kept: tuple[str, ...]
    novel: tuple[str, ...]
    test: tuple[str, ...]

    def save(self, path: Path) -> Path:
        """Write split.json atomically."""
        atomic_write_json(path, {"format": FORMAT, **asdict(self)})
        return Path(path)

    @staticmethod
    def load(path: Path) -> "Split":
        """Read split.json. FileNotFoundError where there is none, ValueError where it is not one of ours."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"No split: {path}. Stage 0 writes it. Run: python stage0_point_guidance.py -s SCENE -m OUT"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(
                    f"{path} has format {content['format']}. Expected {FORMAT}. Run stage 0 again."
                )
            return Split(
                content["protocol"], *(tuple(content[role]) for role in ("kept", "novel", "test"))
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a split written by stage 0 ({error!r}). Run stage 0 again."
            ) from error


def make_split(
    names: Sequence[str],
    keep_every: int | None = None,
    keep_indices: Sequence[int] | None = None,
    keep_count: int | None = None,
    eval: bool = False,
    test_every: int = 8,
) -> Split:
    """Choose the kept views and derive the novel and test views.

    Protocol `s2d`: the kept views are chosen out of all photos; every other view is novel *and* test. Protocol `eval`: test is every
    `test_every`-th photo from the first; the kept views are chosen from the rest (indices and counts refer to the rest), novel is what
    is left of the rest.

    Args:
        names: All views with a photo; sorted here, so indices mean name order.
        keep_every: Keep views 0, n, 2n, ….
        keep_indices: Keep these positions, from 0.
        keep_count: Keep so many, evenly spaced from the first to the last, both included (rounded half to even). More than there
            are: all of them.
        eval: Use protocol `eval`.
        test_every: Distance between test views in protocol `eval`.

    With none of the three keep options: all photos of a scene with at most 12 (s2d only; then nothing is left to test, and novel
    cameras are generated), else 6 evenly spaced ones; the choice is logged.

    Raises:
        ValueError: more than one keep option; fewer than 2 kept views; an index outside the range; a count or step below 1;
            duplicate names.
    """
    names = sorted(names)
    if len(set(names)) != len(names):
        raise ValueError("make_split: view names must be unique.")
    given = {
        flag: value
        for flag, value in (
            ("--keep-every", keep_every),
            ("--keep-indices", keep_indices),
            ("--keep-count", keep_count),
        )
        if value is not None
    }
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} were both given. Choose one way to select the kept views."
        )
    if eval and test_every < 2:
        raise ValueError(
            f"--test-every must be at least 2 (else no photo is left to keep), got {test_every}."
        )
    test = names[::test_every] if eval else []
    pool = [name for name in names if name not in set(test)]
    if not given:
        keep_count = (
            len(pool)
            if not eval and len(pool) <= SMALL_SCENE
            else min(DEFAULT_KEEP_COUNT, len(pool))
        )
        logger.info("no --keep-… option: keeping %d of %d views", keep_count, len(pool))
    rows = _kept_rows(len(pool), keep_every, keep_indices, keep_count)
    if len(rows) < 2:
        left = " that are not test views" if eval else ""
        raise ValueError(
            f"{len(rows)} of the {len(pool)} views{left} would be kept. Expected at least 2: one photo says nothing about depth. "
            "Change --keep-every, --keep-indices or --keep-count, or add photos."
        )
    kept = [pool[row] for row in rows]
    novel = [name for name in pool if name not in set(kept)]
    return Split(
        protocol="eval" if eval else "s2d",
        kept=tuple(kept),
        novel=tuple(novel),
        test=tuple(test if eval else novel),
    )


def read_split_file(path: Path, names: Sequence[str]) -> Split:
    """Read which views somebody else kept and scored: a JSON file with `train_ids` and `test_ids`, as sparse-view papers publish them.

    Args:
        path: Ids are positions in name order, from 0, or view names with or without suffix.
        names: All views with a photo.

    Returns:
        Protocol `eval`; novel is what is in neither list.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not such a file, an id that is no view, fewer than 2 kept views, or one that is kept and scored.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--split-file: no file {path}. Give a JSON file with train_ids and test_ids."
        )
    names = sorted(names)
    by_name = {name: name for name in names} | {
        Path(name).with_suffix("").as_posix(): name for name in names
    }

    def view(entry: int | str) -> str:
        if isinstance(entry, int) and 0 <= entry < len(names):
            return names[entry]
        if isinstance(entry, str) and entry in by_name:
            return by_name[entry]
        raise ValueError(
            f"{path}: {entry!r} is no view of this scene. Expected 0 to {len(names) - 1}, or a name such as {names[0]}."
        )

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kept, test = (
            sorted({view(entry) for entry in content[key]}) for key in ("train_ids", "test_ids")
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a split ({error!r}). Expected JSON with the lists train_ids and test_ids."
        ) from error
    if both := sorted(set(kept) & set(test)):
        raise ValueError(
            f"{path}: {both[0]} is in train_ids and in test_ids. Remove it from one of them."
        )
    if len(kept) < 2:
        raise ValueError(f"{path}: {len(kept)} views in train_ids. Expected at least 2.")
    novel = [name for name in names if name not in {*kept, *test}]
    return Split("eval", tuple(kept), tuple(novel), tuple(test))


def _kept_rows(
    num: int, every: int | None, indices: Sequence[int] | None, count: int | None
) -> list[int]:
    if indices is not None:
        outside = [index for index in indices if not 0 <= index < num]
        if outside:
            raise ValueError(
                f"--keep-indices {outside[0]} is out of range: there are {num} views to choose from. "
                + (f"Expected 0 to {num - 1}." if num else "Check the scene folder.")
            )
        return sorted(set(indices))
    flag, value = ("--keep-every", every) if every is not None else ("--keep-count", count)
    if value < (1 if every is not None else 0):
        raise ValueError(f"{flag} must be positive, got {value}.")
    if every is not None:
        return list(range(0, num, every))
    count = min(count, num)
    if count <= 1:
        return list(range(count))
    # The rounded linspace(0, num - 1, count); ties go to the even number, as in numpy.rint.
    return sorted({round((num - 1) * i / (count - 1)) for i in range(count)})
