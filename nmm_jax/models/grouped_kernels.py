"""Grouped products by accelerator kernels: megablox on TPU. The contract is grouped_matmul's.

    sizes 3 1 0 4   ->   x [a a a b d d d d . .]  x  w [G,K,M]   ->   [aW0 aW0 aW0 bW1 dW3 dW3 dW3 dW3 0 0]

A kernel leaves the rows of no group as it found the memory, so they are masked here, in the output and in the rows'
gradient; XLA fuses that into whatever reads them. The weights' gradient of a group without rows is 0.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# What megablox may hold on chip, by the count in `_vmem`. The compiler's own limit is 16 MiB on v4, v5e and v5p.
VMEM_BYTES = 12 << 20
# megablox counts tiles with jnp.histogram, whose float32 edges go wrong beyond this many (JAX 0.10.2: at 5000).
MAX_ROW_TILES = 4096


def megablox(
    x: Float[Array, "N K"], w: Float[Array, "G K M"], sizes: Int[Array, "G"], interpret: bool = False
) -> Float[Array, "N M"]:
    """grouped_matmul by the TPU kernels of jax.experimental.pallas.ops.tpu.megablox.

    Accumulates in float32. N that no tile divides is padded, which copies x: buffers are best multiples of 512.

    Args:
      interpret: run on any backend, by JAX's own operations, slowly. For tests.
    """
    return _megablox(interpret, x, w, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _megablox(interpret, x, w, sizes):
    return _rows(x, w, sizes, interpret=interpret, transposed=False)


def _megablox_forward(interpret, x, w, sizes):
    return _megablox(interpret, x, w, sizes), (x, w, sizes)


def _megablox_backward(interpret, saved, dy):
    x, w, sizes = saved
    dx = _rows(dy, w, sizes, interpret=interpret, transposed=True)
    return dx, _weights(x, dy, w, sizes, interpret=interpret), None


_megablox.defvjp(_megablox_forward, _megablox_backward)


def _rows(x, w, sizes, *, interpret, transposed):
    """[N,K] x [G,K,M] -> [N,M], or [N,M] -> [N,K] with the matrices transposed in the kernel."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    (n, inner), outer = x.shape, w.shape[1 if transposed else 2]
    tiles = row_tiles(n, inner, outer, len(sizes), x.dtype.itemsize)
    with _precision(x, w):
        y = gmm(_pad(x, tiles[0]), w, sizes, x.dtype, tiles, transpose_rhs=transposed, interpret=interpret)
    return _mask(y[:n], sizes)


def _weights(x, dy, w, sizes, *, interpret):
    """[N,K], [N,M] -> [G,K,M]. The kernel masks the rows of other groups, and of none, in both operands."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = weight_tiles(len(x), *w.shape[1:], len(sizes), x.dtype.itemsize, w.dtype.itemsize)
    x, dy = _pad(x, tiles[0]), _pad(dy, tiles[0])
    with _precision(x, dy):
        return tgmm(x.T, dy, sizes, w.dtype, tiles, interpret=interpret)  # it transposes x back: no copy is left


def _mask(y, sizes):
    return jnp.where((jnp.arange(len(y)) < sizes.sum())[:, None], y, 0)


def _pad(x, tile):
    return jnp.pad(x, ((0, -len(x) % tile), (0, 0))) if len(x) % tile else x


def _precision(a, b):
    """jax_default_matmul_precision="highest" with bfloat16 operands is a MosaicError: "Bad lhs type"."""
    return jax.default_matmul_precision("default") if a.dtype == b.dtype == jnp.bfloat16 else nullcontext()


# Tiles are the cheapest of those that fit on chip, by the bytes that the kernel's grid moves and the rows that it
# multiplies for nothing: a tile of rows is visited once for each group in it, so that large ones suit large groups
# only. The speeds are v5p's: FLOP/s, bytes/s, and seconds for a step of the grid (0.35 us, Pallas' TPU pipelining
# guide). Of other chips, those on which moving bytes is dearer mean larger tiles, and the VMEM decides those anyway.
FLOPS, BYTES, STEP = 459e12, 2.77e12, 0.35e-6


@lru_cache
def row_tiles(n: int, inner: int, outer: int, groups: int, itemsize: int) -> tuple[int, int, int]:
    """Tiles of (rows, inner, outer) for [n,inner] x [groups,inner,outer] -> [n,outer]."""

    def cost(rows, i, o):
        visits, i_tiles, o_tiles = math.ceil(n / rows) + groups - 1, math.ceil(inner / i), math.ceil(outer / o)
        matrices = groups if i_tiles == 1 else visits  # a whole column of w stays for all of its group's rows
        moved = visits * rows * inner * o_tiles + matrices * inner * outer + visits * rows * outer
        return _seconds(visits * rows * i_tiles * i * o_tiles * o, moved * itemsize, visits * i_tiles * o_tiles)

    def vmem(rows, i, o):
        masked = 4 * i * (rows + o) if inner % i else 0
        return 2 * itemsize * (rows * i + i * o + rows * o) + 8 * rows * o + masked  # the sum so far, and a product

    return _cheapest(n, inner, outer, cost, vmem)


@lru_cache
def weight_tiles(n: int, inner: int, outer: int, groups: int, itemsize: int, out_itemsize: int) -> tuple[int, int, int]:
    """Tiles of (rows, inner, outer) for [n,inner] and [n,outer] -> [groups,inner,outer]."""

    def cost(rows, i, o):
        visits, i_tiles, o_tiles = math.ceil(n / rows) + groups - 1, math.ceil(inner / i), math.ceil(outer / o)
        moved = visits * rows * (inner * o_tiles + outer * i_tiles) * itemsize + groups * inner * outer * out_itemsize
        return _seconds(visits * rows * i_tiles * i * o_tiles * o, moved, visits * i_tiles * o_tiles)

    def vmem(rows, i, o):
        operands = (2 * itemsize + 4) * rows * (i + o) + itemsize * rows * i  # masked in float32; x transposed
        return operands + (2 * out_itemsize + 8) * i * o

    return _cheapest(n, inner, outer, cost, vmem)


def _seconds(products, moved, steps):
    return max(2 * products / FLOPS, moved / BYTES) + steps * STEP


def _cheapest(n, inner, outer, cost, vmem):
    tiles = [
        (rows, i, o)
        for rows in (128, 256, 512, 1024)
        for i in _widths(inner)
        for o in _widths(outer)
        if vmem(rows, i, o) <= VMEM_BYTES and n <= rows * MAX_ROW_TILES
    ]
    if not tiles:
        raise ValueError(f"megablox: no tiles for {n} rows of {inner} to {outer}; at most {1024 * MAX_ROW_TILES} rows")
    return min(tiles, key=lambda t: cost(*t))


def _widths(width) -> Iterable[int]:
    """The whole width, and the multiples of 128 that divide it (or any of these, where none does)."""
    divide = [t for t in range(128, min(width, 4096), 128) if width % t == 0]
    return [*(divide or [t for t in (256, 512, 1024) if t < width]), *([width] if width <= 4096 else [])]
