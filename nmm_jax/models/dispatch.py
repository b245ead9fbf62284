"""The one dispatch: sort tokens by group, compute group by group, put back.

    group of each token      1 0 1 - 0          order    1 4 0 2 3     (- is of no group: it sorts last)
    rows, sorted             [t1 t4] [t0 t2] t3     sizes    2 2
    put back                 t0 t1 t2 t3 t4     t3 gets 0

A learned router, a fixed modality label, or both choose the group. With k choices a token has k rows. Forward and
backward are gathers: the inverse permutation is kept, so nothing is scattered.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Order(NamedTuple):
    """Where the rows of N = T * k (token, choice) pairs go. The buffer has room for C of them, N unless bounded."""

    source: Int[Array, "C"]  # the pair, token * k + choice, in each row of the buffer
    place: Int[Array, "T k"]  # the row of each pair; those from C on did not find room
    sizes: Int[Array, "G"]  # rows of each group that did


def sort_by_group(groups: Int[Array, "T k"], num_groups: int, capacity: int | None = None) -> Order:
    """Stable: tokens keep their order within a group.

    Args:
      groups: of each (token, choice) pair; num_groups is none.
      capacity: rows of the buffer, at most T * k (None: all). What does not fit is cut from the last groups.
    """
    flat = groups.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    place = jnp.argsort(order)
    counts = count_groups(flat, num_groups)
    capacity = flat.size if capacity is None else min(capacity, flat.size)
    ends = jnp.minimum(jnp.cumsum(counts), capacity)
    sizes = jnp.diff(ends, prepend=0).astype(jnp.int32)
    return Order(order[:capacity].astype(jnp.int32), place.reshape(groups.shape).astype(jnp.int32), sizes)


def count_groups(groups: Int[Array, "N"], num_groups: int) -> Int[Array, "G"]:
    """Members of each group. By comparison, not by scatter: that is slow on accelerators."""
    return (groups[:, None] == jnp.arange(num_groups)).sum(0, dtype=jnp.int32)


@jax.custom_vjp
def to_groups(x: Float[Array, "T D"], order: Order) -> Float[Array, "C D"]:
    """Each row of the buffer its token."""
    return x[order.source // order.place.shape[1]]


@jax.custom_vjp
def from_groups(rows: Float[Array, "C D"], order: Order) -> Float[Array, "T k D"]:
    """Each (token, choice) pair its row; 0 where it found no room."""
    return rows.at[order.place].get(mode="fill", fill_value=0)


def _to_groups_backward(order: Order, cotangent: Float[Array, "C D"]):
    return from_groups(cotangent, order).sum(1), None


def _from_groups_backward(order: Order, cotangent: Float[Array, "T k D"]):
    return cotangent.reshape(-1, cotangent.shape[-1])[order.source], None


to_groups.defvjp(lambda x, order: (to_groups(x, order), order), _to_groups_backward)
from_groups.defvjp(lambda rows, order: (from_groups(rows, order), order), _from_groups_backward)
