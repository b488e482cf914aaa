"""Training pairs on disk, and every check of them before training starts.

A data set is a folder with `{train,test}_{A,B,P}`, described in docs/data_formats.md: the same names in A (render with
artifacts), B (clean) and P (point guidance), and in M (coverage of P) where that is there. P may be missing as a whole.
"""

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
