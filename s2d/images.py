"""Photos in, pictures out.

Notation: an *image* is float32 [H, W, 3], sRGB, in [0, 1]. A file's *size* is (width, height); `oriented` means after the EXIF
orientation has been applied, which is how people see the photo.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from s2d.files import atomic_write_bytes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")

MAX_PENDING_IMAGES = (
    8  # of an `image_writer`: bounds its memory where writing is slower than making
)

_EXIF_ORIENTATION = 0x0112

# EXIF orientation -> (transpose, flip rows, flip columns), in that order, that turn stored pixels upright.
_UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class ImageInfo(NamedTuple):
    """What a photo's header says."""

    width: int  # of the stored pixels
    height: int
    orientation: int  # EXIF, 1..8; 1: upright as stored

    @property
    def stored_size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def oriented_size(self) -> tuple[int, int]:
        return (
            (self.height, self.width)
            if _UPRIGHT[self.orientation][0]
            else (self.width, self.height)
        )


def image_info(path: Path) -> ImageInfo:
    """Read a photo's size and EXIF orientation without decoding its pixels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image.
    """
    path = _require_file(path)
    try:
        with Image.open(path) as image:
            width, height = image.size
            # Pillow decodes a whole PNG to look for EXIF behind the pixels; who writes an orientation writes it in front.
            in_front = image.format != "PNG" or "exif" in image.info
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if in_front else 1
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise _not_an_image(path) from error
    return ImageInfo(width, height, orientation if orientation in _UPRIGHT else 1)


def read_image(path: Path, oriented: bool = True) -> Tensor:
    """Read any 8 or 16-bit grey, RGB or RGBA photo.

    Transparent pixels are laid over black: that is what a renderer with a black background, our default, shows there, so a scene
    cut out with an alpha channel stays empty where it is empty.

    Args:
        path: PNG, JPEG, WebP, TIFF or BMP file.
        oriented: Turn the picture upright as its EXIF orientation asks. False keeps the pixels as they are stored.

    Returns:
        float32 sRGB in [0, 1]; 8-bit values are k/255 and 16-bit values k/65535 exactly. [H, W, 3]

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image, is cut off, or has an unusual number of channels or type.
    """
    path = _require_file(path)
    pixels = (
        cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if path.stat().st_size
        else None
    )
    if pixels is None:
        raise _not_an_image(path)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    channels = pixels.shape[2]
    if pixels.dtype not in (np.uint8, np.uint16) or channels > 4:
        raise ValueError(
            f"{path} has {channels} channels of type {pixels.dtype}. Expected 8 or 16-bit grey, RGB or RGBA. "
            "Convert it to PNG or JPEG."
        )
    scale = 255.0 if pixels.dtype == np.uint8 else 65535.0
    values = pixels.astype(np.float32) / np.float32(scale)
    alpha = values[..., -1:] if channels in (2, 4) else None
    colour = (
        values[..., :1].repeat(3, axis=2) if channels <= 2 else values[..., 2::-1]
    )  # cv2 has BGR
    if alpha is not None:
        colour = colour * alpha
    if oriented:
        colour = _turn_upright(colour, image_info(path).orientation)
    return torch.from_numpy(np.ascontiguousarray(colour))


def write_image(
    path: Path,
    image: Tensor,  # [H, W, 3] or [H, W, 1] or [H, W]
    quality: int = 95,
) -> Path:
    """Write an image as 8-bit PNG, or JPEG where the name says so, atomically.

    A value v becomes round(255 v) after clamping to [0, 1], so k/255 survives a PNG round trip exactly.

    Args:
        path: Target; `.png`, `.jpg` or `.jpeg`. Missing folders are made.
        image: sRGB or grey in [0, 1]. [H, W, 3], [H, W, 1] or [H, W]
        quality: JPEG quality, 1 to 100.

    Returns:
        The path.

    Raises:
        ValueError: wrong shape, another file type, or values that are not finite.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"write_image: {path} should end in .png, .jpg or .jpeg.")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(
            f"write_image: {path.name} must be [H, W, 3], [H, W, 1] or [H, W], got {list(image.shape)}."
        )
    values = image.detach().to("cpu", torch.float32).numpy()
    if not np.isfinite(values).all():
        raise ValueError(
            f"write_image: {path.name} has {int((~np.isfinite(values)).sum())} non-finite values of {values.size}."
        )
    pixels = np.rint(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = pixels[..., ::-1] if pixels.shape[2] == 3 else pixels[..., 0]
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix != ".png" else []
    _, encoded = cv2.imencode(suffix, np.ascontiguousarray(pixels), options)
    atomic_write_bytes(path, encoded.tobytes())
    return path


@contextmanager
def image_writer() -> Iterator[Callable[[Path, Tensor], None]]:
    """Hand out a `write_image` that works on another thread while the next image is computed; all are written when the block ends.

    Whatever one of them raises is raised by a later call or at the end of the block. Images must not be changed afterwards.
    """
    with ThreadPoolExecutor(1) as thread:
        pending: deque[Future] = deque()

        def write(path: Path, image: Tensor) -> None:
            pending.append(thread.submit(write_image, path, image))
            if len(pending) > MAX_PENDING_IMAGES:
                pending.popleft().result()

        yield write
        for future in pending:
            future.result()


def resize_image(
    image: Tensor,  # [H, W, C]
    width: int,
    height: int,
) -> Tensor:
    """Resize; downscaling averages over the area that each new pixel covers, upscaling is bicubic.

    Both keep the corner-origin convention: `K[0] *= width / W`, `K[1] *= height / H` is the exact change of intrinsics.

    Args:
        image: [H, W, C]
        width, height: New size in pixels.

    Returns:
        [height, width, C], in the input's range.
    """
    if (image.shape[1], image.shape[0]) == (width, height):
        return image
    shrinks = width <= image.shape[1] and height <= image.shape[0]
    resized = cv2.resize(
        image.numpy(), (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    )
    return torch.from_numpy(resized.reshape(height, width, image.shape[2])).clamp_(0.0, 1.0)


def list_images(folder: Path) -> list[str]:
    """Find all photos below a folder: sorted names relative to it, with forward slashes; hidden files are left out."""
    folder = Path(folder)
    names = (
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    return sorted(
        name for name in names if not any(part.startswith(".") for part in name.split("/"))
    )


def _turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    transpose, flip_rows, flip_columns = _UPRIGHT[orientation]
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _require_file(path: Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such photo: {path}.")
    return path


def _not_an_image(path: Path) -> ValueError:
    return ValueError(
        f"{path} is not an image, or is cut off ({path.stat().st_size} bytes). "
        "Expected PNG, JPEG, WebP, TIFF or BMP. Replace the file or remove it and its camera."
    )
