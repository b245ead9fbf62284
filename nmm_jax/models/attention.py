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

    reference   all scores of a row at once, at least float32; what the others are tested against    anywhere
    blocked     the scores of BLOCK queries at a time and all keys; on CPU those of a window         anywhere
    splash      models/attention_tpu.py                                                              TPU
    triton      models/attention_gpu.py                                                              NVIDIA GPU
"""

import math
from collections.abc import Callable, Sequence
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

# Queries whose scores exist at a time in the blocked form. On CPU (2 cores, 4 heads of 64, rows of the 45/45/10
# mixture, both passes) blocks of 64, 128, 256, 512 and all took 0.53, 0.37, 0.32, 0.47 and 0.32 s at 8 x 1024, and
# 1.48, 0.89, 0.77, 0.85 and 3.91 s at 1 x 8192.
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
        return _blocked(q, k, v, segment_ids, attend_until, constrain.platform)
    kernel = _kernel(implementation, constrain.platform, q.dtype)
    first, until = intervals(segment_ids, attend_until)
    mesh = constrain.mesh
    if mesh is None or mesh.size == 1:
        return kernel(q, k, v, first, until)
    return _on_each_device(kernel, mesh, q, k, v, first, until)


def padding_alone(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """With a segment for each position of padding (0 before): it sees itself, and no block goes through the others."""
    at = jnp.arange(segment_ids.shape[1], dtype=segment_ids.dtype)
    return jnp.where(segment_ids == 0, -1 - at, segment_ids)


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


def _blocked(q, k, v, segment_ids, attend_until, platform):
    widths = tuple(window_widths(q.shape[1], platform))
    scaled = q * q.dtype.type(1 / math.sqrt(q.shape[3]))
    return _by_blocks(widths, scaled, k, v, *intervals(segment_ids, attend_until))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_blocks(widths, q, k, v, first, until):
    """The output, and the logarithms of the softmax's sums."""
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def of_window(width, start, q, first, until):
        k, v = (jax.lax.dynamic_slice_in_dim(x, start, width, 2) for x in (keys, values))
        scores = jnp.where(_seen(first, until, start, width), _scores(q, k), jnp.finfo(jnp.float32).min)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        out = _product(_flat(weights.astype(v.dtype)), v, 3, 2).reshape(q.shape) / total
        return out.astype(q.dtype), (largest + jnp.log(total))[..., 0]

    branches = [partial(of_window, width) for width in widths]

    def attend(_, own):
        (which, start), *queries = own
        return None, jax.lax.switch(which, branches, start, *queries)

    queries = _in_blocks(_by_group(q, k.shape[2]), 3), _in_blocks(first, 1), _in_blocks(until, 1)
    out, lse = jax.lax.scan(attend, None, (_windows(widths, first, until), *queries))[1]
    return _by_position(out, q.shape), lse


def _by_blocks_forward(widths, *arguments):
    # Called as it is, or a policy of remat that keeps products would see and keep those of all branches.
    out, lse = (checkpoint_name(x, ATTENDED) for x in _by_blocks(widths, *arguments))
    return (out, lse), (*arguments, out, lse)


def _by_blocks_backward(widths, saved, d_outputs):
    """Block by block as in FlashAttention (arXiv 2205.14135): of the forward pass the logarithms of the softmax's sums
    are kept, scores are made again, and each block adds to the gradients of its window's keys and values."""
    q, k, v, first, until, out, lse = saved
    d_out, _ = d_outputs
    groups = k.shape[2]
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)

    def of_window(width, start, d_out, inner, lse, q, first, until, d_k, d_v):
        k, v = (jax.lax.dynamic_slice_in_dim(x, start, width, 2) for x in (keys, values))
        weights = jnp.where(_seen(first, until, start, width), jnp.exp(_scores(q, k) - lse[..., None]), 0)
        d_weights = _product(_flat(d_out), v, 3, 3).reshape(weights.shape)
        d_scores = _flat((weights * (d_weights - inner)).astype(q.dtype))
        d_q = _product(d_scores, k, 3, 2).reshape(q.shape).astype(q.dtype)
        more = _product(_flat(q), d_scores, 2, 2), _product(_flat(d_out), _flat(weights.astype(q.dtype)), 2, 2)
        sums = (jax.lax.dynamic_slice_in_dim(x, start, width, 3) + own for x, own in zip((d_k, d_v), more, strict=True))
        return d_q, *map(partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=3), (d_k, d_v), sums)

    branches = [partial(of_window, width) for width in widths]

    def attend(so_far, own):
        (which, start), *queries = own
        d_q, *so_far = jax.lax.switch(which, branches, start, *queries, *so_far)
        return so_far, d_q

    of_queries = [_in_blocks(_by_group(x, groups), 3) for x in (d_out, inner)]
    of_queries += [lse, _in_blocks(_by_group(q, groups), 3), _in_blocks(first, 1), _in_blocks(until, 1)]
    b, s, g, d = k.shape
    zeros = [jnp.zeros((b, g, d, s), jnp.float32)] * 2
    (d_k, d_v), d_q = jax.lax.scan(attend, zeros, (_windows(widths, first, until), *of_queries))
    d_k, d_v = (x.transpose(0, 3, 1, 2).astype(k.dtype) for x in (d_k, d_v))
    return _by_position(d_q, q.shape), d_k, d_v, None, None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)


