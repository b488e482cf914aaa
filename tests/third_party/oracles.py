"""Scenes and comparisons that the kernel tests share. Everything is made in float64; `call` casts to what is tested."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

PARAMETERS = ("means", "log_scales", "quats", "opacity_logits", "sh0", "shN")
DIFFERENTIABLE = (*PARAMETERS, "viewmats", "Ks", "background", "means2d_probe")


def look_at(position: Tensor, target: Tensor) -> Tensor:
    """World-to-camera of a camera at `position` that looks at `target`, image-down along -y of the world. [4, 4]"""
    forward = torch.nn.functional.normalize(target - position, dim=0)
    down = torch.tensor([0.0, -1.0, 0.0], dtype=position.dtype)
    right = torch.nn.functional.normalize(torch.linalg.cross(down, forward), dim=0)
    down = torch.linalg.cross(forward, right)
    viewmat = torch.eye(4, dtype=position.dtype)
    viewmat[:3, :3] = torch.stack([right, down, forward])
    viewmat[:3, 3] = -viewmat[:3, :3] @ position
    return viewmat


def make_scene(
    num_gaussians: int = 60,
    degree: int = 3,
    num_cameras: int = 1,
    width: int = 32,
    height: int = 24,
    seed: int = 0,
    size: tuple[float, float] = (0.05, 0.4),  # world units: range of the standard deviations
    opacity_logit: tuple[float, float] = (0.5, 1.5),  # mean and spread
) -> dict:
    """A ball of Gaussians, radius about 1, seen from 4 units away by off-centre cameras. Arguments of the rasteriser, float64."""
    g = torch.Generator().manual_seed(seed)
    n, f64 = num_gaussians, torch.float64

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=f64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=f64)

    low, high = (math.log(s) for s in size)
    viewmats, Ks = [], []
    for i in range(num_cameras):
        angle = 0.5 * i
        position = 4 * torch.tensor([math.sin(angle), 0.2, -math.cos(angle)], dtype=f64)
        viewmats.append(look_at(position, 0.1 * normal(3)))
        focal = 1.3 * width
        cx, cy = (0.58 - 0.03 * i) * width, (0.42 + 0.04 * i) * height
        Ks.append(torch.tensor([[focal, 0, cx], [0, 0.9 * focal, cy], [0, 0, 1]], dtype=f64))
    return {
        "means": 0.6 * normal(n, 3),
        "log_scales": low + (high - low) * uniform(n, 3),
        "quats": normal(n, 4) * (0.3 + uniform(n, 1)),  # not unit
        "opacity_logits": opacity_logit[0] + opacity_logit[1] * normal(n),
        "sh0": normal(n, 1, 3),
        "shN": 0.3 * normal(n, (degree + 1) ** 2 - 1, 3),
        "viewmats": torch.stack(viewmats),
        "Ks": torch.stack(Ks),
        "width": width,
        "height": height,
        "background": torch.tensor([0.2, 0.5, 0.9], dtype=f64),
        "means2d_probe": torch.zeros(num_cameras, n, 2, dtype=f64),
    }


def cast(scene: dict, dtype: torch.dtype) -> dict:
    """Copy a scene with its tensors in another dtype."""
    return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in scene.items()}


def call(rasterize: Callable, scene: dict, **changes: object):
    """Call a rasteriser with a scene and some arguments changed."""
    return rasterize(**{**scene, **changes})


def gradients(rasterize: Callable, scene: dict, seed: int = 7, **changes: object) -> dict:
    """Gradients of a fixed random linear function of rgb, alpha and depth with respect to every differentiable argument."""
    scene = {**scene, **changes}
    leaves = {
        k: scene[k].detach().clone().requires_grad_() for k in DIFFERENTIABLE if scene[k].numel()
    }
    out = rasterize(**{**scene, **leaves})
    g = torch.Generator().manual_seed(seed)
    loss = sum(
        (torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) * x).sum()
        for x in (out.rgb, out.alpha, out.depth)
    )
    values = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        k: torch.zeros_like(leaf) if v is None else v
        for (k, leaf), v in zip(leaves.items(), values, strict=True)
    }


def relative_l2(value: Tensor, truth: Tensor) -> float:
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm().clamp_min(1e-30))


def cosine(value: Tensor, truth: Tensor) -> float:
    a, b = value.double().flatten(), truth.double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-30))


def assert_gradients_close(values: dict, truths: dict, max_relative_l2: float) -> None:
    """Compare whole vectors; all failures are reported together. A truth of exactly zero demands zero."""
    report, failed = [], False
    for name, truth in truths.items():
        value = values[name]
        if not truth.any():
            ok, line = not value.any(), f"{name}: expected zero, got norm {float(value.norm()):.2e}"
        else:
            error, similarity = relative_l2(value, truth), cosine(value, truth)
            ok = error <= max_relative_l2 and similarity >= 0.9999
            line = f"{name}: relative L2 {error:.2e}, cosine {similarity:.8f}, norm {float(truth.norm()):.2e}"
        failed |= not ok
        report.append(("   " if ok else "BAD ") + line)
    assert not failed, f"allowed relative L2 {max_relative_l2:.1e}\n" + "\n".join(report)
