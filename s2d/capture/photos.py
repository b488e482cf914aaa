"""The photos of a folder or a scene, and what one look at each of them tells.

Notation: F features. Pixels are those of the *working* picture: upright, no side longer than WORKING_SIDE, corner origin.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image

from s2d.capture.sharpness import edge_blur
from s2d.images import image_info, list_images, read_image, resize_image
from s2d.transforms_io import find_transforms, read_transforms

WORKING_SIDE = 640  # what stage 0 scales photos to; blur and detail beyond it make no difference
# Cameras and phones write these, and S2D does not read them.
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf")
FOREIGN_SUFFIXES += (".orf", ".rw2", ".mov", ".mp4", ".avi", ".mkv")
COLOUR_SIGMA = (
    2.0  # pixels: a colour is compared over a spot, since features are found to a pixel or so
)
# Outside of these a sensor or a tone curve has cut the colour off.
DARKEST, BRIGHTEST = 0.04, 0.96
DEFAULT_FOCAL = 1.2  # of the longer side: a phone's or a zoom's middle, as COLMAP assumes


class Capture(NamedTuple):
    """Where the photos of a folder or a scene are."""

    root: Path
    names: list[str]  # relative to `root`, sorted
    unreadable_formats: list[str]  # pictures and films that S2D does not read


@dataclass(frozen=True)
class Photo:
    """One photo's facts, features included; the pixels are not kept."""

    name: str
    size: tuple[int, int]  # (width, height) of the file, upright
    camera: str  # EXIF maker's model; empty: unknown
    focal_35mm: float  # EXIF, millimetres on 35 mm film; 0: unknown
    working_size: tuple[int, int]
    blur: float  # σ in working pixels, see `edge_blur`
    xys: np.ndarray = field(repr=False)  # [F, 2] float64 working pixels
    descriptors: np.ndarray = field(repr=False)  # [F, 128] float32, unit length (RootSIFT)
    colours: np.ndarray = field(repr=False)  # [F, 3] linear light; NaN where cut off

    @property
    def focal(self) -> float:
        """Focal length in working pixels, or a guess where EXIF has none."""
        # 35 mm film is 36 mm wide; EXIF's number is by the diagonal, which differs by a few percent.
        share = self.focal_35mm / 36.0 if self.focal_35mm else DEFAULT_FOCAL
        return share * max(self.working_size)


def find_photos(source: Path) -> Capture:
    """Find the photos of a folder, a COLMAP scene or a transforms.json.

    Raises:
        FileNotFoundError: No such folder, or nothing that looks like a photo in it.
        ValueError: A damaged transforms.json.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(
            f"No such folder: {source}. Expected a folder of photos or a scene."
        )
    transforms = find_transforms(source)
    if transforms is not None:
        root = transforms.parent
        paths = read_transforms(transforms).image_paths
        return Capture(root, sorted(path.relative_to(root).as_posix() for path in paths), [])
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is a file. Expected a folder of photos or a scene.")
    root = source / "images" if (source / "images").is_dir() else source
    foreign = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix.lower() in FOREIGN_SUFFIXES
    )
    names = list_images(root)
    if not names and not foreign:
        raise FileNotFoundError(
            f"{root} has no photos. Expected JPEG, PNG, WebP, TIFF or BMP files. Give the folder that holds them."
        )
    return Capture(root, names, foreign)


def read_photo(path: Path, name: str, max_features: int) -> Photo:
    """Look at one photo.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not an image, or cut off.
    """
    info = image_info(path)
    camera, focal_35mm = _exif(path)
    image = read_image(path)
    scale = min(1.0, WORKING_SIDE / max(info.stored_size))
    width, height = (max(1, round(side * scale)) for side in info.oriented_size)
    rgb = np.ascontiguousarray(resize_image(image, width, height).numpy())
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    xys, descriptors = _detect(grey, max_features)
    return Photo(
        name=name,
        size=info.oriented_size,
        camera=camera,
        focal_35mm=focal_35mm,
        working_size=(width, height),
        blur=edge_blur(grey),
        xys=xys,
        descriptors=descriptors,
        colours=_colours(rgb, xys),
    )


def _exif(path: Path) -> tuple[str, float]:
    """The camera's model and the focal length for 35 mm film; empty and 0 where the file does not say."""
    with Image.open(path) as image:
        if image.format == "PNG" and "exif" not in image.info:
            return "", 0.0  # Pillow would decode all of it to look behind the pixels
        exif = image.getexif()
        camera = str(exif.get(ExifTags.Base.Model, "")).strip("\0 ")
        focal = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.FocalLengthIn35mmFilm, 0)
    try:
        return camera, float(focal)
    except (TypeError, ValueError, ZeroDivisionError):  # what some software writes there
        return camera, 0.0


def _detect(grey: np.ndarray, max_features: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.rint(grey * 255).astype(np.uint8)
    keypoints, descriptors = cv2.SIFT_create(max_features).detectAndCompute(pixels, None)
    if not keypoints:
        return np.zeros((0, 2)), np.zeros((0, 128), np.float32)
    xys = np.array([point.pt for point in keypoints]) + 0.5  # OpenCV: whole numbers are centres
    # RootSIFT (Arandjelović and Zisserman 2012).
    return xys, np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-9))


def _colours(
    rgb: np.ndarray,  # [H, W, 3]
    xys: np.ndarray,  # [F, 2]
) -> np.ndarray:  # [F, 3]
    cut_off = ((rgb < DARKEST) | (rgb > BRIGHTEST)).any(2).astype(np.float32)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    smooth = cv2.GaussianBlur(linear.astype(np.float32), (0, 0), COLOUR_SIGMA)
    near_cut_off = cv2.GaussianBlur(cut_off, (0, 0), COLOUR_SIGMA)
    height, width = rgb.shape[:2]
    columns = np.clip(xys[:, 0].astype(int), 0, width - 1)
    rows = np.clip(xys[:, 1].astype(int), 0, height - 1)
    found = smooth[rows, columns]
    found[near_cut_off[rows, columns] > 0.1] = np.nan
    return found
