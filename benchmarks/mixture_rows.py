"""Rows of the 45/45/10 mixture to measure on: of seeded synthetic documents, or of a config's own data.

    interleaved   600-3000 positions, an image in about 500, anywhere
    captions      an image, and some 30 tokens behind it
    text          some 500 tokens

Images are of 256 positions and see themselves both ways. The pipeline's own code cuts documents, packs and mixes rows.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from configs import loading
from data_pipelines import plan
from data_pipelines.packing import cut, pack
from data_pipelines.stream import Mixture, Stream

IMAGE = 256  # positions
WINDOW = 64  # rows that are packed at a time, at least: of few documents, fewer fit together
WEIGHTS = {"interleaved": 0.45, "captions": 0.45, "text": 0.10}

Rows = tuple[np.ndarray, np.ndarray]  # segment_ids, attend_until [B,S]


def documents(source: str, r: np.random.Generator) -> Iterator[tuple[list[int], list[bool]]]:
    """Lengths of the pieces of a source's documents, and which are images; BOS and EOS are with the texts."""
    while True:
        if source == "text":
            yield [int(np.clip(r.lognormal(np.log(500), 0.8), 20, 8000))], [False]
        elif source == "captions":
            yield [1, IMAGE, int(np.clip(r.lognormal(np.log(30), 0.6), 4, 200))], [False, True, False]
        else:
            length = int(r.integers(600, 3001))
            images = max(1, min(round(length / 500), length // (IMAGE + 50)))
            left = length - images * IMAGE
            ends = np.sort(r.integers(1, left, images))
            texts = np.diff(np.concatenate([[0], ends, [left]]))
            pieces = [(int(n), False) for n in texts]
            for n in range(images, 0, -1):
                pieces.insert(n, (IMAGE, True))
            yield [n for n, _ in pieces], [image for _, image in pieces]


def packed(source: str, s: int, rows: int, seed: int) -> tuple[list[Rows], float]:
    """So many rows of a source, and the positions of one that are no padding, on average."""
    r = np.random.default_rng([seed, s, list(WEIGHTS).index(source)])
    fragments: list[tuple[int, list[tuple[int, int]]]] = []  # length, and where its images are
    makes, left = documents(source, r), (max(rows, WINDOW) + 4) * s
    while left > 0:
        lengths, images = next(makes)
        left -= sum(lengths)
        begins = np.cumsum([0, *lengths])
        spans = [(int(b), int(b) + n) for b, n, image in zip(begins, lengths, images, strict=False) if image]
        for part in cut(lengths, images, s, max(s // IMAGE, 1)):
            own = [(a - part.start, b - part.start) for a, b in spans if part.start <= a and b <= part.stop]
            fragments.append((part.stop - part.start, own))
    made = pack([n for n, _ in fragments], [len(i) for _, i in fragments], s, max(s // IMAGE, 1))
    found = []
    for row in (made[n] for n in r.permutation(len(made))):
        segments, until, at = np.zeros(s, np.int32), np.arange(1, s + 1, dtype=np.int32), 0
        for number, fragment in enumerate(row, start=1):
            length, spans = fragments[fragment]
            segments[at : at + length] = number
            for a, b in spans:
                until[at + a : at + b] = at + b
            at += length
        found.append((segments, until))
    return found, float(np.mean([(segments > 0).sum() for segments, _ in found]))


def synthetic(s: int, rows: int, seed: int = 0) -> Rows:
    """Rows of all sources in turn, as the training stream mixes them."""
    sources = [packed(name, s, rows, seed) for name in WEIGHTS]
    mixture = Mixture.of(tuple(WEIGHTS.values()), [positions for _, positions in sources])
    chosen = [sources[source][0][rank] for source, rank in map(mixture.locate, range(rows))]
    segments, until = (np.stack(x) for x in zip(*chosen, strict=True))
    return segments, until


def of_data(config_file: str, root: str | None, s: int, rows: int) -> Rows:
    """The first rows of a config's training stream, at this row length."""
    overrides: dict[str, Any] = {"row_length": s} | ({"data.root": root} if root else {})
    config = loading.load(config_file, overrides)
    if config.image.positions:
        config = loading.load(config_file, overrides | {"image.per_row": max(s // config.image.positions, 1)})
    plan.ensure_plans(config)
    batch = Stream.open(config).batch(range(rows))
    return batch["segment_ids"], batch["attend_until"]


def first_of_segment(segments: np.ndarray) -> np.ndarray:
    """Where the segment of each position begins, int32 [B,S]."""
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    return np.maximum.accumulate(np.where(begins, np.arange(segments.shape[1]), 0), axis=1).astype(np.int32)
