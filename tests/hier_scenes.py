"""Pictures with exactly known depth for the tests of `s2d.hier`: a textured wall, straight or tilted, seen by cameras that slide along it.

The wall is z = 4 + tilt · x; the cameras stand on z = 0 without rotation. Colour is a function of the place on the wall.
"""

import torch
from plane_scene import wall_colour

from s2d.geometry import pixel_grid
from s2d.hier.views import Views

DEPTH = 4.0


def wall(xs=(-0.3, 0.0, 0.3), width=64, height=48, tilt=0.0, dtype=torch.float32):
    """Views of the wall from the places (x, 0, 0), and its depth in each. Views [1, V, …], [1, V, H, W]"""
    focal = 0.9 * width
    K = torch.tensor([[focal, 0, 0.5 * width + 0.7], [0, focal, 0.5 * height - 0.4], [0, 0, 1]])
    grid = pixel_grid(2 * width, 2 * height, dtype=torch.float64) / 2  # four samples per pixel
    images, depths, viewmats = [], [], []
    for x in xs:
        colour, _ = _cast(grid, K, x, tilt)
        images.append(colour.reshape(height, 2, width, 2, 3).mean((1, 3)).permute(2, 0, 1))
        depths.append(_cast(pixel_grid(width, height, dtype=torch.float64), K, x, tilt)[1])
        viewmat = torch.eye(4)
        viewmat[0, 3] = -x
        viewmats.append(viewmat)
    count = len(xs)
    views = Views(
        images=torch.stack(images)[None].to(dtype),
        viewmats=torch.stack(viewmats)[None].to(dtype),
        Ks=K.expand(1, count, 3, 3).to(dtype),
        near=torch.full((1, count), 2.0, dtype=dtype),
        far=torch.full((1, count), 10.0, dtype=dtype),
    )
    return views, torch.stack(depths)[None].to(dtype)


def _cast(grid, K, x, tilt):
    dx, dy = (grid[..., 0] - K[0, 2]) / K[0, 0], (grid[..., 1] - K[1, 2]) / K[1, 1]
    depth = (DEPTH + tilt * x) / (1 - tilt * dx)
    colour = wall_colour((x + dx * depth).numpy(), (dy * depth).numpy())
    return torch.from_numpy(colour) / 255, depth


def random_views(generator, num_scenes, num_views, height, width, dtype=torch.float32):
    """Random pictures of cameras that look roughly the same way from roughly the same place."""
    from s2d.geometry import look_at

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    centers = 0.6 * rand(num_scenes, num_views, 3) - 0.3
    targets = torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64) + 0.3 * rand(
        num_scenes, num_views, 3
    )
    viewmats = look_at(centers, targets, torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64))
    K = torch.tensor([[0.9 * width, 0, 0.5 * width], [0, width, 0.5 * height], [0, 0, 1]])
    return Views(
        images=rand(num_scenes, num_views, 3, height, width).to(dtype),
        viewmats=viewmats.to(dtype),
        Ks=K.expand(num_scenes, num_views, 3, 3).to(dtype),
        near=(1.5 + rand(num_scenes, num_views)).to(dtype),
        far=(8.0 + rand(num_scenes, num_views)).to(dtype),
    )
