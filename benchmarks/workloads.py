"""What the benchmarks run on: finished models with their kept photos, or Gaussians made up to be like them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.made_up import synthetic_tensors
from s2d.cameras import Cameras
from s2d.gaussians import Gaussians, load_checkpoint
from s2d.model_folder import kept_views
from s2d.optim import LearningRates
from s2d.rasterize import rasterize
from s2d.sampling import ViewSampler
from s2d.split import Split
from s2d.training import TrainingRun, start_run


@dataclass
class Workload:
    """A training run in the middle of its optimisation, and the views that it is trained on."""

    name: str
    run: TrainingRun
    cameras: Cameras
    image: Callable[[str], Tensor]
    """Photo of a view by its name. [H, W, 3]"""


def model_workload(model_dir: Path, source: Path | None = None) -> Workload:
    """Take up a finished stage 1 where it ended: its Gaussians, Adam's moments, kept views.

    Args:
        model_dir: OUT of a pipeline run.
        source: The scene; from OUT/stage1/manifest.json where None.

    Raises:
        FileNotFoundError: There is no finished stage 1, or the scene has moved.
    """
    checkpoints = sorted(model_dir.glob("chkpnt_stage1_*.pth"))
    if not checkpoints:
        raise FileNotFoundError(
            f"benchmark: no chkpnt_stage1_*.pth in {model_dir}. Run stages 0 and 1 there first."
        )
    if source is None:
        manifest = json.loads((model_dir / "stage1" / "manifest.json").read_text())
        source = Path(manifest["config"]["source"])
    kept = kept_views(source, model_dir / "stage0", Split.load(model_dir / "stage0" / "split.json"))
    saved = load_checkpoint(checkpoints[-1])
    sampler = ViewSampler(kept.cameras.names, seed=0)
    run = start_run(
        saved.gaussians,
        LearningRates(),
        saved.scene_extent,
        sampler,
        0,
        saved.step,
        saved.optimizer_state,
    )
    return Workload(model_dir.resolve().name, run, kept.cameras, kept.image)


def made_up_workload(name: str, gaussians: Gaussians, camera: Cameras) -> Workload:
    """Train Gaussians against a perturbed render of themselves."""
    with torch.no_grad():
        clean = rasterize(gaussians, camera).rgb[0]
        target = (clean + 0.1 * torch.randn_like(clean)).clamp(0, 1)
    run = start_run(gaussians, LearningRates(), 1.0, ViewSampler(camera.names, seed=0), seed=0)
    return Workload(name, run, camera, lambda _: target)


def front_camera(width: int, height: int, viewmat: Tensor | None = None) -> Cameras:
    """A camera at the origin, or with this world-to-camera [4, 4]."""
    focal = 0.85 * width  # about 60 degrees, as phone photos have
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    viewmat = torch.eye(4) if viewmat is None else viewmat
    return Cameras(viewmat[None], K[None], ((width, height),), ("benchmark.png",))


def camera_before(
    means: Tensor,  # [N, 3]
    width: int,
    height: int,
) -> Cameras:
    """A camera on the z axis that sees the middle 80 % of the centres."""
    low, middle, high = means.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
    viewmat = torch.eye(4)
    viewmat[:3, 3] = -middle
    viewmat[2, 3] += 0.85 * float((high - low).max())
    return front_camera(width, height, viewmat)


def ply_gaussians(path: Path, num: int) -> Gaussians:
    """Read a trained model; at most `num` of its Gaussians, evenly drawn."""
    gaussians = Gaussians.load_ply(path)
    rows = torch.randperm(gaussians.num)[:num].sort().values
    return Gaussians(**{name: t[rows] for name, t in gaussians.tensors().items()})


def synthetic_gaussians(num: int) -> Gaussians:
    """`benchmarks.made_up.synthetic_tensors` as `Gaussians`."""
    return Gaussians(**synthetic_tensors(num))
