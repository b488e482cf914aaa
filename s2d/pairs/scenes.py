"""The scenes that pairs are made of: found, prepared once, watched for changes."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from s2d.files import atomic_write_json, content_hash
from s2d.images import write_image
from s2d.log import logger
from s2d.pairs.dataset import Dataset, read_json
from s2d.pairs.plan import PairScene, photo_name
from s2d.scene import Scene, load_scene, prepare_scene
from s2d.transforms_io import find_transforms, read_transforms

RECORD = "scene.json"


def find_scenes(sources: Sequence[Path]) -> dict[str, Path]:
    """Name the scenes: each source is one, or a folder of some.

    Raises:
        FileNotFoundError: a source does not exist or holds no scene.
        ValueError: two scenes have one name.
    """
    found: dict[str, Path] = {}
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(
                f"No such scene: {source}. Expected a scene (images/ and sparse/, or transforms.json) or a folder of scenes."
            )
        inside = [source]
        if source.is_dir() and not _is_scene(source):
            inside = sorted(filter(_is_scene, source.iterdir()))
        if not inside:
            raise FileNotFoundError(
                f"{source} is no scene and holds none. Expected images/ and sparse/0 (COLMAP) or transforms.json, in it or in its folders."
            )
        for folder in inside:
            name = scene_name(folder)
            if found.setdefault(name, folder).resolve() != folder.resolve():
                raise ValueError(
                    f"Two scenes are called {name}: {found[name]} and {folder}. Pairs are named after the scene's folder: rename one."
                )
    return found


def scene_name(source: Path) -> str:
    """The folder's name, fit for file names."""
    folder = source if source.is_dir() else source.resolve().parent
    return re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name)


def add_scene(
    dataset: Dataset, source: Path, name: str, max_side: int, test_every: int, is_test: bool
) -> PairScene:
    """Prepare a scene and write its photos, unless that has been done.

    Args:
        dataset: Where.
        source, name: From `find_scenes`.
        max_side: Longest side in pixels, 0 as it is.
        test_every: Distance of test frames; 0: none.
        is_test: All pairs of this scene are test pairs.

    Raises:
        FileNotFoundError, ValueError: no scene, or a photo that cannot be read; or the scene is not what it was when pairs were made.
    """
    folder = dataset.jobs_dir / "scenes" / name
    whole = "test" if is_test else "train"
    state = {
        "content": _content_hash(source),
        "split": whole if test_every == 0 else f"every {test_every}-th frame is test",
    }
    record, prepared = folder / RECORD, folder / "scene"
    if record.is_file():
        before = read_json(record)
        changed = [
            what
            for key, what in (("content", "photos or cameras"), ("split", "train or test"))
            if before[key] != state[key]
        ]
        if changed:
            raise ValueError(
                f"Scene {name} is not what it was when pairs were made of it in {dataset.dir} (other {' and '.join(changed)}). "
                "Pass --overwrite to make all pairs anew, or choose another --output-dir."
            )
        scene = load_scene(prepared if prepared.is_dir() else source)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        scene = prepare_scene(source, prepared, max_side)
        folder.mkdir(parents=True, exist_ok=True)
    _write_photos(dataset, scene, name)
    if not record.is_file():
        atomic_write_json(record, state)
    tests = tuple(range(0, len(scene), test_every)) if test_every else ()
    logger.info(
        "%s: %d views of %d x %d pixels, %s",
        name,
        len(scene),
        *scene.cameras.sizes[0],
        state["split"],
    )
    return PairScene(name, prepared if prepared.is_dir() else source, len(scene), tests, is_test)


def _write_photos(dataset: Dataset, scene: Scene, name: str) -> None:
    """Write every photo once. All are read here, so that a damaged one is an error before any work is done."""
    for frame, view in enumerate(scene.names):
        path = dataset.photos_dir / photo_name(name, frame)
        if not path.is_file():
            # A subset of one view: its photo is forgotten with it.
            write_image(path, scene.subset([view]).image(view))


def _is_scene(folder: Path) -> bool:
    if folder.name.startswith(".") or not folder.is_dir():
        return False
    return (folder / "sparse").is_dir() or find_transforms(folder) is not None


def _content_hash(source: Path) -> str:
    """Of cameras and photos."""
    if source.is_dir() and (source / "sparse").is_dir():
        parts = [part for part in (source / "sparse", source / "images") if part.is_dir()]
        return " ".join(content_hash(part) for part in parts)
    transforms = find_transforms(source)
    if transforms is None:
        return ""  # loading it says what is missing
    return content_hash([transforms, *read_transforms(transforms).image_paths])
