"""Tiny untrained models to evaluate, and a tokenizer whose text and tokens are the same thing."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from configs import loading
from nmm_jax import models
from nmm_jax.evaluation.sampling import Sampler
from nmm_jax.parallel.mesh import make_mesh
from nmm_jax.parallel.sharding import param_shardings
from nmm_jax.training.checkpoints import Run


@dataclasses.dataclass(frozen=True)
class Letters:
    """One token a letter, a to z: every sequence of tokens is a text, and encodes to itself."""

    pad: int = 0
    bos: int = 1
    eos: int = 2
    image: int = 3
    boi: int = 4
    eoi: int = 5
    vocab_size: int = 32
    fingerprint: str = "letters"

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(c) - ord("a") + 6 for c in text], np.int32)

    def decode(self, ids) -> str:
        return "".join(chr(int(i) - 6 + ord("a")) for i in ids if i >= 6)


TINY = {
    "row_length": 40,
    "image.size": 8,
    "image.patch": 4,
    "image.positions": 4,
    "image.per_row": 2,
    "model.vocab_size": 48,  # more than the tokenizer has
    "model.width": 32,
    "model.heads": 2,
    "model.ffn_width": 64,
    "evaluation.batch_rows": 4,
}


@pytest.fixture(scope="session")
def letters():
    return Letters()


@pytest.fixture(scope="session")
def run():
    """An untrained model that has strong opinions: weights several times larger than at initialisation."""
    config = loading.load("configs/quickstart.py", TINY)
    mesh = make_mesh(config)
    model = models.build(config)
    shardings = param_shardings(model.abstract, model.logical_axes, mesh)
    params = jax.jit(
        lambda key: jax.tree.map(lambda w: 4 * w, model.init(key)),
        out_shardings=shardings,
    )(jax.random.key(3))
    return Run(config, model, params, 0, mesh)


@pytest.fixture(scope="session")
def sampler(run, letters):
    return Sampler(run, letters, rows=3)


@pytest.fixture(scope="session")
def noise():
    """noise(seed) -> a PNG of 8 by 8 random pixels."""

    def make(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return make