def _scores(q: Float[Array, "B G R Q K"], k: Float[Array, "B G W K"]) -> Float[Array, "B G R Q W"]:
    """float32."""
    return _product(_flat(q), k, 3, 3).reshape(*q.shape[:-1], k.shape[2])


def _product(x: Array, y: Array, of_x: int, of_y: int) -> Array:
    """Over these axes, batch and groups side by side, in float32."""
    return jax.lax.dot_general(x, y, (((of_x,), (of_y,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _flat(x: Array) -> Array:
    """[B,G,R,Q,...] as [B,G,R*Q,...]: the query heads that share a key."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _seen(first: Int[Array, "B Q"], until: Int[Array, "B Q"], start: Array, width: int) -> Bool[Array, "B 1 1 Q W"]:
    keys = start + jnp.arange(width)
    return ((first[..., None] <= keys) & (keys < until[..., None]))[:, None, None]


def _by_group(x: Float[Array, "B S H K"], groups: int) -> Float[Array, "B G R S K"]:
    return x.reshape(*x.shape[:2], groups, -1, x.shape[3]).transpose(0, 2, 3, 1, 4)


def _in_blocks(x: Array, axis: int) -> Array:
    """Positions in blocks, which come first; queries that fill up the last one are 0 and see nothing: 0 <= key < 0."""
    block = min(BLOCK, x.shape[axis])
    padded = jnp.pad(x, [(0, -x.shape[axis] % block if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(padded.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _by_position(blocks: Float[Array, "N B G R Q K"], shape: tuple[int, ...]) -> Float[Array, "B S H K"]:
    b, s, h, k = shape
    return blocks.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, h, k)[:, :s]


def window_widths(length: int, platform: str) -> list[int]:
    """Of the windows of keys that "blocked" has for a block of queries.

    On CPU 1, 2, 3, 4, 6, 8, 12, ... blocks, and all keys; elsewhere all: TPUs' compiler takes minutes for so many
    branches, and no accelerator has timed them.
    """
    blocks = -(-length // BLOCK) if platform == "cpu" else 1
    widths = {w * BLOCK for i in range(blocks.bit_length()) for w in (2**i, 3 * 2**i // 2) if w < blocks}
    return [*sorted(widths), length]


def _windows(
    widths: Sequence[int], first: Int[Array, "B S"], until: Int[Array, "B S"]
) -> tuple[Int[Array, "S/BLOCK"], Int[Array, "S/BLOCK"]]:
    """Of each block of queries: which width its window of keys has, and where it begins.

    It holds all that some row's queries see.
    """
    length = first.shape[1]
    if len(widths) == 1:  # all keys; devices that share a batch need not tell each other where their rows begin
        return (jnp.zeros(-(-length // BLOCK), jnp.int32),) * 2
    padding = ((0, 0), (0, -length % BLOCK))
    low = jnp.pad(first, padding, constant_values=length).reshape(len(first), -1, BLOCK).min((0, 2))
    high = jnp.pad(until, padding).reshape(len(until), -1, BLOCK).max((0, 2))
    which = jnp.searchsorted(jnp.array(widths), high - low).astype(jnp.int32)
    return which, jnp.minimum(low, length - jnp.array(widths)[which])
