"""The folder of a data set of pairs: what is finished, how a job's pictures get to their place, and what is said about them.

    DATASET/jobs/<job>.partial/   at work; removed when it is begun anew
    DATASET/jobs/<job>/           complete: job.json, and pictures until they are moved to {train,test}_{A,P,M}

Moving can be repeated, so a run that is killed in the middle of it is completed by the next one. Format: docs/data_formats.md.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from s2d.device import Choice, DeviceUnusable, run_on
from s2d.files import atomic_write_json, atomic_write_text, fsync_dir
from s2d.pairs.fit import CPU
from s2d.pairs.jobs import run_job
from s2d.pairs.plan import Job, PairSettings, photo_name

FORMAT = 1
SPLITS = ("train", "test")
LETTERS = ("A", "B", "P", "M")
PARTIAL = ".partial"
MANIFEST, PAIRS, SETTINGS, JOB, PREVIEW = (
    "manifest.json",
    "pairs.jsonl",
    "settings.json",
    "job.json",
    "preview.png",
)


@dataclass(frozen=True)
class Dataset:
    """A data set on disk."""

    dir: Path

    @property
    def jobs_dir(self) -> Path:
        return self.dir / "jobs"

    @property
    def photos_dir(self) -> Path:
        return self.dir / "photos"

    def job_dir(self, job: Job) -> Path:
        return self.jobs_dir / job.name

    # --- settings -----------------------------------------------------------------------------------------------------

    def begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Take the settings for this folder's, or see that they are; `overwrite` removes what was made before.

        Raises:
            ValueError: it was made with other settings (names them), or holds what is not ours.
        """
        path = self.jobs_dir / SETTINGS
        if path.is_file():
            if overwrite or not self.records():  # without pairs, prepared scenes are all there is
                self.clear()
        elif found := sorted(
            entry.name
            for entry in self.dir.iterdir()
            if not entry.name.startswith(".") and entry != self.jobs_dir
        ):
            raise ValueError(
                f"{self.dir} holds other files (first: {found[0]}), and no data set of pairs. Choose an empty or new --output-dir."
            )
        if path.is_file():
            before = read_json(path)
            differing = sorted(
                key
                for key in before.keys() | settings.keys()
                if before.get(key) != settings.get(key)
            )
            if differing:
                changes = ", ".join(
                    f"{key}: {before.get(key)}, now {settings.get(key)}" for key in differing
                )
                raise ValueError(
                    f"{self.dir} was made with other settings ({changes}). Pass --overwrite to make it anew, or choose another "
                    "--output-dir. More scenes, seeds and keep counts may be added to what is there."
                )
        else:
            atomic_write_json(path, settings)

    def clear(self) -> None:
        """Remove everything that this module has written, and nothing else."""
        for record in self.records():
            for row in record["pairs"]:
                for letter in LETTERS:
                    (self.dir / f"{row['split']}_{letter}" / row["name"]).unlink(missing_ok=True)
        for name in (MANIFEST, PAIRS, PREVIEW):
            (self.dir / name).unlink(missing_ok=True)
        for folder in (self.dir / f"{split}_{letter}" for split in SPLITS for letter in LETTERS):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        for folder in (
            self.photos_dir,
            self.jobs_dir,
        ):  # the jobs last: they say whose folder this is
            shutil.rmtree(folder, ignore_errors=True)

    # --- jobs ----------------------------------------------------------------------------------------------------------

    def work(
        self,
        job: Job,
        settings: PairSettings,
        on_steps: Callable[[int], None],
        device: torch.device = CPU,
    ) -> dict:
        """Run a job in its `.partial` folder and rename it; returns its record. Called in worker processes.

        A fit that fails (photos that share no surface) is no reason to stop a night's work: its record says what happened.

        Raises:
            DeviceUnusable: The GPU failed, or its memory does not suffice.
        """
        final = self.job_dir(job)
        partial = final.with_name(final.name + PARTIAL)
        for folder in (partial, final):
            shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)
        failed, rows, started = None, [], time.process_time()
        try:
            rows = run_on(
                Choice(device, "the tool's", asked=str(device)),
                lambda on: run_job(job, partial, settings, on_steps, on),
            )
        except DeviceUnusable:
            raise
        except ValueError as error:
            shutil.rmtree(partial)
            partial.mkdir()
            failed = str(error)
        dropped = [row["kind"] for row in rows if row.get("dropped")]
        record = {
            "format": FORMAT,
            "job": job.name,
            "failed": failed,
            "dropped": {kind: dropped.count(kind) for kind in sorted(set(dropped))},
            "cpu_seconds": round(time.process_time() - started, 2),
            "pairs": [row for row in rows if not row.get("dropped")],
        }
        atomic_write_json(partial / JOB, record)
        os.rename(partial, final)
        fsync_dir(final.parent)
        return record

    def is_finished(self, job: Job) -> bool:
        """Whether a job is complete and all its pictures are still there."""
        folder = self.job_dir(job)
        if not (folder / JOB).is_file():
            return False
        return all(
            (self.dir / f"{row['split']}_{letter}" / row["name"]).is_file()
            or (folder / letter / row["name"]).is_file()
            for row in read_json(folder / JOB)["pairs"]
            for letter in ("A", "P", "M")
        )

    def collect(self, job_name: str) -> None:
        """Move a complete job's pictures to where loaders look for them, and link the truths beside them."""
        folder = self.jobs_dir / job_name
        for row in read_json(folder / JOB)["pairs"]:
            for letter in LETTERS:
                target = self.dir / f"{row['split']}_{letter}" / row["name"]
                target.parent.mkdir(exist_ok=True)
                if letter == "B":
                    _link(self.photos_dir / photo_name(row["scene"], row["frame"]), target)
                elif (folder / letter / row["name"]).is_file():
                    os.replace(folder / letter / row["name"], target)
        for letter in LETTERS:
            shutil.rmtree(folder / letter, ignore_errors=True)

    def records(self) -> list[dict]:
        """The records of all complete jobs, by name."""
        paths = sorted(self.jobs_dir.glob(f"*/{JOB}"))
        return [read_json(path) for path in paths if path.parent.suffix != PARTIAL]

    def pairs(self) -> list[dict]:
        """The lines of pairs.jsonl: all pairs of all complete jobs, by name."""
        rows = [row for record in self.records() for row in record["pairs"]]
        return sorted(rows, key=lambda row: row["name"])

    # --- what is said about it -----------------------------------------------------------------------------------------

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Write pairs.jsonl and then manifest.json over all complete jobs; returns the manifest."""
        records, rows = self.records(), self.pairs()
        for split in SPLITS:
            for letter in LETTERS:
                (self.dir / f"{split}_{letter}").mkdir(exist_ok=True)
        atomic_write_text(
            self.dir / PAIRS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
        kinds = sorted({row["kind"] for row in rows})
        manifest = {
            "format": FORMAT,
            **about,
            "num_pairs": {split: sum(row["split"] == split for row in rows) for split in SPLITS},
            "kinds": {
                kind: _statistics([row for row in rows if row["kind"] == kind]) for kind in kinds
            },
            "dropped": {
                kind: sum(record["dropped"].get(kind, 0) for record in records)
                for kind in sorted({kind for record in records for kind in record["dropped"]})
            },
            "failed": {r["job"]: r["failed"] for r in records if r["failed"]},
            "num_jobs": len(records),
            "cpu_seconds": round(sum(record["cpu_seconds"] for record in records), 1),
        }
        atomic_write_json(self.dir / MANIFEST, manifest)
        return manifest


def _statistics(rows: Sequence[dict]) -> dict[str, Any]:
    psnrs = np.array([row["psnr"] for row in rows])
    low, middle, high = np.percentile(psnrs, [10, 50, 90])
    numbers = {"mean": psnrs.mean(), "std": psnrs.std(), "p10": low, "median": middle, "p90": high}
    return {
        **{split: sum(row["split"] == split for row in rows) for split in SPLITS},
        "psnr": {name: round(float(value), 2) for name, value in numbers.items()},
        "coverage": round(float(np.mean([row["coverage"] for row in rows])), 3),
    }


def _link(source: Path, target: Path) -> None:
    """Hard link, or copy where the file system has none; a target that is there stays."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}). Delete it; what it describes is made again."
        ) from error
