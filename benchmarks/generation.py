"""Tokens a second of generation, against transformers' generate on the same weights.

    python -m benchmarks.generation --output=generation.json
    python -m benchmarks.generation --width=2048 --depth=16 --heads=16 --vocab=50432 --prompt=512 --tokens=256

A Llama with random weights is made by transformers, written as safetensors and read by our interop; both continue the
same prompts greedily, and in float32 what they write is the same before anything is timed. Ours is what
nmm_jax.generate runs (evaluation/sampling.py), compiled before. Prompts have one length, so that nobody pads.

    first       until the first token is on the host: the prompt's pass
    tokens/s    of all rows together, from the first to the last
"""

import contextlib
import importlib.util
import itertools
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks.rivals import Rival
from benchmarks.tables import table
from benchmarks.timing import PAUSE, origin, write

_WIDTH = flags.DEFINE_integer("width", 256, "D", lower_bound=8)
_DEPTH = flags.DEFINE_integer("depth", 4, "layers", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 4, "H", lower_bound=1)
_VOCAB = flags.DEFINE_integer("vocab", 8192, "V", lower_bound=300)
_PROMPT = flags.DEFINE_integer("prompt", 64, "tokens of a prompt", lower_bound=2)
_TOKENS = flags.DEFINE_integer("tokens", 64, "that are written, at most", lower_bound=2)
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "prompts that are continued together")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "of each, in turns, after one that is not counted", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")

