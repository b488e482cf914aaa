"""Any posed scene as a source of samples: COLMAP, transforms.json, or what `tools/make_synthetic_scenes.py` writes.

Points say how the views overlap and how deep they are. They come from the scene's sparse model; a scene without one gets points from
matches between its photos, since the cameras are known. Those are kept in a cache folder.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.files import atomic_write_bytes
from s2d.geometry import project
from s2d.guidance.kernels import View
from s2d.guidance.matches import match_sparse
from s2d.hier.data.framing import CENTRE, Framing
from s2d.hier.data.overlap import (
    Overlaps,
    PairSampler,
    measure_overlaps,
)
from s2d.hier.kept_views import depth_range
from s2d.images import read_image, resize_image
from s2d.log import logger, progress
from s2d.pairs.scenes import find_scenes
from s2d.scene import Scene, prepare_scene

# Pixels: what overlaps shows in small pictures, and the number of features rules the time.
MATCHING_SIDE = 320
# Each view is matched with these of the others, 0 being the nearest: some way apart, for the sake of the angle, and few, for the time.
MATCHED_RANKS = (0, 2, 4)
# Of a sparse model: with fewer points per view it is taken for none.
MIN_POINTS_PER_VIEW = 20


@dataclass(frozen=True, eq=False)
class PosedCapture:
    """A posed scene: a `Capture` that knows how its views overlap. A photo is decoded and resized once per size, then kept."""

    key: str
    cameras: Cameras
    image_paths: tuple[Path, ...]
    seen: tuple[Tensor, ...]  # N × [P, 3] world
    near: Tensor  # [N]
    far: Tensor  # [N]
    overlaps: Overlaps
    _scaled: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def viewmats(self) -> Tensor:
        return self.cameras.viewmats

    def __len__(self) -> int:
        return len(self.image_paths)

    def picture(
        self, row: int, size: tuple[int, int], place: tuple[float, float] = CENTRE
    ) -> tuple[Tensor, Tensor]:
        """See `Capture`."""
        framing = Framing.cover(self.cameras.sizes[row], size, place)
        key = (row, *framing.scaled)
        if key not in self._scaled:
            photo = read_image(self.image_paths[row], oriented=False).numpy()
            self._scaled[key] = framing.scale(np.rint(photo * 255).astype(np.uint8))
        return framing.crop(self._scaled[key]), framing.intrinsics(self.cameras.Ks[row])

    def seen_points(self, row: int) -> Tensor:
        return self.seen[row]


@dataclass
class PosedScenes:
    """Captures as a source of training samples (`samples.Source`)."""

    name: str
    captures: Sequence[PosedCapture]
    sampler: PairSampler

    def __len__(self) -> int:
        return len(self.captures)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A shuffled order of the scenes."""
        return rng.permutation(len(self.captures))

    def capture(self, row: int) -> PosedCapture:
        return self.captures[row]

    def is_usable(self, capture: PosedCapture) -> bool:
        """Whether any two of its views make a pair."""
        return bool(self.sampler.training_pairs(capture.overlaps))

    def fingerprint(self) -> str:
        """What the samples depend on, for a training's description."""
        digest = hashlib.sha256()
        for capture in self.captures:
            digest.update(f"{capture.key} {capture.cameras.to_json()}".encode())
            for path in capture.image_paths:
                digest.update(f"{path.name} {path.stat().st_size}".encode())
        return f"{len(self)} posed scenes, {digest.hexdigest()[:16]}"


def load_posed(sources: Sequence[Path], cache_dir: Path) -> list[PosedCapture]:
    """Load scenes, or folders of scenes, in name order.

    Args:
        sources: See `find_scenes`.
        cache_dir: For points that had to be matched, and for scenes whose photos need preparation (see `prepare_scene`).

    Raises:
        FileNotFoundError, ValueError: no scene, or one that cannot be read.
    """
    found = dict(sorted(find_scenes(sources).items()))
    captures = []
    with progress(len(found), "scenes") as bar:
        for done, (name, source) in enumerate(found.items()):
            bar.update(done, scene=name)
            scene = prepare_scene(source, cache_dir / "prepared" / name)
            captures.append(posed_capture(name, scene, cache_dir / "points"))
            bar.update(done + 1, scene=name)
    return captures


