"""Novel cameras planned by what they show: between the kept cameras and around them, chosen one after the other.

A *candidate* stands on the path between two kept cameras, or beside one of them and looks at what that one looks at. It is judged by a small
picture of stage 0's cloud. Each pixel stands for a piece of surface: the nearest one, or, in a hole beside a surface, what is presumed to lie
behind its edge. The piece is *new* as far as no kept and no chosen camera that sees it looks from nearby:

    newness = min(1, angle to the nearest direction it is seen from / ANGLE), 1 where nobody sees it
    gain    = sum of newness over the picture / pixels

The candidate with the largest gain is chosen, until there are enough or the gain is small. A candidate is out if the cloud's front fills too little
of its picture (there would be nothing to repair it with; behind a wall one sees backs), or if it comes too near to a surface.

Everything is measured in angles, shares of a picture, and distances of this scene: moving, turning or scaling the world does the same to the cameras.
"""

import logging
import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.cameras import Cameras
from s2d.geometry import in_picture, invert_rigid, look_at, project, unproject
from s2d.guidance.cloud import SurfaceCloud
from s2d.guidance.render import render_cloud
from s2d.trajectories import path_cameras, short_tour, with_lens_of

logger = logging.getLogger("s2d.novel")

SIDE = 48  # longer side of the pictures that candidates are judged by, pixels
ANGLE = math.radians(10)  # a surface seen from so far aside is wholly new
BORDER = 2  # pixels: so far into a hole the surface beside it is presumed to go on
SAME_SURFACE = 0.05  # relative depth: small pictures are coarse
MIN_COVERAGE = 0.75  # of what the kept views cover of their own pictures
MIN_DISTANCE = 0.5  # of the nearest that a kept camera is to a surface
MIN_GAIN = 0.02  # share of the picture
ON_PATH = tuple(k / 8 for k in range(1, 8))
# Of the distance to the next kept camera: as far out as the path's middle is from its ends.
ASIDE = (0.25, 0.5)
MAX_STEP = 0.35  # of the distance to the scene, where kept cameras stand far apart: half of it aside turns by 10 degrees


class Look(NamedTuple):
    """What a camera sees of the cloud, as a small picture."""

    camera: Cameras
    depth: Tensor  # [h, w] of the cloud, 0 where nothing is
    points: Tensor  # [M, 3] surface that its pixels stand for, world
    coverage: float  # share of the pixels that show the front of a surface
    nearest: float  # distance to the surface, world units


def plan_cameras(
    kept: Cameras,
    cloud: SurfaceCloud,
    num: int,
    min_coverage: float = MIN_COVERAGE,
) -> Cameras | None:
    """Choose up to `num` cameras around the kept ones, the most useful first.

    Args:
        kept: The kept cameras, at least one.
        cloud: What is known of the surface, in their world.
        num: How many at most; fewer where more would show nothing new.
        min_coverage: Share of the picture that the cloud must fill, of the share that it fills of the kept views.

    Returns:
        Cameras with the sizes and intrinsics of kept ones, or None where no candidate shows enough. Deterministic.
    """
    seen = [look(cloud, camera) for camera in kept]
    if not any(one.coverage for one in seen):
        return None
    enough = min_coverage * sum(one.coverage for one in seen) / len(seen)
    distance = MIN_DISTANCE * min(one.nearest for one in seen if one.coverage)
    cameras = candidates(kept, [scene_depth(one) for one in seen])
    looks = [look(cloud, camera) for camera in cameras]
    looks = [one for one in looks if one.coverage >= enough and one.nearest >= distance]
    if not looks:
        return None

    # One row per pixel of all candidates together.
    points = torch.cat([one.points for one in looks])
    counts = torch.tensor([len(one.points) for one in looks])
    owner = torch.repeat_interleave(torch.arange(len(looks)), counts)
    centers = torch.stack([_center(one.camera) for one in looks])[owner]
    pixels = torch.tensor([one.depth.numel() for one in looks])
    angle = torch.full((len(points),), math.inf, dtype=torch.float64)
    for one in seen:
        angle = torch.minimum(angle, _angles(points, centers, one))
    chosen: list[int] = []
    while len(chosen) < min(num, len(looks)):
        newness = (angle / ANGLE).clamp(max=1.0)
        gains = torch.zeros(len(looks), dtype=torch.float64).index_add(0, owner, newness) / pixels
        gains[chosen] = -1.0
        best = int(gains.argmax())
        if gains[best] < MIN_GAIN:
            break
        chosen.append(best)
        angle = torch.minimum(angle, _angles(points, centers, looks[best]))
    logger.info(
        "coverage: %d of %d candidates show enough, %d chosen",
        len(looks),
        len(cameras),
        len(chosen),
    )
    return cameras.select([looks[row].camera.names[0] for row in chosen]) if chosen else None


