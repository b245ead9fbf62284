"""The kernels for NVIDIA GPUs, by JAX's own operations (interpret mode), against the dense reference; and compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import packed_batch

from nmm_jax.models import attention_gpu, attention_gpu_tiles
from nmm_jax.models.attention import attention, intervals
from nmm_jax.models.attention_gpu_tiles import TILES, Tiles, parts, refusal, shared_memory, tiles_of
from nmm_jax.parallel import gpu_targets

# Of the kernels here: several blocks in a short row, of other sizes in each kernel.
SMALL = {"forward": Tiles(32, 16, 4, 2), "dq": Tiles(16, 32, 4, 2), "dkv": Tiles(16, 32, 4, 2)}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_gpu, "tiles_of", lambda kernel, *_: SMALL[kernel])


def mixture(rows, length, seed=0):
    batch = packed_batch(rows, length, patches=21, slots=8, size=12, vocab=50, seed=seed)
    return batch["segment_ids"], batch["attend_until"]


def one_document(rows, length):
    return np.ones((rows, length), np.int32), np.tile(np.arange(1, length + 1, dtype=np.int32), (rows, 1))


def prefixes(rows, length):
    """Each document's first half sees itself both ways."""
    segments, until = mixture(rows, length)
    for b in range(rows):
        for segment in np.unique(segments[b]):
            (at,) = np.nonzero(segments[b] == segment)
            until[b, at[: len(at) // 2]] = at[0] + max(len(at) // 2, 1)
    return segments, np.maximum(until, np.arange(length, dtype=np.int32) + 1)


def anyhow(rows, length):
    """Intervals that end anywhere from a query on: until decreases now and then."""
    segments, _ = mixture(rows, length)
    end = np.stack([[np.nonzero(row == segment)[0][-1] + 1 for segment in row] for row in segments])
    at, r = np.arange(length), np.random.default_rng(0)
    return segments, (at + 1 + r.integers(0, end - at)).astype(np.int32)


MASKS = {"mixture": mixture, "one document": one_document, "prefixes": prefixes, "anyhow": anyhow}


def draw(mask, heads, groups, head_dim, dtype=np.float32):
    r = np.random.default_rng(1)
    shape = mask[0].shape
    return [
        jnp.asarray(r.normal(size=(*shape, n, head_dim)).astype(np.float32), dtype)
        for n in (heads, groups, groups, heads)
    ]


def both_passes(attend):
    @jax.jit
    def passes(q, k, v, dout, segments, until):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, segments, until), q, k, v)
        return out, *pull(dout)

    return passes


def kernels(q, k, v, segments, until):
    return attention_gpu.triton(q, k, v, *intervals(segments, until), interpret=True)


def expected(q, k, v, dout, *mask):
    exact = [x.astype(jnp.float32) for x in (q, k, v, dout)]
    with jax.default_matmul_precision("highest"):
        return both_passes(functools.partial(attention, implementation="reference"))(*exact, *mask)


CASES = {
    "mixture, groups of 2, K of one part, S odd": ("mixture", 101, 4, 2, 24),
    "one key-value head, K of two parts, S odd": ("prefixes", 83, 3, 1, 68),
    "blocks divide S and K": ("one document", 96, 2, 2, 16),
    "until decreases": ("anyhow", 90, 2, 1, 13),
}


@pytest.mark.parametrize(("mask", "length", "heads", "groups", "head_dim"), CASES.values(), ids=CASES)
def test_values_and_gradients(small_tiles, mask, length, heads, groups, head_dim):
    mask = MASKS[mask](2, length)
    inputs = draw(mask, heads, groups, head_dim)
    for found, want in zip(both_passes(kernels)(*inputs, *mask), expected(*inputs, *mask), strict=True):
        assert found.dtype == jnp.float32 and np.isfinite(found).all()
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def test_with_the_tiles_of_gpus_in_bfloat16():
    """To 1.5 times the errors that a dense softmax of bfloat16 has itself."""
    mask = mixture(1, 300, seed=3)
    inputs = draw(mask, 2, 1, 64, jnp.bfloat16)
    exact = expected(*inputs, *mask)
    for found, want in zip(both_passes(kernels)(*inputs, *mask), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(found, np.float32) - want) / np.linalg.norm(want)
        assert error < 5e-3, error


def test_within_rematerialised_scans_and_64_bit_mode(small_tiles):
    mask = mixture(1, 48)
    q, k, v, dout = draw(mask, 2, 1, 8)

    def layers(attend):
        def layer(x, _):
            return x + attend(x, k, v, *map(jnp.asarray, mask)), None

        return jax.jit(jax.grad(lambda q: (jax.lax.scan(jax.checkpoint(layer), q, length=2)[0] * dout).sum()))(q)

    want = layers(functools.partial(attention, implementation="reference"))
    with jax.enable_x64(True):
        found = layers(kernels)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


# Which blocks are read

blocks_of_queries = jax.jit(attention_gpu.blocks_of_queries, static_argnums=2)


def seen(segments, until):
    """bool [B,Q,K], by brute force."""
    keys = np.arange(segments.shape[1])
    return (segments[:, :, None] == segments[:, None]) & (keys < until[:, :, None])


