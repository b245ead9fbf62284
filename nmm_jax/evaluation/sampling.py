"""Text from a model and a prompt of text and images: token by token, with a key-value cache."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.document import Document
from data_pipelines.geometry import Geometry
from data_pipelines.rows import build_documents
from data_pipelines.tokenizer import Tokenizer
from nmm_jax.evaluation.batching import fixed_batches, place, size_on
from nmm_jax.parallel.sharding import Constrain, replicated
from nmm_jax.training.checkpoints import Run


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # only among the k likeliest; 0: all
    top_p: float = 1.0  # only among the likeliest that together reach this probability (arXiv:1904.09751)

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature}; it must not be negative (0 is greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}; it must not be negative (0 is all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}; it must be above 0 and at most 1 (1 is all tokens)")


def writable(tokenizer: Tokenizer, vocab_size: int) -> Bool[np.ndarray, "V"]:
    """The tokens a model may write: text and EOS. Not the other special tokens, nor ids beyond the tokenizer's."""
    allowed = np.arange(vocab_size) < tokenizer.vocab_size
    specials = np.array([tokenizer.pad, tokenizer.bos, tokenizer.image, tokenizer.boi, tokenizer.eoi])
    allowed[specials[specials < vocab_size]] = False  # an imported model may have no room for all of them
    return allowed


def token_logits(
    hidden: Float[Array, "*b D"], unembedding: Float[Array, "D V"], allowed: Bool[Array, "V"]
) -> Float[Array, "*b V"]:
    """float32 logits; -inf where a token may not be written."""
    logits = jnp.matmul(hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return jnp.where(allowed, logits, -jnp.inf)


def choose(logits: Float[Array, "B V"], keys: Array, sampling: Sampling) -> Int[Array, "B"]:
    """The next token of each row, drawn with that row's key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, -1, descending=True)
        probabilities = jax.nn.softmax(ordered, -1)
        before = jnp.cumsum(probabilities, -1) - probabilities  # a token is kept if those above it fall short of top_p
        least = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


GREEDY = Sampling()


class Sampler:
    """Continues prompts, `rows` at a time. A prompt is a document whose EOS is still to come."""

    def __init__(self, run: Run, tokenizer: Tokenizer, rows: int = 1):
        self._run = run
        self._tokenizer = tokenizer
        self._geometry = Geometry.from_config(run.config)
        self._size = size_on(run.mesh, rows)
        allowed = jnp.asarray(writable(tokenizer, run.config.model.vocab_size))
        constrain = Constrain(run.mesh)

        def next_token(params: Any, hidden: Array, seeds: Array, step: Array, sampling: Sampling) -> Array:
            keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
            return choose(token_logits(hidden, run.language_model.unembedding(params), allowed), keys, sampling)

        def first(params: Any, batch: Any, seeds: Array, sampling: Sampling) -> tuple[Array, Array, Any]:
            """-> (next token, its place in the row, the cache of all places before it)."""
            hidden, cache = run.language_model.prefill(params, batch, constrain=constrain)
            at = (batch["segment_ids"] > 0).sum(1)
            before = jnp.take_along_axis(hidden, at[:, None, None] - 1, 1)[:, 0]
            return next_token(params, before, seeds, jnp.int32(0), sampling), at, cache

        def following(
            params: Any, token: Array, at: Array, cache: Any, seeds: Array, step: Array, sampling: Sampling
        ) -> tuple[Array, Array, Any]:
            hidden, cache = run.language_model.decode(params, token, at, cache, constrain=constrain)
            return next_token(params, hidden, seeds, step, sampling), at + 1, cache

        self._first = jax.jit(first, static_argnames="sampling")
        self._following = jax.jit(following, static_argnames="sampling", donate_argnames="cache")
        self._whole = jax.jit(lambda x: x, out_shardings=replicated(run.mesh))

    def stream(
        self, prompts: Sequence[Document], max_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[np.ndarray]:
        """The next token of every prompt, step by step: int32 [prompts], -1 for those that have ended.

        Prompt i is sampled with seed + i, so what is written does not depend on the other prompts.

        A prompt ends at EOS, which is not given out, at max_tokens, and where its row of `row_length` is full.

        Raises:
          ValueError: more prompts than rows, or a prompt that is longer than a row or has too many images.
        """
        if not 0 < len(prompts) <= self._size:
            raise ValueError(f"{len(prompts)} prompts for a sampler of {self._size} rows")
        filled = [prompts[min(i, len(prompts) - 1)] for i in range(self._size)]
        batch = build_documents(filled, self._tokenizer, self._geometry, append_eos=False)
        room = self._geometry.row_length - (batch["segment_ids"] > 0).sum(1)[: len(prompts)]

        params, seeds = self._run.params, (seed + np.arange(self._size)).astype(np.uint32)
        state = self._first(params, place(batch, self._run.mesh), seeds, sampling=sampling)
        ended = np.zeros(len(prompts), bool)
        for step in range(1, max_tokens + 1):
            tokens = np.asarray(self._whole(state[0]))[: len(prompts)]
            ended |= tokens == self._tokenizer.eos
            if ended.all():
                return
            yield np.where(ended, -1, tokens)
            ended |= room < step  # the token just given out has no place in its row, so nothing can follow it
            if ended.all() or step == max_tokens:
                return
            state = self._following(params, *state, seeds, np.int32(step), sampling=sampling)

    def generate(
        self,
        prompts: Sequence[Document],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        title: str = "",
    ) -> list[list[int]]:
        """The tokens written after each of any number of prompts; with a title, progress is shown."""
        written: list[list[int]] = []
        for chosen, real in fixed_batches(len(prompts), self._size, title):
            columns = list(
                self.stream([prompts[i] for i in chosen[:real]], max_tokens, sampling, seed + int(chosen[0]))
            )
            tokens = np.stack(columns, 1) if columns else np.empty((real, 0), np.int32)
            written += [[int(t) for t in row if t >= 0] for row in tokens]
        return written
