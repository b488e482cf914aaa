"""The stage contract: how a script writes a folder of results so that others can trust it.

A stage works in `OUT/<stage>.partial`. When its block ends without an exception, everything in there is flushed to disk,
`manifest.json` is written last, and the folder is renamed to `OUT/<stage>`. So a folder with a manifest is complete, whatever
happens: a kill, a full disk, a power cut.

- Same config and same inputs as a complete stage: up to date, nothing is done.
- Other config or inputs: an error that names what differs, unless `overwrite`.
- An interrupted stage keeps `stage.scratch` (checkpoints, written with the `atomic_*` functions of `s2d.files`) for the next run with the same
  config and inputs; anything else of it is removed.
- Files that belong into OUT itself (`chkpnt*.pth`, `point_cloud/`) are written to `stage.extra_path(...)` and moved after the rename. The
  manifest lists them, so a run that was killed in between is completed by the next one.
"""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from s2d.config import config_hash, config_to_dict, config_to_yaml
from s2d.files import (
    atomic_write_json,
    atomic_write_text,
    content_hash,
    fsync_dir,
    fsync_file,
    list_files,
    locked,
    remove,
)
from s2d.log import describe_machine, logger, versions
from s2d.stage_folders import (
    CONFIG,
    EXTRA,
    KEY,
    MANIFEST,
    SCRATCH,
    finish_commit,
    leave_partial,
    old_dir,
    partial_dir,
    result_files,
    summarise,
)

FORMAT = 1  # raise it when a stage's files change their meaning: older results then count as stale
REQUIRED_KEYS = {"format", "hashed_config", "inputs", "extras"}  # what this module reads back

STAGE_SCRIPTS = {
    "stage0": "stage0_point_guidance.py",
    "stage1": "stage1_3dgs_init.py",
    "stage2": "stage2_artifact_fix.py",
    "stage3": "stage3_3dgs_mixed_opt.py",
}


@dataclass(frozen=True)
class Manifest:
    """What a complete stage says about itself. `data` is the whole of manifest.json."""

    dir: Path
    data: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """All config values by field name, paths as text."""
        return self.data["config"]

    @property
    def info(self) -> dict[str, Any]:
        """What the stage recorded in `stage.info`."""
        return self.data["info"]

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by part; `total` is the whole stage."""
        return self.data["timings"]

    @property
    def extras(self) -> tuple[Path, ...]:
        """The files in OUT that belong to this stage."""
        return tuple(self.dir.parent / name for name in self.data["extras"])


@dataclass
class Stage:
    """A stage at work, handed out by `open_stage`."""

    name: str
    final_dir: Path
    dir: Path  # where to write; `final_dir` if the stage is up to date
    up_to_date: bool
    resuming: bool = False  # `scratch` holds what an interrupted run of the same job left
    timings: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)  # JSON values for the manifest

    @property
    def scratch(self) -> Path:
        """Folder for what a rerun needs to go on; never part of the result. Write with `s2d.files.atomic_*`."""
        return self.dir / SCRATCH

    def extra_path(self, relative: str) -> Path:
        """Where to write a file that will end as `OUT/<relative>` when the stage completes."""
        path = self.dir / EXTRA / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def timer(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to `timings[part]`."""
        start = time.monotonic()
        yield
        self.timings[part] = self.timings.get(part, 0.0) + time.monotonic() - start


@contextmanager
def open_stage(
    model_dir: Path,
    name: str,
    cfg: Any,
    inputs: Mapping[str, Any],
    overwrite: bool = False,
) -> Iterator[Stage]:
    """Open a stage for writing; see the module's docstring for what happens when.

    Args:
        model_dir: OUT, made if missing.
        name: "stage0" … "stage3".
        cfg: The script's frozen dataclass.
        inputs: What the result depends on besides the config, by name: a file, a folder or a list of files (compared by content), the
            Manifest of an earlier stage (by the content of its files as they are now), or a JSON value.
        overwrite: Rebuild a complete stage, whatever it was made with.

    Raises:
        FileNotFoundError: An input does not exist.
        ValueError: The stage is complete but stale and `overwrite` is off, or OUT is in use by another run.
        OSError: OUT cannot be written to.
    """
    model_dir = Path(model_dir)
    final_dir = model_dir / name
    with locked(model_dir, "-m"):
        finish_commit(final_dir)
        key = {
            "format": FORMAT,
            "hashed_config": config_to_dict(cfg, only_hashed=True),
            "inputs": {label: _describe_input(label, value) for label, value in inputs.items()},
        }
        key = json.loads(json.dumps(key))  # as it will be read back
        old = _read_manifest(final_dir)
        if old is not None and not overwrite:
            changes = _differences({part: old.data[part] for part in key}, key)
            missing = [path for path in old.extras if not path.exists()]
            if changes:
                raise ValueError(
                    f"{final_dir} was made with other settings or inputs ({'; '.join(changes)}). "
                    "Pass --overwrite to rebuild it, or -m with another folder to keep both."
                )
            if missing:
                raise ValueError(
                    f"{missing[0]} is gone. It belongs to {final_dir}. Pass --overwrite to rebuild both."
                )
            logger.info("%s is up to date: %s", name, final_dir)
            yield Stage(name, final_dir, final_dir, up_to_date=True)
            return
        stage = _open_partial(final_dir, key)
        try:
            start = time.monotonic()
            yield stage
            stage.timings["total"] = time.monotonic() - start
            _commit(stage, cfg, key, old)
        except BaseException as error:
            leave_partial(stage.dir, error)
            raise


