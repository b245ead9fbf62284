"""Grouped matrix product: rows sorted by group, each multiplied with its own group's matrix.

    sizes      3        1    0      4                 (rows of groups 0..3; 8 rows here, then rows of no group)
    x      [a a a] [b] [] [d d d d] [. .]    ->    y  [aW0 aW0 aW0] [bW1] [] [dW3 dW3 dW3 dW3] [0 0]

FLOPs are those of the rows that belong to a group, forward and backward, whatever the number of groups: nothing here
ever makes the [G, N, K] product that XLA's own ragged_dot is on CPU (8 times the FLOPs at 8 groups, 64 at 64, and for
the weights' gradient on TPU and GPU as well). `grouped_matmul` is the one place that picks an implementation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nmm_jax.models import grouped_kernels

IMPLEMENTATIONS = ("auto", "blocks", "megablox", "tokamax")

# Rows that are multiplied at a time in the "blocks" form: of each size as long as three quarters of a block are the
# group's, of the last what is left. Large ones occupy all cores. A step of configs/moe.py:quickstart-8e (groups of some
# 116 rows, two cores) has 1.06 times the speed of 256 and 48 alone.
BLOCKS = (256, 128, 48)


def grouped_matmul(
    x: Float[Array, "N K"],
    w: Float[Array, "G K M"],
    sizes: Int[Array, "G"],
    implementation: str = "auto",
    platform: str | None = None,
) -> Float[Array, "N M"]:
    """Row n of group g becomes x[n] @ w[g]; the rows past sum(sizes), of no group, become 0 and have gradient 0.

    Args:
      sizes: int32, rows of each group, in order. Their sum is at most N.
      implementation: "blocks" (any backend), "megablox" (TPU), "tokamax" (NVIDIA GPU) or "auto", by platform.
      platform: of the devices that will run it; None is JAX's default.
    """
    if implementation == "auto":
        platform = platform or jax.default_backend()
        implementation = {"tpu": "megablox", "gpu": "tokamax", "cuda": "tokamax"}.get(platform, "blocks")
    if implementation == "blocks":
        return _blocks(x, w, sizes)
    if implementation == "megablox":
        return grouped_kernels.megablox(x, w, sizes)
    if implementation == "tokamax":
        return grouped_kernels.tokamax(x, w, sizes)
    raise ValueError(f"model.moe.grouped_matmul = {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}")


@jax.custom_vjp
def _blocks(x, w, sizes):
    """A loop over groups, and in it one over blocks of the group's rows: each one plain product with its matrix."""
    return _product(x, w, sizes, transposed=False)


def _forward(x, w, sizes):
    return _blocks(x, w, sizes), (x, w, sizes)


def _backward(saved, dy):
    x, w, sizes = saved
    return _product(dy, w, sizes, transposed=True), _weight_gradient(x, dy, w, sizes), None


_blocks.defvjp(_forward, _backward)


def _product(x, w, sizes, *, transposed):
    """[N,K] x [G,K,M] -> [N,M], or [N,M] -> [N,K] with the matrices transposed."""
    contracted = 1 if transposed else 0

    def group(out, own):
        matrix, begin, end = own

        def visit(start, inside, out):
            rows = _rows(x, start, inside)
            product = jax.lax.dot_general(rows, matrix, (((1,), (contracted,)), ((), ())))
            kept = jnp.where(inside, product, _rows(out, start, inside))
            return jax.lax.dynamic_update_slice_in_dim(out, kept, start, 0)

        return _over_blocks(visit, out, begin, end, len(x)), None

    ends = jnp.cumsum(sizes)
    out = jnp.zeros((len(x), w.shape[2 - contracted]), x.dtype)
    return jax.lax.scan(group, out, (w, ends - sizes, ends))[0]


def _weight_gradient(x, dy, w, sizes):
    """[N,K], [N,M] -> [G,K,M]: the sum over each group's rows of the outer products, in float32."""

    def group(_, own):
        begin, end = own

        def visit(start, inside, so_far):
            rows, cotangents = (jnp.where(inside, _rows(a, start, inside), 0) for a in (x, dy))
            return so_far + jax.lax.dot_general(
                rows, cotangents, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        total = _over_blocks(visit, jnp.zeros(w.shape[1:], jnp.float32), begin, end, len(x))
        return None, total.astype(w.dtype)

    ends = jnp.cumsum(sizes)
    return jax.lax.scan(group, None, (ends - sizes, ends))[1]


def _over_blocks(visit, carry, begin, end, rows):
    """carry = visit(start, inside, carry) for each block of a group's rows, those from begin to end.

    start: the block's first row. inside: bool [block,1], which of its rows are the group's and in no block before.
    """
    for size, count in blocks_of(end - begin, rows):

        def body(i, carry, size=size, begin=begin):
            wanted = begin + i * size
            start = jnp.minimum(wanted, rows - size)  # a block at the end of all rows begins earlier
            at = start + jnp.arange(size)
            return visit(start, ((at >= wanted) & (at < end))[:, None], carry)

        carry, begin = jax.lax.fori_loop(0, count, body, carry), begin + count * size
    return carry


def blocks_of(group: Int[Array, "..."], rows: int) -> list[tuple[int, Int[Array, "..."]]]:
    """Rows of a block, and how many such blocks a group of so many of all `rows` is gone through in."""
    sizes = [size for size in BLOCKS if size <= rows] or [rows]
    found, left = [], jnp.asarray(group)
    for size in sizes:
        spare = size - 1 if size == sizes[-1] else size // 4
        count = jnp.maximum(left + spare, 0) // size
        found.append((size, count))
        left = left - count * size
    return found


def _rows(x, start, inside):
    return jax.lax.dynamic_slice_in_dim(x, start, len(inside))
