"""A client that shows levels while they arrive: level 0 at once, finer ones as far as their bytes are there.

Only whole, checked chunks are shown, so a download may end at any byte; the next one goes on from there. How far to refine is decided by the
measured bandwidth alone, never by what is looked at.
"""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

import torch
from torch import Tensor

from s2d.files import atomic_write_bytes
from s2d.gaussians import Gaussians, concatenate
from s2d.layers.manifest import MANIFEST, Levels, parse_levels
from s2d.layers.rows import level_opacities
from s2d.log import logger

PIECE_BYTES = 1 << 14
TRIES = 5  # in a row without a byte
FIRST_WAIT_SECONDS = 0.2  # doubles from try to try
PART = ".part"


@dataclass(frozen=True)
class Shown:
    """What can be shown of what has arrived."""

    level: int
    """Finest level that is complete; -1 where not even level 0 is."""
    share: float
    """Share of the next level's rows that are there, 0 where none is."""
    gaussians: Gaussians
    num_bytes: int
    """Bytes that have arrived, levels.json included."""
    seconds: float
    """Since the start."""


def shown_from_prefix(
    levels: Levels, data: Mapping[str, bytes | bytearray]
) -> tuple[int, float, Gaussians]:
    """Make the best picture of files that are cut off anywhere.

    A level that is complete is shown as it is. Of the next one, rows are added as they come, and the opacities of those below move from
    the old level's to the new level's by the same share: rows that finer ones replace fade as these appear.

    Args:
        levels: The manifest.
        data: File → its first bytes; in the order of `Levels.new_files` only the last may be incomplete.

    Returns:
        `Shown.level`, `Shown.share`, and the Gaussians, maybe none.

    Raises:
        ValueError: A chunk is damaged; names file and chunk.
    """
    parts: list[Gaussians] = []
    logits: Tensor = torch.zeros(0)
    level, share = -1, 0.0
    for k, entry in enumerate(levels.levels):
        below: Tensor | None = None
        if entry.opacity_file is not None:
            below = levels.opacities(k, data.get(entry.opacity_file, b""), partial=True)
            if len(below) < entry.start:
                break
        rows, wanted = (
            levels.rows(k, data.get(entry.rows_file, b""), partial=True),
            entry.stop - entry.start,
        )
        parts.append(rows)
        if rows.num == wanted:
            logits = level_opacities([logits, rows.opacity_logits], [None, below])
            level = k
            continue
        share = rows.num / wanted
        if below is not None and share > 0:
            logits = _between(logits, below, share)
        logits = torch.cat([logits, rows.opacity_logits])
        break
    gaussians = concatenate(parts)
    gaussians.opacity_logits = logits
    return level, share, gaussians


def _between(old: Tensor, new: Tensor, share: float) -> Tensor:
    opacities = (1 - share) * torch.sigmoid(old) + share * torch.sigmoid(new)
    return torch.logit(opacities, eps=1e-6)


class Bandwidth:
    """Bytes per second as of late: each second that passes counts half of what came before."""

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        fade = 0.5**seconds
        self._bytes = self._bytes * fade + num_bytes
        self._seconds = self._seconds * fade + seconds

    @property
    def bytes_per_second(self) -> float:
        """0 until something was measured."""
        return self._bytes / self._seconds if self._seconds > 0 else 0.0