def require_stage(model_dir: Path, name: str) -> Manifest:
    """The manifest of a complete stage.

    Raises:
        FileNotFoundError: `stage0 is not finished: no manifest.json in OUT/stage0. Run: python stage0_point_guidance.py …`
    """
    final_dir = Path(model_dir) / name
    unfinished = (
        partial_dir(final_dir) / MANIFEST,
        old_dir(final_dir),
        final_dir / EXTRA,
        final_dir / SCRATCH,
    )
    if any(path.exists() for path in unfinished):
        with locked(Path(model_dir), "-m"):
            finish_commit(final_dir)
    manifest = _read_manifest(final_dir)
    if manifest is None:
        state = "was interrupted" if partial_dir(final_dir).is_dir() else "is not finished"
        script = STAGE_SCRIPTS.get(name, f"{name}.py")
        raise FileNotFoundError(
            f"{name} {state}: no {MANIFEST} in {final_dir}. "
            f"Run: python {script} -s SCENE -m {shlex.quote(str(model_dir))}"
        )
    return manifest


# --- the manifest and the lock ------------------------------------------------------------------------------------------


def _read_manifest(stage_dir: Path) -> Manifest | None:
    path = stage_dir / MANIFEST
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
        if not data.keys() >= REQUIRED_KEYS:
            raise ValueError
        return Manifest(stage_dir, data)
    except (ValueError, AttributeError):
        raise ValueError(
            f"{path} is damaged: it is not a manifest of this program. Remove {stage_dir} and run the stage again."
        ) from None


# --- inputs and what changed -------------------------------------------------------------------------------------------


def _describe_input(label: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Manifest):
        files = [*result_files(value.dir), *value.extras]
        return {"path": str(value.dir), "sha256": content_hash(files)}
    if isinstance(value, Path):
        if not value.exists():
            raise FileNotFoundError(f"{label} not found: {value}. Check the path.")
        return {"path": str(value), "sha256": content_hash(value)}
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Path) for item in value):
        return {"path": [str(item) for item in value], "sha256": content_hash(value)}
    return {"value": value}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between two keys, for people: `num_steps: 7000, now 30000`."""
    changes = []
    if old["format"] != new["format"]:
        changes.append(f"format: {old['format']}, now {new['format']}")
    changes += _changed_values(old["hashed_config"], new["hashed_config"])
    for label in dict.fromkeys([*old["inputs"], *new["inputs"]]):
        before, now = old["inputs"].get(label, {}), new["inputs"].get(label, {})
        if "sha256" in before and "sha256" in now:
            if before["sha256"] != now["sha256"]:
                changes.append(f"the content of {label} changed")
        elif before != now:
            shown = [item.get("path", item.get("value")) for item in (before, now)]
            changes.append(f"{label}: {shown[0]}, now {shown[1]}")
    return changes


def _changed_values(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {old.get(name)}, now {new.get(name)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name) or (name in old) != (name in new)
    ]


# --- the partial folder and the commit ---------------------------------------------------------------------------------


def _open_partial(final_dir: Path, key: dict[str, Any]) -> Stage:
    partial = partial_dir(final_dir)
    scratch = partial / SCRATCH
    resuming = False
    if partial.exists():
        try:
            known = json.loads((scratch / KEY).read_text())
        except (OSError, ValueError):
            known = None
        same = known is not None and not _differences(known, key)
        resuming = same and any(path.name != KEY for path in list_files(scratch))
        if resuming:
            logger.info("%s: going on from an interrupted run in %s", final_dir.name, partial)
            for path in partial.iterdir():
                if path != scratch:
                    remove(path)
        else:
            logger.info(
                "%s: removing %s, left by an interrupted run that cannot be continued",
                final_dir.name,
                partial,
            )
            shutil.rmtree(partial)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        atomic_write_json(scratch / KEY, key)
    except OSError:
        if not resuming:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return Stage(final_dir.name, final_dir, partial, up_to_date=False, resuming=resuming)


def _commit(stage: Stage, cfg: Any, key: dict[str, Any], old: Manifest | None) -> None:
    extra_dir = stage.dir / EXTRA
    extras = [path.relative_to(extra_dir).as_posix() for path in list_files(extra_dir)]
    outputs = summarise(stage.dir)
    atomic_write_text(stage.dir / CONFIG, config_to_yaml(cfg))
    for path in list_files(stage.dir):
        fsync_file(path)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = {
        "format": FORMAT,
        "stage": stage.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": getattr(cfg, "seed", None),
        "versions": versions(),
        "machine": describe_machine(),
        "device": str(getattr(cfg, "device", "cpu")),
        "config": config_to_dict(cfg),
        "hashed_config": key["hashed_config"],
        "config_hash": config_hash(cfg),
        "inputs": key["inputs"],
        "outputs": outputs,
        "extras": extras,
        "info": stage.info,
        "resumed": stage.resuming,
        "timings": {part: round(seconds, 3) for part, seconds in stage.timings.items()},
        "peak_rss_mb": round(usage / (2**20 if sys.platform == "darwin" else 2**10), 1),
    }
    if torch.cuda.is_available():
        manifest["peak_cuda_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    atomic_write_json(stage.dir / MANIFEST, manifest)
    for folder in [stage.dir, *(path for path in stage.dir.rglob("*") if path.is_dir())]:
        fsync_dir(folder)
    # From here on the new result is complete; `finish_commit` carries on wherever this is cut off.
    finish_commit(stage.final_dir)
    stage.dir = stage.final_dir
    for path in () if old is None else old.extras:  # of the result that was just replaced
        if path.relative_to(stage.final_dir.parent).as_posix() not in extras:
            path.unlink(missing_ok=True)
    logger.info("%s: done in %.1f s: %s", stage.name, stage.timings["total"], stage.final_dir)
