"""The folders behind the stage contract: what lies where, how a complete one gets to its place, what a failed one leaves.

    OUT/stage1.partial/   at work: results, `extra/` (will move into OUT), `scratch/` (checkpoints, never part of the result)
    OUT/stage1.old/       the result before, for the moment in which the new one takes its place
    OUT/stage1/           complete

Every step after `manifest.json` is written can be repeated, so a run that was killed in between is completed by the next one.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from s2d.files import fsync_dir, list_files
from s2d.log import logger

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
EXTRA = "extra"
SCRATCH = "scratch"
KEY = "key.json"  # in scratch: the config and the inputs that the checkpoints belong to


def partial_dir(final_dir: Path) -> Path:
    return final_dir.with_name(final_dir.name + ".partial")


def old_dir(final_dir: Path) -> Path:
    return final_dir.with_name(final_dir.name + ".old")


def result_files(stage_dir: Path) -> list[Path]:
    """The files of a stage that make its result: not the manifest and the config, which also hold times and paths."""
    return [
        path
        for path in list_files(stage_dir)
        if path.relative_to(stage_dir).as_posix() not in (MANIFEST, CONFIG)
    ]


def summarise(stage_dir: Path) -> dict[str, dict[str, int]]:
    """Number of files and bytes by file or folder at the top of the stage, or of OUT for extras."""
    outputs: dict[str, dict[str, int]] = {}
    for path in list_files(stage_dir):
        parts = path.relative_to(stage_dir).parts
        if parts[0] == SCRATCH:
            continue
        entry = outputs.setdefault(parts[parts[0] == EXTRA], {"files": 0, "bytes": 0})
        entry["files"] += 1
        entry["bytes"] += path.stat().st_size
    return outputs


def finish_commit(final_dir: Path) -> None:
    """Carry a complete partial folder through to its place; safe to call at any time by the holder of the lock."""
    partial, old = partial_dir(final_dir), old_dir(final_dir)
    if (partial / MANIFEST).is_file():
        if final_dir.exists():
            if old.exists():
                shutil.rmtree(old)
            os.rename(final_dir, old)
        os.rename(partial, final_dir)
        fsync_dir(final_dir.parent)
    elif old.exists() and not final_dir.exists():
        os.rename(old, final_dir)
    extra_dir = final_dir / EXTRA
    if extra_dir.is_dir():
        for path in list_files(extra_dir):
            target = final_dir.parent / path.relative_to(extra_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
            fsync_dir(target.parent)
        shutil.rmtree(extra_dir)
    if (final_dir / SCRATCH).is_dir():  # kept until now: a disk that filled up cost no optimisation
        shutil.rmtree(final_dir / SCRATCH)
    if old.exists():
        shutil.rmtree(old)


def leave_partial(partial: Path, error: BaseException) -> None:
    """After an exception: keep what a rerun can use, remove the rest, and blame the disk where it is the cause."""
    if (partial / MANIFEST).is_file() or not partial.exists():
        return  # cut off within the commit: the next run completes it
    cause = _disk_error(partial, error)
    if any(path.name != KEY for path in list_files(partial / SCRATCH)):
        logger.info("kept %s: the same command goes on from there", partial / SCRATCH)
    else:
        shutil.rmtree(partial, ignore_errors=True)
    if cause is not None:
        raise cause from error


def _disk_error(folder: Path, error: BaseException) -> OSError | None:
    """The error to show instead, with the folder in it, where `error` hides that the disk failed."""
    if isinstance(error, OSError):  # a failed write() names no file
        hides = error.errno is not None and error.filename is None
        return OSError(error.errno, error.strerror, str(folder)) if hides else None
    if not isinstance(error, Exception):
        return None
    probe = folder / ".probe"  # torch.save and OpenCV don't say that the disk is full: try it
    try:
        with open(probe, "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as failure:
        return OSError(failure.errno or errno.EIO, failure.strerror, str(folder))
    finally:
        probe.unlink(missing_ok=True)
    return None
