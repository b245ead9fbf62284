"""Scenes as pixels: shapes with textures over a noisy background, back to front."""

import functools
import math
import random

import cv2
import numpy as np

from data_pipelines.scenes.scene import COLOURS, Object, Scene

NOISE = 10  # the noise is uniform in [-NOISE, NOISE]
SUBPIXELS = 4  # in each direction: the edges' smoothing
SHADE = 0.4  # brightness of a texture's dark parts


def _inside(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points of the square [-1, 1]^2 (u to the right, v downwards) belong to the shape. Broadcasts; bool."""
    if kind == "circle":
        return u**2 + v**2 < 1
    if kind == "square":
        return (abs(u) < 0.88) & (abs(v) < 0.88)
    if kind == "triangle":
        return (v < 0.9) & (abs(u) < (v + 1) / 1.9)
    if kind == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.34) & (np.maximum(abs(u), abs(v)) < 1)
    if kind == "ring":
        return (u**2 + v**2 < 1) & (u**2 + v**2 > 0.3)
    if kind == "diamond":
        return abs(u) + abs(v) < 1.08
    if kind == "star":  # five points: in each fifth of the circle, the line from a tip to an inner corner
        angle = np.abs((np.arctan2(u, -v) / (2 * math.pi / 5) + 0.5) % 1 - 0.5) * (2 * math.pi / 5)
        inner, radius = 0.42, np.hypot(u, v)
        corner = (inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5))
        return radius * (np.cos(angle) * corner[1] + np.sin(angle) * (1 - corner[0])) < corner[1]
    if kind == "heart":
        x, y = 1.15 * u, 0.15 - 1.15 * v
        return (x**2 + y**2 - 0.72) ** 3 < x**2 * y**3
    raise ValueError(f"no shape of kind {kind!r}")


def _bright(texture: str, rows: np.ndarray, columns: np.ndarray, period: int) -> np.ndarray:
    """Where the texture shows the full colour; elsewhere it is darker. Indices in pixels; `period` a tile's side."""
    if texture == "solid":
        return np.ones(np.broadcast_shapes(rows.shape, columns.shape), bool)
    if texture == "striped":
        return (rows // period + 0 * columns) % 2 == 0
    if texture == "checked":
        return (rows // period + columns // period) % 2 == 0
    if texture == "dotted":
        return (rows // period % 2 == 1) | (columns // period % 2 == 1)
    raise ValueError(f"no texture {texture!r}")


@functools.lru_cache(maxsize=4096)
def stamp(kind: str, colour: str, texture: str, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """An object's picture for a radius in pixels -> (colour times coverage, 1 - coverage).

    Both float32 of [n, n, 3] and [n, n, 1], n odd, the object's centre in the middle pixel.
    """
    half = math.ceil(radius)
    n = 2 * half + 1
    at = ((np.arange(n * SUBPIXELS) + 0.5) / SUBPIXELS - n / 2) / radius
    inside = _inside(kind, at[None, :], at[:, None])
    coverage = inside.reshape(n, SUBPIXELS, n, SUBPIXELS).mean(axis=(1, 3), dtype=np.float32)[..., None]
    index = np.arange(n)
    bright = _bright(texture, index[:, None], index[None, :], max(1, round(radius / 4)))
    paint = np.where(bright, 1.0, SHADE)[..., None] * np.asarray(COLOURS[colour], np.float32)
    return (paint * coverage).astype(np.float32), 1 - coverage


def _pixels(o: Object, size: int) -> tuple[int, int, float]:
    """The object's centre pixel and its radius in half pixels, so that few stamps serve all images."""
    return int(o.x * size), int(o.y * size), round(2 * o.radius * size) / 2


def render(scene: Scene, size: int) -> np.ndarray:
    """The scene as [size, size, 3] uint8 RGB. Same scene, same pixels."""
    grains = np.frombuffer(random.Random(scene.noise).randbytes(size * size * 3), np.uint8).reshape(size, size, 3)
    noise = (grains % (2 * NOISE + 1)).astype(np.float32) - NOISE
    canvas = np.empty_like(noise)
    canvas[:] = scene.background
    for o in scene.objects:
        x, y, radius = _pixels(o, size)
        paint, rest = stamp(o.kind, o.colour, o.texture, radius)
        half = paint.shape[0] // 2
        top, left = max(0, y - half), max(0, x - half)
        bottom, right = min(size, y + half + 1), min(size, x + half + 1)
        cut = slice(top - y + half, bottom - y + half), slice(left - x + half, right - x + half)
        view = canvas[top:bottom, left:right]
        view *= rest[cut]
        view += paint[cut]
    canvas += noise
    return canvas.astype(np.uint8)


def encode(image: np.ndarray) -> bytes:
    """PNG bytes of an RGB image [h, w, 3] uint8."""
    # Stored, not compressed: noise shrinks by a third at best, for three times the time.
    ok, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 0])
    if not ok:
        raise ValueError(f"an image of shape {image.shape} and type {image.dtype} could not be written as PNG")
    return data.tobytes()