class LayerStream:
    """Downloads a folder of levels, coarse to fine, into a folder that the next run goes on with.

    Example:
        for shown in LayerStream("http://127.0.0.1:8080/layers/", Path("cache")).updates():
            picture = rasterize(shown.gaussians, camera)
    """

    def __init__(
        self,
        url: str,
        cache_dir: Path,
        max_level: int | None = None,
        budget_seconds: float | None = None,
        refresh_seconds: float = 0.5,
        timeout_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read levels.json.

        Args:
            url: Folder of levels.json on the server.
            cache_dir: Made if missing. Complete, checked files in it are not fetched again, begun ones are gone on with.
            max_level: Finest level to fetch.
            budget_seconds: Begin a level only if it will be there so long after the start, as the bandwidth has been; level 0 always.
            refresh_seconds: Least time between two updates within a file.
            timeout_seconds: Without a byte, before a try counts as failed.
            clock: Seconds; for tests.

        Raises:
            ConnectionError: The server does not answer.
            ValueError: levels.json is damaged.
        """
        self.url = url if url.endswith("/") else url + "/"
        self.dir = Path(cache_dir)
        self.refresh_seconds, self.timeout_seconds = refresh_seconds, timeout_seconds
        self.budget_seconds, self.clock = budget_seconds, clock
        self.bandwidth = Bandwidth()
        self.start = clock()
        self.num_bytes = 0
        text = b"".join(self._fetch(MANIFEST, 0, None))
        self.levels = parse_levels(text, self.dir)
        self.last_level = min(len(self.levels) - 1, len(self.levels) if max_level is None else max_level)  # fmt: skip
        self._data: dict[str, bytearray] = {}
        self._keep_what_fits(text)

    def updates(self) -> Iterator[Shown]:
        """Fetch, and yield what can be shown whenever that has become more; the last one is the best there will be.

        Raises:
            ConnectionError: The server is gone, after some tries. What has arrived stays for the next run.
            ValueError: A file is not what levels.json says: damaged, or of another model; it is deleted.
        """
        for k in range(self.last_level + 1):
            if k > 0 and not self._worth_beginning(k):
                return
            for name in self.levels.new_files(k):
                if self.levels.files[name].bytes == len(self._load(name)):
                    self._check(name)
                    continue
                last_shown = self.clock()
                for _ in self._download(name):
                    if self.clock() - last_shown >= self.refresh_seconds:
                        last_shown = self.clock()
                        yield self._shown(name)
                self._check(name)
            yield self._shown(name)

    def _worth_beginning(self, k: int) -> bool:
        if self.budget_seconds is None or self.bandwidth.bytes_per_second == 0:
            return True
        missing = sum(
            self.levels.files[name].bytes - len(self._load(name))
            for name in self.levels.new_files(k)
        )
        left = self.budget_seconds - (self.clock() - self.start)
        fits = missing <= left * self.bandwidth.bytes_per_second
        if not fits:
            logger.info(
                "level %d stays away: %.1f MB would take longer than the %.1f s that are left at %.1f Mbit/s",
                k, missing / 1e6, max(left, 0.0), self.bandwidth.bytes_per_second * 8e-6,
            )  # fmt: skip
        return fits

    def _shown(self, newest: str) -> Shown:
        try:
            level, share, gaussians = shown_from_prefix(self.levels, self._data)
        except ValueError:  # all files before it have been checked
            self._delete(newest)
            raise
        return Shown(level, share, gaussians, self.num_bytes, self.clock() - self.start)

    def _keep_what_fits(self, manifest: bytes) -> None:
        """Begun files of another model would be gone on with in vain."""
        path = self.dir / MANIFEST
        known = path.read_bytes() if path.is_file() else None
        if known != manifest:
            old = parse_levels(known, self.dir).files if known is not None else {}
            for name in old:
                if old[name] != self.levels.files.get(name):
                    self._delete(name)
            atomic_write_bytes(path, manifest)

    def _delete(self, name: str) -> None:
        (self.dir / name).unlink(missing_ok=True)
        (self.dir / (name + PART)).unlink(missing_ok=True)

    def _load(self, name: str) -> bytearray:
        if name not in self._data:
            whole, part = self.dir / name, self.dir / (name + PART)
            path = whole if whole.is_file() else part
            self._data[name] = bytearray(path.read_bytes() if path.is_file() else b"")
        return self._data[name]

    def _check(self, name: str) -> None:
        try:
            self.levels.check(name, bytes(self._data[name]))
        except ValueError:
            self._delete(name)
            raise
        part = self.dir / (name + PART)
        if part.is_file():
            part.replace(self.dir / name)

    def _download(self, name: str) -> Iterator[None]:
        """Append to the file until it is complete; yields after each piece."""
        expected = self.levels.files[name]
        with (self.dir / (name + PART)).open("ab") as file:
            file.truncate(len(self._data[name]))
            for piece in self._fetch(name, len(self._data[name]), expected.sha256, expected.bytes):
                file.write(piece)
                self._data[name] += piece
                yield

    def _fetch(
        self, name: str, at: int, sha256: str | None, total: int | None = None
    ) -> Iterator[bytes]:
        """The bytes of a file from `at` on; goes on where a connection broke, a few times."""
        failures = 0
        while total is None or at < total:
            try:
                for piece in self._request(name, at, sha256):
                    failures = 0
                    at += len(piece)
                    yield piece
                if total is None or at >= total:
                    return
                raise http.client.IncompleteRead(b"")
            except urllib.error.HTTPError as error:
                raise ConnectionError(
                    f"{urljoin(self.url, name)}: the server says {error.code} {error.reason}. Is this the folder of {MANIFEST}?"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                failures += 1
                if failures >= TRIES:
                    raise ConnectionError(
                        f"{urljoin(self.url, name)} broke off at byte {at} and does not answer after {TRIES} tries ({error}). "
                        "Run the same command again later: it goes on from there."
                    ) from error
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (failures - 1))

    def _request(self, name: str, at: int, sha256: str | None) -> Iterator[bytes]:
        url = urljoin(self.url, name) + (f"?sha256={sha256}" if sha256 else "")
        request = urllib.request.Request(url)
        if at:
            request.add_header("Range", f"bytes={at}-")
            if sha256:
                request.add_header("If-Range", f'"{sha256}"')
        before = self.clock()
        with urllib.request.urlopen(request, timeout=self.timeout_seconds) as answer:
            if at and answer.status != 206:
                # Another file than the one begun, or a server without ranges: skip what is there, the hash decides in the end.
                answer.read(at)
            while piece := answer.read1(PIECE_BYTES):
                now = self.clock()
                self.bandwidth.add(len(piece), now - before)
                before = now
                self.num_bytes += len(piece)
                yield piece
