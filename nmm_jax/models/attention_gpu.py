"""Attention over intervals on NVIDIA GPUs, forward and backward: query i sees the keys first[i] <= k < until[i].

Pallas kernels for Triton, over blocks of queries and of keys. A block that no interval reaches is not read, and one
inside the intervals of all its queries is not masked. Of two documents, the second with an image at 200-300:

    keys              0    64   128  192  256  320
    queries    0-63   m                                m  read and masked
              64-127  m    m                           .  read whole
             128-191       m    m                         not read
             192-255       m    .    m    m
             256-319       m    .    .    m
             320-383       m    .    .    .    m

There are three: the output; dq, a block of queries at a time; dk and dv, a block of keys at a time, which goes through
the query heads of its key-value head one after the other, so that nothing of H heads is left to be summed. There is no
[S,S] array, and q, k and v are neither copied nor padded in memory: what is beyond S or K is masked as it is loaded.

Nothing that is maintained does this (JAX 0.10.2, tokamax 0.0.12). jax.experimental.pallas.ops.gpu.attention knows
segments and a causal mask, and skips by the latter alone. cuDNN has masks of its own kinds, or a dense bias. tokamax
takes k_start and k_end, in private interfaces; forwards it skips by them, backwards it makes a dense mask of them
(Triton's kernel) or skips by causality alone (Mosaic's). By its own timings on H100 Mosaic's forward pass takes 0.6
times as long as Triton's; it could take the place of `_forward`: backwards, only its output and `lse` are needed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from nmm_jax.models.attention import ATTENDED
from nmm_jax.models.attention_gpu_tiles import Tiles, parts, refusal, tiles_of

# A score that no query sees, and what any is above: of a block in which a query sees nothing, the weights are then 0.
# (Were the maximum itself hidden, they would be 2 to the rounding of -1e30: infinite.)
HIDDEN, LOWEST = -1e30, -1e20

_MANY = 1 << 30  # positions


def triton(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    first: Int[Array, "B S"],
    until: Int[Array, "B S"],
    interpret: bool = False,
) -> Float[Array, "B S H K"]:
    """softmax(q k / sqrt(K)) v over each query's interval; each group of H / G query heads shares a key-value head.

    Args:
      q, k, v: float32 or bfloat16; K up to 320.
      first, until: first[i] <= i < until[i], first not decreasing within a row. Where until decreases within a row, the
        backward pass may read blocks that it need not.
      interpret: run on any backend, by JAX's own operations, slowly. For tests.

    Raises:
      ValueError: another type, wider heads, or JAX's default device is a GPU that cannot run this.
    """
    why = None if q.dtype in (jnp.float32, jnp.bfloat16) else f"takes float32 or bfloat16, not {q.dtype}"
    if why is None:
        device = jax.local_devices()[0]  # to compile for a GPU from a machine without one, it is none
        capability = getattr(device, "compute_capability", 9.0) if device.platform == "gpu" else 9.0
        why = refusal(float(capability), q.shape[3], q.dtype.itemsize)
    if why is not None:
        raise ValueError(f"model.attention = 'triton' {why}; 'blocked' runs everywhere")
    return _attend(interpret, q, k, v, first.astype(jnp.int32), until.astype(jnp.int32))


def supports(capability: float, head_dim: int) -> bool:
    """Whether GPUs of this compute capability can, in bfloat16."""
    return refusal(capability, head_dim, jnp.bfloat16.dtype.itemsize) is None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(interpret, q, k, v, first, until):
    return _forward(interpret, q, k, v, first, until)[0]


def _attend_forward(interpret, q, k, v, first, until):
    out, lse = _forward(interpret, q, k, v, first, until)
    out, lse = checkpoint_name(out, ATTENDED), checkpoint_name(lse, ATTENDED)
    return out, (q, k, v, first, until, out, lse)


def _attend_backward(interpret, saved, dout):
    q, k, v, first, until, out, lse = saved
    dq, delta = _gradient_of_queries(interpret, q, k, v, first, until, out, dout, lse)
    dk, dv = _gradient_of_keys(interpret, q, k, v, first, until, dout, lse, delta)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(interpret, q, k, v, first, until):
    """The output, and of each query log2 of the sum of 2 to the power of its scores, float32 [B,H,S]."""
    cut = _Cut.of("forward", q, k)
    (block_q, block_k), unit = cut.blocks, cut.unit

    def attention_forward(first_ref, until_ref, q_ref, k_ref, v_ref, out_ref, lse_ref):
        _, own = cut.positions(pl.program_id(0), block_q)
        q = cut.load(q_ref, slice(None), own)
        first, until = _load(first_ref, own), _load(until_ref, own)

        def visit(block, _, carry, masked):
            out, top, total = carry
            keys, inside = cut.positions(block, block_k, masked)
            rows = pl.ds(block * block_k, block_k)
            scores = _products(q, cut.load(k_ref, rows, inside))
            if masked:
                seen = (first[:, None] <= keys[None]) & (keys[None] < until[:, None])
                scores = jnp.where(seen, scores, HIDDEN)
            new = jnp.maximum(top, scores.max(1) * unit)
            weights = jnp.exp2(scores * unit - new[:, None])
            shrink = jnp.exp2(top - new)
            out = _add([x * shrink[:, None] for x in out], weights, cut.load(v_ref, rows, inside))
            return out, new, total * shrink + weights.sum(1)

        nothing = cut.zeros(block_q), jnp.full(block_q, LOWEST, jnp.float32), jnp.zeros(block_q, jnp.float32)
        blocks = blocks_of_keys(first, until, block_k, own)
        out, top, total = _over(blocks, visit, nothing)
        cut.store(out_ref, [x / total[:, None] for x in out], own)
        plgpu.store(lse_ref, top + jnp.log2(total), mask=own)

    b, s, heads, _ = q.shape
    lse = jax.ShapeDtypeStruct((b, heads, s), jnp.float32)
    return cut.run(
        attention_forward,
        [(first, cut.block_of_rows), (until, cut.block_of_rows)]
        + [(q, cut.block_of_queries), (k, cut.all_keys), (v, cut.all_keys)],
        [(q, cut.block_of_queries), (lse, cut.block_of_statistics)],
        interpret,
    )


def _gradient_of_queries(interpret, q, k, v, first, until, out, dout, lse):
    """dq; and of each query the sum of out * dout, float32 [B,H,S], which dk and dv need too."""
    cut = _Cut.of("dq", q, k)
    (block_q, block_k), unit = cut.blocks, cut.unit

    def attention_dq(first_ref, until_ref, q_ref, k_ref, v_ref, out_ref, dout_ref, lse_ref, dq_ref, delta_ref):
        _, own = cut.positions(pl.program_id(0), block_q)
        q, out, dout = (cut.load(ref, slice(None), own) for ref in (q_ref, out_ref, dout_ref))
        first, until, lse = (_load(ref, own) for ref in (first_ref, until_ref, lse_ref))
        delta = functools.reduce(jnp.add, ((x.astype(jnp.float32) * y).sum(1) for x, y in zip(out, dout, strict=True)))
        plgpu.store(delta_ref, delta, mask=own)

        def visit(block, _, dq, masked):
            keys, inside = cut.positions(block, block_k, masked)
            rows = pl.ds(block * block_k, block_k)
            k, v = (cut.load(ref, rows, inside) for ref in (k_ref, v_ref))
            scores = _products(q, k)
            if masked:
                seen = (first[:, None] <= keys[None]) & (keys[None] < until[:, None])
                scores = jnp.where(seen, scores, HIDDEN)
            weights = jnp.exp2(scores * unit - lse[:, None])
            return _add(dq, weights * (_products(dout, v) - delta[:, None]), k)

        dq = _over(blocks_of_keys(first, until, block_k, own), visit, cut.zeros(block_q))
        cut.store(dq_ref, [x * cut.scale for x in dq], own)

    return cut.run(
        attention_dq,
        [(first, cut.block_of_rows), (until, cut.block_of_rows)]
        + [(q, cut.block_of_queries), (k, cut.all_keys), (v, cut.all_keys)]
        + [(out, cut.block_of_queries), (dout, cut.block_of_queries), (lse, cut.block_of_statistics)],
        [(q, cut.block_of_queries), (lse, cut.block_of_statistics)],
        interpret,
    )


def _gradient_of_keys(interpret, q, k, v, first, until, dout, lse, delta):
    """dk and dv. Scores stand here as [keys, queries], so that both sums take their weights as they are."""
    cut = _Cut.of("dkv", q, k)
    (block_q, block_k), unit = cut.blocks, cut.unit

    def attention_dkv(
        blocks_ref, first_ref, until_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref
    ):
        keys, own = cut.positions(pl.program_id(0), block_k)
        k, v = (cut.load(ref, slice(None), own) for ref in (k_ref, v_ref))
        keys = keys[:, None]

        def visit(block, head, carry, masked):
            dk, dv = carry
            _, inside = cut.positions(block, block_q, masked)
            rows = pl.ds(block * block_q, block_q)
            q, dout = (cut.load(ref, (rows, head), inside) for ref in (q_ref, dout_ref))
            lse, delta = (_load(ref.at[head, rows], inside)[None] for ref in (lse_ref, delta_ref))
            scores = _products(k, q)
            if masked:
                first, until = (_load(ref.at[rows], inside)[None] for ref in (first_ref, until_ref))
                scores = jnp.where((first <= keys) & (keys < until), scores, HIDDEN)
            weights = jnp.exp2(scores * unit - lse)
            dv = _add(dv, weights, dout)
            return _add(dk, weights * (_products(v, dout) - delta), q), dv

        blocks = [blocks_ref[n] for n in range(4)]
        dk, dv = _over(blocks, visit, (cut.zeros(block_k), cut.zeros(block_k)), cut.heads_of_group)
        cut.store(dk_ref, [x * cut.scale for x in dk], own)
        cut.store(dv_ref, dv, own)

    return cut.run(
        attention_dkv,
        [(blocks_of_queries(first, until, cut.tiles), cut.bounds), (first, cut.all_rows), (until, cut.all_rows)]
        + [(q, cut.all_queries), (k, cut.block_of_keys), (v, cut.block_of_keys)]
        + [(dout, cut.all_queries), (lse, cut.all_statistics), (delta, cut.all_statistics)],
        [(k, cut.block_of_keys), (v, cut.block_of_keys)],
        interpret,
    )


# Which blocks are read: from start to stop; and of these the ones that need no mask: from inner to outer.


def blocks_of_keys(first: Int[Array, "Q"], until: Int[Array, "Q"], block: int, own: Array | None) -> Sequence[Array]:
    """(start, inner, outer, stop) of the blocks of keys that these queries see any of, and that they all see all of.

    Args:
      own: which of the queries exist; None: all of them.
    """

    def of_own(x, otherwise):
        return x if own is None else jnp.where(own, x, otherwise)

    start, stop = of_own(first, _MANY).min() // block, -(-of_own(until, 0).max() // block)
    inner = jnp.clip(-(-of_own(first, 0).max() // block), start, stop)
    return start, inner, jnp.clip(of_own(until, _MANY).min() // block, inner, stop), stop


def blocks_of_queries(first: Int[Array, "B S"], until: Int[Array, "B S"], tiles: Tiles) -> Int[Array, "B N 4"]:
    """The same for each block of keys: the blocks of queries that see any of it, and those that all see all of it."""
    s = first.shape[1]
    queries = jnp.arange(s, dtype=jnp.int32)
    begin = jnp.arange(0, s, tiles.keys, dtype=jnp.int32)[:, None]
    first, until = first[:, None], until[:, None]
    start = jnp.where(until > begin, queries, s).min(2) // tiles.queries
    stop = -(-jnp.where(first < begin + tiles.keys, queries + 1, 0).max(2) // tiles.queries)
    # Whole is the block to those after the last one that does not see it to its end, up to another segment's.
    inner = jnp.where((first <= begin) & (until < begin + tiles.keys), queries + 1, 0).max(2)
    inner = jnp.clip(-(-inner // tiles.queries), start, stop)
    outer = jnp.clip(jnp.where(first <= begin, queries + 1, 0).max(2) // tiles.queries, inner, stop)
    return jnp.stack([start, inner, outer, stop], axis=2)


def _over(blocks: Sequence[Array], visit: Callable[..., Any], carry: Any, heads: int = 1) -> Any:
    """visit(block, head, carry, masked) for all blocks and each head; (start, inner, outer, stop), whole ones first."""
    start, inner, outer, stop = blocks

    def loop(count, block, carry, masked):
        def step(n, carry):
            head, n = (jnp.int32(0), n) if heads == 1 else (jax.lax.div(n, count), jax.lax.rem(n, count))
            return visit(block(n), head, carry, masked)

        return jax.lax.fori_loop(0, count * heads, step, carry)

    carry = loop(outer - inner, lambda n: inner + n, carry, False)
    before = inner - start
    return loop(before + stop - outer, lambda n: jnp.where(n < before, start + n, outer + n - before), carry, True)


# How arrays are cut


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Which part of the arrays a program has, at (block, head, row) of the grid; heads are of queries or of keys."""

    tiles: Tiles
    shape: tuple[int, ...]  # B, S, H, K
    groups: int
    by_keys: bool

    @classmethod
    def of(cls, kernel: str, q: Array, k: Array) -> "_Cut":
        return cls(tiles_of(kernel, q.shape[3], q.dtype.itemsize), q.shape, k.shape[2], kernel == "dkv")

    @property
    def blocks(self) -> tuple[int, int]:
        return self.tiles.queries, self.tiles.keys

    @property
    def heads_of_group(self) -> int:
        return self.shape[2] // self.groups

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.shape[3])

    @property
    def unit(self) -> float:
        """From products to scores, as powers of two."""
        return self.scale * math.log2(math.e)

    def run(self, kernel: Callable[..., None], inputs: list, outputs: list, interpret: bool) -> Any:
        """Inputs are (array, spec), outputs (something of the same shape and type, spec)."""
        b, s, heads, _ = self.shape
        block, heads = (self.tiles.keys, self.groups) if self.by_keys else (self.tiles.queries, heads)
        return pl.pallas_call(
            kernel,
            grid=(pl.cdiv(s, block), heads, b),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in outputs],
            compiler_params=plgpu.CompilerParams(num_warps=self.tiles.warps, num_stages=self.tiles.stages),
            interpret=interpret,
        )(*(array for array, _ in inputs))

    # The specs below are of blocks that may reach beyond an array.

    @property
    def _width(self) -> int:
        return sum(width for _, width in parts(self.shape[3]))

    def _whole(self, block: int) -> int:
        return pl.cdiv(self.shape[1], block) * block

    @property
    def bounds(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0))

    @property
    def block_of_rows(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.tiles.queries), lambda i, h, b: (b, i))

    @property
    def block_of_queries(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.tiles.queries, None, self._width), lambda i, h, b: (b, i, h, 0))

    @property
    def block_of_statistics(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.tiles.queries), lambda i, h, b: (b, h, i))

    @property
    def all_keys(self) -> pl.BlockSpec:
        shape = (None, self._whole(self.tiles.keys), None, self._width)
        return pl.BlockSpec(shape, lambda i, h, b: (b, 0, h // self.heads_of_group, 0))

    @property
    def all_rows(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self._whole(self.tiles.queries)), lambda i, g, b: (b, 0))

    @property
    def block_of_keys(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.tiles.keys, None, self._width), lambda i, g, b: (b, i, g, 0))

    @property
    def all_queries(self) -> pl.BlockSpec:
        shape = (None, self._whole(self.tiles.queries), self.heads_of_group, self._width)
        return pl.BlockSpec(shape, lambda i, g, b: (b, 0, g, 0))

    @property
    def all_statistics(self) -> pl.BlockSpec:
        shape = (None, self.heads_of_group, self._whole(self.tiles.queries))
        return pl.BlockSpec(shape, lambda i, g, b: (b, g, 0))

    def positions(self, number: Array, block: int, masked: bool = True) -> tuple[Array, Array | None]:
        """Of a block, and which of them exist; None: all of them."""
        positions = number * block + jnp.arange(block, dtype=jnp.int32)
        return positions, positions < self.shape[1] if masked and self.shape[1] % block else None

    def _columns(self, inside: Array | None) -> list[tuple[Any, Array | None]]:
        """Of each part of a matrix its columns, and which of its elements exist."""
        found = []
        for start, width in parts(self.shape[3]):
            mask = None if inside is None else inside[:, None]
            if start + width > self.shape[3]:
                columns = (start + jnp.arange(width, dtype=jnp.int32) < self.shape[3])[None]
                mask = columns if mask is None else mask & columns
            found.append((pl.ds(start, width), mask))
        return found

    def load(self, ref: Any, rows: Any, inside: Array | None) -> list[Array]:
        """Of a matrix, as its parts, with zeros for what does not exist."""
        rows = rows if isinstance(rows, tuple) else (rows,)
        return [_load(ref.at[(*rows, columns)], mask) for columns, mask in self._columns(inside)]

    def store(self, ref: Any, values: list[Array], inside: Array | None) -> None:
        for (columns, mask), x in zip(self._columns(inside), values, strict=True):
            plgpu.store(ref.at[:, columns], x.astype(ref.dtype), mask=mask)

    def zeros(self, rows: int) -> list[Array]:
        return [jnp.zeros((rows, width), jnp.float32) for _, width in parts(self.shape[3])]


def _load(ref: Any, mask: Array | None) -> Array:
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _products(a: list[Array], b: list[Array]) -> Array:
    """a b^T, over all parts."""
    return functools.reduce(jnp.add, (plgpu.dot(x, y.T) for x, y in zip(a, b, strict=True)))


def _add(sums: list[Array], weights: Array, b: list[Array]) -> list[Array]:
    """sums + weights b, part by part; a product has one type."""
    return [total + plgpu.dot(weights.astype(x.dtype), x) for total, x in zip(sums, b, strict=True)]
