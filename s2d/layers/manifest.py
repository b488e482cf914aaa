"""`levels.json`: what a folder of levels holds, and whether it is all there. Layout: docs/data_formats.md, "Layers".

One format for LapisGS's layers and HiSplat's levels. Rows are level-major: level k adds rows [start, stop), and showing level k takes rows
[0, stop) with the opacities that were learned for *that* level.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from s2d.gaussians import Gaussians
from s2d.layers.quantise import Ranges
from s2d.layers.records import (
    Codec,
    Encoding,
    OpacityFormat,
    RowFormat,
    decode_opacities,
    decode_rows,
)

VERSION = 1
MANIFEST = "levels.json"
_HASH_KEY = b'"sha256"'
_AGAIN = "Fetch it again, or make it again with tools/layers.py."


@dataclass(frozen=True)
class DataFile:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Level:
    """One level of detail."""

    id: int
    """Position: 0 is the coarsest."""
    start: int
    """First row that this level adds."""
    stop: int
    """One behind the last."""
    rescale: float
    """Share of the full resolution that it was trained for."""
    rows_file: str
    """Rows [start, stop), with their opacities at this level."""
    opacity_file: str | None
    """Opacities of rows [0, start) at this level; None: as at the level below."""
    visible: int
    """Rows of [0, stop) that are drawn at this level."""
    transparent: int
    """Rows of [0, stop) with an opacity below 0.005 at this level."""
    metrics: dict[str, Any] | None = None


@dataclass(frozen=True)
class Levels:
    """A folder of levels; `files` has size and hash of each file in it."""

    dir: Path
    sh_degree: int
    encoding: Encoding
    levels: tuple[Level, ...]
    files: Mapping[str, DataFile]

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def num_rows(self) -> int:
        return self.levels[-1].stop

    def new_files(self, k: int) -> tuple[str, ...]:
        """The files to fetch for level k where level k - 1 is there: its opacities first, then its rows."""
        level = self.levels[k]
        return tuple(name for name in (level.opacity_file, level.rows_file) if name is not None)

    def needed_files(self, k: int) -> tuple[str, ...]:
        """The files that level k is made of, and no other: rows of all levels up to k and, where it has one, its opacity list alone."""
        upto = self.levels[: k + 1]
        lists = [level.opacity_file for level in upto]
        last = max((row for row, name in enumerate(lists) if name is not None), default=0)
        return tuple(
            name
            for row, level in enumerate(upto)
            for name in (level.opacity_file if row >= last else None, level.rows_file)
            if name is not None
        )

    def num_bytes(self, k: int) -> int:
        """Bytes of `needed_files(k)`."""
        return sum(self.files[name].bytes for name in self.needed_files(k))

    def read(self, name: str) -> bytes:
        """Read a file of the folder and check its size and hash.

        Raises:
            FileNotFoundError, ValueError: It is missing, or not what levels.json says; names the file.
        """
        path = self.dir / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {MANIFEST} names it. {_AGAIN}")
        data = path.read_bytes()
        self.check(name, data)
        return data

    def check(self, name: str, data: bytes) -> None:
        """Raise ValueError, naming the file, unless `data` is its whole content."""
        expected = self.files[name]
        if len(data) != expected.bytes:
            raise ValueError(
                f"{self.dir / name} has {len(data)} bytes. Expected {expected.bytes} from {MANIFEST}. {_AGAIN}"
            )
        if hashlib.sha256(data).hexdigest() != expected.sha256:
            raise ValueError(
                f"{self.dir / name} is damaged: its SHA-256 is not the one in {MANIFEST}. {_AGAIN}"
            )

    def rows(self, k: int, data: bytes, partial: bool = False) -> Gaussians:
        """Decode the rows of level k, as far as they are there (`decode_rows`)."""
        name = self.levels[k].rows_file
        return decode_rows(data, self.encoding, self.sh_degree, str(self.dir / name), partial)

    def opacities(self, k: int, data: bytes, partial: bool = False) -> Tensor:
        """Decode the opacity list of level k: logits of rows [0, start), as far as they are there."""
        name = self.levels[k].opacity_file
        return decode_opacities(data, self.encoding, str(self.dir / str(name)), partial)


def layers_folder(source: Path) -> Path:
    """Where the layers are: `source` itself, or below it where it is the OUT of a run."""
    source = Path(source)
    return source if (source / MANIFEST).is_file() else source / "stage3" / "layers"


def load_levels(folder: Path) -> Levels:
    """Read and check `levels.json`; the files beside it are checked when they are read (`check_levels`: all of them).

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, of another version, or contradicts itself.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"No {MANIFEST} in {folder}. Train layers with stage3_3dgs_mixed_opt.py --layers, or make it with tools/layers.py extract."
        )
    return parse_levels(path.read_bytes(), Path(folder))


