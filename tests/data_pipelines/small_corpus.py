"""Small datasets of every kind of document, and an encoding of documents that shares no code with the rows."""

import pathlib

import cv2
import numpy as np

from configs.base import base
from data_pipelines.document import Document
from data_pipelines.store import DatasetWriter

SOURCES = ("captions", "interleaved", "text")
SIZE, POSITIONS, ROW_LENGTH, PER_ROW = 4, 4, 48, 3


def picture(number: int) -> bytes:
    """A PNG of SIZE x SIZE whose pixels tell `number`, so that an unaugmented row shows which image it holds."""
    digits = np.array([number % 256, number // 256 % 256, 7], np.uint8)  # blue, green, red
    return cv2.imencode(".png", np.broadcast_to(digits, (SIZE, SIZE, 3)))[1].tobytes()


def number_of(pixels: np.ndarray) -> int:
    assert (pixels == pixels[0, 0]).all() and pixels[0, 0, 0] == 7
    return int(pixels[0, 0, 2]) + 256 * int(pixels[0, 0, 1])


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join("".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, 6))) for _ in range(count))


def documents(source: str, count: int, seed: int) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        if source == "captions":
            parts = [picture(len(made)), words(rng, int(rng.integers(1, 5)))]
        elif source == "text":
            parts = [words(rng, int(rng.integers(0, 60)))]
        else:  # runs of images longer than a row has slots, empty texts, documents longer than a row
            parts = [
                picture(int(rng.integers(0, 60_000))) if rng.random() < 0.5 else words(rng, int(rng.integers(0, 15)))
                for _ in range(rng.integers(3, 12))  # two would be a caption
            ]
        made.append(Document(f"{source}-{i}", source, tuple(parts)))
    return made


def write(root: pathlib.Path, counts: tuple[int, ...] = (90, 60, 50), split: str = "train", held_out: int = 0) -> None:
    """Of each source's documents the first `held_out` are in the split of that name, the others in `split`."""
    for k, (source, count) in enumerate(zip(SOURCES, counts, strict=True)):
        with DatasetWriter(root / source, source) as writer:
            for number, document in enumerate(documents(source, count, seed=k)):
                writer.add(document, "held_out" if number < held_out else split)


def config_for(root: pathlib.Path):
    c = base()
    c.row_length = ROW_LENGTH
    c.data.root = str(root)
    c.data.window = 16
    c.image.size, c.image.patch, c.image.positions, c.image.per_row = SIZE, 2, POSITIONS, PER_ROW
    c.image.augment = False
    return c


def axis(document: Document, delimiters: bool = False) -> list[tuple[str, int]]:
    """(kind, value) of every position of a document under the byte tokenizer, written the plainest way."""
    positions = [("bos", 1)]
    for part in document.parts:
        if isinstance(part, str):
            positions += [("text", 6 + byte) for byte in part.encode()]
        else:
            positions += [("boi", 4)] * delimiters
            positions += [("image", 3)] * POSITIONS
            positions += [("eoi", 5)] * delimiters
    return [*positions, ("eos", 2)]
