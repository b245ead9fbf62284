"""A corpus to time on where none is at hand: captions, interleaved documents and text of random words and pictures.

Like the web's in what costs time: JPEGs of 300 to 800 pixels a side with content at every scale, captions of a sentence
or two, pages of several paragraphs with up to four pictures, texts of up to a few thousand words. Words are drawn from
5,000 by Zipf's law, and a BPE tokenizer is trained on them. The same seed makes the same bytes.
"""

import pathlib

import cv2
import numpy as np
import simplejpeg
from ml_collections import ConfigDict

from data_pipelines import store, tokenizer
from data_pipelines.document import Document
from data_pipelines.plan import ensure_plans
from data_pipelines.rows import Batch
from data_pipelines.stream import Stream

SOURCES = ("captions", "interleaved", "text")
DOCUMENTS = {"captions": 240, "interleaved": 90, "text": 60}
PICTURES = 64  # different ones; documents take turns with them
TOKENIZER = "tokenizer.json"


def make(root: pathlib.Path, seed: int = 0, vocab_size: int = 8_192) -> None:
    """Writes a dataset for each of SOURCES, and a tokenizer."""
    rng = np.random.default_rng(seed)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 11)))) for _ in range(5_000)]
    pictures = [picture(rng) for _ in range(PICTURES)]
    texts: list[str] = []

    def text(low: int, high: int) -> str:
        chosen = rng.zipf(1.3, rng.integers(low, high)) % len(words)
        texts.append(" ".join(words[i] for i in chosen))
        return texts[-1]

    def document(source: str, number: int) -> Document:
        image = pictures[number % PICTURES]
        if source == "captions":
            parts: list[str | bytes] = [image, text(8, 40)]
        elif source == "text":
            parts = [text(100, 3_000)]
        else:
            parts = [text(40, 150)]
            for i in range(rng.integers(1, 5)):
                parts += [pictures[(number + 7 * i) % PICTURES], text(40, 150)]
        return Document(f"{source}-{number}", source, tuple(parts))

    for source in SOURCES:
        with store.DatasetWriter(root / source, source) as writer:
            for number in range(DOCUMENTS[source]):
                writer.add(document(source, number), store.TRAIN)
    tokenizer.train_bpe(texts, vocab_size, root / TOKENIZER)


def picture(rng: np.random.Generator) -> bytes:
    height, width = (int(n) for n in rng.integers(300, 800, 2))
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells, strength in ((4, 90), (16, 60), (64, 35), (256, 15)):
        coarse = rng.uniform(-strength, strength, (cells, cells, 3)).astype(np.float32)
        pixels += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return simplejpeg.encode_jpeg(pixels.clip(0, 255).astype(np.uint8), quality=85)


def use(config: ConfigDict, root: pathlib.Path) -> None:
    """Has a config read the corpus in `root`, making it if it is not there.

    A model whose vocabulary has no room for the tokenizer reads bytes.
    """
    if not (root / TOKENIZER).exists():
        make(root)
    there = tokenizer.load(str(root / TOKENIZER))
    fits = there.vocab_size <= config.model.vocab_size
    with config.unlocked():
        config.data.root, config.data.plans, config.data.sources = str(root), "", SOURCES
        config.data.tokenizer = TOKENIZER if fits else "bytes"
        if not fits:
            config.model.vocab_size = max(config.model.vocab_size, tokenizer.load("bytes").vocab_size)


def batches(config: ConfigDict, count: int) -> list[Batch]:
    """The first batches of a config's training stream."""
    ensure_plans(config, progress=False)
    stream = Stream.open(config)
    rows = config.batch_rows
    return [stream.batch(range(t * rows, (t + 1) * rows)) for t in range(count)]
