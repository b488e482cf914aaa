"""What `--data` names, as sources of training samples, and the scenes that are left out of them to judge by."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from s2d.hier.data.capture import Capture
from s2d.hier.data.chunks import ChunkFolder, is_chunk_root
from s2d.hier.data.index import Pick, capture_key, read_evaluation_index
from s2d.hier.data.overlap import PairSampler, evaluation_pairs
from s2d.hier.data.posed import PosedCapture, PosedScenes, load_posed
from s2d.hier.data.samplers import BoundedSampler, EvaluationSampler
from s2d.hier.data.samples import Source
from s2d.log import logger

Case = tuple[Capture, Pick]


@dataclass(frozen=True)
class DataRules:
    """How samples are chosen, by kind of source."""

    videos: BoundedSampler = field(default_factory=BoundedSampler)
    pairs: PairSampler = field(default_factory=PairSampler)
    near: float = 1.0
    """Of chunks whose scenes do not bring their own range; world units."""
    far: float = 100.0


def open_sources(
    paths: Sequence[Path], rules: DataRules, exclude: Sequence[str], cache_dir: Path
) -> tuple[list[Source], list[PosedCapture]]:
    """Open each of the paths: a chunk data set (its train/), a posed scene, or a folder of posed scenes.

    Args:
        paths: One source each.
        rules: How samples are chosen.
        exclude: Names of posed scenes that nothing is trained on.
        cache_dir: See `load_posed`.

    Returns:
        - the sources
        - the posed scenes that were excluded

    Raises:
        FileNotFoundError, ValueError: see `load_posed` and `ChunkFolder`; an excluded name that no scene has; nothing left of a source.
    """
    sources: list[Source] = []
    left_out: list[PosedCapture] = []
    for path in paths:
        if is_chunk_root(path):
            sources.append(ChunkFolder(path, "train", rules.videos, rules.near, rules.far))
            continue
        captures = load_posed([path], cache_dir)
        left_out += [capture for capture in captures if capture.key in exclude]
        used = [capture for capture in captures if capture.key not in exclude]
        source = PosedScenes(path.name, [], rules.pairs)
        source.captures = [capture for capture in used if source.is_usable(capture)]
        for capture in used:
            if capture not in source.captures:
                logger.warning("%s: no two views overlap enough to train on", capture.key)
        if source.captures:
            sources.append(source)
    if unknown := sorted(set(exclude) - {capture.key for capture in left_out}):
        raise ValueError(
            f"--exclude-scenes {unknown[0]}: no scene of --data has that name. Scenes are called as their folders are."
        )
    return sources, left_out


def posed_cases(
    captures: Sequence[PosedCapture], rule: PairSampler, max_pairs: int, max_targets: int
) -> list[Case]:
    """What posed scenes are judged by: see `evaluation_pairs`."""
    return [
        (capture, pick)
        for capture in captures
        for pick in evaluation_pairs(capture.overlaps, rule.rule, max_pairs, max_targets)
    ]


def chunk_cases(
    root: Path, index_path: Path, near: float, far: float
) -> tuple[list[tuple[str, Case]], int]:
    """What a published index judges by, as far as the chunks of `ROOT/test` are here.

    Returns:
        - (entry of the index, case), in the order of the chunks
        - number of valid entries whose scene is not here

    Raises:
        FileNotFoundError, ValueError: no index, no chunks, or none of them is in the index.
    """
    index = read_evaluation_index(index_path)
    folder = ChunkFolder(root, "test", EvaluationSampler(index), near, far)
    keys = {entry: capture_key(entry, folder.index) for entry, pick in index.items() if pick}
    here = [entry for entry, key in keys.items() if key is not None]
    if not here:
        raise ValueError(
            f"None of the {len(keys)} scenes of {index_path} is among the {len(folder)} of {folder.folder}. Is it the index of another data set?"
        )
    here.sort(key=lambda entry: (folder.index[keys[entry]], entry))
    cases = [(entry, (_Lazy(folder, keys[entry]), index[entry])) for entry in here]
    return cases, len(keys) - len(here)


class _Lazy:
    """A capture that is opened when something is asked of it, so that thousands of them can be listed."""

    def __init__(self, folder: ChunkFolder, key: str) -> None:
        self.folder = folder
        self.key = key

    def __len__(self) -> int:
        return len(self.folder.find(self.key))

    def __getattr__(self, name: str) -> object:
        return getattr(self.folder.find(self.key), name)
