"""Grouped products by accelerator kernels: megablox on TPU, tokamax on NVIDIA GPU. The contract is grouped_matmul's.

    sizes 3 1 0 4   ->   x [a a a b d d d d . .]  x  w [G,K,M]   ->   [aW0 aW0 aW0 bW1 dW3 dW3 dW3 dW3 0 0]

A kernel leaves the rows of no group as it found the memory, so they are masked here, in the output and in the rows'
gradient; XLA fuses that into whatever reads them. The weights' gradient of a group without rows is 0. Sums are float32.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def megablox(
    x: Float[Array, "N K"], w: Float[Array, "G K M"], sizes: Int[Array, "G"], interpret: bool = False
) -> Float[Array, "N M"]:
    """grouped_matmul by the TPU kernels of jax.experimental.pallas.ops.tpu.megablox.

    N that no tile of rows divides is padded, which copies x: buffers are best multiples of 512 rows.

    Args:
      interpret: run on any backend, by JAX's own operations, slowly. For tests.
    """
    return _grouped(*_megablox_kernels(interpret), x, w, sizes)


def tokamax(x: Float[Array, "N K"], w: Float[Array, "G K M"], sizes: Int[Array, "G"]) -> Float[Array, "N M"]:
    """grouped_matmul by tokamax's kernels for NVIDIA GPUs from Ampere on, and one of our own for w's gradient.

    Raises:
      ImportError: tokamax is not installed.
      NotImplementedError: JAX's default device is no such GPU. To compile for one from a machine without,
        `with tokamax.config.cross_compile(True)`.
    """
    return _grouped(_tokamax_rows, triton_weights, x, w, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(rows: Callable, weights: Callable, x, w, sizes):
    return _mask(rows(x, w, sizes, transposed=False), sizes)


def _forward(rows, weights, x, w, sizes):
    return _grouped(rows, weights, x, w, sizes), (x, w, sizes)


def _backward(rows, weights, saved, dy):
    x, w, sizes = saved
    return _mask(rows(dy, w, sizes, transposed=True), sizes), weights(x, dy, w, sizes), None


_grouped.defvjp(_forward, _backward)


def _mask(y, sizes):
    return jnp.where((jnp.arange(len(y)) < sizes.sum())[:, None], y, 0)


# TPU

# What megablox may hold on chip, as row_tiles and weight_tiles count it. The compiler's limit is 16 MiB on v4 and v5.
VMEM_BYTES = 12 << 20
# megablox counts tiles with jnp.histogram, whose float32 edges go wrong beyond this many (JAX 0.10.2: at 5000).
MAX_ROW_TILES = 4096


@lru_cache
def _megablox_kernels(interpret: bool) -> tuple[Callable, Callable]:
    """The same objects each time, so that JAX knows a function it has traced."""
    return partial(_megablox_rows, interpret=interpret), partial(_megablox_weights, interpret=interpret)


def _megablox_rows(x, w, sizes, *, interpret, transposed):
    """[N,K] x [G,K,M] -> [N,M], or [N,M] -> [N,K] with the matrices transposed in the kernel."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    (n, inner), outer = x.shape, w.shape[1 if transposed else 2]
    tiles = row_tiles(n, inner, outer, len(sizes), x.dtype.itemsize)
    with _precision(x, w):
        y = gmm(_pad(x, tiles[0]), w, sizes, x.dtype, tiles, transpose_rhs=transposed, interpret=interpret)
    return y[:n]


