"""`scene.glb`: the cloud and the cameras for any 3D viewer.

In the scene's own world frame, as `--points-path` would read it back; viewers that take +y for up may show it turned.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from s2d.cameras import Cameras
from s2d.files import atomic_write_bytes
from s2d.geometry import invert_rigid
from s2d.guidance.cloud import SurfaceCloud

MAX_POINTS = 300_000  # 5 MB, and what a browser turns smoothly
KEPT_COLOUR = (230, 120, 20)
NOVEL_COLOUR = (60, 130, 230)
# Numbers of glTF 2.0: modes of a primitive, types of a component.
_POINTS, _LINES = 0, 1
_UNSIGNED_BYTE, _FLOAT = 5121, 5126


def write_scene_glb(path: Path, cloud: SurfaceCloud, kept: Cameras, novel: Cameras) -> Path:
    """Write the points (evenly thinned where there are many) and one pyramid per camera: kept orange, novel blue."""
    chosen = np.unique(
        np.linspace(0, len(cloud) - 1, min(len(cloud), MAX_POINTS)).round().astype(int)
    )
    colours = (cloud.rgbs[chosen] * 255).round().byte().numpy()
    size = 0.1 * max(
        Cameras.cat([kept, novel.renamed([f"novel/{name}" for name in novel.names])]).extent, 1e-6
    )
    parts = [("points", _POINTS, cloud.points[chosen].numpy(), colours)]
    for name, cameras, colour in (("kept", kept, KEPT_COLOUR), ("novel", novel, NOVEL_COLOUR)):
        if len(cameras):
            ends = frusta(cameras, size).reshape(-1, 3)
            parts.append((name, _LINES, ends, np.tile(np.uint8(colour), (len(ends), 1))))
    atomic_write_bytes(path, _glb(parts))
    return Path(path)


def _glb(parts: Sequence[tuple[str, int, np.ndarray, np.ndarray]]) -> bytes:
    """Binary glTF 2.0 of named parts: (name, mode, positions [V, 3], colours [V, 3] 8 bits)."""
    buffers, views, accessors, meshes = [], [], [], []
    for name, mode, positions, colours in parts:
        # An 8-bit colour takes four bytes, because a vertex has to start at a multiple of four.
        rgba = np.concatenate([colours, np.full((len(colours), 1), 255, np.uint8)], 1)
        for array, kind in ((positions.astype("<f4"), "VEC3"), (rgba, "VEC4")):
            offset = sum(map(len, buffers))
            buffers.append(array.tobytes())
            views.append({"buffer": 0, "byteOffset": offset, "byteLength": len(buffers[-1])})
            accessors.append({"bufferView": len(views) - 1, "count": len(array), "type": kind})
        accessors[-2] |= {
            "componentType": _FLOAT,
            "min": positions.min(0).tolist(),
            "max": positions.max(0).tolist(),
        }
        accessors[-1] |= {"componentType": _UNSIGNED_BYTE, "normalized": True}
        attributes = {"POSITION": len(accessors) - 2, "COLOR_0": len(accessors) - 1}
        meshes.append({"name": name, "primitives": [{"attributes": attributes, "mode": mode}]})
    binary = b"".join(buffers)
    content = {
        "asset": {"version": "2.0", "generator": "S2D"},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(meshes)))}],
        "nodes": [{"name": mesh["name"], "mesh": k} for k, mesh in enumerate(meshes)],
        "meshes": meshes,
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(binary)}],
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


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
