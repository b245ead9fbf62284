"""Small AIM and AIMv2 models, and a batch of pairs for them: 9 patches of 2 by 2 pixels, texts of up to 8 tokens."""

import numpy as np
from ml_collections import ConfigDict

from configs.base import base

PATCHES, ROW, VOCABULARY = 9, 10, 40


def pixel_config(family: str, **overrides) -> ConfigDict:
    """Keys with "__" for "."."""
    c = base()
    c.row_length = ROW
    c.data.rows = "pairs"
    c.image.size, c.image.patch, c.image.positions, c.image.per_row = 6, 2, 0, 1
    c.model.family = family
    c.model.vocab_size = VOCABULARY
    c.model.width, c.model.depth, c.model.heads, c.model.ffn_width = 24, 2, 2, 32
    c.model.qk_norm = "none"
    c.model.init = "open_lm"
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.model.vision.width, c.model.vision.depth, c.model.vision.heads = 16, 2, 2
    c.model.vision.patch_bias = False
    c.model.vision.embedding_norm = "before_positions"
    c.model.aim.head_width, c.model.aim.head_depth = 12, 2
    if family == "aim":
        c.model.vision.ffn, c.model.vision.norm_eps, c.model.vision.positions = "gelu", 1e-6, "sincos"
    else:
        c.model.vision.norm, c.model.vision.ffn_width = "rmsnorm", 32
    for key, value in overrides.items():
        *groups, name = key.split("__")
        node = c
        for group in groups:
            node = node[group]
        node[name] = value
    return c


def pairs(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows BOS text EOS of texts of 3 tokens and more, each with an image of noise."""
    rng = np.random.default_rng(seed)
    batch = {
        "tokens": np.zeros((rows, ROW), np.int32),
        "targets": np.zeros((rows, ROW), np.int32),
        "loss_mask": np.zeros((rows, ROW), np.float32),
        "segment_ids": np.zeros((rows, ROW), np.int32),
        "attend_until": np.tile(np.arange(1, ROW + 1, dtype=np.int32), (rows, 1)),
        "positions": np.zeros((rows, ROW), np.int32),
        "image_index": np.full((rows, ROW), -1, np.int32),
        "images": rng.integers(0, 256, (rows, 1, 6, 6, 3), dtype=np.uint8),
        "image_mask": np.ones((rows, 1), bool),
        "source": np.zeros((rows, ROW), np.int8),
    }
    for b in range(rows):
        text = [1, *rng.integers(6, VOCABULARY, rng.integers(3, ROW - 1)), 2]
        n = len(text)
        batch["tokens"][b, :n] = text
        batch["targets"][b, : n - 1] = text[1:]
        batch["loss_mask"][b, : n - 1] = 1
        batch["segment_ids"][b, :n] = 1
        batch["positions"][b, :n] = np.arange(n)
    return batch