def candidates(kept: Cameras, depths: list[float]) -> Cameras:
    """Make the candidates: on the path between neighbours, and in eight directions beside each kept camera.

    Args:
        kept: The kept cameras.
        depths: How far the scene is from each, world units; 0 where that is not known.
    """
    parts = []
    if len(kept) > 1:
        tour = short_tour(kept)
        segments = torch.arange(len(tour) - 1).repeat_interleave(len(ON_PATH))
        parts.append(
            path_cameras(kept, tour, segments, torch.tensor(ON_PATH).repeat(len(tour) - 1))
        )
    known = [depth for depth in depths if depth > 0]
    typical = sum(known) / len(known)
    apart = torch.cdist(kept.centers.double(), kept.centers.double())
    apart.fill_diagonal_(math.inf)
    rows, viewmats = [], []
    for row, viewmat in enumerate(kept.viewmats.double()):
        depth = depths[row] or typical
        step = min(float(apart[row].min()), MAX_STEP * depth)
        c2w = invert_rigid(viewmat)
        target = c2w[:3, 3] + depth * c2w[:3, 2]
        for share in ASIDE:
            for eighth in range(8):
                turn = eighth * math.pi / 4
                aside = share * step * (math.cos(turn) * c2w[:3, 0] + math.sin(turn) * c2w[:3, 1])
                rows.append(row)
                viewmats.append(look_at(c2w[:3, 3] + aside, target, -viewmat[1, :3]))
    parts.append(with_lens_of(torch.stack(viewmats), kept, rows))
    count = sum(len(part) for part in parts)
    names = iter(f"candidate_{i}" for i in range(count))
    return Cameras.cat([part.renamed([next(names) for _ in part.names]) for part in parts])


def look(cloud: SurfaceCloud, camera: Cameras) -> Look:
    """Draw the small picture of one camera."""
    width, height = camera.sizes[0]
    scale = SIDE / max(width, height)
    small = camera.scaled((max(1, round(width * scale)), max(1, round(height * scale))))
    towards = _center(camera).float() - cloud.points
    # A point of unknown orientation has the normal 0: a front.
    front = ((cloud.normals * towards).sum(-1) >= 0).float()
    drawn = render_cloud(replace(cloud, rgbs=front[:, None].expand(-1, 3)), small)
    depth = drawn.depth.double() * drawn.coverage
    nearby = F.max_pool2d(depth[None], 2 * BORDER + 1, stride=1, padding=BORDER)[0]
    # Beside an edge the far side goes on.
    presumed = torch.where(depth > 0, depth, nearby)
    lifted = unproject(presumed, small.Ks[0].double(), small.viewmats[0].double())
    covered = depth[depth > 0]
    return Look(
        camera,
        depth,
        lifted[presumed > 0],
        float((drawn.rgb[..., 0] * drawn.coverage).mean()),
        # One in a hundred may be a stray point.
        float(torch.quantile(covered, 0.01)) if len(covered) else 0.0,
    )


def scene_depth(seen: Look) -> float:
    """How far away a camera's scene is: the median depth; 0 where it sees nothing."""
    covered = seen.depth[seen.depth > 0]
    return float(covered.median()) if len(covered) else 0.0


def _angles(
    points: Tensor,  # [M, 3]
    centers: Tensor,  # [M, 3]
    other: Look,
) -> Tensor:
    """Angle at each point between the camera that its row is of and another one; infinite where that does not see the point. [M]"""
    height, width = other.depth.shape
    camera = other.camera.scaled((width, height))
    xy, z = project(points, camera.Ks[0].double(), camera.viewmats[0].double())
    inside = in_picture(xy, z, (width, height))
    column, row = xy.nan_to_num().floor().long().unbind(-1)
    surface = other.depth[row.clamp(0, height - 1), column.clamp(0, width - 1)]
    visible = inside & ((surface == 0) | (z <= (1 + SAME_SURFACE) * surface))
    a, b = centers - points, _center(other.camera) - points
    angle = torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))
    return torch.where(visible, angle, math.inf)


def _center(camera: Cameras) -> Tensor:
    return invert_rigid(camera.viewmats[0].double())[:3, 3]
