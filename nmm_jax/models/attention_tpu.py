"""Attention over intervals on TPU: JAX's splash kernels, with blocks that are chosen on the device, row by row.

    position       0    1    2    3    4    5    6    7       an image at 3-5, and a second document
    first          0    0    0    0    0    0    6    6
    until          1    2    3    6    6    6    7    8
    blocks of 2   keys 0-1   2-3   4-5   6-7
    queries 0-1         x     .     .     .                   x  loaded, masked and multiplied
    queries 2-3         x     x     x     .                   .  neither loaded nor multiplied, in any of the kernels:
    queries 4-5         x     x     x     .                      forward; dq; dk and dv
    queries 6-7         .     .     .     x

Splash is made for masks that are known when a program is traced. But it finds the blocks to visit in arrays, which may
as well be computed from the batch; and where it asks whether the query at some place sees a key, the place is a number
from an array too, and may as well be `until`. A query's `first` is its segment's name. So no array has S x S values.

The rows of a batch are laid one behind the other, as one long row with all intervals within their part of it; the
kernels' grid is as wide as a part.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from nmm_jax.models.attention import ATTENDED

LANES = 128  # of a TPU; blocks are multiples of it

# Positions of a block of queries and of keys, the best first. No TPU has timed them. Counted for v5e and K = 128: the
# bundles of the compiled kernels (libtpu 0.0.42), or their products' cycles where these are more, times the visits in
# rows of the 45/45/10 mixture, with 0.35 us, assumed, for a block that is loaded, at least. Thousands of cycles a head
# and row, all three kernels; and what is visited of S^2 in blocks of 512, where a causal mask has 0.75, 0.56 and 0.53:
#
#   queries x keys   128x128   256x256   256x512   512x256   512x512   512x1024   1024x1024     visited
#   S = 1024             63      25.7      21.6      22.2      21.2       21.8       21.5          0.92
#   S = 4096            603       207       155       160       144        157        187          0.37
#   S = 8192           1893       592       405       411       341        360        424          0.19
BLOCKS = (512, 640, 384)

# Positions, of several rows, that one run of the kernels goes through. More take more memory, fewer more turns of a
# loop, whose copies nothing is fused with. MB besides arguments and results, compiled for v5e (forward and backward, 16
# heads of 128, bfloat16): of 8 rows of 1024 at once 174, one by one 45, under vmap 115, "blocked" 168; of 4 rows of
# 4096 336, 260, 296 and 537. It also bounds the tables of blocks, which lie in scalar memory.
POSITIONS = 8192


def splash(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    first: Int[Array, "B S"],
    until: Int[Array, "B S"],
    interpret: bool = False,
) -> Float[Array, "B S H K"]:
    """softmax(q k / sqrt(K)) v over first <= key < until; each group of H / G query heads shares a key-value head.

    Any S and K; products are with K rounded up to a multiple of 128, in the kernels.

    Args:
      first, until: int32, first[i] <= i < until[i]. Queries with the same `first` are a segment: no interval reaches
        beyond its own.
      interpret: run on any backend, by JAX's own operations, slowly. For tests.
    """
    length, head_dim = q.shape[1], q.shape[3]
    padding = -length % block_of(length)
    q = (q.astype(jnp.float32) / math.sqrt(head_dim)).astype(q.dtype)
    q, k, v = (_pad(x, padding) for x in (q, k, v))
    first, until = _pad(first, padding, length), _pad(until, padding, length + padding)  # a segment of its own
    return _attend(interpret, q, k, v, first, until)[:, :length]


def block_of(length: int) -> int:
    """Positions of a block: all of a short row, else those of BLOCKS that leave the least padding."""
    if length <= BLOCKS[0]:
        return math.ceil(length / LANES) * LANES
    return min(BLOCKS, key=lambda block: math.ceil(length / block) * block)


def rows_at_a_time(rows: int, length: int) -> int:
    """That one run of the kernels goes through: a divisor of rows."""
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * length <= POSITIONS))


def _pad(x, padding, value=0):
    return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=value)


class Visits(NamedTuple):
    """By block of queries and block of keys of a row: which are multiplied, and at each turn which is loaded.

    Where a kernel has nothing to multiply it keeps the block that comes next, or that was last.
    """

    multiplied: Bool[Array, "B Q N"]
    keys: Int[Array, "B Q N"]  # loaded for the queries
    queries: Int[Array, "B Q N"]  # loaded for the keys


def visits(first: Int[Array, "B S"], until: Int[Array, "B S"], block: int) -> Visits:
    """In blocks of so many queries and as many keys."""
    rows, length = first.shape
    blocks = length // block
    first, until = (x.reshape(rows, blocks, block) for x in (first, until))
    # Queries see themselves, so those of a block together leave no gap.
    lowest, highest = first.min(2)[..., None] // block, (until.max(2)[..., None] - 1) // block
    keys = jnp.arange(blocks, dtype=jnp.int32)
    queries = keys[:, None]
    multiplied = (lowest <= keys) & (keys <= highest)
    earliest = jnp.where(multiplied, queries, blocks).min(1, keepdims=True)
    latest = jnp.where(multiplied, queries, 0).max(1, keepdims=True)
    return Visits(multiplied, jnp.clip(keys, lowest, highest), jnp.clip(queries, earliest, latest))


# A derivative of our own: splash's keeps q, k and v a second time, as its kernels take them, and could not be told what
# _as_kernels_take_them says.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(interpret, q, k, v, first, until):
    return _in_parts(partial(_forward, interpret, False), q, k, v, first, until)[0]


def _attend_forward(interpret, q, k, v, first, until):
    out, lse = _in_parts(partial(_forward, interpret, True), q, k, v, first, until)
    out, lse = checkpoint_name(out, ATTENDED), checkpoint_name(lse, ATTENDED)
    return out, (q, k, v, first, until, out, lse)


def _attend_backward(interpret, saved, dout):
    return *_in_parts(partial(_backward, interpret), *saved, dout), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _in_parts(compute: Callable[..., tuple[Array, ...]], *arrays: Array) -> tuple[Array, ...]:
    """compute(*arrays), some rows at a time."""
    rows, length = arrays[0].shape[:2]
    part = rows_at_a_time(rows, length)
    with _as_kernels_take_them(arrays[0].dtype):
        if part == rows:
            return compute(*arrays)
        parts = tuple(x.reshape(-1, part, *x.shape[1:]) for x in arrays)
        found = jax.lax.map(lambda part: compute(*part), parts)
        return tuple(x.reshape(rows, *x.shape[2:]) for x in found)


@contextlib.contextmanager
def _as_kernels_take_them(dtype: Any) -> Iterator[None]:
    """Integers have 32 bits; bfloat16 has one precision, under "highest" Mosaic refuses it ("Bad lhs type")."""
    precision = jax.default_matmul_precision("default") if dtype == jnp.bfloat16 else contextlib.nullcontext()
    with jax.enable_x64(False), precision:
        yield


def _forward(interpret, with_lse, q, k, v, first, until):
    """out [R S H K] and, if asked for, lse [R H S], the logarithm of each query's sum of exponentials."""
    rows, length = first.shape
    mask = _mask(first, until)
    kernel = kernels.SplashAttentionKernel(
        mask.by_queries, None, None, mask_function=_sees, block_sizes=mask.sizes, save_residuals=with_lse,
        is_mqa=False, mask_value=kernels.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None, residual_checkpoint_name=None,
        interpret=interpret,
    )  # fmt: skip
    found: Any = kernel(*map(_one_row, (q, k, v)), mask.segments)
    if not with_lse:
        return (_rows(found, rows),)
    out, (lse,) = found
    return _rows(out, rows), lse.reshape(-1, rows, length).swapaxes(0, 1)