COLUMNS = {
    "batch": ("prompts", "d"), "way": ("way", ""), "first_milliseconds": ("first ms", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"), "times_transformers": ("x transformers", ".2f"),
}  # fmt: skip

Measured = tuple[list[list[int]], float, float]  # what was written, seconds to the first token and behind it


def prompts(count: int, length: int) -> list[str]:
    """Of so many bytes, which are the tokens here."""
    rng = np.random.default_rng(0)
    return ["".join(map(chr, rng.integers(97, 123, length))) for _ in range(count)]


class Transformers:
    def __init__(self, folder: pathlib.Path, sizes: dict[str, int], dtype: str):
        """Writes the model, too."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from data_pipelines.tokenizer import ByteTokenizer

        self._torch, self._tokenizer = torch, ByteTokenizer()
        ids = {"bos_token_id": self._tokenizer.bos, "eos_token_id": self._tokenizer.eos}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, pad_token_id=self._tokenizer.pad, rms_norm_eps=1e-5))
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def generate(self, texts: list[str], tokens: int, forbidden: list[int]) -> Measured:
        ids = [[self._tokenizer.bos, *self._tokenizer.encode(text).tolist()] for text in texts]
        put = self._torch.tensor(ids, device=self._model.device)
        begun = self._run(put, 1, forbidden)[1]
        found, seconds = self._run(put, tokens, forbidden)
        stops = [list(itertools.takewhile(lambda t: t != self._tokenizer.eos, row)) for row in found]
        return stops, begun, seconds - begun

    def _run(self, ids: Any, tokens: int, forbidden: list[int]) -> tuple[list[list[int]], float]:
        began = time.perf_counter()
        with self._torch.inference_mode():
            found = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                suppress_tokens=forbidden,
            )
        written = found[:, ids.shape[1] :].tolist()
        return written, time.perf_counter() - began


class Ours:
    def __init__(self, folder: pathlib.Path):
        from data_pipelines.tokenizer import ByteTokenizer
        from nmm_jax import models
        from nmm_jax.interop import their_config
        from nmm_jax.interop.import_weights import load
        from nmm_jax.interop.tensors import Folder
        from nmm_jax.training.checkpoints import Run
        from nmm_jax.training.state import mesh_for

        source = their_config.read(folder)
        model = models.build(source.config)
        mesh = mesh_for(model)
        self._tokenizer = ByteTokenizer()
        self._run = Run(source.config, model, load(Folder(folder), source, model, mesh), 0, mesh)
        self._samplers: dict[int, Any] = {}

    def forbidden(self) -> list[int]:
        """Tokens that are never written."""
        from nmm_jax.evaluation.sampling import writable

        return np.flatnonzero(~writable(self._tokenizer, self._run.config.model.vocab_size)).tolist()

    def generate(self, texts: list[str], tokens: int) -> Measured:
        from data_pipelines.document import Document
        from nmm_jax.evaluation.sampling import Sampler

        if len(texts) not in self._samplers:
            self._samplers[len(texts)] = Sampler(self._run, self._tokenizer, len(texts))
        documents = [Document(str(i), "prompt", (text,)) for i, text in enumerate(texts)]
        began = time.perf_counter()
        steps = self._samplers[len(texts)].stream(documents, tokens)
        columns = [next(steps)]
        first = time.perf_counter() - began
        columns += steps
        behind = time.perf_counter() - began - first
        return [[int(t) for t in row if t >= 0] for row in np.stack(columns, 1)], first, behind


def measure(batch: int, dtype: str, ours: Rival, theirs: Rival) -> list[dict[str, Any]]:
    texts, forbidden = prompts(batch, _PROMPT.value - 1), ours("forbidden")
    ways = {
        "nmm_jax": lambda: ours("generate", texts, _TOKENS.value),
        "transformers": lambda: theirs("generate", texts, _TOKENS.value, forbidden),
    }
    written = {way: run()[0] for way, run in ways.items()}
    if dtype == "float32":
        same(written["transformers"], written["nmm_jax"])
    found: dict[str, list[Measured]] = {way: [] for way in ways}
    for _ in range(_ROUNDS.value):
        for way, run in ways.items():
            time.sleep(PAUSE)
            found[way].append(run())
    return [
        {
            "batch": batch,
            "way": way,
            "first_milliseconds": 1e3 * statistics.median(first for _, first, _ in found[way]),
            "tokens_per_second": statistics.median(map(rate, found[way])),
            "times_transformers": statistics.median(
                rate(a) / rate(b) for a, b in zip(found[way], found["transformers"], strict=True)
            )
            if way == "nmm_jax"
            else None,
            "seconds": [(first, behind) for _, first, behind in found[way]],
        }
        for way in ways
    ]


def rate(measured: Measured) -> float:
    """Tokens a second behind the first one; a row that ends early ends none of the others."""
    written, _, behind = measured
    return len(written) * (max(map(len, written)) - 1) / behind


def same(expected: list[list[int]], found: list[list[int]]) -> None:
    """Who writes something else is no rival."""
    for row, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        if theirs != ours:
            raise ValueError(f"prompt {row}: transformers writes {theirs[:8]}..., nmm_jax {ours[:8]}...")


def main(_):
    if importlib.util.find_spec("transformers") is None:
        print("not measured here: transformers is not installed: `make .venv-all/ready`, then .venv-all/bin/python")
        return
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    sizes = dict(
        vocab_size=_VOCAB.value,
        hidden_size=_WIDTH.value,
        num_hidden_layers=_DEPTH.value,
        num_attention_heads=_HEADS.value,
        intermediate_size=-(-int(8 * _WIDTH.value / 3) // 256) * 256,
        max_position_embeddings=_PROMPT.value + _TOKENS.value,
    )
    rows = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = pathlib.Path(scratch)
        theirs = stack.enter_context(Rival(Transformers, folder, sizes, dtype))
        ours = stack.enter_context(Rival(Ours, folder))
        for batch in map(int, _BATCHES.value):
            rows += measure(batch, dtype, ours, theirs)
    print(
        f"{jax.devices()[0].device_kind}, {dtype}: width {_WIDTH.value}, {_DEPTH.value} layers, "
        f"{_PROMPT.value} tokens, then {_TOKENS.value}\n\n{table(rows, COLUMNS)}"
    )
    if _OUTPUT.value:
        record = {"sizes": sizes, "dtype": dtype, "prompt": _PROMPT.value, "tokens": _TOKENS.value, "ways": rows}
        write(_OUTPUT.value, record | origin(("jax", "jaxlib", "torch", "transformers")))


if __name__ == "__main__":
    app.run(main)
