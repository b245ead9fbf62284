"""Tokens to the devices that hold their experts, and back: an all-to-all of unequal parts over one mesh axis.

Every device has rows sorted by expert; device p of the axis owns the experts [p * n, (p + 1) * n). What arrives is
sorted by expert again, and within an expert by where it came from, so nothing is sorted a second time:

    device 0 sends   [e0 e0 | e1 | e2 | e3 e3]        device 0 (e0, e1) receives   [e0 e0 e0'| e1 e1'e1']
    device 1 sends   [e0'| e1'e1'| e3']               device 1 (e2, e3) receives   [e2 | e3 e3 e3']

Called inside shard_map. `ragged` is XLA's own all-to-all of unequal parts, which not all devices have
(models/moe.lacks_ragged); `padded` gives the same rows by an all-to-all of equal parts that are long enough for all.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Plan(NamedTuple):
    """Of every device's rows for every expert; P devices on the axis, E experts in all. The same on all of them."""

    offsets: Int[Array, "P E"]  # where they begin among the sender's rows
    sizes: Int[Array, "P E"]  # how many travel
    starts: Int[Array, "P E"]  # where they begin in the owner's buffer


def make_plan(counts: Int[Array, "E"], capacity: int, axis: str) -> tuple[Plan, Int[Array, ""]]:
    """From this device's rows for each expert. What the owners' buffers of `capacity` rows have no room for stays.

    Returns:
      The plan, and how many of this device's rows stay.
    """
    counts = jax.lax.all_gather(counts, axis)
    devices, experts = counts.shape
    offsets = jnp.cumsum(counts, 1) - counts
    # The owner's buffer is ordered by (expert, sender).
    arriving = counts.reshape(devices, devices, -1).transpose(1, 2, 0).reshape(devices, -1)
    starts = jnp.cumsum(arriving, 1) - arriving
    sizes = jnp.clip(capacity - starts, 0, arriving)

    def by_sender(x: Array) -> Array:
        return x.reshape(devices, -1, devices).transpose(2, 0, 1).reshape(devices, experts)

    plan = Plan(offsets, by_sender(sizes), by_sender(jnp.minimum(starts, capacity)))
    return plan, (counts - plan.sizes)[jax.lax.axis_index(axis)].sum()


def received(plan: Plan, axis: str) -> Int[Array, "E/P"]:
    """Rows of each of this device's own experts."""
    return _own(plan.sizes, axis).sum(0)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def send(rows: Float[Array, "N D"], plan: Plan, capacity: int, transport: str, axis: str) -> Float[Array, "C D"]:
    """Rows to their experts' devices; the rest of the buffer is 0. Its gradient takes the way back."""
    return _move(rows, plan, capacity, transport, axis, back=False)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def send_back(rows: Float[Array, "C D"], plan: Plan, count: int, transport: str, axis: str) -> Float[Array, "N D"]:
    """The inverse: rows to where they came from, 0 for those that had stayed at home."""
    return _move(rows, plan, count, transport, axis, back=True)


def _send_forward(rows, plan, capacity, transport, axis):
    return send(rows, plan, capacity, transport, axis), (plan, rows.shape[0])


def _send_backward(capacity, transport, axis, saved, cotangent):
    return send_back(cotangent, saved[0], saved[1], transport, axis), None


def _back_forward(rows, plan, count, transport, axis):
    return send_back(rows, plan, count, transport, axis), (plan, rows.shape[0])


def _back_backward(count, transport, axis, saved, cotangent):
    return send(cotangent, saved[0], saved[1], transport, axis), None


send.defvjp(_send_forward, _send_backward)
send_back.defvjp(_back_forward, _back_backward)


def _move(rows, plan, length, transport, axis, *, back):
    mine = jax.lax.axis_index(axis)
    at_home = Plan(*(x[mine] for x in plan))  # by expert, so by peer and the peer's expert
    as_owner = Plan(*(_own(x, axis).reshape(-1) for x in plan))  # by peer and this device's own expert
    if back:
        pieces = as_owner.starts, as_owner.sizes, as_owner.offsets, at_home.sizes, at_home.offsets
    else:
        pieces = at_home.offsets, at_home.sizes, at_home.starts, as_owner.sizes, as_owner.starts
    out = jnp.zeros((length, rows.shape[1]), rows.dtype)
    return {"ragged": _ragged, "padded": _padded}[transport](rows, out, *pieces, axis)


def _ragged(rows, out, offsets, sizes, targets, arriving, places, axis):
    del places  # the senders say where a piece goes
    return jax.lax.ragged_all_to_all(rows, out, offsets, sizes, targets, arriving, axis_name=axis)


def _padded(rows, out, offsets, sizes, targets, arriving, places, axis):
    """Each peer's pieces, one after another, in a part that has room for all rows of a sender.

    Args, all by peer and piece [P * n]:
      offsets, sizes: where the pieces to be sent begin here, and their rows.
      arriving, places: rows of the pieces that come, and where they belong here.
    """
    del targets  # the receivers know
    peers, length = jax.lax.axis_size(axis), out.shape[0]
    part = min(rows.shape[0], length)  # neither sender nor receiver has more
    parts = jax.vmap(lambda starts, counts: _rows_of(starts, counts, part))(
        offsets.reshape(peers, -1), sizes.reshape(peers, -1)
    )
    sent = rows.at[parts].get(mode="fill", fill_value=0)
    got = jax.lax.all_to_all(sent, axis, 0, 0)
    landing = jax.vmap(lambda starts, counts: _rows_of(starts, counts, part))(
        places.reshape(peers, -1), arriving.reshape(peers, -1)
    )
    return out.at[landing.reshape(-1)].set(got.reshape(-1, rows.shape[1]), mode="drop")


def _rows_of(starts: Int[Array, "n"], counts: Int[Array, "n"], length: int) -> Int[Array, "length"]:
    """The rows of pieces [start, start + count), one piece after another; then rows that no array has."""
    ends = jnp.cumsum(counts)
    i = jnp.arange(length)
    piece = jnp.minimum(jnp.searchsorted(ends, i, side="right"), len(counts) - 1)
    row = starts[piece] + i - (ends - counts)[piece]
    return jnp.where(i < ends[-1], row, jnp.iinfo(jnp.int32).max)


def _own(x: Int[Array, "P E"], axis: str) -> Int[Array, "P E/P"]:
    """The columns of this device's own experts."""
    owned = x.shape[1] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * owned, owned, 1)
