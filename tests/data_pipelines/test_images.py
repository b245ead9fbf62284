"""Images: every kind comes out as Pillow would have it, upright; the random crop follows torchvision's law."""

import io
import math
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipelines import images


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth, and different in every corner."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "a maker"  # an entry before the one looked for
    tags[0x0112] = orientation
    return tags


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def random_numbers(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(images.UNIFORMS)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation, format):
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(picture(40, 64), format, exif=exif(orientation), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    got = images.decode(data)
    assert got.shape == expected.shape and got.dtype == np.uint8
    # Two builds of libjpeg may round differently.
    np.testing.assert_allclose(got.astype(int), expected.astype(int), atol=2 if format == "JPEG" else 0)
    squeezed = np.asarray(Image.fromarray(expected).resize((16, 16), Image.Resampling.BOX))
    assert difference(images.to_eval(data, 16), squeezed) < 6
    wrong = np.asarray(Image.fromarray(expected[::-1]).resize((16, 16), Image.Resampling.BOX))
    assert difference(images.to_eval(data, 16), wrong) > 20


@pytest.mark.parametrize("order", ["II", "MM"])
def test_orientation_is_read_in_both_byte_orders_and_behind_other_segments(order):
    sign = {"II": "<", "MM": ">"}[order]
    tiff = order.encode() + struct.pack(sign + "HI", 42, 8) + struct.pack(sign + "H", 1)
    tiff += struct.pack(sign + "HHIHH", 0x0112, 3, 1, 8, 0) + struct.pack(sign + "I", 0)
    comment = b"\xff\xfe" + struct.pack(">H", 7) + b"hello"
    block = b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(tiff)) + b"Exif\0\0" + tiff
    jpeg = encode(picture(24, 40), "JPEG")
    turned = jpeg[:2] + comment + block + jpeg[2:]
    np.testing.assert_array_equal(images.decode(turned), np.rot90(images.decode(jpeg)))
    cut = jpeg[:2] + block[:20] + jpeg[2:]  # a block that promises more than there is
    with pytest.raises(images.BadImage):
        images.decode(cut[:200])


def test_exif_of_nonsense_does_not_lose_the_image():
    jpeg = encode(picture(24, 40), "JPEG")
    for tiff in (b"", b"II*\0", b"XXXX", b"MM\0*" + struct.pack(">I", 10**6), b"II*\0\x08\0\0\0\xff\xff"):
        block = b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff
        np.testing.assert_array_equal(images.decode(jpeg[:2] + block + jpeg[2:]), images.decode(jpeg))


def test_grey_and_palette():
    grey = Image.fromarray(picture(30, 50)).convert("L")
    expected = np.asarray(grey.convert("RGB"))
    np.testing.assert_array_equal(images.decode(encode(grey, "PNG")), expected)
    np.testing.assert_allclose(images.decode(encode(grey, "JPEG", quality=95)).astype(int), expected, atol=6)
    palette = Image.fromarray(picture(30, 50)).quantize(16)
    for format in ("PNG", "GIF"):
        np.testing.assert_array_equal(images.decode(encode(palette, format)), np.asarray(palette.convert("RGB")))


def test_what_is_transparent_shows_white():
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[:, 0] = (200, 0, 0, 255)
    pixels[:, 1] = (200, 0, 0, 0)
    pixels[:, 2] = (200, 0, 0, 51)  # a fifth red, four fifths white
    got = images.decode(encode(Image.fromarray(pixels, "RGBA"), "PNG"))
    np.testing.assert_array_equal(got[0], [(200, 0, 0), (255, 255, 255), (244, 204, 204)])
    np.testing.assert_array_equal(images.decode(encode(Image.fromarray(pixels, "RGBA"), "WEBP", lossless=True)), got)
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putdata([0, 1])
    got = images.decode(encode(palette, "PNG", transparency=0))
    np.testing.assert_array_equal(got[0], [(255, 255, 255), (10, 20, 30)])
    grey_alpha = np.array([[[100, 255], [100, 0]]], np.uint8)
    got = images.decode(encode(Image.fromarray(grey_alpha, "LA"), "PNG"))
    np.testing.assert_array_equal(got[0], [(100, 100, 100), (255, 255, 255)])


