"""Which photos may stand in as the reference of a training pair.

`pairs.jsonl`, where a data set has it, names the photos that the pair's own model knew: what stage 2 will have. Without it the
names tell: `garden_0012.png` is frame 12 of the sequence `garden`, and its neighbours' clean images are at hand.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

FRAME = re.compile(r"^(?P<sequence>.*?)[_-]?(?P<index>\d+)$")
LISTING, PHOTOS = "pairs.jsonl", "photos"

# Stage 2 takes the nearest kept photo. A little farther ones are learned from too: users' photos stand farther apart than ours.
NEAREST = 3


def find_references(
    dataset: Path, clean: Path, names: list[str], window: int
) -> dict[str, tuple[Path, ...]]:
    """Find the photos that each pair may look at, nearest first.

    Args:
        dataset: Folder with `pairs.jsonl` and `photos/`, if there are any.
        clean: The split's folder B.
        names: Of the pairs, file names in B.
        window: Without a listing: frames at most this many indices away; all others of the sequence where none is that near.

    Returns:
        Name → paths. Never the pair's own photo; empty where the name has no index or its sequence has no other frame.

    Raises:
        ValueError: The listing is damaged or does not know a pair; names the line or the pair.
        FileNotFoundError: A listed photo is gone.
    """
    if (dataset / LISTING).is_file():
        return _listed(dataset, names)
    sequences: dict[str, list[tuple[int, str]]] = defaultdict(list)
    frames: dict[str, tuple[str, int]] = {}
    for name in names:
        if match := FRAME.match(name.rsplit(".", 1)[0]):
            frames[name] = match["sequence"], int(match["index"])
            sequences[match["sequence"]].append((int(match["index"]), name))
    references = {}
    for name in names:
        others: list[tuple[int, str]] = []
        if name in frames:
            sequence, index = frames[name]
            others = sorted(
                (abs(other - index), other_name)
                for other, other_name in sequences[sequence]
                if other != index
            )
        near = [other for distance, other in others if distance <= window]
        references[name] = tuple(clean / other for other in near or [o for _, o in others])
    return references


def _listed(dataset: Path, names: list[str]) -> dict[str, tuple[Path, ...]]:
    path = dataset / LISTING
    listed: dict[str, tuple[Path, ...]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            entry = json.loads(line)
            photos = tuple(dataset / PHOTOS / photo for photo in entry["references"][:NEAREST])
            listed[entry["name"]] = photos
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not the description of a pair ({type(error).__name__}: {error}). Run "
                "tools/make_fixer_pairs.py again, or remove the file: references are then found by name."
            ) from error
    for name in names:
        if name not in listed:
            raise ValueError(
                f"{path} does not know {name}. Run tools/make_fixer_pairs.py again, or remove the file: references are "
                "then found by name."
            )
        for photo in listed[name]:
            if not photo.is_file():
                raise FileNotFoundError(
                    f"Reference photo {photo} of {name} is missing. Run tools/make_fixer_pairs.py again."
                )
    return {name: listed[name] for name in names}
