"""Stage 2's work on its novel views: read what belongs to each, fix one or several at once, write three pictures of each.

A view is complete once its three pictures are. An interruption costs the views that are at work: one on a CPU, up to
`memory.MOST_VIEWS` on a GPU.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from s2d.fixer.calibration import CalibratedFixer
from s2d.fixer.interface import Fixer, FixResult, NovelView
from s2d.fixer.judge import Verdict
from s2d.fixer.processes import Processes
from s2d.images import image_writer, read_image
from s2d.log import progress

RESULTS = ("fixed", "mask", "confidence")


@dataclass(frozen=True)
class ViewFiles:
    """What the fixer reads for one novel view."""

    rendered: Path
    guidance: Path
    coverage: Path | None
    references: tuple[Path, ...]  # nearest first


@dataclass(frozen=True)
class Plan:
    """What all processes do together."""

    verdict: Verdict
    views: dict[str, ViewFiles]  # those still to be fixed, by name
    num_done: int
    folder: Path  # gets one folder of pictures per kind of result


def of_each_model(views: Mapping[str, ViewFiles], models: Sequence[Path]) -> dict[str, ViewFiles]:
    """The views as each model of an ensemble renders them, by `<model>/<name>`; `models` are the folders of their renders."""
    return {
        f"{model.name}/{name}": replace(view, rendered=model / name)
        for model in models
        for name, view in views.items()
    }


def unfinished_views(views: Mapping[str, ViewFiles], folder: Path) -> dict[str, ViewFiles]:
    """The views that no earlier run has finished; those with the same references stand together, so that one process encodes them."""
    for part in RESULTS:
        (folder / part).mkdir(exist_ok=True)
    return {
        name: view
        for name, view in sorted(views.items(), key=lambda item: (item[1].references, item[0]))
        if not all((folder / part / name).exists() for part in RESULTS)
    }


def fix_views(plan: Plan, processes: Processes, device: str) -> None:
    """Fix this process's share of the views and wait for the others.

    Raises:
        OSError: A picture could not be written; those of the other views at work are.
        ValueError: Pictures of one view differ in size, or see `FixerChoice.load`.
    """
    share = processes.share_of(list(plan.views.items()))
    total, done = plan.num_done + len(plan.views), 0
    fixer = usable_fixer(plan.verdict, processes, device) if share else None
    with image_writer() as write, progress(total, "stage 2", start=plan.num_done) as bar:
        for batch in batches(share, fixer):
            results = fixer.fix_together(list(batch.values()))
            write_results(write, plan.folder, dict(zip(batch, results, strict=True)))
            done += len(batch)
            bar.update(min(total, plan.num_done + done * processes.count))  # the others keep pace
    processes.wait()


def usable_fixer(verdict: Verdict, processes: Processes, device: str) -> Fixer:
    """The fixer, as far as it has shown that it helps; one that does not is not even loaded."""
    calibration = verdict.calibration
    if calibration is not None and not calibration.is_used:
        return CalibratedFixer(None, calibration)
    fixer = verdict.choice.load(device, processes.local_rank, few=False)
    return fixer if calibration is None else CalibratedFixer(fixer, calibration)


def batches(share: Iterable[tuple[str, ViewFiles]], fixer: Fixer) -> Iterator[dict[str, NovelView]]:
    """Read the views, and hand them out by name in order: as many neighbours at a time as go together, and as the fixer takes at once."""
    batch: dict[str, NovelView] = {}
    first: NovelView | None = None
    for name, files in share:
        view = read_view(files)
        if first is None or not view.goes_with(first):
            if batch:
                yield batch
            batch, first = {}, view
        batch[name] = view
        if len(batch) >= fixer.views_at_once(*view.size):
            yield batch
            batch, first = {}, None
    if batch:
        yield batch


def write_results(
    write: Callable[[Path, Tensor], object], folder: Path, results: Mapping[str, FixResult]
) -> None:
    """Write all pictures of some views; where one fails, the others all the same, before its error is raised."""
    failure: Exception | None = None
    for name, result in results.items():
        for part in RESULTS:
            try:
                write(folder / part / name, getattr(result, part))
            except (OSError, ValueError) as error:
                failure = failure or error
    if failure is not None:
        raise failure


def read_view(files: ViewFiles) -> NovelView:
    """Read what belongs to a view.

    Raises:
        ValueError: Its pictures differ in size.
    """
    rendered, guidance = read_image(files.rendered), read_image(files.guidance)
    require_size(files.guidance, guidance, files.rendered, rendered)
    if files.coverage is None:  # what is not black
        coverage = (guidance > 0).any(-1, keepdim=True).float()
    else:
        coverage = (read_image(files.coverage)[..., :1] > 0.5).float()
        require_size(files.coverage, coverage, files.rendered, rendered)
        guidance = guidance * coverage  # what `guidance_check` leaves out is in the picture still
    photos = tuple(read_photo(path) for path in files.references)
    return NovelView(rendered, guidance, coverage, photos)


# Neighbouring views look at the same photos.
read_photo = lru_cache(maxsize=8)(read_image)


def require_size(path: Path, image: Tensor, other_path: Path, other: Tensor) -> None:
    """Refuse pictures of one view that differ in size."""
    if image.shape[:2] != other.shape[:2]:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (image.shape, other.shape)]
        raise ValueError(
            f"{path} is {sizes[0]}, but {other_path} is {sizes[1]}. Expected one size per view. "
            "Run stages 0 and 1 on the same scene again."
        )