def by_blocks(mask, queries, keys):
    """Whether any, and whether all, of a block of queries [B,Q] sees of a block of keys [N]: each bool [B,Q,N]."""
    b, s, _ = mask.shape
    bounds = [np.arange(0, s, n) for n in (queries, keys)]
    some, every = (
        np.logical_or.reduceat(np.logical_or.reduceat(m, bounds[0], axis=1), bounds[1], axis=2) for m in (mask, ~mask)
    )
    return some, some & ~every


def ranges(blocks, count):
    """(start to stop, inner to outer) of [..., 4] as bool [..., count]."""
    start, inner, outer, stop = np.moveaxis(np.asarray(blocks), -1, 0)[..., None]
    at = np.arange(count)
    assert ((start <= inner) & (inner <= outer) & (outer <= stop)).all()
    return (start <= at) & (at < stop), (inner <= at) & (at < outer)


SHAPES = {"equal": Tiles(16, 16, 4, 2), "more queries": Tiles(32, 16, 4, 2), "more keys": Tiles(16, 32, 4, 2)}


@pytest.mark.parametrize("tiles", [*SHAPES.values(), TILES["forward", 2][64]], ids=[*SHAPES, "of a GPU"])
@pytest.mark.parametrize("length", [253, 256])
def test_bounds_are_those_of_the_mask(length, tiles):
    rows = zip(mixture(4, length), one_document(1, length), prefixes(2, length), strict=True)
    segments, until = (np.concatenate(x) for x in rows)
    count = len(segments)
    first, until = intervals(jnp.asarray(segments), jnp.asarray(until))
    some, every = by_blocks(seen(segments, np.asarray(until)), tiles.queries, tiles.keys)
    if length % tiles.keys:
        every[:, :, -1] = False  # what is beyond S is masked
    queries, keys = some.shape[1:]

    padding = -length % tiles.queries
    blocks = [np.pad(x, ((0, 0), (0, padding))).reshape(count * queries, -1) for x in (first, until)]
    own = np.tile(np.arange(length + padding) < length, (count, 1)).reshape(count * queries, -1)
    of_keys = jax.jit(
        jax.vmap(lambda *block: jnp.stack(attention_gpu.blocks_of_keys(*block[:2], tiles.keys, block[2])))
    )
    read, whole = ranges(np.reshape(of_keys(*blocks, own), (count, queries, 4)), keys)
    np.testing.assert_array_equal(read, some)
    np.testing.assert_array_equal(whole, every)

    if length % tiles.queries:
        every[:, -1] = False
    read, whole = ranges(blocks_of_queries(first, until, tiles), queries)
    np.testing.assert_array_equal(read, some.swapaxes(1, 2))
    np.testing.assert_array_equal(whole, every.swapaxes(1, 2))


@pytest.mark.parametrize("length", [61, 64])
def test_bounds_where_until_decreases(length):
    """Nothing is left out, and nothing is left unmasked that is not seen."""
    tiles = Tiles(16, 8, 4, 2)
    segments, until = anyhow(3, length)
    some, every = by_blocks(seen(segments, until), tiles.queries, tiles.keys)
    mask = intervals(jnp.asarray(segments), jnp.asarray(until))
    read, whole = ranges(blocks_of_queries(*mask, tiles), some.shape[1])
    assert (read | ~some.swapaxes(1, 2)).all() and (every.swapaxes(1, 2) | ~whole).all()


def test_kernels_read_these_blocks_and_no_other(small_tiles, monkeypatch):
    """What is NaN in a block spreads to exactly the blocks that read it: row b has it in block b."""
    tiles = Tiles(16, 16, 4, 2)
    monkeypatch.setattr(attention_gpu, "tiles_of", lambda *_: tiles)
    blocks = 6
    mask = [np.repeat(x, blocks, axis=0) for x in mixture(1, 16 * blocks, seed=2)]
    (some, *_), _ = by_blocks(seen(*mask)[:1], 16, 16)
    assert 0 < some.sum() < blocks * (blocks + 1) / 2  # some of what is causal is left out
    q, k, v, dout = draw(mask, 4, 2, 16)
    poisoned = jnp.repeat(jnp.eye(blocks, dtype=bool), 16, axis=1)[:, :, None, None]

    def touched(x):
        nan = np.isnan(x).reshape(blocks, blocks, -1)
        assert (nan.all(2) == nan.any(2)).all()
        return nan.all(2)  # [poisoned block, block that has read it]

    passes = both_passes(kernels)
    out, dq, _, _ = passes(q, k, jnp.where(poisoned, jnp.nan, v), dout, *mask)
    np.testing.assert_array_equal(touched(out), some.T)
    np.testing.assert_array_equal(touched(dq), some.T)
    _, _, dk, dv = passes(q, k, v, jnp.where(poisoned, jnp.nan, dout), *mask)
    np.testing.assert_array_equal(touched(dk), some)
    np.testing.assert_array_equal(touched(dv), some)


# What they take


