"""A scene small enough for tests: a textured box in a textured room, ray-cast exactly, with cameras and tracks in COLMAP's format.

Colour is a function of the 3D position alone, so views agree by construction and every test can ask for the truth.
"""

from pathlib import Path

import torch

from s2d.colmap_io import ColmapModel, write_model
from s2d.geometry import invert_rigid, look_at, pixel_grid
from s2d.images import write_image
from s2d.lenses import Lens

# Mixed on purpose: nothing may assume that all photos have one size.
SIZES = ((48, 36), (48, 36), (64, 48), (48, 36), (48, 36), (32, 24), (48, 36), (48, 36))
NAMES = tuple(f"view_{i}.png" for i in range(len(SIZES)))
NUM_POINTS = 400

_ROOM = torch.tensor([[-4.0, -4.0, 0.0], [4.0, 4.0, 4.0]], dtype=torch.float64)  # seen from inside
_BOX = torch.tensor([[-0.7, -0.6, 0.0], [0.6, 0.5, 1.1]], dtype=torch.float64)  # seen from outside


def texture(points: torch.Tensor) -> torch.Tensor:
    """Colour of the surface at world points, in [0, 1]. [..., 3]"""
    frequency = torch.tensor(
        [[2.1, 0.4, 1.3], [0.3, 2.6, 1.9], [1.5, 1.7, 0.6]], dtype=points.dtype
    )
    phase = torch.tensor([0.3, 1.1, 2.0], dtype=points.dtype)
    waves = 0.28 * torch.sin(points @ frequency.T + phase)
    fine = (
        0.18
        * torch.sin(5 * points[..., :1])
        * torch.sin(5 * points[..., 1:2] + 4 * points[..., 2:])
    )
    return 0.5 + waves + fine


def cameras() -> tuple[torch.Tensor, list[Lens]]:
    """Eight cameras on an arc of 70 degrees around the box: viewmats [8, 4, 4] float64 and their lenses."""
    angle = torch.deg2rad(torch.linspace(-35, 35, len(SIZES), dtype=torch.float64))
    height = 1.6 + 0.3 * torch.cos(3 * angle)
    centers = torch.stack([3.0 * torch.sin(angle), -3.0 * torch.cos(angle), height], -1)
    target = torch.tensor([0.0, 0.0, 0.6], dtype=torch.float64)
    viewmats = look_at(
        centers, target.expand_as(centers), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    )
    lenses = [
        Lens("PINHOLE", w, h, (0.9 * w, 0.9 * w, 0.5 * w + 0.7, 0.5 * h - 0.4)) for w, h in SIZES
    ]
    return viewmats, lenses


def cast(origins: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """First surface point on each ray. [..., 3]"""
    safe = torch.where(directions.abs() < 1e-12, torch.full_like(directions, 1e-12), directions)

    def slabs(box: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        planes = (box[:, None] - origins.reshape(-1, 3)) / safe.reshape(-1, 3)  # [2, rays, 3]
        return planes.amin(0).amax(-1), planes.amax(0).amin(-1)

    enter, leave = slabs(_BOX)
    _, room = slabs(_ROOM)
    distance = torch.where((enter < leave) & (enter > 0), enter, room).reshape(
        directions.shape[:-1]
    )
    return origins + directions * distance[..., None]


def render(viewmat: torch.Tensor, lens: Lens, samples: int = 3) -> torch.Tensor:
    """The truth for a pinhole camera: mean of samples x samples rays per pixel. [H, W, 3] float32"""
    fx, fy, cx, cy = lens.params
    grid = pixel_grid(lens.width * samples, lens.height * samples, dtype=torch.float64) / samples
    x, y = (grid[..., 0] - cx) / fx, (grid[..., 1] - cy) / fy
    c2w = invert_rigid(viewmat)
    directions = torch.stack([x, y, torch.ones_like(x)], -1) @ c2w[:3, :3].T
    colours = texture(cast(c2w[:3, 3].expand_as(directions), directions))
    return colours.reshape(lens.height, samples, lens.width, samples, 3).mean((1, 3)).float()


def build_tiny_scene(folder: Path) -> Path:
    """Write `images/` and `sparse/0` of the scene; tracks are exact projections of visible surface points."""
    viewmats, lenses = cameras()
    for name, viewmat, lens in zip(NAMES, viewmats, lenses, strict=True):
        write_image(folder / "images" / name, render(viewmat, lens))
    write_model(folder / "sparse" / "0", tiny_model())
    return folder


def tiny_model() -> ColmapModel:
    """The scene's cameras, surface points and observations."""
    viewmats, lenses = cameras()
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(SIZES, dtype=torch.float64)
    focal = torch.tensor([lens.params[:2] for lens in lenses], dtype=torch.float64)
    middle = torch.tensor([lens.params[2:] for lens in lenses], dtype=torch.float64)
    c2w = invert_rigid(viewmats)
    # A random pixel of a random view gives a surface point; it is kept if two or more views see it.
    view = torch.randint(len(SIZES), (2 * NUM_POINTS,), generator=generator)
    pixels = torch.rand(len(view), 2, generator=generator, dtype=torch.float64) * sizes[view]
    rays = torch.cat([(pixels - middle[view]) / focal[view], torch.ones(len(view), 1).double()], 1)
    centers = c2w[:, :3, 3]
    points = cast(centers[view], (c2w[view, :3, :3] @ rays[..., None])[..., 0])

    in_camera = torch.einsum("vij,pj->pvi", viewmats[:, :3, :3], points) + viewmats[:, :3, 3]
    xys = focal * in_camera[..., :2] / in_camera[..., 2:] + middle  # [P, V, 2]
    first = cast(centers.expand(len(points), -1, -1), points[:, None] - centers)
    seen = (
        (in_camera[..., 2] > 0)
        & ((xys > 0) & (xys < sizes)).all(-1)
        & ((first - points[:, None]).norm(dim=-1) < 1e-6)
    )
    kept = torch.nonzero(seen.sum(1) >= 2)[:NUM_POINTS, 0]
    points, xys, seen = points[kept], xys[kept], seen[kept]
    point_ids, view_ids = torch.nonzero(seen, as_tuple=True)
    return ColmapModel(
        names=list(NAMES),
        lenses=lenses,
        viewmats=viewmats.numpy(),
        points=points.numpy(),
        rgbs=texture(points).numpy(),
        point_ids=point_ids.numpy(),
        view_ids=view_ids.numpy(),
        xys=xys[seen].numpy(),
    )
