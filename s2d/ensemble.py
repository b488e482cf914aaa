"""Several models of the same photos, alike but for their seed: where the photos do not decide, each errs in its own way.

The mean of M models' pictures keeps their common error and 1 / M of the variance that the seed alone causes (bagging, Breiman 1996). Stage 2
repairs each model's picture and takes the mean of what comes out, and stage 3 trains one model on it, so that one model learns what several agree on.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.images import image_writer, list_images, read_image

# Far enough apart that neither a few seeds of one's own nor their members ever meet.
SEED_STEP = 10_007

MEMBERS = "members"  # folder of stage 1 that holds a folder of renders per model, 0 for the first

# Difference of two models' pictures, mean over the channels, from which on they do not agree at all.
DISAGREEMENT = 0.04
# Radius of the square that it is averaged over, as a share of the picture's longer side: 4 pixels of 320.
NEIGHBOURHOOD = 1 / 80


def member_seed(seed: int, member: int) -> int:
    """Seed of a model of the ensemble; the first one's is the stage's own."""
    return seed + SEED_STEP * member


def member_folders(stage1_dir: Path) -> list[Path]:
    """Folders of each model's renders of the novel views, the first model's first; none where there is but one model."""
    return sorted((stage1_dir / MEMBERS).glob("*"), key=lambda folder: int(folder.name))


def mean_pictures(folders: Sequence[Path], out: Path) -> None:
    """Write the mean of equally named pictures of several folders, as PNGs.

    Args:
        folders: At least one; the names are those of the first one's pictures.
        out: Folder to write to; may be one of them.

    Raises:
        FileNotFoundError: A folder lacks one of the pictures.
    """
    with image_writer() as write:
        for name in list_images(folders[0]):
            write(out / name, torch.stack([read_image(path / name) for path in folders]).mean(0))


def disagreement(
    pictures: Tensor,  # [M, H, W, 3]
) -> Tensor:
    """How far several models' pictures of one view lie apart: 0 where they agree, so that the photos have decided, up to 1 where they do not.

    The mean absolute difference of two of them, over all pairs, the channels and a neighbourhood, as a share of DISAGREEMENT.

    Args:
        pictures: Of at least two models. [M, H, W, 3]

    Returns:
        [H, W, 1] in [0, 1].
    """
    pairs = [(a - b).abs().mean(-1) for a, b in combinations(pictures, 2)]
    apart = torch.stack(pairs).mean(0)[None, None]  # [1, 1, H, W]
    radius = max(1, round(NEIGHBOURHOOD * max(apart.shape[2:])))
    # Not counting what lies outside: at the border the mean of what is there.
    near = F.avg_pool2d(apart, 2 * radius + 1, 1, radius, count_include_pad=False)
    return (near / DISAGREEMENT).clamp(max=1.0)[0, 0, :, :, None]
