"""How good predictions are: views that the model was not shown, rendered from every prefix of its levels, and scored.

Scores are those of the papers on RealEstate10K: PSNR of clipped renders, SSIM as scikit-image has it (`windowed_ssim`), LPIPS with VGG; a
scene's score is the mean over its target views, a data set's the mean over scenes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from s2d.geometry import invert_rigid, quat_to_rotation, rigid, rotation_to_quat, slerp
from s2d.hier.data.samples import Sample, as_batch, as_views
from s2d.hier.gaussians import HierGaussians, render
from s2d.hier.views import Views
from s2d.images import resize_image, write_image
from s2d.metrics import LPIPS_MIN_SIDE, SSIM_C1, SSIM_C2, SSIM_SIGMA, SSIM_WINDOW, Lpips, psnr

Predict = Callable[[Views], list[HierGaussians]]
Scores = dict[str, float | None]

CELL_HEIGHT = 160  # pixels of the sheet's pictures
TITLE_HEIGHT = 22


@dataclass(frozen=True, eq=False)
class Judged:
    """One sample and what was made of it. L levels, T target views."""

    name: str
    context: Tensor  # [V, H, W, 3]
    truth: Tensor  # [T, H, W, 3]
    renders: Tensor  # [L, T, H, W, 3] in [0, 1], of the set up to each level
    levels: list[HierGaussians]  # of one scene


@torch.no_grad()
def judge(
    name: str, predict: Predict, sample: Sample, device: torch.device | str = "cpu"
) -> Judged:
    """Predict from the context views, look from the target views.

    Args:
        name: For people.
        predict: A model, or what stands in for one.
        sample: See `frame_sample`.
        device: Where the model is.
    """
    batch = {key: tensor.to(device) for key, tensor in as_batch(sample).items()}
    levels = predict(as_views(batch, "context"))
    target = as_views(batch, "target")
    renders = [_pictures(render(gaussians, target)) for gaussians in levels]
    return Judged(
        name,
        _pictures(batch["context_images"]),
        _pictures(batch["target_images"]),
        torch.stack(renders),
        levels,
    )


def score(judged: Judged, lpips: Lpips | None) -> list[Scores]:
    """Mean `psnr`, `ssim`, `lpips` over the target views, for each level; no `lpips` without its network or for small pictures."""
    large_enough = min(judged.truth.shape[1:3]) >= LPIPS_MIN_SIDE
    rows = []
    for renders in judged.renders:
        pairs = list(zip(renders, judged.truth, strict=True))
        row: Scores = {
            "psnr": float(np.mean([psnr(*pair) for pair in pairs])),
            "ssim": float(np.mean([windowed_ssim(*pair) for pair in pairs])),
        }
        if lpips is not None and large_enough:
            row["lpips"] = float(np.mean([lpips(*pair) for pair in pairs]))
        rows.append(row)
    return rows


def mean_scores(rows: Sequence[Mapping[str, float | None]]) -> Scores:
    """Mean of each score over those that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def windowed_ssim(
    image: Tensor,  # [H, W, 3]
    target: Tensor,  # [H, W, 3]
) -> float:
    """SSIM with the 11×11 Gaussian window where it lies wholly inside, and sample covariances.

    These are scikit-image's choices, and so the published numbers'. `s2d.metrics.ssim` pads with zeros, as 3DGS does.
    """
    half = SSIM_WINDOW // 2
    if min(image.shape[:2]) < SSIM_WINDOW:
        raise ValueError(
            f"windowed_ssim: pictures must be at least {SSIM_WINDOW} pixels wide and high, got {list(image.shape)}."
        )
    kernel = cv2.getGaussianKernel(SSIM_WINDOW, SSIM_SIGMA, cv2.CV_64F)
    correction = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)  # of a sample's variance

    def blur(plane: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(plane, -1, kernel, kernel)[half:-half, half:-half]

    x, y = image.double().numpy(), target.double().numpy()
    mean_x, mean_y = blur(x), blur(y)
    variances = correction * (blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2)
    covariance = correction * (blur(x * y) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return float((luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)).mean())


def flight(context: Views, num_frames: int) -> Views:
    """Cameras from the first context view to the last and back, along the line between them; sides are even, as films need. T views

    The pictures are black: these views are to be rendered.
    """
    first, last = (context.select([row]) for row in (0, context.num_views - 1))
    width, height = context.width // 2 * 2, context.height // 2 * 2
    share = (1 - torch.cos(2 * torch.pi * torch.linspace(0, 1, num_frames))) / 2
    share = share.to(context.images)[None, :]
    quats = [rotation_to_quat(end.viewmats[:, :, :3, :3]) for end in (first, last)]
    quats = slerp(*(quat.expand(-1, num_frames, -1) for quat in quats), share)
    centers = [invert_rigid(end.viewmats)[:, :, :3, 3] for end in (first, last)]
    centers = torch.lerp(*centers, share[..., None])
    rotation = quat_to_rotation(quats)
    return Views(
        images=context.images.new_zeros(1, 1, 3, height, width).expand(
            context.num_scenes, num_frames, -1, -1, -1
        ),
        viewmats=rigid(rotation, -(rotation @ centers[..., None])[..., 0]),
        Ks=torch.lerp(first.Ks, last.Ks, share[..., None, None]),
        near=torch.lerp(first.near, last.near, share),
        far=torch.lerp(first.far, last.far, share),
    )


@torch.no_grad()
def fly(gaussians: HierGaussians, context: Views, num_frames: int) -> Iterator[Tensor]:
    """Render a flight through the first scene, frame by frame. [H, W, 3] each"""
    views = flight(context, num_frames)
    for frame in range(num_frames):
        yield _pictures(render(gaussians, views.select([frame])))[0]


def write_sheet(path: Path, judgements: Sequence[Judged]) -> Path:
    """Write one row per sample: two context views, the first target, and its render from every prefix of the levels with the PSNR."""
    rows = []
    for judged in judgements:
        cells = [(f"context {v}", judged.context[v]) for v in range(2)]
        cells.append((judged.name, judged.truth[0]))
        for level, renders in enumerate(judged.renders):
            title = f"level {level}: {psnr(renders[0], judged.truth[0]):.2f} dB"
            cells.append((title, renders[0]))
        rows.append(torch.cat([_cell(*cell) for cell in cells], dim=1))
    width = max(row.shape[1] for row in rows)
    padded = [torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[1])) for row in rows]
    return write_image(path, torch.cat(padded))


def _cell(title: str, image: Tensor) -> Tensor:
    width = max(1, round(image.shape[1] * CELL_HEIGHT / image.shape[0]))
    strip = np.zeros((TITLE_HEIGHT, width, 3), np.uint8)
    cv2.putText(strip, title, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255,) * 3, 1, cv2.LINE_AA)
    return torch.cat([torch.from_numpy(strip) / 255, resize_image(image, width, CELL_HEIGHT)])


def _pictures(images: Tensor) -> Tensor:  # [1, V, 3, H, W] → [V, H, W, 3]
    return images[0].float().clamp(0, 1).permute(0, 2, 3, 1).contiguous().cpu()