def test_head_dims_are_taken_as_powers_of_two():
    for head_dim in range(1, 321):
        taken = parts(head_dim)
        widths = [width for _, width in taken]
        assert all(width >= 16 and width & (width - 1) == 0 for width in widths)
        assert [start for start, _ in taken] == [0, *np.cumsum(widths)[:-1]] and sum(widths) >= head_dim
    taken = {k: [width for _, width in parts(k)] for k in (16, 50, 64, 68, 102, 128, 138, 164, 202, 320)}
    assert taken == {
        16: [16], 50: [64], 64: [64], 68: [64, 16], 102: [128], 128: [128], 138: [128, 16], 164: [128, 64],
        202: [256], 320: [256, 64],
    }  # fmt: skip


def test_gpus_that_cannot_run_it():
    assert all(attention_gpu.supports(9.0, k) for k in (13, 50, 64, 68, 102, 128, 138, 164, 202, 256, 320))
    assert all(attention_gpu.supports(c, 64) for c in (8.0, 8.6, 8.9, 10.0, 12.0))
    assert attention_gpu.supports(8.0, 128) and not attention_gpu.supports(8.9, 128)
    assert refusal(7.5, 64, 2) == "needs a GPU of compute capability 8.0 (Ampere) or more, not 7.5"
    assert refusal(9.0, 321, 2) == "takes heads of up to 320, not of 321"
    assert "bytes of shared memory for heads of 128; a GPU of 8.9 has 101,376" in refusal(8.9, 128, 2)


def test_what_it_refuses():
    mask = one_document(1, 16)
    with pytest.raises(ValueError, match="model.attention = 'triton' takes float32 or bfloat16, not float16"):
        attention_gpu.triton(*draw(mask, 1, 1, 8, jnp.float16)[:3], *mask)
    with jax.enable_x64(True), pytest.raises(ValueError, match="takes float32 or bfloat16, not float64"):
        attention_gpu.triton(*draw(mask, 1, 1, 8, jnp.float64)[:3], *mask)
    with pytest.raises(ValueError, match="model.attention = 'triton' takes heads of up to 320, not of 321"):
        attention_gpu.triton(*draw(mask, 1, 1, 321)[:3], *mask)


# Compiled for GPUs that are not there


def compiled(target, kernel, s, heads, groups, head_dim, dtype):
    """A kernel alone, or both passes."""
    place = jax.sharding.SingleDeviceSharding(gpu_targets.gpu_devices(target, 1, 1)[0])

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((2, *shape), dtype, sharding=place)

    q, k, interval = array(s, heads, head_dim), array(s, groups, head_dim), array(s, dtype=jnp.int32)
    numbers = array(heads, s, dtype=jnp.float32)

    def passes(q, k, v, dout, first, until):
        out, pull = jax.vjp(lambda *qkv: attention_gpu.triton(*qkv, first, until), q, k, v)
        return out, *pull(dout)

    function, *inputs = {
        "passes": (passes, q, k, k, q, interval, interval),
        "forward": (functools.partial(attention_gpu._forward, False), q, k, k, interval, interval),
        "dq": (
            functools.partial(attention_gpu._gradient_of_queries, False),
            *(q, k, k, interval, interval, q, q, numbers),
        ),
        "dkv": (
            functools.partial(attention_gpu._gradient_of_keys, False),
            *(q, k, k, interval, interval, q, numbers, numbers),
        ),
    }[kernel]
    return jax.jit(function).lower(*inputs).compile()


needs_plugin = pytest.mark.skipif(not gpu_targets.has_plugin(), reason="JAX's CUDA plugin is not installed")


@pytest.mark.extras
@needs_plugin
@pytest.mark.parametrize(("target", "head_dim"), [("h100", 64), ("h100", 128), ("h100", 51), ("h200", 128)])
@pytest.mark.parametrize("s", [1024, 4096])
def test_both_passes_compile_for_hopper(target, head_dim, s):
    """To three kernels, the bounds of one of them, and no memory beyond lse, delta and these bounds."""
    program = compiled(target, "passes", s, 8, 4, head_dim, jnp.bfloat16)
    text = program.as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
    assert not re.search(rf"\[(\d+,)*{s},(\d+,)*{s}[,\]]", text) and " dot(" not in text and "__cublas" not in text
    kept = 2 * 4 * (2 * 8 * s) + 2 * 4 * 4 * (s // 64)
    assert program.memory_analysis().temp_size_in_bytes <= kept + 8192


@pytest.mark.extras
@needs_plugin
@pytest.mark.parametrize(
    ("kernel", "itemsize", "head_dim"), [(*key, widest) for key, by_width in TILES.items() for widest in by_width]
)
def test_all_tiles_compile_for_hopper(kernel, itemsize, head_dim):
    """XLA refuses what takes more shared memory than the GPU has."""
    compiled("h100", kernel, 1000, 2, 1, head_dim - 1, {2: jnp.bfloat16, 4: jnp.float32}[itemsize])
    assert shared_memory(kernel, head_dim, itemsize) <= attention_gpu_tiles.SHARED_MEMORY[9.0] << 10
    assert tiles_of(kernel, head_dim - 1, itemsize) == TILES[kernel, itemsize][head_dim]
