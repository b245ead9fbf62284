"""A PyTorch DataLoader over our files, as one writes it: documents drawn by weight, packed one after another.

The same records and tokenizer, Pillow for the pictures, worker processes that each go their own way. It makes arrays of
the same names and shapes, but what a row holds depends on the number of workers, and nobody knows where it was.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipelines import images, store, tokenizer
from data_pipelines.document import Document

ARRAYS = ("tokens", "targets", "loss_mask", "segment_ids", "attend_until", "positions", "image_index")

Row = dict[str, np.ndarray]


class PackedRows(IterableDataset):
    """Endless rows."""

    def __init__(self, config: ConfigDict, seed: int = 0):
        self.config, self.seed = config, seed

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        c = self.config
        self._tokenizer = tokenizer.load(c.data.tokenizer, c.data.root)
        datasets = [store.Dataset.open(f"{c.data.root}/{source}") for source in c.data.sources]
        weights = np.array(c.data.weights) / sum(c.data.weights)
        row = self._empty()
        at = slot = segment = 0
        while True:
            dataset = datasets[rng.choice(len(datasets), p=weights)]
            tokens, pixels = self._encoded(dataset[int(rng.integers(len(dataset)))], rng)
            while len(tokens):
                n = self._fits(tokens, c.row_length - at, c.image.per_row - slot)
                if n:
                    segment += 1
                    self._put(row, at, slot, segment, tokens[: n + 1], n, pixels)
                    taken = (tokens[:n] == self._tokenizer.image).sum() // c.image.positions
                    at, slot, pixels, tokens = at + n, slot + taken, pixels[taken:], tokens[n:]
                if len(tokens):
                    yield row
                    row, at, slot, segment = self._empty(), 0, 0, 0

    def _empty(self) -> Row:
        c = self.config
        row: Row = {name: np.zeros(c.row_length, np.int32) for name in ARRAYS}
        row["loss_mask"] = np.zeros(c.row_length, np.float32)
        row["tokens"][:] = self._tokenizer.pad
        row["attend_until"][:] = np.arange(1, c.row_length + 1)
        row["image_index"][:] = -1
        row["images"] = np.zeros((c.image.per_row, c.image.size, c.image.size, 3), np.uint8)
        row["image_mask"] = np.zeros(c.image.per_row, bool)
        return row

    def _encoded(self, document: Document, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
        """A document's tokens, with image.positions of the image token for each picture, and its pictures."""
        parts, pixels = [[self._tokenizer.bos]], []
        for part in document.parts:
            if isinstance(part, str):
                parts.append(self._tokenizer.encode(part))
            else:
                parts.append([self._tokenizer.image] * self.config.image.positions)
                pixels.append(self._pixels(part, rng))
        return np.concatenate([*parts, [self._tokenizer.eos]]).astype(np.int32), pixels

    def _pixels(self, data: bytes, rng: np.random.Generator) -> np.ndarray:
        """torchvision's RandomResizedCrop and RandomHorizontalFlip, of Pillow."""
        image, size = Image.open(io.BytesIO(data)).convert("RGB"), self.config.image.size
        if not self.config.image.augment:
            return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
        u = rng.random(images.UNIFORMS)
        top, left, height, width = images.random_crop(image.height, image.width, u, tuple(self.config.image.crop_scale))
        box = (left, top, left + width, top + height)
        found = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
        return found[:, ::-1] if u[-1] < self.config.image.flip else found

    def _fits(self, tokens: np.ndarray, room: int, slots: int) -> int:
        """How many of the tokens have room; none that would cut an image or lack a slot."""
        n = min(len(tokens), room)
        is_image = tokens[:n] == self._tokenizer.image
        whole = min(is_image.sum() // self.config.image.positions, slots) * self.config.image.positions
        over = np.flatnonzero(is_image)[whole:]
        return int(over[0]) if len(over) else n

    def _put(
        self, row: Row, at: int, slot: int, segment: int, tokens: np.ndarray, n: int, pixels: list[np.ndarray]
    ) -> None:
        """The first n of the tokens at a row's position; what is behind them is what the last one predicts."""
        image, p = self._tokenizer.image, self.config.image.positions
        here = slice(at, at + n)
        following = np.append(tokens, 0)[1 : n + 1]
        scored = (following != image) & (np.arange(1, n + 1) < len(tokens))
        row["tokens"][here] = tokens[:n]
        row["targets"][here] = following * scored
        row["loss_mask"][here] = scored
        row["segment_ids"][here] = segment
        row["positions"][here] = np.arange(n)
        places = np.flatnonzero(tokens[:n] == image)
        row["image_index"][at + places] = slot * p + np.arange(len(places))
        row["attend_until"][at + places] = at + np.repeat(places[::p], p) + p
        for i in range(len(places) // p):
            row["images"][slot + i] = pixels[i]
            row["image_mask"][slot + i] = True


def batches(config: ConfigDict, rows: int, workers: int, prefetch: int) -> Iterator[dict[str, torch.Tensor]]:
    options: dict[str, Any] = dict(prefetch_factor=max(prefetch // workers, 1)) if workers else {}
    return iter(DataLoader(PackedRows(config), rows, num_workers=workers, **options))
