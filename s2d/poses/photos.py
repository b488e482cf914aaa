"""A plain folder of photos: what is in it, which lens took what, and what to tell a user whose folder cannot be used."""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import pycolmap
from PIL import Image

from s2d.images import ImageInfo, image_info, list_images
from s2d.transforms_io import find_transforms

logger = logging.getLogger("s2d.poses")

MIN_PHOTOS = 2
MANY_PHOTOS = 40  # every photo is compared with every other: above this the time is worth a word

_HEIC = (".heic", ".heif", ".avif")
_RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
_VIDEO = (".mp4", ".mov", ".avi", ".mkv", ".m4v", ".webm", ".3gp")
_EXIF_MAKE, _EXIF_MODEL = 0x010F, 0x0110

# What to do with files that look like photos to their owner and cannot be read: by kind, suffixes and cure.
_UNREADABLE = {
    "HEIC": (
        _HEIC,
        "Convert them to JPEG, for example: heif-convert IMG.HEIC IMG.jpg. On an iPhone: Settings, Camera, Formats, Most Compatible.",
    ),
    "RAW": (_RAW, "Export them as JPEG or TIFF."),
    "video": (
        _VIDEO,
        "Take 6 to 30 sharp frames out of it, for example: ffmpeg -i VIDEO -vf fps=1 -q:v 2 photos/%04d.jpg",
    ),
}


class Photo(NamedTuple):
    """A photo before it has a camera. Everything is about the stored pixels, before the EXIF orientation is applied."""

    name: str  # path below the folder
    path: Path
    info: ImageInfo
    focal: float | None  # EXIF focal length in pixels of the stored picture, where there is one
    device: str  # maker and model of the camera, "" where the photo does not say

    @property
    def lens_key(self) -> tuple:
        """Photos with equal keys were taken with one lens at one zoom, as far as can be told."""
        return (*self.info.stored_size, self.device, self.focal and round(self.focal, 2))


def is_photo_folder(source: Path) -> bool:
    """True for a source without cameras: a folder with neither sparse/ nor a transforms.json, or a video (which is then refused)."""
    source = Path(source)
    if source.is_file():
        return source.suffix.lower() in _VIDEO
    return source.is_dir() and not (source / "sparse").is_dir() and find_transforms(source) is None


def photo_root(source: Path) -> Path:
    """The folder below which photos are named: `images/` where there is one, as in a scene that lacks its cameras."""
    images = Path(source) / "images"
    return images if images.is_dir() else Path(source)


def find_photos(source: Path) -> list[Photo]:
    """List the photos of a plain folder in name order; reads headers, no pixels.

    Raises:
        FileNotFoundError: no photos in there.
        ValueError: fewer than two, only files that cannot be read (HEIC, RAW, video), a damaged header, or two photos whose names
            differ in their suffix only.
    """
    source = Path(source)
    if source.is_file():
        raise ValueError(
            f"{source} is a video. Expected a folder of photos. {_UNREADABLE['video'][1]}"
        )
    root = photo_root(source)
    names = list_images(root)
    _report_others(root, num_photos=len(names))
    if not names:
        raise FileNotFoundError(
            f"{root} has no photos. Expected PNG, JPEG, WebP, TIFF or BMP files: 3 to 30 overlapping photos of one scene."
        )
    if len(names) < MIN_PHOTOS:
        raise ValueError(
            f"{root} has one photo ({names[0]}). Expected at least {MIN_PHOTOS}: one photo says nothing about depth. "
            "Take 3 to 30, a step to the side between one and the next."
        )
    stems = [Path(name).with_suffix("").as_posix() for name in names]
    for name, stem in zip(names, stems, strict=True):
        if stems.count(stem) > 1:
            raise ValueError(
                f"{root}: two photos differ in their suffix only ({name}). Every stage writes <name>.png, so rename one of them."
            )
    return [_read_header(name, root / name) for name in names]


def leave_out_copies(photos: list[Photo]) -> tuple[list[Photo], dict[str, str]]:
    """Drop photos whose file is that of an earlier one, byte for byte.

    Returns:
        - The photos that are left.
        - Name → reason of those that are not.
    """
    first: dict[str, str] = {}
    left, reasons = [], {}
    for photo in photos:
        content = hashlib.sha256(photo.path.read_bytes()).hexdigest()
        original = first.setdefault(content, photo.name)
        if original == photo.name:
            left.append(photo)
        else:
            reasons[photo.name] = f"is the same file as {original}"
    return left, reasons


def _read_header(name: str, path: Path) -> Photo:
    info = image_info(path)
    with Image.open(path) as image:
        # Pillow decodes a whole PNG to look for EXIF behind the pixels (see s2d.images).
        has_exif = image.format != "PNG" or "exif" in image.info
        exif = image.getexif() if has_exif else {}
        device = " ".join(str(exif.get(tag, "")).strip("\0 ") for tag in (_EXIF_MAKE, _EXIF_MODEL))
    focal = None
    if has_exif and len(exif):
        # COLMAP's reading: the 35 mm equivalent, or the sensor's width from EXIF or its table of cameras.
        focal = pycolmap.Bitmap.read(str(path), False).exif_focal_length()
    return Photo(name, path, info, float(focal) if focal else None, device.strip())


def _report_others(root: Path, num_photos: int) -> None:
    """Say which files look like photos and are not read; an error where there is nothing else."""
    suffixes = {
        path.name: path.suffix.lower() for path in sorted(root.rglob("*")) if path.is_file()
    }
    for kind, (known, cure) in _UNREADABLE.items():
        found = [name for name, suffix in suffixes.items() if suffix in known]
        if not found:
            continue
        what = f"{len(found)} {kind} file{'s' * (len(found) > 1)} (first: {found[0]})"
        if num_photos < MIN_PHOTOS:
            raise ValueError(f"{root} has {what}, which S2D cannot read. {cure}")
        logger.warning("%s: ignoring %s. %s", root, what, cure)
