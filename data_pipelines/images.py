"""Encoded images to pixels: decoded, turned upright, made RGB, cropped and resized.

JPEG, most of what there is, goes through libjpeg-turbo (simplejpeg), which can decode at 1/2, 1/4 and 1/8 of the size
for a fraction of the work; anything else, and JPEGs it does not take, through Pillow. benchmarks/images.py has the
numbers behind these choices.
"""

import io
import math
import struct

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 1 << 26  # of an image that is decoded at all: 64 million, 200 MB
_ORIENTATION = 0x0112  # the EXIF tag: 1 is upright, 2 to 8 are turned or mirrored
_TURNED = (5, 6, 7, 8)  # the orientations that swap height and width
Image.init()  # registers its formats
# Those that Pillow may open; among its others are some that run programs (EPS).
_FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000") if f in Image.OPEN)
_TRIES = 10  # of a random crop
UNIFORMS = 2 * _TRIES + 3  # random numbers that `to_train` takes
_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop

Image.MAX_IMAGE_PIXELS = None  # its own limit only warns; ours is looked at before anything is decoded
cv2.setNumThreads(0)  # rows are built by many threads already


class BadImage(ValueError):
    """Bytes that are no image, a broken one, or one too large; the message says which."""


def probe(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) from the header alone, as stored: before an EXIF orientation turns it.

    Raises:
      BadImage: it has no header that can be read.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        return "JPEG", width, height
    except ValueError:
        image = _open(data)
        return image.format or "?", *image.size


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The upright image, uint8 [height, width, 3] RGB; what is transparent shows white.

    Raises:
      BadImage: not an image, broken, truncated, or of more than `max_pixels`.
    """
    return _Encoded(data, max_pixels).pixels(1)


class _Encoded:
    """An encoded image of which only the header has been read: its upright size, and its pixels when asked for."""

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS):
        self._data = data
        self.format, width, height = probe(data)
        if width * height > max_pixels:
            raise BadImage(f"{self.format} of {width}x{height} pixels; at most {max_pixels} are decoded")
        self._image = None if self.format == "JPEG" else _open(data)
        self._orientation = _jpeg_orientation(data) if self._image is None else self._exif(self._image)
        self.height, self.width = (width, height) if self._orientation in _TURNED else (height, width)

    def pixels(self, shrink: int) -> np.ndarray:
        """Upright RGB, uint8 [height, width, 3]; a JPEG may come at 1/`shrink` of its size (1, 2, 4, 8), rounded up."""
        pixels = _decode_jpeg(self._data, shrink) if self.format == "JPEG" else None
        if pixels is None:
            try:
                pixels = _rgb(self._image or _open(self._data))
            except BadImage:
                raise
            except Exception as e:  # Pillow's decoders raise errors of many kinds
                raise BadImage(f"broken {self.format} ({type(e).__name__}: {e})") from e
        return _upright(pixels, self._orientation)

    def _exif(self, image: Image.Image) -> int:
        try:
            return image.getexif().get(_ORIENTATION, 1)
        except Exception as e:  # a PNG's may stand behind its pixels, so all is read
            raise BadImage(f"broken {self.format} ({type(e).__name__}: {e})") from e


def _open(data: bytes) -> Image.Image:
    """Reads the header, no pixels."""
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as e:
        raise BadImage(f"not an image: {len(data)} bytes beginning {bytes(data[:8])!r}") from e
    except Exception as e:  # Pillow's readers raise errors of many kinds for broken headers
        raise BadImage(f"broken header ({type(e).__name__}: {e})") from e


def _jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 where there is none, found by walking over the segments of its header.

    Pillow finds it too, at a tenth of the cost of decoding a photo at half size.
    """
    at = 2  # behind the start-of-image marker
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # the pixels begin
            break
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _tiff_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    """The orientation in an EXIF block, a little TIFF file: its first directory has 12 bytes an entry."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for k in range(entries):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * k)
            if (tag, kind, count) == (_ORIENTATION, 3, 1):
                return value
    except struct.error:  # cut, or its offsets lead outside: no orientation rather than no image
        pass
    return 1


def _decode_jpeg(data: bytes, shrink: int) -> np.ndarray | None:
    """None where libjpeg-turbo does not take it: Pillow decides then whether it is broken."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("Gray", "RGB", "YCbCr"):
            return None
        least = {"min_height": math.ceil(height / shrink), "min_width": math.ceil(width / shrink)}
        return simplejpeg.decode_jpeg(data, colorspace="RGB", **least)
    except ValueError:
        return None


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits of grey
        return np.repeat((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, 2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation; a view where it can be."""
    if orientation in _TURNED:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """To [size, size, 3] without aliasing.

    Linear and cubic samples skip pixels when they shrink, so that fine patterns come out wrong. Averaging areas is
    right and slow; averaging 2 x 2 pixels of a linear sample twice as fine is within 1 dB of it up to a factor of 3
    and takes a third of its time (benchmarks/images.py).
    """
    pixels = np.ascontiguousarray(pixels)
    shrink = max(pixels.shape[0], pixels.shape[1]) / size
    if pixels.shape[:2] == (size, size):
        return pixels
    if shrink <= 1:
        return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_CUBIC)
    if shrink < 3:
        pixels = cv2.resize(pixels, (2 * size, 2 * size), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)


def _shrink_for(height: float, width: float, size: int) -> int:
    """The largest of 8, 4, 2, 1 at which a region of this size still has `size` pixels each way."""
    return next((s for s in (8, 4, 2) if min(height, width) >= s * size), 1)


def to_eval(data: bytes, size: int) -> np.ndarray:
    """The whole image, squeezed into uint8 [size, size, 3]: nothing at its edges is lost.

    Raises:
      BadImage: as `decode`.
    """
    image = _Encoded(data)
    return _resize(image.pixels(_shrink_for(image.height, image.width, size)), size)


def to_train(
    data: bytes, size: int, u: np.ndarray, crop_scale: tuple[float, float] = (0.4, 1.0), flip: float = 0.5
) -> np.ndarray:
    """A random resized crop, flipped with probability `flip`: uint8 [size, size, 3].

    The law of torchvision's RandomResizedCrop (area uniform in `crop_scale` of the image, logarithm of the ratio
    uniform in [3/4, 4/3], ten tries, then the largest crop of an allowed ratio in the middle).

    Args:
      u: `UNIFORMS` numbers in [0, 1), all the randomness there is.

    Raises:
      BadImage: as `decode`.
    """
    image = _Encoded(data)
    top, left, height, width = random_crop(image.height, image.width, u, crop_scale)
    pixels = image.pixels(_shrink_for(height, width, size))
    # Decoded at 1/shrink, rounded up; the crop is the same part of it.
    fy, fx = pixels.shape[0] / image.height, pixels.shape[1] / image.width
    rows = slice(round(top * fy), round((top + height) * fy))
    columns = slice(round(left * fx), round((left + width) * fx))
    resized = _resize(pixels[rows, columns], size)
    return np.ascontiguousarray(resized[:, ::-1]) if u[-1] < flip else resized


def random_crop(height: int, width: int, u: np.ndarray, crop_scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the crop that `to_train` takes of an image of this size."""
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for k in range(_TRIES):
        area = height * width * (crop_scale[0] + u[2 * k] * (crop_scale[1] - crop_scale[0]))
        ratio = math.exp(low + u[2 * k + 1] * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[-3] * (height - h + 1)), int(u[-2] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < _RATIO[0]:
        h = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(height * _RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w
