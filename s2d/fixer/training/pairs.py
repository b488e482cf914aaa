"""Training pairs on disk, and every check of them before training starts.

A data set is a folder with `{train,test}_{A,B,P}`, described in docs/data_formats.md: the same names in A (render with
artifacts), B (clean) and P (point guidance), and in M (coverage of P) where that is there. P may be missing as a whole.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from s2d.fixer.training.references import find_references
from s2d.images import image_info, list_images, read_image
from s2d.log import logger

PARTS = {
    "A": "renders with artifacts",
    "B": "clean images",
    "P": "point guidance",
    "M": "coverage",
}
REQUIRED = "AB"
SCENE = re.compile(r"(.+?)(?:_[a-z]+-[a-z0-9-]+)?_\d+\.\w+$")
CHECK_THREADS = 8  # reading waits for the disk, and checksums are computed outside of Python's lock

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Pair:
    """One sample's files, all of one size."""

    name: str
    rendered: Path
    target: Path
    guidance: Path | None
    coverage: Path | None
    references: tuple[Path, ...]
    """Photos that may be drawn as reference, nearest first; none where the data set has none for it."""
    size: Size

    @property
    def scene(self) -> str:
        """What stands before the kind and the frame: garden of garden_sparse-k3-s0_0012.png, or of garden_0012.png."""
        match = SCENE.match(self.name)
        return match[1] if match else Path(self.name).stem


def load_pairs(folder: Path, split: str, window: int) -> tuple[Pair, ...]:
    """List and check one split of a data set.

    Every file is read once (PNG: its checksums, others: decoded), so that training cannot stumble over one after hours.

    Args:
        folder: The data set.
        split: "train" or "test".
        window: How many frame indices away a reference may be; see `find_references`.

    Returns:
        In name order, at least one.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: Nothing in it, names without partner, sizes that differ, or a file that cannot be read.
    """
    folders = {part: folder / f"{split}_{part}" for part in PARTS}
    for part in REQUIRED:
        if not folders[part].is_dir():
            raise FileNotFoundError(
                f"No folder {folders[part]} ({PARTS[part]}). Expected {split}_A, {split}_B and {split}_P in the data set. "
                f"{_advice(split)}"
            )
    names = {part: list_images(path) if path.is_dir() else [] for part, path in folders.items()}
    if not names["A"] and not names["B"]:
        raise ValueError(f"{folders['A']} is empty. {_advice(split)}")
    used = [part for part in PARTS if part in REQUIRED or names[part]]
    for part in used[1:]:
        _require_same_names(folders["A"], names["A"], folders[part], names[part])
    if "P" not in used:
        logger.info("%s: no point guidance, so none is learned from", folders["P"])
    references = find_references(folder, folders["B"], names["A"], window)
    readable_size = cache(_readable_size)  # a photo serves many pairs

    def check(name: str) -> Pair:
        files = {part: folders[part] / name for part in used}
        size = readable_size(files["A"])
        for path in files.values():
            if (other := readable_size(path)) != size:
                raise ValueError(
                    f"{path} is {_show(other)} and {files['A']} is {_show(size)}. Images of one name must have one size: "
                    "render or resize them again."
                )
        for path in references[name]:
            readable_size(path)
        return Pair(
            name, files["A"], files["B"], files.get("P"), files.get("M"), references[name], size
        )

    with ThreadPoolExecutor(CHECK_THREADS) as threads:
        return tuple(threads.map(check, names["A"]))


def load_splits(
    folder: Path, window: int, test_scenes: tuple[str, ...], with_test: bool
) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """List and check what is trained on and what is judged by.

    Args:
        folder: The data set.
        window: See `load_pairs`.
        test_scenes: Pairs of these scenes are judged by and all others trained on, whichever folder they lie in. None: the folders say.
        with_test: Whether anything is judged at all.

    Raises:
        FileNotFoundError, ValueError: See `load_pairs`; or a scene is not in the data set, or none is left to train on.
    """
    train = load_pairs(folder, "train", window)
    if not test_scenes:
        return train, load_pairs(folder, "test", window) if with_test else ()
    pairs = train
    if (folder / "test_A").is_dir() and list_images(folder / "test_A"):
        pairs += load_pairs(folder, "test", window)
    scenes = {pair.scene for pair in pairs}
    if unknown := sorted(set(test_scenes) - scenes):
        raise ValueError(
            f"--test-scenes {unknown[0]}: {folder} has no pair of that scene. It has {', '.join(sorted(scenes))}."
        )
    if scenes <= set(test_scenes):
        raise ValueError(
            f"--test-scenes names all scenes of {folder}: none is left to train on. Leave at least one out."
        )
    return (
        tuple(pair for pair in pairs if pair.scene not in test_scenes),
        tuple(pair for pair in pairs if pair.scene in test_scenes),
    )


def _require_same_names(
    folder: Path, names: list[str], other: Path, other_names: list[str]
) -> None:
    for has, have, lacks, lack in (
        (folder, names, other, other_names),
        (other, other_names, folder, names),
    ):
        if missing := sorted(set(have) - set(lack)):
            raise ValueError(
                f"{len(missing)} of {len(have)} images in {has} have no partner in {lacks} (first: {missing[0]}). "
                "Both must hold the same names, suffixes included: add the missing ones or remove the others."
            )


def _readable_size(path: Path) -> Size:
    """Size of a picture whose file is whole."""
    if path.suffix.lower() != ".png":
        height, width = read_image(path).shape[:2]
        return width, height
    size = image_info(path).oriented_size
    try:
        with Image.open(path) as image:
            image.verify()
    # Pillow raises SyntaxError for a broken chunk, and what its readers stumble over for the rest.
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Write it again, or remove it from every folder of the data set."
        ) from error
    return size


def _advice(split: str) -> str:
    if split == "test":
        return "Move some pairs there, or train without evaluation: --eval-freq 0 --viz-freq 0."
    return "Make pairs with tools/make_fixer_pairs.py, or check --dataset-folder."


def _show(size: Size) -> str:
    return f"{size[0]}×{size[1]}"


def fingerprint(pairs: tuple[Pair, ...]) -> str:
    """What a training depends on of its pairs: their number, names and the lengths of their files."""
    files = [(pair.rendered, pair.target, pair.guidance, pair.coverage) for pair in pairs]
    lengths = [sum(path.stat().st_size for path in paths if path) for paths in files]
    return f"{len(pairs)} from {pairs[0].name} to {pairs[-1].name}, {sum(lengths)} bytes"
