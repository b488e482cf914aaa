"""A mesh from rendered depth maps: fused into a truncated signed distance field by Open3D."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from s2d.cameras import Cameras
from s2d.files import atomic_write_bytes
from s2d.rasterize import Render

MIN_ALPHA = 0.5  # below, a pixel shows the background more than a surface
TRUNCATION_VOXELS = 4.0


def write_mesh(path: Path, renders: Sequence[tuple[Cameras, Render]], voxels: int) -> int:
    """Fuse the depth of renders and write the surface as a coloured PLY mesh.

    Args:
        path: The .ply file.
        renders: One camera and its render each.
        voxels: Voxels along the longest side of the box of what is seen (the middle 98 % of it on each axis).

    Returns:
        Number of triangles.

    Raises:
        ValueError: Open3D is not installed, or no pixel has a surface.
    """
    try:
        import open3d as o3d
    except ImportError as error:
        raise ValueError(
            f"A mesh needs Open3D, which is not installed ({error}). Run: .venv/bin/python -m pip install 'open3d>=0.19'"
        ) from error
    depths = [torch.where(r.alpha > MIN_ALPHA, r.depth, 0.0)[0, ..., 0] for _, r in renders]
    seen = [depth[depth > 0] for depth in depths]
    if sum(map(len, seen)) == 0:
        raise ValueError(f"No mesh for {path}: no pixel of {len(depths)} views has a surface.")
    far = float(torch.cat([d[::7] for d in seen]).quantile(0.98))
    side = 0.0
    for (camera, _), depth in zip(renders, seen, strict=True):
        if len(depth):
            median = min(far, float(depth.median()))
            side = max(side, median * camera.width / float(camera.Ks[0, 0, 0]))
    volume = o3d.pipelines.integration.ScalableTSDFVolume(
        voxel_length=side / voxels,
        sdf_trunc=TRUNCATION_VOXELS * side / voxels,
        color_type=o3d.pipelines.integration.TSDFVolumeColorType.RGB8,
    )
    for (camera, render), depth in zip(renders, depths, strict=True):
        K, colour = camera.Ks[0].double(), (render.rgb[0].clamp(0, 1) * 255).round()
        pair = o3d.geometry.RGBDImage.create_from_color_and_depth(
            o3d.geometry.Image(np.ascontiguousarray(colour.to(torch.uint8).numpy())),
            o3d.geometry.Image(np.ascontiguousarray(depth.numpy().astype(np.float32))),
            depth_scale=1.0,
            depth_trunc=far,
            convert_rgb_to_intensity=False,
        )
        # Open3D counts pixels from their centres.
        lens = o3d.camera.PinholeCameraIntrinsic(
            camera.width, camera.height, K[0, 0], K[1, 1], K[0, 2] - 0.5, K[1, 2] - 0.5
        )
        volume.integrate(pair, lens, camera.viewmats[0].double().numpy())
    mesh = volume.extract_triangle_mesh()
    mesh.compute_vertex_normals()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.ply")
    try:
        o3d.io.write_triangle_mesh(str(partial), mesh)
        atomic_write_bytes(path, partial.read_bytes())
    finally:
        partial.unlink(missing_ok=True)
    return len(mesh.triangles)
