"""Encoded images to pixels: decoded, turned upright, made RGB, cropped and resized.

JPEG, most of what there is, goes through libjpeg-turbo (simplejpeg), which can decode at 1/2, 1/4 and 1/8 of the size
for a fraction of the work; anything else, and JPEGs it does not take, through Pillow. benchmarks/images.py has the
numbers behind these choices.
"""

import dataclasses
import io
import math

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 1 << 26  # of an image that is decoded at all: 64 million, 200 MB
_ORIENTATION = 0x0112  # the EXIF tag
_TRIES = 10  # of a random crop
UNIFORMS = 2 * _TRIES + 3  # random numbers that `to_train` takes
_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop

Image.MAX_IMAGE_PIXELS = None  # its own limit only warns; ours is looked at before anything is decoded
cv2.setNumThreads(0)  # rows are built by many threads already


class BadImage(ValueError):
    """Bytes that are no image, a broken one, or one too large; the message says which."""


@dataclasses.dataclass(frozen=True)
class _Header:
    format: str
    height: int  # upright
    width: int
    orientation: int  # EXIF: 1 is upright, 2 to 8 are turned or mirrored


def _header(data: bytes) -> tuple[_Header, Image.Image]:
    try:
        image = Image.open(io.BytesIO(data))
        orientation = image.getexif().get(_ORIENTATION, 1)
    except UnidentifiedImageError as e:
        raise BadImage(f"not an image: {len(data)} bytes beginning {data[:8]!r}") from e
    except Exception as e:  # Pillow's decoders raise errors of many kinds for broken headers
        raise BadImage(f"broken header ({type(e).__name__}: {e})") from e
    width, height = image.size
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    return _Header(image.format or "?", height, width, orientation), image


def probe(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) from the header; the size is that of the upright image.

    Raises:
      BadImage: it has no header that can be read.
    """
    header, _ = _header(data)
    return header.format, header.width, header.height


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The upright image, uint8 [height, width, 3] RGB; what is transparent shows white.

    Raises:
      BadImage: not an image, broken, truncated, or of more than `max_pixels`.
    """
    return _decode(data, 1, max_pixels)


def _decode(data: bytes, shrink: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """`decode`; a JPEG at 1/`shrink` of its size (1, 2, 4 or 8), rounded up."""
    header, image = _header(data)
    if header.width * header.height > max_pixels:
        raise BadImage(f"{header.format} of {header.width}x{header.height} pixels; at most {max_pixels} are decoded")
    pixels = _decode_jpeg(data, shrink) if header.format == "JPEG" else None
    if pixels is None:
        try:
            pixels = _rgb(image)
        except Exception as e:  # Pillow's decoders raise errors of many kinds
            raise BadImage(f"broken {header.format} ({type(e).__name__}: {e})") from e
    return _upright(pixels, header.orientation)


def _decode_jpeg(data: bytes, shrink: int) -> np.ndarray | None:
    """None where libjpeg-turbo does not take it: Pillow decides then whether it is broken."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("Gray", "RGB", "YCbCr"):
            return None
        least = {"min_height": math.ceil(height / shrink), "min_width": math.ceil(width / shrink)}
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=True, **least)
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
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """To [size, size, 3]. Enlarging is cubic. Shrinking averages areas from a factor of 2 on, below that it is linear:
    a linear sample of less than half the pixels skips some of them, and fine patterns come out wrong."""
    shrink = min(pixels.shape[0], pixels.shape[1]) / size
    method = cv2.INTER_CUBIC if shrink < 1 else cv2.INTER_LINEAR if shrink < 2 else cv2.INTER_AREA
    return cv2.resize(np.ascontiguousarray(pixels), (size, size), interpolation=method)


def _shrink_for(height: float, width: float, size: int) -> int:
    """The largest of 8, 4, 2, 1 at which a region of this size still has `size` pixels each way."""
    return next((s for s in (8, 4, 2) if min(height, width) >= s * size), 1)


def to_eval(data: bytes, size: int) -> np.ndarray:
    """The whole image, squeezed into uint8 [size, size, 3]: nothing at its edges is lost.

    Raises:
      BadImage: as `decode`.
    """
    header, _ = _header(data)
    return _resize(_decode(data, _shrink_for(header.height, header.width, size)), size)


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
    header, _ = _header(data)
    top, left, height, width = random_crop(header.height, header.width, u, crop_scale)
    pixels = _decode(data, _shrink_for(height, width, size))
    # The decoded image is header / shrink, rounded up; the crop is the same part of it.
    fy, fx = pixels.shape[0] / header.height, pixels.shape[1] / header.width
    y, x = int(top * fy), int(left * fx)
    crop = pixels[y : y + max(1, round(height * fy)), x : x + max(1, round(width * fx))]
    if u[-1] < flip:
        crop = crop[:, ::-1]
    return _resize(crop, size)


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