def posed_capture(key: str, scene: Scene, cache_dir: Path) -> PosedCapture:
    """Make a capture of a scene.

    Args:
        key: Its name.
        scene: Loaded.
        cache_dir: Where matched points are kept.
    """
    seen = _seen_by_model(scene)
    if sum(map(len, seen)) < MIN_POINTS_PER_VIEW * len(scene):
        seen = _seen_by_matching(scene, cache_dir / f"{key}.npz")
    near, far = view_ranges(scene.cameras, seen)
    overlaps = measure_overlaps(scene.cameras, seen)
    return PosedCapture(key, scene.cameras, scene.image_paths, tuple(seen), near, far, overlaps)


def view_ranges(cameras: Cameras, seen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Nearest and farthest depth to search in each view; one that sees too few points gets the widest range of the others. [N], [N]

    Raises:
        ValueError: no view sees enough points.
    """
    ranges = [
        depth_range(project(points, K, viewmat)[1]) if len(points) else None
        for points, K, viewmat in zip(seen, cameras.Ks, cameras.viewmats, strict=True)
    ]
    known = [bounds for bounds in ranges if bounds is not None]
    if not known:
        raise ValueError(
            f"No view of {len(cameras)} (first: {cameras.names[0]}) sees enough points to know how far away things are: its sparse model is "
            "empty and its photos do not match. Leave this scene out."
        )
    widest = (min(near for near, _ in known), max(far for _, far in known))
    near, far = torch.tensor([bounds or widest for bounds in ranges]).unbind(1)
    return near, far


def _seen_by_model(scene: Scene) -> list[Tensor]:
    """Points that each view observes, by the scene's own sparse model."""
    sfm = scene.sfm
    if sfm is None:
        return [torch.zeros(0, 3)] * len(scene)
    return [sfm.points[sfm.point_ids[sfm.view_ids == view].unique()] for view in range(len(scene))]


def _seen_by_matching(scene: Scene, cache: Path) -> list[Tensor]:
    """Points that two photos show, by features on each other's epipolar lines."""
    paths = [f"{path.name} {path.stat().st_size}" for path in scene.image_paths]
    state = hashlib.sha256("\n".join([scene.cameras.to_json(), *paths]).encode()).hexdigest()
    if cache.is_file():
        with np.load(cache, allow_pickle=False) as stored:
            if str(stored["state"]) == state:
                return _by_view(stored["points"], stored["pairs"], len(scene))
    views = [_small_view(scene, row) for row in range(len(scene))]
    points, pairs = [np.zeros((0, 3))], [np.zeros((0, 2), int)]
    for pair in _pairs_to_match(scene.cameras):
        found = match_sparse([views[row] for row in pair])
        points.append(found.points)
        pairs.append(np.tile(pair, (len(found.points), 1)))
    points, pairs = np.concatenate(points), np.concatenate(pairs)
    logger.info("%s: no sparse model; %d points matched", scene.name, len(points))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, state=state, points=points, pairs=pairs)
    atomic_write_bytes(cache, buffer.getvalue())
    return _by_view(points, pairs, len(scene))


def _pairs_to_match(cameras: Cameras) -> list[tuple[int, int]]:
    """Every view with some of those that look most like it, each pair once."""
    nearest = cameras.pose_distances(cameras).fill_diagonal_(torch.inf).argsort(dim=1)
    chosen = set()
    for row, others in enumerate(nearest.tolist()):
        for rank in MATCHED_RANKS:
            if rank < len(cameras) - 1:  # the last is the view itself
                chosen.add((min(row, others[rank]), max(row, others[rank])))
    return sorted(chosen)


def _by_view(points: np.ndarray, pairs: np.ndarray, num: int) -> list[Tensor]:
    tensor = torch.from_numpy(points).float()
    return [tensor[torch.from_numpy((pairs == view).any(1))] for view in range(num)]


def _small_view(scene: Scene, row: int) -> View:
    width, height = scene.cameras.sizes[row]
    factor = min(1.0, MATCHING_SIDE / max(width, height))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    photo = read_image(scene.image_paths[row], oriented=False)
    grey = resize_image(photo, *size).mean(-1).numpy()
    camera = scene.cameras[row].scaled(size)
    return View(
        *size, camera.Ks[0].double().numpy(), camera.viewmats[0].double().numpy(), grey=grey
    )
