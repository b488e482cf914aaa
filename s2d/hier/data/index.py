"""Evaluation indices: which frames of which scene are shown to the model, and which it is judged by.

`{scene: {"context": [i, ...], "target": [j, ...]} | null}`, null where a scene has no valid pair. The files that pixelSplat published for
RealEstate10K and ACID have this form, HiSplat's for DTU and Replica too; there a key ends in `_NN`, the number of a pair of the scene.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from s2d.files import atomic_write_json


class Pick(NamedTuple):
    """Rows of a capture. The context's order is kept: published indices have pairs such as (33, 31)."""

    context: tuple[int, ...]
    target: tuple[int, ...]


EvaluationIndex = dict[str, Pick | None]


def read_evaluation_index(path: Path) -> EvaluationIndex:
    """Read an index.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or an entry of another form; names the scene.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No evaluation index {path}. Expected a JSON file; check --index.")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}). Fetch the evaluation index again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected scenes by name, got a {type(content).__name__}.")
    return {key: _pick(path, key, entry) for key, entry in content.items()}


def write_evaluation_index(path: Path, index: Mapping[str, Pick | None]) -> Path:
    """Write an index in the published form."""
    entries = {
        key: pick and {"context": list(pick.context), "target": list(pick.target)}
        for key, pick in index.items()
    }
    atomic_write_json(path, entries)
    return path


def capture_key(entry: str, captures: Mapping[str, object]) -> str | None:
    """The capture that an entry of an index is about: of its own name, or its name without `_NN`; None where there is neither."""
    if entry in captures:
        return entry
    stem = re.sub(r"_\d+$", "", entry)
    return stem if stem in captures else None


def _pick(path: Path, key: str, entry: object) -> Pick | None:
    if entry is None:
        return None
    try:
        pick = Pick(tuple(entry["context"]), tuple(entry["target"]))
        good = bool(pick.context and pick.target) and all(
            type(row) is int and row >= 0 for row in (*pick.context, *pick.target)
        )
    except (TypeError, KeyError):
        good = False
    if not good:
        raise ValueError(
            f'{path}: scene {key} must be null or {{"context": [frames], "target": [frames]}}, got {str(entry)[:80]}.'
        )
    return pick