def _backward(interpret, q, k, v, first, until, out, lse, dout):
    """dq, dk and dv [R S H K]."""
    mask = _mask(first, until)
    q, k, v, out, dout = map(_one_row, (q, k, v, out, dout))
    lse = lse.swapaxes(0, 1).reshape(len(q), -1)
    found = kernels._splash_attention_bwd(
        mask_function=_sees, block_sizes=mask.sizes, save_residuals=False,
        is_mqa=False, mask_value=kernels.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None, residual_checkpoint_name=None,
        interpret=interpret, do=dout, res=(q, k, v, mask.segments, None, out, lse, mask.by_queries, mask.by_keys),
    )  # fmt: skip
    return tuple(_rows(gradient, len(first)) for gradient in found[3:6])


class Mask(NamedTuple):
    """As splash takes it."""

    by_queries: MaskInfo  # for the forward and the dq kernel
    by_keys: MaskInfo
    segments: kernels.SegmentIds
    sizes: kernels.BlockSizes


def _mask(first: Int[Array, "R S"], until: Int[Array, "R S"]) -> Mask:
    """Of rows that lie one behind the other."""
    rows, length = first.shape
    block = block_of(length)
    multiplied, keys, queries = visits(first, until, block)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    segments, places = ((x + row * length).reshape(-1) for x in (first, until))
    blocks_before = row[..., None] * (length // block)

    def below(x: Array) -> Array:  # [R Q N] -> [R*Q N]
        return x.reshape(-1, x.shape[2])

    def beside(x: Array) -> Array:  # [R Q N] -> [Q R*N]
        return x.swapaxes(0, 1).reshape(x.shape[1], -1)

    def info(laid: Callable[[Array], Array], loaded: Array) -> MaskInfo:
        tables: list[Any] = [laid(x).astype(jnp.int32)[None] for x in (loaded + blocks_before, multiplied)]
        of_queries: Any = places
        return MaskInfo(
            data_next=tables[0], mask_next=None, block_mask=tables[1], partial_mask_blocks=None, q_sequence=of_queries
        )

    sizes = kernels.BlockSizes(*(block,) * 8)
    return Mask(info(below, keys), info(beside, queries), kernels.SegmentIds(segments, segments), sizes)


def _sees(until: Array, key: Array) -> Array:
    return key < until


def _one_row(x: Float[Array, "R S H K"]) -> Float[Array, "H R*S K"]:
    return x.reshape(-1, *x.shape[2:]).swapaxes(0, 1)


def _rows(x: Float[Array, "H R*S K"], rows: int) -> Float[Array, "R S H K"]:
    return x.swapaxes(0, 1).reshape(rows, -1, x.shape[0], x.shape[2])
