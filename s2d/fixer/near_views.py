"""How much of a fixer's change is kept in novel views that are easier than the trials.

A trial's photo stands as far from the others as neighbouring photos do from each other, and its render is as bad as that makes it: what trials teach
holds for novel views as far away. A view close to a kept photo is rendered better, and the same change does harm there, unless nothing in it
was decided by the photos anyway. So of the change the share

    s = max(min(d / D, 1), w)

is kept: d the distance of the view's camera from the nearest kept one, D that of a kept one from its nearest neighbour (mean over them), and w how far the
models of stage 1 disagree around the pixel (`s2d.ensemble.disagreement`). Measured: docs/fixer.md, *Near views*.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.ensemble import disagreement
from s2d.images import image_writer, list_images, read_image


def distance_shares(novel: Cameras, kept: Cameras) -> Tensor:
    """How far each novel camera is from the kept ones: 0 in the place of one, 1 as far as those are from each other, or farther.

    Args:
        novel: N cameras.
        kept: At least two.

    Returns:
        [N] in [0, 1].
    """
    between = kept.pose_distances(kept)
    between.fill_diagonal_(torch.inf)
    gap = between.amin(1).mean()
    # Kept cameras that are all in one place: no view is nearer than a trial.
    return (novel.pose_distances(kept).amin(1) / gap.clamp_min(1e-9)).clamp(max=1.0)


def write_faded(
    rendered: Sequence[Path], fixed: Sequence[Path], shares: Mapping[str, float], out: Path
) -> None:
    """Write the mean of several models' fixed views, moved back towards the mean of their renders; see the module's docstring.

    Args:
        rendered: Folders with each model's renders, at least two.
        fixed: Folders with the fixed views of these, equally named.
        shares: Of each picture, by name: the least share of the change that is kept, in [0, 1].
        out: Folder to write to.
    """
    with image_writer() as write:
        for name in list_images(fixed[0]):
            before, after = (
                torch.stack([read_image(folder / name) for folder in folders])
                for folders in (rendered, fixed)
            )
            share = disagreement(before).clamp_min(shares[name])
            write(out / name, torch.lerp(before.mean(0), after.mean(0), share))
