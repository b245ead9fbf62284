"""Attention over intervals: query q sees key k when both are in one segment and k < attend_until[q].

    position        0  1  2  3  4  5  6          keys seen       0 1 2 3 4 5 6
    what it is      a  [image ]  b |  c  d                   0   x . . . . . .
    segment_ids     1  1  1  1  1  2  2                      1   x x x x . . .
    attend_until    1  4  4  4  5  6  7                      2   x x x x . . .
                                                             3   x x x x . . .
    Text sees what went before it, a patch also the          4   x x x x x . .
    rest of its image. Other fillings of attend_until        5   . . . . . x .
    are other masks; nothing else encodes one.               6   . . . . . x x

Every position belongs to a segment (padding is segment 0 and sees itself), so no query is without a key.
`attention` is the one place that picks an implementation.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Queries whose scores exist at a time in the blocked form. On CPU (2 cores, S=1024) blocks of 64, 128, 256 and 512 took
# 0.54, 0.54, 0.46 and 0.49 s forward and backward; all at once 0.36 s, in memory that grows with the square of S.
BLOCK = 256


def attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    segment_ids: Int[Array, "B S"],
    attend_until: Int[Array, "B S"],
    implementation: str = "auto",
) -> Float[Array, "B S H K"]:
    """softmax(q k / sqrt(K)) v over each query's interval; each group of H / G query heads shares a key-value head.

    Args:
      implementation: "reference" (all scores at once, at least float32), "blocked" (scores of `BLOCK` queries at a
        time, recomputed in the backward pass) or "auto".
    """
    if implementation == "auto":
        implementation = "blocked"  # on every backend; rows of up to BLOCK positions are one block
    if implementation == "reference":
        return _reference(q, k, v, segment_ids, attend_until)
    if implementation == "blocked":
        return _blocked(q, k, v, segment_ids, attend_until)
    raise ValueError(f"model.attention = {implementation!r}; expected auto, reference or blocked")


def visible(
    query_segments: Int[Array, "B Q"], query_until: Int[Array, "B Q"], key_segments: Int[Array, "B S"]
) -> Bool[Array, "B Q S"]:
    """Which keys of its row each query sees."""
    keys = jnp.arange(key_segments.shape[1])
    return (query_segments[:, :, None] == key_segments[:, None, :]) & (keys < query_until[:, :, None])


def masked_attention(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Bool[Array, "B Q S"],
    accumulate: jnp.dtype = jnp.float32,
) -> Float[Array, "B Q H K"]:
    """Attention with an explicit mask; scores and softmax in `accumulate`, products of the inputs' own type.

    Heads before positions and the softmax's division last: on CPU half the time of einsum over "bqhk" (2 cores, JAX
    0.10.2, forward and backward of B=2, S=1024, 4 heads of 64: 0.43 s, against 0.75 s, and 0.97 s for
    jax.nn.dot_product_attention).
    """
    b, queries, heads, head_dim = q.shape
    groups = k.shape[2]
    q = (q * q.dtype.type(1 / math.sqrt(head_dim))).reshape(b, queries, groups, heads // groups, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(b, groups, -1, head_dim)  # the heads of a group side by side
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    scores = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=accumulate)
    scores = scores.reshape(b, groups, -1, queries, k.shape[2])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(accumulate).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1)[..., None]
    weights = weights.astype(v.dtype).reshape(b, groups, -1, k.shape[2])
    out = jnp.matmul(weights, v, preferred_element_type=accumulate)
    out = out.reshape(b, groups, -1, queries, head_dim) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(b, queries, heads, head_dim).astype(q.dtype)


def _reference(q, k, v, segment_ids, attend_until):
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    mask = visible(segment_ids, attend_until, segment_ids)
    exact = [x.astype(accumulate) for x in (q, k, v)]
    return masked_attention(exact[0], exact[1], exact[2], mask, accumulate).astype(q.dtype)


def _blocked(q, k, v, segment_ids, attend_until):
    b, s, heads, head_dim = q.shape
    block = min(BLOCK, s)
    padding = -s % block  # queries that see nothing, cut off again
    queries = [jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in (q, segment_ids, attend_until)]
    blocks = [jnp.moveaxis(x.reshape(b, -1, block, *x.shape[2:]), 1, 0) for x in queries]

    @partial(jax.checkpoint, prevent_cse=False)
    def attend(carry, query_block):
        q_block, segments, until = query_block
        return carry, masked_attention(q_block, k, v, visible(segments, until, segment_ids))

    _, out = jax.lax.scan(attend, None, tuple(blocks))
    return jnp.moveaxis(out, 0, 1).reshape(b, s + padding, heads, head_dim)[:, :s]
