"""What stage 3 trains on: kept photos, and pseudo views (stage 2's pictures) with how much each of their pixels weighs."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.ensemble import disagreement, member_folders
from s2d.fixer.judge import is_off
from s2d.images import read_image, resize_image
from s2d.losses import novel_view_weight
from s2d.model_folder import render_name
from s2d.scene import Scene
from s2d.stage_io import require_stage
from s2d.views import View, ViewSource

# Decoded views held in memory; the rest is read again when drawn.
CACHED_VIEWS = 100

FixedViews = Callable[[str], tuple[Tensor, Tensor]]
"""Name of a novel view → its fixed image [H,W,3] and gradient weight [H,W,1]."""


class FixedPaths(NamedTuple):
    """Files of the pseudo views, by the views' names."""

    images: dict[str, Path]
    masks: dict[str, Path]
    confidences: dict[str, Path]
    models: Mapping[str, list[Path]] = MappingProxyType({})
    """The render of each of stage 1's models, as far as they are to be compared."""

    def inputs(self) -> dict[str, list[Path]]:
        """What the stage depends on."""
        named = {
            "fixed views": list(self.images.values()),
            "masks": list(self.masks.values()),
            "confidences": list(self.confidences.values()),
            "models": list(chain(*self.models.values())),
        }
        return {label: paths for label, paths in named.items() if paths}


def find_fixed_views(
    model_dir: Path,
    names: Sequence[str],
    fixed_dir: Path | None = None,
    mask_dir: Path | None = None,
    confidence_dir: Path | None = None,
    stage: str = "stage2",
) -> FixedPaths:
    """Find the fixed view, the mask and perhaps the confidence of every novel view.

    Args:
        model_dir: OUT.
        names: Of the novel views.
        fixed_dir, mask_dir, confidence_dir: Where they are if not in the stage's folder.
        stage: Of which they are; a round before the last has one of its own.

    Raises:
        FileNotFoundError: Stage 2 has not finished, or a folder or picture is missing.
    """
    folders = []
    for given, kind in ((fixed_dir, "fixed"), (mask_dir, "mask")):
        folder = given or require_stage(model_dir, stage).dir / kind
        paths = {name: folder / render_name(name) for name in names}
        missing = [path for path in paths.values() if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} novel views are missing in {folder} (first: {missing[0].name}). "
                "Run: python stage2_artifact_fix.py -m OUT"
            )
        folders.append(paths)
    folder = confidence_dir or _measured_confidences(model_dir, fixed_dir, stage)
    if folder is None:
        return FixedPaths(*folders, {})
    if not folder.is_dir():
        raise FileNotFoundError(f"Folder not found: {folder}. Check --fixed-confidence-dir.")
    paths = {name: folder / render_name(name) for name in names}
    # A view without one is trusted wholly.
    return FixedPaths(*folders, {name: path for name, path in paths.items() if path.is_file()})


def model_renders(model_dir: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """The novel views as each of stage 1's models shows them; none where there is but one model."""
    folders = member_folders(model_dir / "stage1")
    return {name: [folder / render_name(name) for folder in folders] for name in names if folders}


def default_agreed_weight(num_kept: int) -> float:
    """Least weight of fixed views where stage 1's models agree: 1 up to three kept photos, which may mislead all models alike, 0.1 from six on (docs/strategies.md)."""
    return round(min(max(1 - 0.3 * (num_kept - 3), 0.1), 1.0), 1)


def is_worth_training_on(model_dir: Path, stage: str = "stage2") -> bool:
    """Whether the fixed views say anything that stage 1's model does not know itself.

    Where trials have switched the fixer off they are its own renders, which only hold back what photos would still improve; the mean of
    an ensemble's renders is better than they are.

    Raises:
        FileNotFoundError: Stage 2 has not finished.
    """
    stage2 = require_stage(model_dir, stage)
    if not is_off(stage2.dir) or stage2.config["stage1_novel_render_dir"] is not None:
        return True
    return require_stage(model_dir, "stage1").config["ensemble"] > 1


def fixed_view_reader(
    novel: Cameras, paths: FixedPaths, beta: float, agreed_weight: float = 1.0
) -> FixedViews:
    """Return what reads a pseudo view.

    Args:
        novel: Cameras of the views; what is read gets their sizes.
        paths: As `find_fixed_views` and `model_renders` return them.
        beta: Weight of the gradient in unguided pixels.
        agreed_weight: Least weight of the gradient where stage 1's models agree; it grows to 1 with their disagreement.
    """
    sizes = dict(zip(novel.names, novel.sizes, strict=True))

    @lru_cache(maxsize=CACHED_VIEWS)
    def read(name: str) -> tuple[Tensor, Tensor]:
        # A fixer may work at a size of its own.
        fixed = resize_image(read_image(paths.images[name]), *sizes[name])
        mask = (resize_image(read_image(paths.masks[name])[..., :1], *sizes[name]) > 0.5).float()
        weight = novel_view_weight(mask, beta)
        if name in paths.confidences:
            weight = weight * resize_image(
                read_image(paths.confidences[name])[..., :1], *sizes[name]
            )
        if name in paths.models:
            renders = torch.stack([read_image(path) for path in paths.models[name]])
            weight = weight * resize_image(disagreement(renders), *sizes[name]).clamp(agreed_weight)
        return fixed, weight

    return read


def view_source(kept: Scene, novel: Cameras, fixed: FixedViews | None) -> ViewSource:
    """Return a function from (is it a kept view, its name) to what is trained on."""

    def view(is_kept: bool, name: str) -> View:
        if is_kept:
            return View(kept.cameras.select([name]), kept.image(name), None)
        assert fixed is not None
        return View(novel.select([name]), *fixed(name))

    return view


def _measured_confidences(model_dir: Path, fixed_dir: Path | None, stage: str) -> Path | None:
    """Stage 2's confidences, for its own views and where its trials have taught them: what a fixer thinks of itself weighs nothing."""
    if fixed_dir is not None:
        return None
    stage2 = require_stage(model_dir, stage)
    return stage2.dir / "confidence" if stage2.info.get("calibrated", False) else None
