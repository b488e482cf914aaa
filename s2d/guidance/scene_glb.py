"""`scene.glb`: the cloud and the cameras for any 3D viewer.

In the scene's own world frame, as `--points-path` would read it back; viewers that take +y for up may show it turned.
"""

from pathlib import Path

import numpy as np
import torch
import trimesh
from trimesh.path.entities import Line

from s2d.cameras import Cameras
from s2d.files import atomic_write_bytes
from s2d.geometry import invert_rigid
from s2d.guidance.cloud import SurfaceCloud

MAX_POINTS = 300_000  # 5 MB, and what a browser turns smoothly
KEPT_COLOUR = (230, 120, 20, 255)
NOVEL_COLOUR = (60, 130, 230, 255)


def write_scene_glb(path: Path, cloud: SurfaceCloud, kept: Cameras, novel: Cameras) -> Path:
    """Write the points (evenly thinned where there are many) and one pyramid per camera: kept orange, novel blue."""
    chosen = np.unique(
        np.linspace(0, len(cloud) - 1, min(len(cloud), MAX_POINTS)).round().astype(int)
    )
    colours = (cloud.rgbs[chosen] * 255).round().byte().numpy()
    scene = trimesh.Scene()
    scene.add_geometry(
        trimesh.PointCloud(cloud.points[chosen].numpy(), colours), geom_name="points"
    )
    size = 0.1 * max(
        Cameras.cat([kept, novel.renamed([f"novel/{name}" for name in novel.names])]).extent, 1e-6
    )
    for name, cameras, colour in (("kept", kept, KEPT_COLOUR), ("novel", novel, NOVEL_COLOUR)):
        if len(cameras):
            ends = frusta(cameras, size).reshape(-1, 3)
            # Not load_path: it takes time to join the lines to longer ones.
            lines = [Line([end, end + 1]) for end in range(0, len(ends), 2)]
            path3d = trimesh.path.Path3D(lines, ends, process=False)
            path3d.colors = np.tile(colour, (len(path3d.entities), 1))
            scene.add_geometry(path3d, geom_name=name)
    atomic_write_bytes(path, scene.export(file_type="glb"))
    return Path(path)


def frusta(cameras: Cameras, size: float) -> np.ndarray:
    """Line segments of the pyramids from each centre to the picture's corners at depth `size`. [C * 8, 2, 3]"""
    segments = []
    for camera in cameras:
        width, height = camera.sizes[0]
        corners = torch.tensor(
            [[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], dtype=torch.float32
        )
        rays = torch.linalg.solve(camera.Ks[0], corners.T).T * size
        c2w = invert_rigid(camera.viewmats)[0]
        world = rays @ c2w[:3, :3].T + c2w[:3, 3]
        for k in range(4):
            segments += [
                torch.stack([c2w[:3, 3], world[k]]),
                torch.stack([world[k], world[(k + 1) % 4]]),
            ]
    return torch.stack(segments).numpy()
