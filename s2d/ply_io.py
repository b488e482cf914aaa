"""PLY files: Gaussians as every 3DGS viewer reads them, and coloured point clouds.

The only file that knows `f_dc_*` and `f_rest_*`: the latter is channel-major in the file (all of R, then G, then B), basis-major in
memory (`shN` [N, K-1, 3]). Files are binary little-endian; text PLY can be read. Layouts: docs/data_formats.md.
"""

import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from plyfile import PlyData, PlyElement, PlyElementParseError, PlyHeaderParseError
from torch import Tensor

from s2d.checks import check_shape
from s2d.files import atomic_write_bytes

OPAQUE_LOGIT = 15.0  # an opacity of 1 - 3e-7


class PointCloud(NamedTuple):
    """A coloured point cloud."""

    points: Tensor  # [P, 3] float32, world
    rgbs: Tensor  # [P, 3] float32 in [0, 1]
    confidence: Tensor | None  # [P] float32, as the file has it


def write_gaussians_ply(
    path: Path,
    *,
    means: Tensor,  # [N, 3]
    log_scales: Tensor,  # [N, 3]
    quats: Tensor,  # [N, 4]
    opacity_logits: Tensor,  # [N]
    sh0: Tensor,  # [N, 1, 3]
    shN: Tensor,  # [N, K-1, 3]
    support: Tensor | None = None,  # [N]
) -> Path:
    """Write raw Gaussian parameters as a 3DGS PLY, atomically.

    float32 values come back bit for bit (`read_gaussians_ply`); K = 1, 4, 9 or 16. Normals are written as zeros: viewers expect the
    columns and do not use them. `support` (s2d/strategies/support.py) becomes a last property that viewers ignore.

    Raises:
        ValueError: shapes that disagree.
    """
    dims = check_shape("means", means, ("N", 3))
    check_shape("log_scales", log_scales, ("N", 3), dims)
    check_shape("quats", quats, ("N", 4), dims)
    check_shape("opacity_logits", opacity_logits, ("N",), dims)
    check_shape("sh0", sh0, ("N", 1, 3), dims)
    check_shape("shN", shN, ("N", None, 3), dims)
    num, num_rest = shN.shape[0], shN.shape[1]
    _sh_degree(3 * num_rest, "write_gaussians_ply: shN")
    columns = [
        (("x", "y", "z"), means),
        (("nx", "ny", "nz"), torch.zeros(num, 3)),
        (_numbered("f_dc", 3), sh0.reshape(num, 3)),
        (_numbered("f_rest", 3 * num_rest), shN.transpose(1, 2).reshape(num, 3 * num_rest)),
        (("opacity",), opacity_logits.reshape(num, 1)),
        (_numbered("scale", 3), log_scales),
        (_numbered("rot", 4), quats),
    ]
    if support is not None:
        check_shape("support", support, ("N",), dims)
        columns.append((("support",), support.reshape(num, 1)))
    # All columns are float32, so the structured rows are just a matrix seen through another type.
    matrix = torch.cat([values.detach().cpu().float() for _, values in columns], 1).contiguous()
    dtype = np.dtype([(name, "<f4") for names, _ in columns for name in names])
    _write_vertices(path, matrix.numpy().astype("<f4", copy=False).view(dtype)[:, 0])
    return Path(path)


def read_gaussians_ply(path: Path) -> dict[str, Tensor]:
    """Read a 3DGS PLY of any SH degree 0 to 3, its properties in any order.

    Returns:
        The keyword arguments of `write_gaussians_ply`, float32: means [N, 3], log_scales [N, 3], quats [N, 4] wxyz as stored,
        opacity_logits [N] (infinite ones become ±`OPAQUE_LOGIT`), sh0 [N, 1, 3], shN [N, K-1, 3].

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a PLY, cut off, or without the properties of Gaussians.
    """
    vertices = _read_vertices(path)
    present = set(vertices.dtype.names)
    needed = (
        "x",
        "y",
        "z",
        "opacity",
        *_numbered("f_dc", 3),
        *_numbered("scale", 3),
        *_numbered("rot", 4),
    )
    missing = [name for name in needed if name not in present]
    if missing:
        raise ValueError(
            f"{path} holds no Gaussians: {len(missing)} of {len(needed)} properties are missing (first: {missing[0]}). "
            "Expected a 3DGS point_cloud.ply; a plain point cloud goes through stage 0 (--provider points)."
        )
    num_rest = sum(name.startswith("f_rest_") for name in present)
    degree = _sh_degree(num_rest, str(path))
    rest = _columns(vertices, _numbered("f_rest", num_rest))
    opacity_logits = _columns(vertices, ("opacity",))[:, 0].contiguous()
    # Converters write the logit of 255/255 as it is. Training and the rasteriser want numbers.
    opacity_logits = torch.where(
        opacity_logits.isinf(), opacity_logits.sign() * OPAQUE_LOGIT, opacity_logits
    )
    return {
        "means": _columns(vertices, ("x", "y", "z")),
        "log_scales": _columns(vertices, _numbered("scale", 3)),
        "quats": _columns(vertices, _numbered("rot", 4)),
        "opacity_logits": opacity_logits,
        "sh0": _columns(vertices, _numbered("f_dc", 3))[:, None, :],
        "shN": rest.reshape(len(vertices), 3, (degree + 1) ** 2 - 1).transpose(1, 2).contiguous(),
    }


