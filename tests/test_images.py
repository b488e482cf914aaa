"""Photos of every kind, made by Pillow and OpenCV, read back; written files; damaged files."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from s2d.images import (
    image_info,
    image_writer,
    list_images,
    read_image,
    resize_image,
    write_image,
)

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (7, 9, 3), np.uint8)


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp", "webp"])
def test_8_bit_rgb_is_k_over_255(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(path)
    assert image.dtype == torch.float32 and image.shape == (7, 9, 3)
    assert torch.equal(image, torch.from_numpy(RGB).float() / 255)


def test_jpeg_is_about_the_same(tmp_path):
    smooth = cv2.resize(RGB, (64, 48), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=98, subsampling=0)
    difference = read_image(tmp_path / "a.jpg") - torch.from_numpy(smooth).float() / 255
    assert float(difference.abs().mean()) < 0.01  # measured 0.004; swapped channels give 0.3


def test_grey_is_repeated(tmp_path):
    Image.fromarray(RGB[..., 0]).save(tmp_path / "a.png")
    expected = torch.from_numpy(RGB[..., :1]).float() / 255
    assert torch.equal(read_image(tmp_path / "a.png"), expected.expand(-1, -1, 3))


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3)])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_is_k_over_65535(tmp_path, shape, suffix):
    values = RNG.integers(0, 65536, shape, np.uint16)
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), values)
    expected = values if values.ndim == 3 else np.repeat(values[..., None], 3, 2)
    assert np.array_equal(
        read_image(tmp_path / f"a.{suffix}").numpy(),
        expected[..., ::-1].astype(np.float32) / np.float32(65535),
    )


def test_transparency_is_laid_over_black(tmp_path):
    alpha = RNG.integers(0, 256, (7, 9, 1), np.uint8)
    Image.fromarray(np.concatenate([RGB, alpha], 2)).save(tmp_path / "a.png")
    expected = RGB / 255.0 * (alpha / 255.0)
    np.testing.assert_allclose(read_image(tmp_path / "a.png").numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_as_pillow_turns_it(tmp_path, orientation):
    from PIL import ImageOps

    big = np.kron(RGB, np.ones((8, 8, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(big).save(path, exif=exif, quality=95)
    with Image.open(path) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored))
        as_stored = np.asarray(stored)
    # JPEG decoders may differ by a grey value or two; another orientation differs by 80 in the mean.
    assert np.abs(read_image(path).numpy() * 255 - upright).mean() < 1
    assert np.abs(read_image(path, oriented=False).numpy() * 255 - as_stored).mean() < 1
    info = image_info(path)
    assert info.orientation == orientation
    assert info.stored_size == (72, 56)
    assert info.oriented_size == (upright.shape[1], upright.shape[0])


def test_png_round_trip_is_exact_and_rounds_to_nearest(tmp_path):
    steps = (torch.arange(256).float() / 255).reshape(16, 16, 1).repeat(1, 1, 3)
    assert torch.equal(read_image(write_image(tmp_path / "a.png", steps)), steps)
    write_image(
        tmp_path / "b.png",
        torch.tensor([[0.4999, 0.5001, 1.7, -0.2]]) / torch.tensor([255.0, 255.0, 1, 1]),
    )
    assert (read_image(tmp_path / "b.png")[0, :, 0] * 255).round().tolist() == [0, 1, 255, 0]


def test_channel_order_on_disk(tmp_path):
    write_image(tmp_path / "a.png", torch.tensor([1.0, 0.5, 0.0]).expand(2, 2, 3))
    assert np.asarray(Image.open(tmp_path / "a.png"))[0, 0].tolist() == [255, 128, 0]


def test_write_image_leaves_nothing_but_the_image(tmp_path):
    write_image(tmp_path / "deep" / "er" / "a.jpg", torch.rand(8, 8, 3))
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["a.jpg"]


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("a.gif", torch.zeros(2, 2, 3), "should end in .png"),
        ("a.png", torch.zeros(3, 2, 2), r"got \[3, 2, 2\]"),
        ("a.png", torch.full((2, 2, 3), torch.nan), "12 non-finite values of 12"),
    ],
)
def test_write_image_refuses(tmp_path, name, image, message):
    with pytest.raises(ValueError, match=message):
        write_image(tmp_path / name, image)
    assert list(tmp_path.iterdir()) == []


def test_downscaling_averages_areas():
    image = torch.rand(6, 8, 3)
    blocks = image.reshape(3, 2, 4, 2, 3).mean((1, 3))
    assert torch.allclose(resize_image(image, 4, 3), blocks, atol=1e-6)
    assert resize_image(image, 8, 6) is image
    assert resize_image(torch.rand(6, 8, 1), 4, 3).shape == (3, 4, 1)


def test_damaged_files_are_named(tmp_path):
    write_image(tmp_path / "good.png", torch.rand(40, 40, 3))
    content = (tmp_path / "good.png").read_bytes()
    for name, damaged in (
        ("cut.png", content[:1000]),
        ("text.jpg", b"no picture"),
        ("empty.png", b""),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"{name} is not an image, or is cut off \({len(damaged)} bytes\)"
        ):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"text.jpg is not an image"):
        image_info(tmp_path / "text.jpg")
    with pytest.raises(FileNotFoundError, match=r"No such photo: .*none.png"):
        read_image(tmp_path / "none.png")


def test_list_images_sorts_and_skips_hidden_and_other_files(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.webp", ".hidden.png", ".git/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["a.png", "b.JPG", "sub/c.webp"]


def test_the_image_writer_has_written_everything_when_its_block_ends(tmp_path):
    images = [torch.full((3, 4, 3), k / 255) for k in range(20)]  # more than may be pending
    with image_writer() as write:
        for k, image in enumerate(images):
            write(tmp_path / "deep" / f"{k}.png", image)
    for k, image in enumerate(images):
        assert torch.equal(read_image(tmp_path / "deep" / f"{k}.png"), image)


def test_the_image_writer_raises_what_went_wrong_on_its_thread(tmp_path):
    bad = pytest.raises(ValueError, match=r"bad\.png has 1 non-finite values")
    with bad, image_writer() as write:
        write(tmp_path / "bad.png", torch.tensor([[0.5, torch.nan]]))
        write(tmp_path / "good.png", torch.zeros(2, 2))
    assert (tmp_path / "good.png").is_file()