def _megablox_weights(x, dy, w, sizes, *, interpret):
    """[N,K], [N,M] -> [G,K,M]. The kernel masks the rows of other groups, and of none, in both operands."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = weight_tiles(len(x), *w.shape[1:], len(sizes), x.dtype.itemsize, w.dtype.itemsize)
    x, dy = _pad(x, tiles[0]), _pad(dy, tiles[0])
    with _precision(x, dy):
        return tgmm(x.T, dy, sizes, w.dtype, tiles, interpret=interpret)  # it transposes x back: no copy is left


def _pad(x, tile):
    return jnp.pad(x, ((0, -len(x) % tile), (0, 0))) if len(x) % tile else x


def _precision(a, b):
    """Of bfloat16 operands there is one precision; under "highest" Mosaic refuses them ("Bad lhs type")."""
    return jax.default_matmul_precision("default") if a.dtype == b.dtype == jnp.bfloat16 else nullcontext()


# Tiles are the cheapest of those that fit on chip, by the bytes that the kernel's grid moves and the rows that it
# multiplies for nothing: a tile of rows is visited once for each group in it, so that large ones suit large groups
# only. The speeds are v5p's FLOP/s and bytes/s; the seconds that a step of the grid costs are assumed. They compile for
# v4, v5e, v5p and v6e; no TPU has timed them.
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


# NVIDIA GPU

# tokamax has two kernels for rows x matrices. By the timings that it ships for H100, Triton's does some 650 TF/s and
# Mosaic's 430; but Triton's launches its whole grid once for every group, and an empty block takes 0.75 ns: the same as
# 29 of K for each group. So Mosaic's is used where K <= MOSAIC[generation] * G. With 24, that is the faster one of 27
# among the 29 shapes that both ran whole (the other two, K = 4096 and G = 128, lose 11 %); with 256, of B200's all 33.
MOSAIC = {9: 24, 10: 256}


def _tokamax_rows(x, w, sizes, *, transposed):
    """[N,K] x [G,K,M] -> [N,M], or [N,M] -> [N,K] with the matrices transposed (by XLA: no kernel does it)."""
    kernels = import_tokamax()
    contracted, outer = (2, 1) if transposed else (1, 2)
    inner, outer, groups = w.shape[contracted], w.shape[outer], len(sizes)
    capability = _capability()
    if x.dtype == w.dtype == jnp.bfloat16 and mosaic_is_faster(capability, groups, inner, outer):
        op = kernels.Mosaic(config=kernels.MosaicConfig(**mosaic_config(capability, outer)))
    else:
        op = kernels.Triton(config=kernels.TritonConfig(**triton_config(capability, groups <= 16, x.dtype.itemsize)))
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(([1], [contracted]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return op(
        x,
        w,
        group_sizes=sizes,
        ragged_dot_dimension_numbers=numbers,
        preferred_element_type=x.dtype,
        precision=_one_precision(x),
    )


def mosaic_is_faster(capability: float, groups: int, inner: int, outer: int) -> bool:
    """Whether to multiply by Mosaic's kernel, and whether it can: on Hopper it drops the last inner % 128 columns."""
    return inner <= MOSAIC.get(int(capability), 0) * groups and inner % 128 == outer % 128 == 0


# Configurations are given, not left to tokamax. It looks up tuned ones by the exact shape and device ("NVIDIA H200" has
# none) and falls back to 64x64 blocks; and those tuned for H100 with 768 inputs are wrong: in blocks of 512, its kernel
# multiplies the first 512 only. These won most often in its tables.


def mosaic_config(capability: float, outer: int) -> dict:
    if capability < 10:
        columns = next(n for n in (8 if outer > 2048 else 4, 4, 2, 1) if outer % (64 * n) == 0)
        return dict(block_m=128, block_n=64, block_k=128, num_stages=4, split_k=1, grid_block_n=columns)
    blackwell = dict(persistent=False, collective=True, grid_minor_dim=0, grid_tile_width=4)
    return dict(block_m=128, block_n=128, block_k=128, num_stages=2, split_k=1, **blackwell)


def triton_config(capability: float, large: bool, itemsize: int) -> dict:
    """Large blocks take 144 KB of shared memory, which consumer GPUs (8.6, 8.9, 12.0) lack."""
    if itemsize > 2:
        return dict(block_m=128, block_n=128, block_k=32, num_warps=4, num_stages=2)
    if large and capability in (8.0, 9.0, 10.0, 10.3):
        return dict(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3)
    return dict(block_m=128, block_n=128, block_k=32, num_warps=4, num_stages=4)


