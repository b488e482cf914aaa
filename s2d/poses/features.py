"""Features of photos and which of them are the same point: SIFT and guided matching of all pairs, on the CPU.

Everything after this works in *working pixels*: stored pixels times `working_scale`, so that thresholds in pixels mean the same for a
telephone's 12 megapixels and for a thumbnail, and the shape of a picture is not rounded.

Notation: V photos, K features of one photo.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pycolmap

from s2d.images import read_image, resize_image
from s2d.log import progress
from s2d.poses.photos import Photo

MAX_SIDE = 1600  # working pixels: SIFT on larger pictures finds more and blurrier points
DOUBLED_BELOW = 1100  # smaller pictures are enlarged by SIFT itself (octave -1): else they have too few features
MAX_PIXEL_ERROR = 2.0  # of a match against the two-view geometry, working pixels


class FeatureSettings(NamedTuple):
    """How to look for features. Wide baselines need the second kind, at three times the time."""

    name: str
    peak_threshold: float
    affine: (
        bool  # affine shape and domain-size pooling: descriptors that stand a change of 50 degrees
    )


STANDARD = FeatureSettings("sift", peak_threshold=0.02 / 3, affine=False)
THOROUGH = FeatureSettings("affine sift", peak_threshold=0.002, affine=True)


class Features(NamedTuple):
    """What SIFT found in one photo."""

    keypoints: np.ndarray  # [K, 4] float32: x, y in working pixels, scale, angle
    descriptors: pycolmap.FeatureDescriptors


def working_scale(photo: Photo) -> float:
    """Working pixels per stored pixel, at most 1."""
    return min(1.0, MAX_SIDE / max(photo.info.stored_size))


def num_threads() -> int:
    """`S2D_NUM_THREADS`, `OMP_NUM_THREADS`, or the CPUs that this process may use."""
    for name in ("S2D_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def max_features(num_photos: int) -> int:
    """How many features to keep per photo: the time to match all pairs grows with the square of both numbers."""
    return 8000 if num_photos <= 6 else 6000 if num_photos <= 12 else 4000


def extract(photo: Photo, settings: FeatureSettings, limit: int) -> Features:
    """Find the features of one photo; of more than `limit`, the largest, which are found again in most other photos."""
    scale = working_scale(photo)
    width, height = photo.info.stored_size
    image = read_image(photo.path, oriented=False)
    image = resize_image(image, max(1, round(width * scale)), max(1, round(height * scale)))
    grey = cv2.cvtColor(image.numpy(), cv2.COLOR_RGB2GRAY)
    options = pycolmap.FeatureExtractionOptions()
    options.use_gpu, options.num_threads = False, 1
    options.sift.max_num_features = limit
    options.sift.first_octave = -1 if max(grey.shape) < DOUBLED_BELOW else 0
    options.sift.peak_threshold = settings.peak_threshold
    options.sift.estimate_affine_shape = options.sift.domain_size_pooling = settings.affine
    extractor = pycolmap.FeatureExtractor.create(options, pycolmap.Device.cpu)
    found, descriptors = extractor.extract_from_uint8_array(np.rint(grey * 255).astype(np.uint8))
    keypoints = pycolmap.keypoints_to_matrix(found).astype(np.float32).reshape(len(found), 4)
    # From pixels of the rounded picture to working pixels, which are a multiple of the stored ones.
    keypoints[:, 0] *= width * scale / grey.shape[1]
    keypoints[:, 1] *= height * scale / grey.shape[0]
    rows = np.sort(np.argsort(-keypoints[:, 2], kind="stable")[:limit])
    return Features(keypoints[rows], _rows_of(descriptors, rows))


def extract_all(
    photos: Sequence[Photo], settings: FeatureSettings, limit: int, description: str
) -> list[Features]:
    """Find the features of all photos, several at a time."""
    with ThreadPoolExecutor(num_threads()) as threads:
        jobs = [threads.submit(extract, photo, settings, limit) for photo in photos]
        with progress(len(jobs), description) as bar:
            features = []
            try:
                for done, job in enumerate(jobs, start=1):
                    features.append(job.result())
                    bar.update(done, features=len(features[-1].keypoints))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
    return features


def match_all(
    database: Path,
    photos: Sequence[Photo],
    features: Sequence[Features],
    cameras: Sequence[pycolmap.Camera],
    seed: int,
) -> None:
    """Match all pairs of photos into a database at `database`; pairs that are in there already are left alone, so it can be resumed.

    Matches are guided: after a first geometry of a pair, further features are matched along the epipolar lines, which doubles or
    triples them in views that are far apart.

    Args:
        database: File; made if missing.
        photos, features: V of each.
        cameras: Row by row the camera of a photo (the same object where they share one); a known focal length makes the geometry of
            a pair a calibrated one.
        seed: Of RANSAC.
    """
    if not database.is_file():
        started = database.with_suffix(".partial")
        started.unlink(missing_ok=True)
        with pycolmap.Database.open(str(started)) as db:
            write_photos(db, cameras, features)
        started.rename(database)  # all photos or none, whenever the run is killed
    pairs = list(combinations(range(len(photos)), 2))
    with pycolmap.Database.open(str(database)) as db:
        left = [pair for pair in pairs if not db.exists_matches(pair[0] + 1, pair[1] + 1)]
    matching = pycolmap.FeatureMatchingOptions()
    matching.use_gpu, matching.num_threads, matching.guided_matching = False, num_threads(), True
    pairing = pycolmap.ImportedPairingOptions()
    pairing.match_list_path = database.with_suffix(".pairs.txt")
    block = max(num_threads(), 4)
    with progress(len(pairs), "match", start=len(pairs) - len(left)) as bar:
        for start in range(0, len(left), block):
            lines = [f"{image_name(a)} {image_name(b)}\n" for a, b in left[start : start + block]]
            pairing.match_list_path.write_text("".join(lines))
            pycolmap.match_image_pairs(
                str(database), matching, pairing, two_view_options(seed), pycolmap.Device.cpu
            )
            bar.update(len(pairs) - len(left) + min(start + block, len(left)))


def two_view_options(seed: int) -> pycolmap.TwoViewGeometryOptions:
    """How the geometry of a pair is found."""
    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.max_error = MAX_PIXEL_ERROR
    options.ransac.random_seed = seed
    # Few matches are all there is in views that are far apart; what they are worth is decided when all photos stand.
    options.min_num_inliers = 10
    return options


def write_photos(
    db: pycolmap.Database, cameras: Sequence[pycolmap.Camera], features: Sequence[Features]
) -> None:
    """Write photos with their features; row r becomes image r + 1, so that ids do not depend on the order of writing."""
    rig_of: dict[int, tuple[int, int]] = {}  # id() of a camera object → its id and its rig's
    for row, (camera, found) in enumerate(zip(cameras, features, strict=True)):
        if id(camera) not in rig_of:
            camera_id = db.write_camera(camera)
            rig = pycolmap.Rig()
            rig.add_ref_sensor(pycolmap.sensor_t(pycolmap.SensorType.CAMERA, camera_id))
            rig_of[id(camera)] = camera_id, db.write_rig(rig)
        camera_id, rig_id = rig_of[id(camera)]
        image_id = db.write_image(
            pycolmap.Image(name=image_name(row), camera_id=camera_id, image_id=row + 1),
            use_image_id=True,
        )
        frame = pycolmap.Frame()
        frame.rig_id = rig_id
        sensor = pycolmap.sensor_t(pycolmap.SensorType.CAMERA, camera_id)
        frame.add_data_id(pycolmap.data_t(sensor, image_id))
        db.write_frame(frame)
        db.write_keypoints(image_id, found.keypoints)
        db.write_descriptors(image_id, found.descriptors)


def image_name(row: int) -> str:
    """Name a photo inside of databases: COLMAP's lists of pairs break at spaces."""
    return f"{row:05d}"


def row_of_image(name: str) -> int:
    return int(name)


def _rows_of(
    descriptors: pycolmap.FeatureDescriptors, rows: np.ndarray
) -> pycolmap.FeatureDescriptors:
    descriptors.data = np.ascontiguousarray(descriptors.data[rows])
    return descriptors
