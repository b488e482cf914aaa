"""Structure from motion for few photos: several attempts from strict to lenient, and the best of them.

COLMAP's defaults want an initial pair with 100 inliers 16 degrees apart, and 30 inliers for every further photo: right for hundreds of
photos, too much for three. Lenient settings alone would accept wrong geometry where strict ones find the right one. So both are
tried, each result is refined and measured the same way (`s2d.poses.refine`), and the measure decides.

Notation: V photos; errors and focal lengths in working pixels (`s2d.poses.features`).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pycolmap

from s2d.log import progress
from s2d.poses.features import (
    STANDARD,
    THOROUGH,
    Features,
    FeatureSettings,
    extract_all,
    match_all,
    max_features,
    working_scale,
    write_photos,
)
from s2d.poses.photos import Photo
from s2d.poses.refine import Quality, polish, quality

logger = logging.getLogger("s2d.poses")

# Focal length over the longer side where EXIF says nothing: a telephone's main camera (26 mm equivalent) has 0.72, a normal lens 1.2.
FOCAL_GUESSES = (0.8, 1.2)
# An attempt that is as good as this ends the search at once (`Quality.weakest`, and the median error in pixels) …
CONVINCING_WEAKEST, CONVINCING_ERROR = 100, 0.75
# … and one that is as good as this ends it before the slow features.
SATISFYING_WEAKEST = 30


class MapperSettings(NamedTuple):
    """What an incremental mapper asks of its first pair and of every further photo."""

    name: str
    init_inliers: int
    init_angle: float  # degrees
    next_inliers: int
    next_inlier_ratio: float


STRICT = MapperSettings("strict", 100, 16.0, 30, 0.25)
RELAXED = MapperSettings("relaxed", 30, 4.0, 20, 0.2)
LENIENT = MapperSettings("lenient", 15, 1.5, 12, 0.1)


class Attempt(NamedTuple):
    """One way to solve the cameras, and what came of it."""

    features: str
    mapper: str
    lenses: str  # "shared": photos that say the same of their camera have one lens; "own": each photo has its own
    guess: (
        float | None
    )  # focal length over the longer side that photos without EXIF started from; None: all have EXIF
    quality: Quality
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """JSON values."""
        numbers = {
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in self.quality._asdict().items()
        }
        return {**self._asdict(), "quality": numbers}


class Solution(NamedTuple):
    """The best attempt with all that further photos need to be placed in it."""

    model: pycolmap.Reconstruction  # image ids are rows + 1, points2D are the features
    features: list[Features]
    settings: FeatureSettings
    attempt: Attempt
    attempts: list[Attempt]


def solve(photos: Sequence[Photo], scratch: Path, seed: int = 0) -> Solution | None:
    """Find the cameras of photos.

    Args:
        photos: At least two.
        scratch: Folder for what an interrupted run goes on from: the matches.
        seed: Of RANSAC; the same photos and seed give the same bits.

    Returns:
        The best solution, of two photos or more; None where no attempt placed two.
    """
    best: Solution | None = None
    attempts: list[Attempt] = []
    limit = max_features(len(photos))
    for settings in (STANDARD, THOROUGH):
        features = extract_all(photos, settings, limit, settings.name)
        matches = scratch / f"matches_{settings.name.replace(' ', '_')}.db"
        match_all(matches, photos, features, make_cameras(photos, FOCAL_GUESSES[0], True), seed)
        for mapper, shared, guess in _plans(photos):
            model, priors = _map(photos, features, matches, mapper, shared, guess, seed)
            found, notes = Quality(0, 0.0, 0.0, 0, 0.0, 0), []
            if model is not None:
                decisions = polish(model, priors)
                if model.num_reg_images() >= 2:
                    found, notes = quality(model), decisions
            lenses = "shared" if shared else "own"
            attempt = Attempt(settings.name, mapper.name, lenses, guess, found, notes)
            attempts.append(attempt)
            logger.info(
                "cameras: %s, %s: %d of %d photos, %d points, error %.2f px",
                settings.name,
                mapper.name,
                found.num_placed,
                len(photos),
                found.num_points,
                found.error,
            )
            if found.num_placed and (best is None or _rank(found) > _rank(best.attempt.quality)):
                best = Solution(model, features, settings, attempt, attempts)
            if _convincing(found, len(photos)):
                return best
        if best is not None and _satisfying(best.attempt.quality, len(photos)):
            return best
    return best


def make_cameras(photos: Sequence[Photo], guess: float, shared: bool) -> list[pycolmap.Camera]:
    """Make the cameras to start from, one per photo: the same object for photos that share a lens."""
    made: dict[Any, pycolmap.Camera] = {}
    cameras = []
    for row, photo in enumerate(photos):
        key = photo.lens_key if shared else row
        if key not in made:
            made[key] = start_camera(photo, guess)
        cameras.append(made[key])
    return cameras


def start_camera(photo: Photo, guess: float) -> pycolmap.Camera:
    """The camera of a photo before anything is known but its header, in working pixels."""
    scale = working_scale(photo)
    width, height = (side * scale for side in photo.info.stored_size)
    focal = photo.focal * scale if photo.focal else guess * max(width, height)
    camera = pycolmap.Camera.create_from_model_name(
        0, "SIMPLE_RADIAL", focal, max(1, round(width)), max(1, round(height))
    )
    camera.params = [focal, width / 2, height / 2, 0.0]
    camera.has_prior_focal_length = photo.focal is not None
    return camera


def _plans(photos: Sequence[Photo]) -> list[tuple[MapperSettings, bool, float | None]]:
    """What to try with one set of matches, best bet first: mapper, shared lenses, focal length guess."""
    guesses = FOCAL_GUESSES if any(photo.focal is None for photo in photos) else (None,)
    plans = [(mapper, True, guess) for mapper in (RELAXED, STRICT, LENIENT) for guess in guesses]
    # Photos that only seem to have one lens: cropped, or zoomed without EXIF.
    if len({photo.lens_key for photo in photos}) < len(photos):
        plans.append((RELAXED, False, guesses[0]))
    return plans


def _rank(found: Quality) -> tuple[int, float]:
    return found.num_placed, found.support


def _convincing(found: Quality, num_photos: int) -> bool:
    return (
        found.num_placed == num_photos
        and found.weakest >= CONVINCING_WEAKEST
        and found.error <= CONVINCING_ERROR
    )


def _satisfying(found: Quality, num_photos: int) -> bool:
    return found.num_placed == num_photos and found.weakest >= SATISFYING_WEAKEST


def _map(
    photos: Sequence[Photo],
    features: Sequence[Features],
    matches: Path,
    mapper: MapperSettings,
    shared: bool,
    guess: float | None,
    seed: int,
) -> tuple[pycolmap.Reconstruction | None, dict[int, tuple[float, bool]]]:
    """Run the incremental mapper once; returns the largest model and the focal lengths that it started from."""
    cameras = make_cameras(photos, guess or FOCAL_GUESSES[0], shared)
    with (
        pycolmap.Database.open(":memory:") as db,
        pycolmap.Database.open(str(matches)) as matched,
    ):
        write_photos(db, cameras, features)
        pair_ids, geometries = matched.read_two_view_geometries()
        for pair_id, geometry in zip(pair_ids, geometries, strict=True):
            db.write_two_view_geometry(*pycolmap.pair_id_to_image_pair(pair_id), geometry)
        priors = {
            camera.camera_id: (camera.params[0], camera.has_prior_focal_length)
            for camera in db.read_all_cameras()
        }
        manager = pycolmap.ReconstructionManager()
        pipeline = pycolmap.IncrementalPipeline(_mapper_options(mapper, seed), db, manager)
        with progress(len(photos), f"map ({mapper.name})") as bar:
            pipeline.run()
            models = [manager.get(index) for index in range(manager.size())]
            best = max(models, key=lambda model: model.num_reg_images(), default=None)
            bar.update(best.num_reg_images() if best is not None else 0)
        # A copy: the manager's models end with it.
        return (None if best is None else pycolmap.Reconstruction(best)), priors


def _mapper_options(settings: MapperSettings, seed: int) -> pycolmap.IncrementalPipelineOptions:
    options = pycolmap.IncrementalPipelineOptions()
    # One thread: sums in another order would end in other bits.
    options.num_threads = options.mapper.num_threads = 1
    options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = seed
    options.extract_colors = False
    options.min_model_size = 2
    options.min_num_matches = 10
    options.min_focal_length_ratio = options.mapper.min_focal_length_ratio = 0.3
    options.max_focal_length_ratio = options.mapper.max_focal_length_ratio = 5.0
    options.mapper.init_min_num_inliers = settings.init_inliers
    options.mapper.init_min_tri_angle = settings.init_angle
    options.mapper.abs_pose_min_num_inliers = settings.next_inliers
    options.mapper.abs_pose_min_inlier_ratio = settings.next_inlier_ratio
    # Three photos have few points that more than two of them see.
    options.triangulation.ignore_two_view_tracks = False
    options.triangulation.min_angle = options.mapper.filter_min_tri_angle = 1.0
    return options