def triton_weights(x, dy, w, sizes, *, interpret=False):
    """[N,K], [N,M] -> [G,K,M] by a Pallas-Triton kernel, a block of one group's sum at a time.

    tokamax's, which this follows, is 3 to 6 times as fast on H100 as its Mosaic one, but of a group without rows it
    makes the product of those before it (or of what lies before x in memory): it always adds one last block of rows,
    masked by the rows' end only. Here the last block may be empty.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    (n, inner), outer, groups = x.shape, dy.shape[1], len(sizes)
    config = triton_config(_capability(), n >= 2048 * groups, x.dtype.itemsize)
    rows, block = config["block_k"], (config["block_m"], config["block_n"])
    ends = jnp.cumsum(sizes)

    def kernel(x_ref, dy_ref, start_ref, end_ref, dw_ref):
        first = [pl.program_id(axis) * size for axis, size in enumerate(block)]
        i, o = (pl.ds(*span) for span in zip(first, block, strict=True))
        # Where blocks divide the matrix nothing is masked but the last rows: masked loads may not be pipelined.
        own_i, own_o = (
            None if width % size == 0 else (at + jnp.arange(size))[None] < width
            for at, size, width in zip(first, block, (inner, outer), strict=True)
        )
        start, end = start_ref[...], end_ref[...]

        def both(a, b):
            return a & b if a is not None and b is not None else b if a is None else a

        def load(ref, mask):
            return plgpu.load(ref, mask=mask, other=None if mask is None else 0)

        def add(visit, total, masked=False):
            at = start + visit * rows
            own = (at + jnp.arange(rows) < end)[:, None] if masked else None
            a = load(x_ref.at[pl.ds(at, rows), i], both(own, own_i))
            b = load(dy_ref.at[pl.ds(at, rows), o], both(own, own_o))
            return total + plgpu.dot(a.T, b, precision=_one_precision(x))

        whole = (end - start) // rows
        total = jax.lax.fori_loop(0, whole, add, jnp.zeros(block, jnp.float32))
        total = add(whole, total, masked=True).astype(dw_ref.dtype)
        plgpu.store(dw_ref.at[i, o], total, mask=both(None if own_i is None else own_i.T, own_o))

    everything = [pl.BlockSpec(a.shape, lambda i, o, g: (0, 0)) for a in (x, dy)]
    of_group = pl.BlockSpec((None,), lambda i, o, g: (g,))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(w.shape, w.dtype),
        # A group's blocks together, for they read the same rows.
        grid=(pl.cdiv(inner, block[0]), pl.cdiv(outer, block[1]), groups),
        in_specs=[*everything, of_group, of_group],
        out_specs=pl.BlockSpec((None, inner, outer), lambda i, o, g: (g, 0, 0)),
        compiler_params=plgpu.CompilerParams(num_warps=config["num_warps"], num_stages=config["num_stages"]),
        interpret=interpret,
        name="grouped_weights",
    )(x, dy, ends - sizes, ends)


def _one_precision(x):
    return jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else None


def _capability() -> float:
    """Of the default device, as tokamax itself asks; 0 of what is no NVIDIA GPU."""
    return float(getattr(jax.extend.backend.get_default_device(), "compute_capability", 0))


def import_tokamax() -> SimpleNamespace:
    try:
        from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu, pallas_triton
    except ImportError as error:
        raise ImportError(
            "model.moe.grouped_matmul = 'tokamax' (which 'auto' is on NVIDIA GPUs) needs the package tokamax: "
            "pip install 'nmm_jax[gpu-kernels]', or set it to 'blocks'"
        ) from error
    from absl import flags

    if not flags.FLAGS.is_parsed():  # tokamax would parse the command line of whatever program this is
        flags.FLAGS.mark_as_parsed()
    return SimpleNamespace(
        Mosaic=pallas_mosaic_gpu.PallasMosaicGpuRaggedDot,
        MosaicConfig=pallas_mosaic_gpu.Config,
        Triton=pallas_triton.PallasTritonRaggedDot,
        TritonConfig=pallas_triton.Config,
    )
