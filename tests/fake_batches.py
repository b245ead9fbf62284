"""Batches that keep the contract of docs/architecture.md, made up instead of read."""

import numpy as np

from configs import loading


def tiny_config(**overrides):
    """A model of some ten thousand parameters in float32, and rows of 48 positions."""
    keys = {
        "steps": 20,
        "batch_rows": 8,
        "row_length": 48,
        "image.size": 8,
        "image.patch": 4,
        "image.positions": 4,
        "image.per_row": 2,
        "model.vocab_size": 64,
        "model.width": 32,
        "model.depth": 2,
        "model.heads": 4,
        "model.ffn_width": 64,
        "schedule.warmup": 2,
        "schedule.cooldown": 0,
        "log.progress": False,
        "log.tensorboard": False,
    }
    return loading.load("configs/quickstart.py", keys | {k.replace("__", "."): v for k, v in overrides.items()})


def fake_batch(config, seed=0):
    """Each row is a caption (image, then text), a text, and padding; rows differ in how much of each they have."""
    rng = np.random.default_rng(seed)
    B, S, P, I = config.batch_rows, config.row_length, config.image.positions, config.image.per_row
    size = config.image.size
    batch = {
        "tokens": np.zeros((B, S), np.int32),
        "targets": np.zeros((B, S), np.int32),
        "loss_mask": np.zeros((B, S), np.float32),
        "segment_ids": np.zeros((B, S), np.int32),
        "attend_until": np.tile(np.arange(1, S + 1, dtype=np.int32), (B, 1)),
        "positions": np.zeros((B, S), np.int32),
        "image_index": np.full((B, S), -1, np.int32),
        "images": np.zeros((B, I, size, size, 3), np.uint8),
        "image_mask": np.zeros((B, I), bool),
        "source": np.zeros((B, S), np.int8),
    }
    for b in range(B):
        at = 0
        for segment, (images, words) in enumerate([(1, rng.integers(3, 12)), (0, rng.integers(5, 20))], start=1):
            length = 1 + images * P + words
            row = slice(at, at + length)
            batch["tokens"][b, row] = rng.integers(6, config.model.vocab_size, length)
            batch["segment_ids"][b, row] = segment
            batch["positions"][b, row] = np.arange(length)
            batch["source"][b, row] = 0 if images else 2
            if images:
                span = slice(at + 1, at + 1 + P)
                batch["tokens"][b, span] = 3
                batch["image_index"][b, span] = np.arange(P)
                batch["attend_until"][b, span] = at + 1 + P
                batch["images"][b, 0] = rng.integers(0, 256, (size, size, 3))
                batch["image_mask"][b, 0] = True
            targets = np.append(batch["tokens"][b, at + 1 : at + length], 2)
            mask = targets != 3
            batch["targets"][b, row] = targets * mask
            batch["loss_mask"][b, row] = mask
            at += length
    return batch
