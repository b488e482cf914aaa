"""Cameras to see a model from, where the model's frame is not that of the cameras: refined or estimated cameras.

The photos that a model was made from have a camera in both frames; the Sim(3) between them carries the others along, as is usual for
methods that estimate cameras (InstantSplat's evaluation is one).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from s2d.alignment import align_cameras
from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.optim import scene_extent
from s2d.refinement import Refinement, register_cameras
from s2d.scene import Scene, load_scene
from s2d.split import Split

# Test cameras are off by parts of a pixel at most when they are registered: no coarse pictures needed.
TEST_ROUNDS = ((2, 20), (1, 20))


def carried_cameras(test: Cameras, kept: Cameras, used: Cameras) -> tuple[Cameras, str | None]:
    """Carry cameras into the frame of a model.

    Args:
        test: To be carried; in the frame of `kept`.
        kept: The cameras of the kept photos; more than those are ignored.
        used: The cameras of the same photos that the model belongs to.

    Returns:
        The cameras, focal lengths changed as those of the kept ones in the median; and a line that says how well the kept ones agree, None
        where `kept` are the model's own cameras and `test` is returned as it is.

    Raises:
        ValueError: One of `used` is not among `kept`.
    """
    kept = kept.select(used.names)
    if torch.equal(kept.viewmats, used.viewmats) and torch.equal(kept.Ks, used.Ks):
        return test, None
    alignment = align_cameras(kept, used)
    widths = [torch.tensor([width for width, _ in cameras.sizes]) for cameras in (kept, used)]
    zooms = (used.Ks[:, 0, 0] / widths[1]) / (kept.Ks[:, 0, 0] / widths[0])
    Ks = test.Ks.clone()
    Ks[:, :2, :2] *= zooms.median()
    moved = alignment.sim3.cameras(test)
    return Cameras(moved.viewmats, Ks, moved.sizes, moved.names), alignment.summary()


def follow_refinement(novel: Cameras, given: Cameras, refinement: Refinement | None) -> Cameras:
    """Carry novel cameras along with refined kept ones, so that they see of the Gaussians what they see of stage 0's points."""
    return novel if refinement is None else carried_cameras(novel, given, refinement.cameras())[0]


def registered_cameras(
    gaussians: Gaussians, test: Cameras, photo: Callable[[str], Tensor], used: Cameras
) -> Cameras:
    """Move test cameras to where a finished model looks most like their photos; the model stays as it is."""
    return register_cameras(
        gaussians, test, photo, scene_extent(used, gaussians.means.cpu()), TEST_ROUNDS
    )


def load_truth(source: Path, split: Split) -> tuple[Scene, Split]:
    """Load photos and cameras that a run did not have, to score it with.

    Views are matched by their names without suffix and called as in the run. Where the run has no test views, all views that it did not
    keep are.

    Args:
        source: A plain scene, in any frame; with a camera for each kept photo.
        split: The run's.

    Raises:
        ValueError: A kept photo is not in the scene.
    """
    scene = load_scene(source)
    of_run = {Path(name).with_suffix(""): name for name in (*split.kept, *split.test)}
    names = [of_run.get(Path(name).with_suffix(""), name) for name in scene.names]
    scene = replace(scene, cameras=scene.cameras.renamed(names))
    missing = [name for name in (*split.kept, *split.test) if name not in names]
    if missing:
        raise ValueError(
            f"{len(missing)} of the run's views are not in {source} (first: {missing[0]}). "
            "Expected a scene with a camera for each kept photo. Check --truth."
        )
    if not split.test:
        split = replace(split, test=tuple(name for name in names if name not in split.kept))
    return scene, split
