"""Packed rows for tests, made without the data pipeline: segments with images inside, and padding behind."""

import numpy as np


def packed_batch(rows, length, patches, slots, size, vocab, seed=0, sources=3):
    """A batch of random rows (NumPy): documents of text with images of `patches` positions inside, bidirectional."""
    r = np.random.default_rng(seed)
    batch = {
        name: np.zeros((rows, length), np.int32)
        for name in ("tokens", "targets", "segment_ids", "attend_until", "positions")
    }
    batch["tokens"] = r.integers(6, vocab, (rows, length)).astype(np.int32)
    batch["targets"] = r.integers(6, vocab, (rows, length)).astype(np.int32)
    batch["loss_mask"] = np.zeros((rows, length), np.float32)
    batch["image_index"] = np.full((rows, length), -1, np.int32)
    batch["images"] = r.integers(0, 256, (rows, slots, size, size, 3)).astype(np.uint8)
    batch["image_mask"] = np.zeros((rows, slots), bool)
    batch["source"] = r.integers(0, sources, (rows, length)).astype(np.int8)
    batch["attend_until"][:] = np.arange(length) + 1
    for b in range(rows):
        start, slot, end_of_row = 0, 0, length - int(r.integers(1, 4))
        segment = 1
        while start < end_of_row:
            stop = min(start + int(r.integers(patches + 3, 3 * patches + 6)), end_of_row)
            batch["segment_ids"][b, start:stop] = segment
            batch["positions"][b, start:stop] = np.arange(stop - start)
            batch["loss_mask"][b, start:stop] = 1
            place = start + int(r.integers(1, 3))
            if place + patches < stop and slot < slots:
                span = slice(place, place + patches)
                batch["attend_until"][b, span] = place + patches
                batch["image_index"][b, span] = slot * patches + np.arange(patches)
                batch["loss_mask"][b, place : place + patches - 1] = 0
                batch["image_mask"][b, slot] = True
                slot += 1
            start, segment = stop, segment + 1
    return batch
