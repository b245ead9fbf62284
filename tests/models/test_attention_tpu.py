"""Splash over intervals, interpreted, against a dense mask in float64; and which blocks its kernels read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from packed_rows import packed_batch

from nmm_jax.models import attention_tpu
from nmm_jax.models.attention import intervals
from nmm_jax.models.attention_tpu import block_of, rows_at_a_time, splash, visits
from tests.training_runs import passes_on_eight_devices

ROWS, LENGTH, BLOCK = 2, 389, 128  # 4 blocks, the last of them padded

interpreted = functools.partial(splash, interpret=True)


def mixture(seed=0):
    """Documents with images that see both ways, and padding."""
    batch = packed_batch(ROWS, LENGTH, patches=40, slots=4, size=4, vocab=50, seed=seed)
    return batch["segment_ids"], batch["attend_until"]


def causal():
    segments, until = mixture()
    return segments, np.broadcast_to(np.arange(LENGTH) + 1, until.shape)


def one_document(until):
    return np.ones((ROWS, LENGTH), np.int32), np.broadcast_to(until, (ROWS, LENGTH))


def short_documents():
    lengths = np.random.default_rng(0).integers(1, 4, LENGTH)
    return np.broadcast_to(np.repeat(np.arange(LENGTH), lengths)[:LENGTH], (ROWS, LENGTH)), causal()[1]


AT = np.arange(LENGTH)
MASKS = {
    "mixture": mixture,
    "other mixture": lambda: mixture(1),
    "images causal, as CogVLM's": causal,
    "one causal document": lambda: one_document(AT + 1),
    "a tower's images": lambda: one_document(np.full(LENGTH, LENGTH)),
    "a prefix": lambda: one_document(np.maximum(AT + 1, 150)),
    "anything ahead": lambda: one_document(np.random.default_rng(0).integers(AT + 1, LENGTH + 1)),
    "padding alone": lambda: (np.zeros((ROWS, LENGTH), np.int32), causal()[1]),
    "short documents": short_documents,
}


def dense(segments, until):
    """[B,S,S]"""
    return (segments[:, :, None] == segments[:, None]) & (np.arange(segments.shape[1]) < until[:, :, None])


def expected(q, k, v, mask, dout):
    """Output, dq, dk and dv in float64."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    repeats = q.shape[2] // k.shape[2]
    keys, values = (np.repeat(x, repeats, axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    scores = np.where(mask[:, None], np.einsum("bqhk,bshk->bhqs", q, keys) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bqhk,bshk->bhqs", dout, values)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dk, dv = np.einsum("bhqs,bqhk->bshk", ds, q), np.einsum("bhqs,bqhk->bshk", p, dout)
    of_group = (x.reshape(*x.shape[:2], -1, repeats, x.shape[3]).sum(3) for x in (dk, dv))
    return np.einsum("bhqs,bshk->bqhk", p, values), np.einsum("bhqs,bshk->bqhk", ds, keys), *of_group


def drawn(heads, groups, head_dim, rows=ROWS, length=LENGTH, dtype=jnp.float32):
    """q, k, v, and the output's gradient."""
    r = np.random.default_rng(0)
    return [jnp.asarray(r.normal(size=(rows, length, n, head_dim)), dtype) for n in (heads, groups, groups, heads)]


@jax.jit
def both_passes(q, k, v, dout, first, until):
    out, pull = jax.vjp(lambda *qkv: interpreted(*qkv, first, until), q, k, v)
    return out, *pull(dout)


def errors(found, wanted):
    """The largest, as parts of the largest value."""
    return [np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in zip(found, wanted, strict=True)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_tpu, "BLOCKS", (BLOCK,))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_values_and_gradients(mask):
    """Two query heads to a key-value head."""
    segments, until = mask()
    q, k, v, dout = drawn(4, 2, 24)
    found = both_passes(q, k, v, dout, *intervals(segments, until))
    assert max(errors(found, expected(q, k, v, dense(segments, until), dout))) < 1e-6


def test_bfloat16():
    """As dense attention of bfloat16: 3e-3 forward, 5e-3 the gradients, of the norm."""
    segments, until = mixture()
    q, k, v, dout = drawn(4, 2, 24, dtype=jnp.bfloat16)
    found = both_passes(q, k, v, dout, *intervals(segments, until))
    wanted = expected(q, k, v, dense(segments, until), dout)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(a, np.float64) - b) < 5e-3 * np.linalg.norm(b)


@pytest.mark.parametrize(("heads", "groups", "head_dim", "length"), [(3, 1, 50, 77), (2, 2, 202, 130)])
def test_shapes(heads, groups, head_dim, length):
    """Head dimensions that are no multiple of anything, rows shorter than a block, one key-value head for all."""
    segments, until = (x[:, :length] for x in mixture())
    q, k, v, dout = drawn(heads, groups, head_dim, length=length)
    mask = dense(segments, until)
    found = both_passes(q, k, v, dout, *intervals(segments, until))
    assert max(errors(found, expected(q, k, v, mask, dout))) < 1e-6


def test_some_rows_at_a_time(monkeypatch):
    """The same numbers, in 2 runs of 3 rows each."""
    first, until = intervals(*(np.concatenate([x(seed) for seed in range(3)]) for x in _fields(mixture)))
    q, k, v, dout = drawn(2, 1, 16, rows=6)

    def run():
        out, pull = jax.vjp(lambda *qkv: interpreted(*qkv, first, until), q, k, v)
        return out, *pull(dout)

    together = jax.jit(run)()
    monkeypatch.setattr(attention_tpu, "POSITIONS", 3 * 512)
    assert rows_at_a_time(6, 512) == 3
    for a, b in zip(jax.jit(lambda: run())(), together, strict=True):
        np.testing.assert_array_equal(a, b)


def _fields(mask):
    return (lambda seed: mask(seed)[0]), (lambda seed: mask(seed)[1])


def test_blocks_and_rows():
    assert [rows_at_a_time(*shape) for shape in ((8, 1024), (12, 1024), (7, 2048), (4, 32768))] == [8, 6, 1, 1]


def test_blocks_leave_little_padding(monkeypatch):
    monkeypatch.undo()
    lengths = {77: 128, 256: 256, 257: 384, 577: 640, 729: 384, 1024: 512, 1152: 384, 1536: 512, 4096: 512, 8192: 512}
    assert {length: block_of(length) for length in lengths} == lengths


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_visited_are_the_blocks_in_which_something_is_seen(mask):
    """No more and no fewer; and no other is loaded."""
    segments, until = (np.array(x) for x in mask())
    blocks = -(-LENGTH // BLOCK)
    padding = blocks * BLOCK - LENGTH
    segments = np.pad(segments, ((0, 0), (0, padding)), constant_values=-1)
    until = np.pad(until, ((0, 0), (0, padding)), constant_values=blocks * BLOCK)
    seen = dense(segments, until).reshape(ROWS, blocks, BLOCK, blocks, BLOCK).any((2, 4))

    found = visits(*intervals(segments, until), BLOCK)
    np.testing.assert_array_equal(found.multiplied, seen)
    for row, q in np.ndindex(ROWS, blocks):
        assert set(np.asarray(found.keys[row, q])) == set(np.flatnonzero(seen[row, q]))
    for row, n in np.ndindex(ROWS, blocks):
        first, *_, last = np.flatnonzero(seen[row, :, n]).repeat(2)
        loaded = set(np.asarray(found.queries[row, :, n]))
        assert loaded == set(range(first, last + 1))


@pytest.mark.parametrize("mask", ["mixture", "other mixture", "one causal document"])
def test_blocks_outside_are_not_read(mask):
    """NaN there reaches neither a block of queries (of keys and values) nor one of keys (of queries and gradients)."""
    segments, until = MASKS[mask]()
    first, until = intervals(segments, until)
    q, k, v, dout = drawn(4, 2, 24)
    clean = both_passes(q, k, v, dout, first, until)
    blocks = -(-LENGTH // BLOCK)
    padded = [np.pad(x, ((0, 0), (0, blocks * BLOCK - LENGTH)), mode="edge") for x in (first, until)]
    multiplied = np.asarray(visits(*map(jnp.asarray, padded), BLOCK).multiplied)
    assert 0 < multiplied.sum() < multiplied.size

    def poisoned(x, read):  # read: [B, blocks]
        return jnp.where(np.repeat(read, BLOCK, axis=1)[:, :LENGTH, None, None], x, jnp.nan)

    for block in range(blocks):
        own = slice(block * BLOCK, min((block + 1) * BLOCK, LENGTH))
        read = multiplied[:, block]
        found = both_passes(q, poisoned(k, read), poisoned(v, read), dout, first, until)
        for a, b in zip(found[:2], clean[:2], strict=True):
            np.testing.assert_array_equal(a[:, own], b[:, own])
        read = multiplied[:, :, block]
        found = both_passes(poisoned(q, read), k, v, poisoned(dout, read), first, until)
        for a, b in zip(found[2:], clean[2:], strict=True):
            np.testing.assert_array_equal(a[:, own], b[:, own])
        if not read.all():
            assert np.isnan(found[0]).any()


def test_on_eight_devices():
    """Rows and heads over replica, fsdp and tensor; and in a model whose layers are scanned and recomputed."""
    passes_on_eight_devices("attention_eight_devices.py", __file__)


@pytest.mark.parametrize(("kept", "kernels"), [((), 4), (("query", "key", "value", "attended"), 3)])
def test_the_forward_kernel_is_not_run_again_where_its_results_are_kept(kept, kernels):
    """Under model.remat = "full" and "minimal": forward, perhaps again, dq, dk and dv."""
    first, until = intervals(*mixture())
    policy = jax.checkpoint_policies.save_only_these_names(*kept)

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(q, k, v):
        q, k, v = (checkpoint_name(x, name) for x, name in zip((q, k, v), ("query", "key", "value"), strict=True))
        return jnp.sin(interpreted(q, k, v, first, until)).sum()

    program = jax.make_jaxpr(jax.grad(layer, (0, 1, 2)))(*drawn(2, 1, 16)[:3])
    assert str(program).count("pallas_call[") == kernels


def test_under_64_bits():
    """Which the kernels' compiler does not take (test_compile_attention_tpu.py): they have 32 all the same."""
    segments, until = mixture()
    q, k, v, dout = drawn(4, 2, 24)
    with jax.enable_x64(True):
        found = both_passes(q, k, v, dout, *intervals(segments.astype(np.int64), until.astype(np.int64)))
    assert max(errors(found, expected(q, k, v, dense(segments, until), dout))) < 1e-6
