"""Ways from an encoded JPEG to the model's pixels: their speed, and how far they are from careful resizing.

    python -m benchmarks.images [--input=data/captions] [--output=benchmarks/images.json]

Every way makes uint8 [size, size, 3] of the whole image, in one thread. "2x2" averages a linear sample twice as fine.
The reference is Pillow's Lanczos filter, which looks at every pixel, on the fully decoded image; "dB" is the peak
signal-to-noise ratio against it, higher is closer. Ways are timed in turns, image by image, so that a busy machine
slows all of them alike. Without --input the images are generated: smooth shapes, edges, fine texture and noise.
"""

import io
import itertools
import math
import time
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from absl import app, flags
from PIL import Image

from benchmarks.tables import table
from benchmarks.timing import origin, write
from data_pipelines import images
from data_pipelines.store import Dataset

_INPUT = flags.DEFINE_string("input", None, "dataset folder whose JPEGs are used; generated images without it")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")
_IMAGES = flags.DEFINE_integer("images", 64, "at most so many", lower_bound=1)
_SIZE = flags.DEFINE_integer("size", 224, "of the result", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "each image is timed so often, the best counts", lower_bound=1)

COLUMNS = {
    "way": ("way", ""), "ms": ("ms/image", ".2f"), "speed": ("images/s", ",.0f"), "db": ("dB", ".1f"),
}  # fmt: skip

Way = Callable[[bytes, int], np.ndarray]


def reference(data: bytes, size: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def pillow(draft: bool) -> Way:
    def way(data: bytes, size: int) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        if draft:
            image.draft("RGB", (size, size))
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))

    return way


def opencv(interpolation: int) -> Way:
    def way(data: bytes, size: int) -> np.ndarray:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        return cv2.resize(pixels, (size, size), interpolation=interpolation)

    return way


def turbo(interpolation: int, scaled: bool, fast: bool = False, twice: bool = False) -> Way:
    def way(data: bytes, size: int) -> np.ndarray:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        shrink = next((s for s in (8, 4, 2) if scaled and min(height, width) >= s * size), 1)
        least = {"min_height": math.ceil(height / shrink), "min_width": math.ceil(width / shrink)}
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=fast, fastupsample=fast, **least)
        if twice:
            pixels = cv2.resize(pixels, (2 * size, 2 * size), interpolation=cv2.INTER_LINEAR)
        return cv2.resize(pixels, (size, size), interpolation=interpolation)

    return way


WAYS: dict[str, Way] = {
    "Pillow, bicubic": pillow(draft=False),
    "Pillow draft, bicubic": pillow(draft=True),
    "cv2, linear": opencv(cv2.INTER_LINEAR),
    "cv2, cubic": opencv(cv2.INTER_CUBIC),
    "simplejpeg full, linear": turbo(cv2.INTER_LINEAR, scaled=False),
    "simplejpeg full, cubic": turbo(cv2.INTER_CUBIC, scaled=False),
    "simplejpeg full, area": turbo(cv2.INTER_AREA, scaled=False),
    "simplejpeg scaled, linear": turbo(cv2.INTER_LINEAR, scaled=True),
    "simplejpeg scaled, cubic": turbo(cv2.INTER_CUBIC, scaled=True),
    "simplejpeg scaled, area": turbo(cv2.INTER_AREA, scaled=True),
    "simplejpeg scaled fast, cubic": turbo(cv2.INTER_CUBIC, scaled=True, fast=True),
    "simplejpeg scaled, linear, 2x2": turbo(cv2.INTER_AREA, scaled=True, twice=True),
    "images.to_eval": images.to_eval,
}


def generated(count: int, seed: int = 0) -> list[bytes]:
    """JPEGs of 400 to 1,600 pixels a side with content at every scale, quality 90."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        height, width = rng.integers(400, 1600, 2)
        pixels = np.zeros((height, width, 3), np.float32)
        for cells, strength in ((4, 90), (16, 60), (64, 35), (256, 15)):
            coarse = rng.uniform(-strength, strength, (cells, cells, 3)).astype(np.float32)
            method = (cv2.INTER_CUBIC, cv2.INTER_NEAREST)[rng.integers(2)]
            pixels += cv2.resize(coarse, (int(width), int(height)), interpolation=method)
        pixels += 128 + rng.normal(0, 3, pixels.shape)
        made.append(simplejpeg.encode_jpeg(pixels.clip(0, 255).astype(np.uint8), quality=90))
    return made


def stored(folder: str, count: int) -> list[bytes]:
    """The first JPEGs of a dataset that stand upright and are in colour, which all the ways can read."""

    def usable(data: bytes) -> bool:
        if not data.startswith(b"\xff\xd8\xff"):
            return False
        image = Image.open(io.BytesIO(data))
        return image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1

    everything = itertools.chain.from_iterable(document.images for document in Dataset.open(folder))
    return list(itertools.islice(filter(usable, everything), count))


def measure(encoded: list[bytes], size: int, rounds: int) -> dict[str, dict[str, float]]:
    """{way: {"ms": of an image, "db": mean over images}}."""
    best = {name: np.full(len(encoded), np.inf) for name in WAYS}
    decibels: dict[str, list[float]] = {name: [] for name in WAYS}
    for k, data in enumerate(encoded):
        expected = reference(data, size).astype(np.float64)
        for turn in range(rounds):
            for name, way in WAYS.items():
                start = time.perf_counter()
                pixels = way(data, size)
                best[name][k] = min(best[name][k], time.perf_counter() - start)
                if turn == 0:
                    decibels[name].append(10 * math.log10(255**2 / max(1e-9, np.mean((pixels - expected) ** 2))))
    return {name: {"ms": 1e3 * float(best[name].mean()), "db": float(np.mean(decibels[name]))} for name in WAYS}


def main(_):
    encoded = stored(_INPUT.value, _IMAGES.value) if _INPUT.value else generated(_IMAGES.value)
    if not encoded:
        raise app.UsageError(f"{_INPUT.value} has no upright colour JPEG")
    probes = [images.probe(data) for data in encoded]
    megapixels = float(np.mean([width * height for _, width, height in probes])) / 1e6
    measured = measure(encoded, _SIZE.value, _ROUNDS.value)
    source = _INPUT.value or "generated"
    kilobytes = float(np.mean([len(d) for d in encoded])) / 1e3
    print(f"{len(encoded)} JPEGs ({source}), {kilobytes:.0f} kB and {megapixels:.2f} megapixels on average")
    print(f"to {_SIZE.value} x {_SIZE.value}\n")
    print(table([{"way": name, "speed": 1e3 / row["ms"], **row} for name, row in measured.items()], COLUMNS))
    if _OUTPUT.value:
        record = {
            "images": {"source": source, "count": len(encoded), "kilobytes": kilobytes, "megapixels": megapixels},
            "size": _SIZE.value,
            "ways": measured,
        }
        write(_OUTPUT.value, record | origin(("pillow", "opencv-python-headless", "simplejpeg")))


if __name__ == "__main__":
    app.run(main)