def parse_levels(text: bytes, folder: Path) -> Levels:
    """Read `levels.json` from its bytes, as they are in the file; `load_levels` for one that was fetched."""
    where = f"{folder}/{MANIFEST}"
    position = text.rfind(_HASH_KEY)
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or position < 0:
            raise TypeError
        version, written = content["version"], content["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{where} is damaged: not a manifest of layers. {_AGAIN}") from None
    if version != VERSION:
        raise ValueError(
            f"{where} has version {version}. Expected {VERSION}. Make it again with this version of S2D."
        )
    if hashlib.sha256(text[:position]).hexdigest() != written:
        raise ValueError(
            f"{where} is damaged: its SHA-256 is not the one that it ends with. {_AGAIN}"
        )
    try:
        ranges = content["encoding"]["ranges"]
        encoding = Encoding(
            rows=_one_of(content["encoding"]["rows"], RowFormat),
            opacity=_one_of(content["encoding"]["opacity"], OpacityFormat),
            codec=_one_of(content["encoding"]["codec"], Codec),
            ranges=None
            if ranges is None
            else Ranges(**{k: tuple(v) if isinstance(v, list) else v for k, v in ranges.items()}),
        )
        levels = Levels(
            dir=folder,
            sh_degree=content["sh_degree"],
            encoding=encoding,
            levels=tuple(Level(**entry) for entry in content["levels"]),
            files={name: DataFile(**entry) for name, entry in content["files"].items()},
        )
        check_structure(levels)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} contradicts itself ({error}). {_AGAIN}") from error
    return levels


def manifest_text(levels: Levels) -> bytes:
    """The bytes of levels.json. Its last key is the SHA-256 of all bytes before it."""
    content = {
        "version": VERSION,
        "sh_degree": levels.sh_degree,
        "encoding": asdict(levels.encoding),
        "levels": [asdict(level) for level in levels.levels],
        "files": {name: asdict(entry) for name, entry in levels.files.items()},
    }
    body = json.dumps(content, indent=1, allow_nan=False).encode()[: -len("\n}")] + b",\n "
    return body + _HASH_KEY + f': "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def check_structure(levels: Levels) -> None:
    """Raise ValueError where a manifest does not describe levels: it may come from anywhere."""
    if not levels.levels or levels.sh_degree not in range(4):
        raise ValueError("no levels, or an SH degree other than 0 to 3")
    if (levels.encoding.rows == "quantised") != (levels.encoding.ranges is not None):
        raise ValueError("ranges belong to quantised rows")
    start = 0
    for k, level in enumerate(levels.levels):
        if (level.id, level.start) != (k, start) or level.stop < start or level.rescale <= 0:
            raise ValueError(f"level {k} does not follow on the one before")
        if k == 0 and level.opacity_file is not None:
            raise ValueError("level 0 has nothing below it that could have an opacity list")
        start = level.stop
    for name, entry in levels.files.items():
        # A manifest decides which files are opened: nothing but plain names in its own folder.
        if not re.fullmatch(r"\w[\w.-]*", name) or entry.bytes < 0:
            raise ValueError(f"{name!r} is not a file name")
    named = {name for k in range(len(levels)) for name in levels.new_files(k)}
    if named != levels.files.keys():
        raise ValueError(f"levels and files name other files: {named ^ levels.files.keys()}")


def _one_of(value: str, choice: Any) -> Any:
    if value not in get_args(choice):
        raise ValueError(f"{value!r} is none of {', '.join(get_args(choice))}")
    return value
