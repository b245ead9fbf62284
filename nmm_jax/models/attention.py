"""Attention over intervals: query q sees key k when both are in one segment and k < attend_until[q].

    position        0  1  2  3  4  5  6          keys seen       0 1 2 3 4 5 6
    what it is      a  [image ]  b |  c  d                   0   x . . . . . .
    segment_ids     1  1  1  1  1  2  2                      1   x x x x . . .
    attend_until    1  4  4  4  5  6  7                      2   x x x x . . .
                                                             3   x x x x . . .
    Text sees what went before it, a patch also the          4   x x x x x . .
    rest of its image. Other fillings of attend_until        5   . . . . . x .
    are other masks; nothing else encodes one.               6   . . . . . x x

Every position belongs to a segment, whose positions lie side by side (padding is segment 0), and sees itself; so no
query is without a key. `attention` is the one place that picks an implementation. The kernels for accelerators know
only the interval of each query, `first` <= key < `until`, and go through the blocks of keys that some interval reaches:

    reference   all scores of a row at once, at least float32; what the others are tested against     anywhere
    blocked     the scores of BLOCK queries at a time and all keys                                     anywhere
    splash      models/attention_tpu.py                                                                TPU
    triton      models/attention_gpu.py                                                                NVIDIA GPU
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from nmm_jax.parallel.mesh import BATCH_AXES
from nmm_jax.parallel.sharding import ON_ONE_DEVICE, Constrain

IMPLEMENTATIONS = ("auto", "reference", "blocked", "splash", "triton")
KERNELS = {"splash": ("tpu",), "triton": ("gpu", "cuda")}  # and the platforms that run them

# Queries whose scores exist at a time in the blocked form. On CPU (2 cores, S=1024) blocks of 64, 128, 256 and 512 took
# 0.54, 0.54, 0.46 and 0.49 s forward and backward; all at once 0.36 s, in memory that grows with the square of S.
BLOCK = 256

# What model.remat = "minimal" keeps by this name (models/decoder.py): the output, and what else a kernel's backward
# pass has from its forward pass. Each implementation names it: named once more, it would be kept once more.
ATTENDED = "attended"

Kernel = Callable[..., Float[Array, "B S H K"]]  # (q, k, v, first, until)


def attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    segment_ids: Int[Array, "B S"],
    attend_until: Int[Array, "B S"],
    implementation: str = "auto",
    constrain: Constrain = ON_ONE_DEVICE,
) -> Float[Array, "B S H K"]:
    """softmax(q k / sqrt(K)) v over each query's interval; each group of H / G query heads shares a key-value head.

    Args:
      implementation: one of IMPLEMENTATIONS; "auto" is the kernel of the platform that will run it, else "blocked".
      constrain: its mesh tells that platform. Kernels run on each device's own rows and heads.

    Raises:
      ValueError: the platform does not run the implementation, or the kernel not the type.
    """
    if implementation == "auto":
        implementation = _automatic(constrain, q.shape[3])
    if implementation == "reference":
        return checkpoint_name(_reference(q, k, v, segment_ids, attend_until), ATTENDED)
    if implementation == "blocked":
        return checkpoint_name(_blocked(q, k, v, segment_ids, attend_until), ATTENDED)
    kernel = _kernel(implementation, constrain.platform, q.dtype)
    first, until = intervals(segment_ids, attend_until)
    mesh = constrain.mesh
    if mesh is None or mesh.size == 1:
        return kernel(q, k, v, first, until)
    return _on_each_device(kernel, mesh, q, k, v, first, until)


def intervals(
    segment_ids: Int[Array, "B S"], attend_until: Int[Array, "B S"]
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """The first key that each query sees, and the one behind the last; int32, both within the query's segment."""
    length = segment_ids.shape[1]
    at = jnp.arange(length, dtype=jnp.int32)
    ends = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    begins = jnp.roll(ends, 1, axis=1)
    first = jax.lax.cummax(jnp.where(begins, at, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, at + 1, length), axis=1, reverse=True)
    return first, jnp.minimum(attend_until.astype(jnp.int32), end)


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


def _automatic(constrain: Constrain, head_dim: int) -> str:
    if constrain.platform in KERNELS["splash"]:
        return "splash"
    if constrain.platform in KERNELS["triton"]:
        from nmm_jax.models import attention_gpu

        device = jax.local_devices()[0] if constrain.mesh is None else constrain.mesh.devices.flat[0]
        capability = getattr(device, "compute_capability", "")  # "9.0" of NVIDIA's, "gfx942" of AMD's
        is_number = capability.replace(".", "").isdecimal()
        return "triton" if is_number and attention_gpu.supports(float(capability), head_dim) else "blocked"
    return "blocked"


def _kernel(implementation: str, platform: str, dtype: jnp.dtype) -> Kernel:
    if implementation not in KERNELS:
        raise ValueError(f"model.attention = {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    if platform not in KERNELS[implementation]:
        raise ValueError(
            f"model.attention = {implementation!r} runs on {KERNELS[implementation][0]}, not on {platform}; 'auto' "
            "takes what does"
        )
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"model.attention = {implementation!r} takes float32 or bfloat16, not {dtype}")
    if implementation == "splash":
        from nmm_jax.models import attention_tpu

        return attention_tpu.splash
    from nmm_jax.models import attention_gpu

    return attention_gpu.triton


def _on_each_device(kernel: Kernel, mesh: Mesh, q, k, v, first, until):
    """With its own rows and heads. All of a few rows that do not divide, as of prompts."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows = BATCH_AXES if len(q) % parts == 0 else None
    heads, interval = PartitionSpec(rows, None, "tensor"), PartitionSpec(rows)
    # Manual over all axes: kernels have no partitioning rule, and XLA's partitioner crashes on partly manual ones.
    local = jax.shard_map(
        kernel, mesh=mesh, in_specs=(heads, heads, heads, interval, interval), out_specs=heads, check_vma=False
    )
    return local(q, k, v, first, until)


def _reference(q, k, v, segment_ids, attend_until):
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    mask = visible(segment_ids, attend_until, segment_ids)
    exact = [x.astype(accumulate) for x in (q, k, v)]
    return masked_attention(exact[0], exact[1], exact[2], mask, accumulate).astype(q.dtype)


def _blocked(q, k, v, segment_ids, attend_until):
    b, s, heads, head_dim = q.shape
    if s <= BLOCK:  # all of it is one block, whose scores need not be made again for the backward pass
        return masked_attention(q, k, v, visible(segment_ids, attend_until, segment_ids))
    block = BLOCK
    padding = -s % block  # queries that see nothing, cut off again
    queries = [jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in (q, segment_ids, attend_until)]
    blocks = [jnp.moveaxis(x.reshape(b, -1, block, *x.shape[2:]), 1, 0) for x in queries]

    @partial(jax.checkpoint, prevent_cse=False)
    def attend(carry, query_block):
        q_block, segments, until = query_block
        return carry, masked_attention(q_block, k, v, visible(segments, until, segment_ids))

    _, out = jax.lax.scan(attend, None, tuple(blocks))
    return jnp.moveaxis(out, 0, 1).reshape(b, s + padding, heads, head_dim)[:, :s]
