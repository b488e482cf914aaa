"""What leaves the project: Gaussians in other programs' formats, fly-throughs, pictures, depth maps (docs/export.md)."""

from s2d.export.frames import render_frames, write_depth, write_video
from s2d.export.model import kept_cameras, load_model, newest_ply
from s2d.export.paths import fly_through
from s2d.export.splats import FORMATS, write_splats

__all__ = [
    "FORMATS",
    "fly_through",
    "kept_cameras",
    "load_model",
    "newest_ply",
    "render_frames",
    "write_depth",
    "write_splats",
    "write_video",
]
