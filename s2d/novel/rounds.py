"""Rounds: render, fix, optimise, and again a little further out.

The first pseudo views stand next to the photos, where a render is easy to repair; the model that was trained on them renders the next ones better than
stage 1's does. Round r of R takes the novel cameras in the first r of R equal groups by their distance from the nearest kept camera, renders
them with the model of round r - 1 (stage 1's, for the first), fixes all of them anew and trains for its share of stage 3's steps.

    OUT/stage2_round<r>/  OUT/stage3_round<r>/   rounds before the last: stages like all others, complete or not there
    OUT/stage2/           OUT/stage3/            the last round: the result

One round is what stages 2 and 3 do without any of this. Where going further is not worth it (`Reach.stopped`), the rounds between are left out and the last one
trains on with the views that were reached.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from s2d.cameras import Cameras
from s2d.files import atomic_write_json
from s2d.fixer.judge import ADAPTED, PICTURES, VERDICT, is_off
from s2d.images import read_image
from s2d.model_folder import kept_views, render_name, stage1_checkpoint
from s2d.split import Split
from s2d.stage_io import Manifest, require_stage

logger = logging.getLogger("s2d.novel")

# New views of which the points cover less than this share of what they cover of the first round's: nothing there to repair them with.
MIN_COVERAGE = 0.5


@dataclass(frozen=True)
class Round:
    """One of several rounds of stages 2 and 3."""

    number: int = 1
    count: int = 1

    @staticmethod
    def parse(text: str) -> "Round":
        """Read `2/3`: the second of three rounds. ValueError for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        number, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= count:
            raise ValueError(f"--round {text}: expected NUMBER/COUNT, such as 1/2 and then 2/2.")
        return Round(number, count)

    @property
    def is_last(self) -> bool:
        return self.number == self.count

    @property
    def suffix(self) -> str:
        """What the folder's name has behind the stage's; nothing for the last round."""
        return "" if self.is_last else f"_round{self.number}"

    def last_step(self, first: int, last: int) -> int:
        """Where this round's part of the steps from `first` to `last` ends."""
        return first + (last - first) * self.number // self.count

    def refuse(self, **flags: object) -> None:
        """Raise ValueError for flags that mean nothing where there are several rounds."""
        given = [name for name, value in flags.items() if value]
        if self.count > 1 and given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} does not go with --round {self.number}/{self.count}. Leave one of the two out."
            )


@dataclass(frozen=True)
class Reach:
    """How far out a round goes."""

    names: tuple[str, ...]
    """The novel views that it works on, in the order of the novel cameras."""
    previous: int
    """The round whose model it starts from; 0: stage 1."""
    stopped: str | None
    """Why nothing further out is tried; None where it is."""


def reach_of(model_dir: Path, at: Round, source: Path | None = None) -> Reach:
    """Find out which views a round works on; needs stage 0, and later rounds the first one's stage 2.

    Args:
        model_dir: OUT.
        at: The round.
        source: The scene, if it has moved since stage 0.
    """
    stage0 = require_stage(model_dir, "stage0")
    novel = Cameras.from_json(stage0.dir / "novel_cameras.json")
    if at.count == 1:
        return Reach(novel.names, 0, None)
    split = Split.load(stage0.dir / "split.json")
    kept = kept_views(source or Path(stage0.config["source"]), stage0.dir, split).cameras
    groups = by_distance(novel, kept, at.count)
    reached, stopped = 1, None
    while reached < at.number and stopped is None:
        stopped = _why_not(stage0, groups[0], groups[reached]) or _no_gain(model_dir)
        reached += stopped is None
    chosen = {name for group in groups[:reached] for name in group}
    names = tuple(name for name in novel.names if name in chosen)
    return Reach(names, min(reached, at.number - 1), stopped)


