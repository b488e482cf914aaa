"""The Gaussians of a scene as raw parameters: made from points, saved, loaded.

Raw means before the activation: `log_scales` (exp → world units), `opacity_logits` (sigmoid → (0,1)), `quats` wxyz of any
norm, spherical-harmonic coefficients `sh0` (constant) and `shN` (the rest). K = (degree + 1)² coefficients per channel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from simple_knn._C import distCUDA2
from torch import Tensor

from s2d.checks import check_shape
from s2d.device import to_cpu
from s2d.files import atomic_torch_save
from s2d.ply_io import read_gaussians_ply, write_gaussians_ply
from s2d.sh import rgb_to_sh0

CHECKPOINT_FORMAT = 1
# Mean squared distances below this are duplicates; the floor keeps log() finite, as in 3DGS.
MIN_SQUARED_DISTANCE = 1e-7


@dataclass
class Gaussians:
    """N Gaussians as raw parameter tensors. All on one device, float32."""

    means: Tensor  # [N, 3] world
    log_scales: Tensor  # [N, 3] log of world units
    quats: Tensor  # [N, 4] wxyz, any norm
    opacity_logits: Tensor  # [N]
    sh0: Tensor  # [N, 1, 3]
    shN: Tensor  # [N, K-1, 3]

    @property
    def num(self) -> int:
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        return round((self.shN.shape[1] + 1) ** 0.5) - 1

    def tensors(self) -> dict[str, Tensor]:
        """Return name → tensor, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def detached(self) -> "Gaussians":
        """Return the same values without gradients; memory is shared."""
        return Gaussians(**{name: tensor.detach() for name, tensor in self.tensors().items()})

    def save_ply(self, path: Path, support: Tensor | None = None) -> Path:
        """Write the PLY that every 3DGS viewer reads, bit-exact; atomic. `support` [N] becomes a property that viewers ignore."""
        return write_gaussians_ply(path, **self.tensors(), support=support)

    @staticmethod
    def load_ply(path: Path) -> "Gaussians":
        """Read what `save_ply` or any 3DGS program wrote."""
        return Gaussians(**read_gaussians_ply(path))

    def to(self, device: torch.device | str) -> "Gaussians":
        """Return a copy on `device` (the same tensors if they are there already)."""
        return Gaussians(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


def concatenate(parts: Sequence[Gaussians]) -> Gaussians:
    """Join the rows of several sets, first to last."""
    columns = [part.tensors() for part in parts]
    return Gaussians(**{name: torch.cat([c[name] for c in columns]) for name in columns[0]})


def thin_points(
    points: Tensor,  # [P, 3]
    max_points: int,
    confidence: Tensor | None = None,  # [P]
) -> Tensor:
    """Choose at most `max_points` points, evenly spread over the cloud.

    The points are put in Morton order, a curve that visits neighbours one after the other, and cut into runs of equal
    length; each run gives its most confident point. So dense parts stay denser than sparse ones, and no part is lost.

    Args:
        points: World positions. [P, 3]
        max_points: Number of points to keep; 0 keeps none.
        confidence: Larger is better; the first of each run where None. [P]

    Returns:
        Row numbers, ascending; all of them if there are no more than `max_points`. [M]
    """
    num = points.shape[0]
    if num <= max_points or max_points == 0:
        return torch.arange(min(num, max_points))
    low, high = points.amin(0), points.amax(0)
    # 21 bits per axis fill the 63 bits of a positive int64.
    cells = ((points - low).double() / (high - low).double().clamp(min=1e-12) * (2**21 - 1)).long()
    order = _morton_codes(cells).argsort(stable=True)
    run = torch.arange(num) * max_points // num  # [P] which run the k-th point on the curve is in
    score = torch.zeros(num) if confidence is None else confidence[order].float()
    # Sort by run, then by falling score: the first of each run is its best.
    by_score = score.argsort(descending=True, stable=True)
    best_first = by_score[run[by_score].argsort(stable=True)]
    starts = torch.cat(
        [torch.zeros(1, dtype=torch.long), run.bincount(minlength=max_points).cumsum(0)[:-1]]
    )
    return order[best_first[starts]].sort().values


def _morton_codes(
    cells: Tensor,  # [P, 3]
) -> Tensor:
    """Interleave the lowest 21 bits of three whole numbers. [P] int64"""
    spread = cells
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        spread = (spread | (spread << shift)) & mask
    return spread[:, 0] | (spread[:, 1] << 1) | (spread[:, 2] << 2)


def gaussians_from_points(
    points: Tensor,  # [P, 3]
    rgbs: Tensor,  # [P, 3]
    sh_degree: int,
    init_opacity: float = 0.1,
    max_scale_ratio: float = 10.0,
) -> Gaussians:
    """Put a round Gaussian on every point, as large as its surroundings are empty.

    The standard deviation is the root mean squared distance to the three nearest points, clamped to
    `max_scale_ratio` times the median one: a stray point far from everything would else cover the scene.

    Args:
        points: World positions. [P, 3]
        rgbs: Colours in [0,1]; they become the constant term, the view-dependent ones start at 0. [P, 3]
        sh_degree: Degree of the spherical harmonics, 0 to 3.
        init_opacity: Opacity in (0,1) that every Gaussian starts with.
        max_scale_ratio: Largest size in units of the median size.

    Raises:
        ValueError: With fewer than 4 points, which have no three nearest neighbours.
    """
    dims = check_shape("points", points, ("P", 3))
    check_shape("rgbs", rgbs, ("P", 3), dims)
    if points.shape[0] < 4:
        raise ValueError(
            f"gaussians_from_points: expected at least 4 points, got {points.shape[0]}. "
            "The point cloud of stage 0 is (nearly) empty: keep more photos or give a cloud with --provider points."
        )
    squared = distCUDA2(points.float().contiguous()).clamp(min=MIN_SQUARED_DISTANCE)
    squared = squared.clamp(max=float(squared.median()) * max_scale_ratio**2)
    num, num_coefficients = points.shape[0], (sh_degree + 1) ** 2
    return Gaussians(
        means=points.float().clone(),
        log_scales=(0.5 * squared.log())[:, None].repeat(1, 3),
        quats=points.new_tensor([1.0, 0.0, 0.0, 0.0]).float().repeat(num, 1),
        opacity_logits=squared.new_full((num,), float(torch.logit(torch.tensor(init_opacity)))),
        sh0=rgb_to_sh0(rgbs.float())[:, None, :],
        shN=squared.new_zeros(num, num_coefficients - 1, 3),
    )


@dataclass
class Checkpoint:
    """What a training run leaves behind: enough to continue it exactly."""

    gaussians: Gaussians
    step: int
    scene_extent: float
    optimizer_state: dict[str, Any] | None = None
    """`state_dict()` of the optimiser; None when the file has none that fits."""
    run_state: dict[str, Any] | None = None
    """Sampler, density statistics, random number generators, history: plain tensors, lists and numbers."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint of CPU tensors, all or nothing: a crash leaves the previous file as it was."""
    content = {
        "format": CHECKPOINT_FORMAT,
        "step": checkpoint.step,
        "scene_extent": checkpoint.scene_extent,
        "gaussians": checkpoint.gaussians.detached().tensors(),
        "optimizer_state": checkpoint.optimizer_state,
        "run_state": checkpoint.run_state,
    }
    atomic_torch_save(path, to_cpu(content))
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of ours, or the 12-tuple that 3DGS's training script writes; all of it onto the CPU.

    Files are read with weights_only=True: nothing in them is executed.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a checkpoint, or one of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Checkpoint not found: {path}. Run stage 1 first, or give --start_checkpoint."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises four unrelated types for a file that is cut off or not its own
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}). Run stage 1 again."
        ) from error
    if isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT:
        return Checkpoint(
            gaussians=Gaussians(**content["gaussians"]),
            step=content["step"],
            scene_extent=content["scene_extent"],
            optimizer_state=content["optimizer_state"],
            run_state=content["run_state"],
        )
    if isinstance(content, tuple) and len(content) == 2 and len(content[0]) == 12:
        return _from_3dgs_capture(*content)
    found = (
        f"format {content.get('format')}" if isinstance(content, dict) else type(content).__name__
    )
    raise ValueError(
        f"{path}: expected a checkpoint of format {CHECKPOINT_FORMAT} or a 3DGS (capture, iteration) pair, "
        f"got {found}. Run stage 1 again with this version."
    )


def _from_3dgs_capture(capture: tuple[Any, ...], step: int) -> Checkpoint:
    """Name what 3DGS stores by position.

    Its optimiser state is left behind: its groups are in another order and its statistics in other units, and
    Adam finds its moments again within some hundred steps.
    """
    _, xyz, features_dc, features_rest, scaling, rotation, opacity, *_, spatial_lr_scale = capture
    named = {
        "means": xyz,
        "log_scales": scaling,
        "quats": rotation,
        "opacity_logits": opacity[:, 0],
        "sh0": features_dc,
        "shN": features_rest,
    }
    gaussians = Gaussians(
        **{name: tensor.detach().float().contiguous() for name, tensor in named.items()}
    )
    return Checkpoint(gaussians, step, float(spatial_lr_scale))
