"""Files written so that a kill or a full disk never leaves half of one, and hashes of what lies in folders."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch

LOCK = ".s2d.lock"


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that, whenever it is looked at, it has its old content or its new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _named(path), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def atomic_write_text(path: Path, content: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, content.encode())


def atomic_write_json(path: Path, value: Any) -> None:
    """`atomic_write_bytes` of indented JSON that ends with a newline."""
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")


def atomic_torch_save(path: Path, state: Any) -> None:
    """`torch.save` that leaves no half-written checkpoint; read it with `weights_only=True`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write_bytes(path, buffer.getvalue())


def content_hash(paths: Path | Sequence[Path]) -> str:
    """SHA-256 over names and contents of a file, a list of files, or all files in a folder (hidden ones left out)."""
    if isinstance(paths, Path):
        root = paths if paths.is_dir() else paths.parent
        files = list_files(paths) if paths.is_dir() else [paths]
    else:
        files = sorted(path.absolute() for path in paths)
        root = Path(os.path.commonpath([path.parent for path in files])) if files else Path()
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0{_hash_file(path)}\n".encode())
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    """In pieces: a diffusion model's weights are gigabytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def list_files(folder: Path) -> list[Path]:
    """All files below a folder in name order; hidden ones and those in hidden folders left out."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def remove(path: Path) -> None:
    """Delete a file or a whole folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def fsync_file(path: Path) -> None:
    """Have a file's content on the disk before going on."""
    with _named(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_dir(folder: Path) -> None:
    """Have a folder's entries (renames, new files) on the disk before going on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with _named(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in an error of the system: one from write() or fsync() does not, and the user must know which disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Hold a folder, made if need be, against a second run. The system frees the lock of a process that dies.

    Args:
        folder: What the run writes into.
        flag: The option that names it, for the message.

    Raises:
        ValueError: Another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"{folder} is in use by another run. Wait until it has ended, or choose another output folder with {flag}."
        ) from None
    try:
        yield
    finally:
        lock.release()