def is_left_out(at: Round, reach: Reach) -> bool:
    """Whether there is nothing to do in a round; says so."""
    if reach.stopped is None:
        return False
    if not at.is_last:
        logger.info("round %d of %d is left out: %s", at.number, at.count, reach.stopped)
        return True
    logger.info(
        "round %d of %d stays with the %d views that were reached: %s",
        at.number,
        at.count,
        len(reach.names),
        reach.stopped,
    )
    return False


def by_distance(novel: Cameras, kept: Cameras, count: int) -> list[tuple[str, ...]]:
    """Split the novel cameras into `count` groups of one size, nearest to a kept camera first."""
    distance = novel.pose_distances(kept).amin(1)
    order = distance.argsort(stable=True).tolist()
    ends = [round(len(order) * k / count) for k in range(count + 1)]
    return [tuple(novel.names[row] for row in order[start:stop]) for start, stop in pairwise(ends)]


def previous_stage(model_dir: Path, at: Round, reach: Reach) -> Manifest:
    """The stage 3 of the round before."""
    name = f"stage3_round{reach.previous}"
    try:
        return require_stage(model_dir, name)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Round {at.number} of {at.count} goes on from round {reach.previous}, which is not finished: no {model_dir / name}. "
            f"Run stages 2 and 3 with --round {reach.previous}/{at.count} first."
        ) from None


def round_checkpoint(stage_dir: Path, step: int) -> Path:
    """Where a round before the last leaves its model."""
    return stage_dir / f"chkpnt{step}.pth"


def round_start(
    model_dir: Path,
    at: Round,
    reach: Reach,
    end_of: Callable[[int], int],
) -> tuple[int, Path]:
    """Where a round's part of stage 3's steps ends, and the checkpoint that it goes on from.

    Args:
        model_dir: OUT.
        at: The round.
        reach: How far it goes.
        end_of: Stage 3's last step, by the one that it begins at.

    Raises:
        FileNotFoundError: Stage 1, or the round before, has not finished.
    """
    start = stage1_checkpoint(model_dir)
    first = require_stage(model_dir, "stage1").info["iteration"]
    last_step = at.last_step(first, end_of(first))
    if reach.previous > 0:
        before = previous_stage(model_dir, at, reach)
        start = round_checkpoint(before.dir, before.info["iteration"])
    return last_step, start


def take_over_trials(model_dir: Path, at: Round, scratch: Path) -> None:
    """Trials do not depend on the round: those of the first are put where `judge` looks for its own."""
    if at.number == 1 or (scratch / VERDICT).is_file():
        return
    first = model_dir / f"stage2{Round(1, at.count).suffix}"
    if not (first / VERDICT).is_file():
        return
    summary = json.loads((first / VERDICT).read_text(encoding="utf-8"))
    for trial in summary["trials"]:
        folder = scratch / "trials" / f"{trial['name']}.png"
        folder.mkdir(parents=True, exist_ok=True)
        for picture in PICTURES:
            name = trial["picture"] if picture == "fixed" else picture
            shutil.copyfile(
                first / "trials" / f"{trial['name']}_{picture}.png", folder / f"{name}.png"
            )
    if (first / ADAPTED).is_file():
        shutil.copyfile(first / ADAPTED, scratch / ADAPTED)
    atomic_write_json(scratch / VERDICT, summary)  # last: with it the rest counts as complete


def _why_not(stage0: Manifest, first: tuple[str, ...], new: tuple[str, ...]) -> str | None:
    def coverage(names: tuple[str, ...]) -> float:
        pictures = [read_image(stage0.dir / "coverage" / render_name(name)) for name in names]
        return sum(float(picture.mean()) for picture in pictures) / max(len(pictures), 1)

    near, far = coverage(first), coverage(new)
    if far >= MIN_COVERAGE * near:
        return None
    return f"the points cover {far:.0%} of the next views, {near:.0%} of the first"


def _no_gain(model_dir: Path) -> str | None:
    """What the first round's trials have to say: renders that nothing improves teach a model only itself."""
    return "the fixer improves no trial" if is_off(model_dir / "stage2_round1") else None
