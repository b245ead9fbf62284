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

# Rows that are multiplied at a time in the "blocks" form. Measured on one core, product and both gradients of 8,192
# rows of 256 to 704, as a multiple of one dense product: 8 groups 1.17, 64 groups 1.58; with blocks of 32 1.27 and
# 1.67, of 64 1.13 and 1.65, of 80 1.10 and 1.60.
BLOCK = 48


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
    """A loop over blocks of rows, as many as the groups fill: each one plain product with one group's matrix."""
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
    block, visits, blocks = _visits(sizes, x.shape[0])

    def visit(i, out):
        start, group, own = visits(i)
        rows = jax.lax.dynamic_slice_in_dim(x, start, block)
        matrix = jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
        product = jax.lax.dot_general(rows, matrix, (((1,), (contracted,)), ((), ())))
        before = jax.lax.dynamic_slice_in_dim(out, start, block)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(own, product, before), start, 0)

    return jax.lax.fori_loop(0, blocks, visit, jnp.zeros((x.shape[0], w.shape[2 - contracted]), x.dtype))


def _weight_gradient(x, dy, w, sizes):
    """[N,K], [N,M] -> [G,K,M]: the sum over each group's rows of the outer products."""
    block, visits, blocks = _visits(sizes, x.shape[0])

    def visit(i, dw):
        start, group, own = visits(i)
        rows, cotangents = (jnp.where(own, jax.lax.dynamic_slice_in_dim(a, start, block), 0) for a in (x, dy))
        outer = jax.lax.dot_general(rows, cotangents, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        so_far = jax.lax.dynamic_index_in_dim(dw, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw, so_far + outer, group, 0)

    return jax.lax.fori_loop(0, blocks, visit, jnp.zeros(w.shape, jnp.float32)).astype(w.dtype)


def _visits(sizes, rows):
    """Rows of a block; a function of the visit's number: its first row, its group, its rows that are the group's;
    and how many visits there are."""
    block = min(BLOCK, rows)
    ends = jnp.cumsum(sizes)
    count = -(-sizes // block)
    last = jnp.cumsum(count)
    i = jnp.arange(rows // block + len(sizes))  # as many as there can be
    groups = jnp.minimum(jnp.searchsorted(last, i, side="right"), len(sizes) - 1)
    wanted = (ends - sizes)[groups] + (i - (last - count)[groups]) * block
    starts = jnp.clip(wanted, 0, rows - block)  # a block at the end of all rows begins earlier

    def visit(i):
        own = starts[i] + jnp.arange(block)
        return starts[i], groups[i], ((own >= wanted[i]) & (own < ends[groups[i]]))[:, None]

    return block, visit, last[-1]
