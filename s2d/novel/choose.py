"""Which novel cameras a scene gets: its own other cameras, cameras planned by what they show, or one of the plain paths."""

import logging
from typing import Literal

from torch import Tensor

from s2d.cameras import Cameras
from s2d.guidance.cloud import SurfaceCloud
from s2d.novel.plan import plan_cameras
from s2d.trajectories import interpolate_cameras, orbit_cameras, perturb_cameras

logger = logging.getLogger("s2d.novel")

NovelMode = Literal["auto", "given", "coverage", "interpolate", "orbit", "perturb"]


def make_novel_cameras(
    mode: NovelMode,
    kept: Cameras,
    given: Cameras | None = None,
    num: int = 24,
    cloud: SurfaceCloud | None = None,
    seed: int = 0,
) -> Cameras:
    """Choose or generate the novel cameras.

    Args:
        mode: `given`: the scene's other cameras. `coverage`: between and around the kept cameras, those that show most of the cloud anew.
            `interpolate`: a smooth path through the kept cameras. `orbit`: around the point that they look at. `perturb`: kept cameras
            moved and turned a little. `auto`: given where there are any, else two thirds interpolated and one third orbit.
        kept: The kept cameras, at least one (interpolate: two).
        given: The scene's other cameras, for `given` and `auto`.
        num: How many to generate, `coverage` at most; the given ones are all taken.
        cloud: Stage 0's points; `coverage` needs them, the others ask them how far away the scene is.
        seed: For `perturb`.

    Raises:
        ValueError: no kept camera, `given` without given cameras, one camera to interpolate, num below 1, unknown mode.
    """
    if len(kept) == 0:
        raise ValueError("make_novel_cameras: there are no kept cameras.")
    has_given = given is not None and len(given) > 0
    if mode == "given" and not has_given:
        raise ValueError(
            "--novel given: every camera of the scene is kept or a test camera, so none is left. "
            "Use --novel auto, or keep fewer views."
        )
    if mode == "given" or (mode == "auto" and has_given):
        return given
    if num < 1:
        raise ValueError(f"make_novel_cameras: num must be at least 1, got {num}.")
    points = None if cloud is None else cloud.points
    if mode == "auto":
        cameras = _plain_mix(kept, num, points)
    elif mode == "coverage":
        cameras = None if cloud is None else plan_cameras(kept, cloud, num)
        if cameras is None:
            logger.warning(
                "the points cover too little beside the photos to plan by them: novel cameras on a plain path"
            )
            cameras = _plain_mix(kept, num, points)
    elif mode == "interpolate":
        cameras = interpolate_cameras(kept, num)
    elif mode == "orbit":
        cameras = orbit_cameras(kept, num, points)
    elif mode == "perturb":
        cameras = perturb_cameras(kept, num, points, seed)
    else:
        raise ValueError(
            f"make_novel_cameras: unknown mode {mode!r}. Expected auto, given, coverage, interpolate, orbit or perturb."
        )
    logger.info("generated %d novel cameras (%s)", len(cameras), mode)
    return cameras.renamed([f"novel_{i:04d}" for i in range(len(cameras))])


def _plain_mix(kept: Cameras, num: int, points: Tensor | None) -> Cameras:
    """Two thirds on the path through the kept cameras, one third on an orbit."""
    num_orbit = num // 3
    if len(kept) == 1 or num == 1:
        return orbit_cameras(kept, num, points)
    path = interpolate_cameras(kept, num - num_orbit)
    if num_orbit == 0:
        return path
    orbit = orbit_cameras(kept, num_orbit, points)
    return Cameras.cat([path, orbit.renamed([f"orbit_{i}" for i in range(num_orbit)])])