def test_sixteen_bits_of_grey_keep_their_high_byte():
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    got = images.decode(encode(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(got[0, :, 0], [0, 0, 1, 128, 255])


def test_cmyk_jpeg():
    image = Image.fromarray(picture(40, 64))
    data = encode(image.convert("CMYK"), "JPEG", quality=95)
    assert difference(images.decode(data), np.asarray(image)) < 4
    assert images.to_eval(data, 8).shape == (8, 8, 3)


def test_probe_reads_only_the_header():
    jpeg = encode(picture(33, 47), "JPEG", exif=exif(6))
    assert images.probe(jpeg[: jpeg.index(b"\xff\xda") + 20]) == ("JPEG", 47, 33)
    for format in ("PNG", "WEBP", "GIF"):
        assert images.probe(encode(picture(33, 47), format)) == (format, 47, 33)


def huge_png(side: int) -> bytes:
    """The header of a PNG of side x side pixels: a few bytes that would take gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_from_the_header():
    data = huge_png(30_000)
    assert images.probe(data) == ("PNG", 30_000, 30_000)
    for read in (images.decode, lambda d: images.to_eval(d, 8), lambda d: images.to_train(d, 8, random_numbers(0))):
        with pytest.raises(images.BadImage, match="PNG of 30000x30000 pixels; at most 67108864"):
            read(data)
    with pytest.raises(images.BadImage, match="at most 100 are"):
        images.decode(encode(picture(20, 20), "JPEG"), max_pixels=100)


def test_broken_bytes_raise_bad_image_with_the_reason():
    jpeg = encode(picture(200, 300), "JPEG", quality=95)
    png = encode(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8), "PNG")
    with pytest.raises(images.BadImage, match="truncated"):
        images.decode(jpeg[: len(jpeg) // 2])
    with pytest.raises(images.BadImage, match="truncated"):
        images.to_eval(jpeg[: len(jpeg) // 2], 16)
    with pytest.raises(images.BadImage, match="broken PNG"):
        images.decode(png[: len(png) // 2])
    for nothing in (b"", b"<html>404</html>", jpeg[:20]):
        with pytest.raises(images.BadImage) as e:
            images.decode(nothing)
        assert " at 0x" not in str(e.value)


@pytest.mark.parametrize("height, width", [(480, 640), (301, 1200), (1000, 97), (16, 16), (7, 5), (1, 1)])
def test_eval_is_the_whole_image_and_always_the_same(height, width):
    data = encode(picture(height, width), "JPEG", quality=95, subsampling=0)
    got = images.to_eval(data, 32)
    expected = np.asarray(Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BICUBIC))
    assert difference(got, expected) < 4
    np.testing.assert_array_equal(got, images.to_eval(data, 32))


def test_an_image_of_the_right_size_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(images.to_eval(encode(pixels, "PNG"), 32), pixels)


def test_shrinking_does_not_alias():
    """A grid of black and white pixels is grey from afar, however the image is stored."""
    grid = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    for data in (encode(grid, "PNG"), encode(grid, "JPEG", quality=95)):
        for size in (64, 128, 256):
            assert np.abs(images.to_eval(data, size).astype(int) - 128).max() <= 3


def test_crops_follow_the_law():
    """Where no try fails, the area is uniform in the scale, the logarithm of the ratio uniform, places cover all."""
    height, width, scale = 3000, 3000, (0.2, 0.5)
    crops = np.array([images.random_crop(height, width, random_numbers(k), scale) for k in range(4000)])
    top, left, h, w = crops.T
    area, ratio = h * w / (height * width), w / h
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    for values, low, high in (
        (area, *scale),
        (np.log(ratio), math.log(3 / 4), math.log(4 / 3)),
        (top / (height - h), 0, 1),
        (left / (width - w), 0, 1),
    ):
        unit = np.sort((values - low) / (high - low))
        assert -0.01 < unit[0] and unit[-1] < 1.01  # whole pixels
        # Kolmogorov-Smirnov at the level 1e-4: 2.23 / sqrt(n)
        assert np.abs(unit - (np.arange(len(unit)) + 0.5) / len(unit)).max() < 2.23 / math.sqrt(len(unit))


def torchvision_crop(height, width, scale, rng):
    """RandomResizedCrop.get_params, as torchvision has it, on another generator."""
    area = height * width
    for _ in range(10):
        target = area * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * 4 / 3), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("height, width", [(480, 640), (200, 640), (900, 300)])
def test_crops_have_torchvisions_distribution_where_tries_fail(height, width):
    rng = np.random.default_rng(1)
    n = 4000
    ours = np.array([images.random_crop(height, width, random_numbers(k), (0.4, 1.0)) for k in range(n)])
    theirs = np.array([torchvision_crop(height, width, (0.4, 1.0), rng) for _ in range(n)])
    for column in range(4):
        both = np.sort(np.concatenate([ours[:, column], theirs[:, column]]))
        cdf = [np.searchsorted(np.sort(c[:, column]), both, side="right") / n for c in (ours, theirs)]
        assert np.abs(cdf[0] - cdf[1]).max() < 2.23 * math.sqrt(2 / n)  # two-sample Kolmogorov-Smirnov, 1e-4


def test_no_try_fits_takes_the_middle():
    # An area of at least 0.9 of a 10:1 image is no crop of ratio up to 4/3.
    assert images.random_crop(100, 1000, random_numbers(0), (0.9, 1.0)) == (0, 433, 100, 133)
    assert images.random_crop(1000, 100, random_numbers(0), (0.9, 1.0)) == (433, 0, 133, 100)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_train_takes_the_crop_and_flips_it(format):
    pixels = picture(600, 800, seed=3)
    data = encode(pixels, format, **({"quality": 95, "subsampling": 0} if format == "JPEG" else {}))
    for seed in range(12):
        u = random_numbers(seed)
        top, left, h, w = images.random_crop(600, 800, u, (0.1, 1.0))
        expected = np.asarray(Image.fromarray(pixels[top : top + h, left : left + w]).resize((48, 48)))
        plain = images.to_train(data, 48, u, (0.1, 1.0), flip=0.0)
        assert plain.shape == (48, 48, 3) and plain.dtype == np.uint8
        assert difference(plain, expected) < 3
        assert difference(images.to_train(data, 48, u, (0.1, 1.0), flip=1.0), expected[:, ::-1]) < 3
        np.testing.assert_array_equal(
            images.to_train(data, 48, u, (0.1, 1.0)), plain[:, ::-1] if u[-1] < 0.5 else plain
        )


def test_train_crops_the_upright_image():
    turned = encode(picture(300, 500), "JPEG", exif=exif(6))
    upright = encode(images.decode(turned), "PNG")
    u = random_numbers(5)
    assert difference(images.to_train(turned, 32, u), images.to_train(upright, 32, u)) < 3