def read_support(path: Path) -> Tensor | None:
    """Read the property `support` of a PLY of Gaussians; None where it has none. [N]

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a PLY, or cut off.
    """
    vertices = _read_vertices(path)
    has_support = "support" in vertices.dtype.names
    return _columns(vertices, ("support",))[:, 0].contiguous() if has_support else None


def write_points_ply(
    path: Path,
    points: Tensor,  # [P, 3]
    rgbs: Tensor,  # [P, 3]
    confidence: Tensor | None = None,  # [P]
) -> Path:
    """Write a coloured point cloud atomically: float32 positions, 8-bit colours, float32 confidence if given.

    Args:
        points: World. [P, 3]
        rgbs: In [0, 1]; rounded to 8 bits. [P, 3]
        confidence: Any number per point. [P]

    Raises:
        ValueError: shapes that disagree.
    """
    dims = check_shape("points", points, ("P", 3))
    check_shape("rgbs", rgbs, ("P", 3), dims)
    fields = [(axis, "<f4") for axis in "xyz"] + [
        (colour, "u1") for colour in ("red", "green", "blue")
    ]
    if confidence is not None:
        check_shape("confidence", confidence, ("P",), dims)
        fields.append(("confidence", "<f4"))
    vertices = np.empty(len(points), dtype=fields)
    positions = points.detach().cpu().numpy()
    colours = (rgbs.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    for i, (axis, colour) in enumerate(zip("xyz", ("red", "green", "blue"), strict=True)):
        vertices[axis] = positions[:, i]
        vertices[colour] = colours[:, i]
    if confidence is not None:
        vertices["confidence"] = confidence.detach().cpu().numpy()
    _write_vertices(path, vertices)
    return Path(path)


def read_points_ply(path: Path) -> PointCloud:
    """Read a point cloud from any PLY with vertices x, y, z: a scan, a mesh's vertices, COLMAP's or our own.

    Colours may be 8-bit, 16-bit or floating point in [0, 1], called red/green/blue or r/g/b; without colours the points are mid-grey.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a PLY, cut off, without x, y, z, or with positions that are not finite.
    """
    vertices = _read_vertices(path)
    present = set(vertices.dtype.names)
    if not {"x", "y", "z"} <= present:
        raise ValueError(
            f"{path} has no x, y, z in its vertices (has: {', '.join(vertices.dtype.names)})."
        )
    points = _columns(vertices, ("x", "y", "z"))
    finite = torch.isfinite(points).all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"{path}: {int((~finite).sum())} of {len(points)} points are not finite (first: {int((~finite).nonzero()[0])}). "
            "Clean the cloud first."
        )
    rgbs = torch.full_like(points, 0.5)
    for names in (
        ("red", "green", "blue"),
        ("r", "g", "b"),
        ("diffuse_red", "diffuse_green", "diffuse_blue"),
    ):
        if set(names) <= present:
            kind = vertices.dtype[names[0]]
            scale = 1.0 if kind.kind == "f" else float(np.iinfo(kind).max)
            rgbs = (_columns(vertices, names) / scale).clamp(0, 1)
            break
    confidence = (
        _columns(vertices, ("confidence",))[:, 0].contiguous() if "confidence" in present else None
    )
    return PointCloud(points, rgbs, confidence)


def _numbered(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}_{i}" for i in range(count))


def _sh_degree(num_rest: int, where: str) -> int:
    degree = math.isqrt(num_rest // 3 + 1) - 1
    if 3 * ((degree + 1) ** 2 - 1) != num_rest or degree > 3:
        raise ValueError(
            f"{where} has {num_rest} higher SH coefficients. Expected 0, 9, 24 or 45 (degree 0 to 3, three channels)."
        )
    return degree


def _columns(vertices: np.ndarray, names: tuple[str, ...]) -> Tensor:
    matrix = np.empty((len(vertices), len(names)), np.float32)
    for i, name in enumerate(names):
        matrix[:, i] = vertices[name]
    return torch.from_numpy(matrix)


def _write_vertices(path: Path, vertices: np.ndarray) -> None:
    buffer = io.BytesIO()
    PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<").write(buffer)
    atomic_write_bytes(path, buffer.getvalue())


def _read_vertices(path: Path) -> np.ndarray:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such PLY file: {path}.")
    try:
        ply = PlyData.read(path)
    except (PlyHeaderParseError, PlyElementParseError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a PLY file or is cut off ({error}). Make or download it again."
        ) from error
    if "vertex" not in ply:
        raise ValueError(
            f"{path} has no vertices (elements: {', '.join(e.name for e in ply.elements)})."
        )
    return ply["vertex"].data
