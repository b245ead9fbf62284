"""The vision tower on the image slots that are filled, and on few others.

    row 0   [a b . .]   row 1   [c d e f]   row 2   [. . . .]   row 3   [g . . .]       slots; . is empty
    sorted  [a b c d | e f g . | . . . . | . . . .]     filled first; parts of which only two are computed
    put back in place

Rows differ in how many images they have, so with fixed shapes a good part of the slots is empty. Each device sorts the
slots of the rows it has, and goes through them part by part until no device has a filled one left; the loader deals
out rows so that devices have about as many (data_pipelines/balance.py). benchmarks/image_slots.py counts what is empty.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from nmm_jax.parallel.mesh import BATCH_AXES
from nmm_jax.parallel.sharding import Constrain

# Each part gathers the tower's weights anew, so a part should have as many patches as make that worth it; but parts of
# more than a 16th of the slots are mostly empty where images are rare.
WORTH_IT = 4_096


def part_size(slots: int, patches: int) -> int:
    """Slots that a device goes through at a time, of all those it has."""
    return min(max(math.ceil(WORTH_IT / patches), math.ceil(slots / 32)), math.ceil(slots / 16))


def map_filled(
    encode: Callable[[UInt8[Array, "N height width 3"]], Float[Array, "N P D"]],
    images: UInt8[Array, "B I height width 3"],
    image_mask: Bool[Array, "B I"],
    patches: int,
    policy: Callable[..., bool],
    constrain: Constrain,
) -> tuple[Float[Array, "B I P D"], Int[Array, ""]]:
    """What `encode` makes of each slot's image, 0 in some of the empty ones; and how many slots it was computed for.

    Args:
      patches: of an image, that the tower computes.
      policy: what of a part is kept for the backward pass.
    """
    b, i = image_mask.shape
    devices = 1 if constrain.mesh is None else math.prod(constrain.mesh.shape[axis] for axis in BATCH_AXES)
    slots = b // devices * i
    part = part_size(slots, patches)
    filled = image_mask.reshape(devices, slots)
    images = constrain(images.reshape(devices, slots, *images.shape[2:]), ("batch",))
    order = jnp.argsort(~filled, axis=1, stable=True)
    place = jnp.argsort(order, axis=1)
    parts = math.ceil(slots / part)
    padded = jnp.pad(order, ((0, 0), (0, parts * part - slots)), mode="edge").reshape(devices, parts, part)
    most = filled.sum(1).max()  # the same number on all devices, so that they go through as many parts
    number = jnp.minimum(-(-most // part), parts)  # never more: it tells who counts turns in the compiled program

    def encoded(chosen: Int[Array, "devices part"], images: Array) -> Float[Array, "devices part P D"]:
        of_part = jnp.take_along_axis(images, chosen[:, :, None, None, None], axis=1)
        found = encode(constrain(of_part.reshape(-1, *images.shape[2:]), ("batch",)))
        return constrain(found.reshape(devices, part, *found.shape[1:]), ("batch",))

    chosen = padded.swapaxes(0, 1)
    encoded, weights = jax.closure_convert(encoded, chosen[0], images)
    encoded = jax.checkpoint(encoded, policy=policy, prevent_cse=False)
    found = _first_parts(encoded, number, chosen, images, weights)
    found = constrain(found.swapaxes(0, 1).reshape(devices, parts * part, *found.shape[3:]), ("batch",))
    found = jnp.take_along_axis(found, place[:, :, None, None], axis=1)
    computed = (number * part * devices).astype(jnp.int32)
    return constrain(found.reshape(b, i, *found.shape[2:]), ("batch",)), computed


# Loops of `number` turns, which JAX does not differentiate by itself. It would a scan of conditionals, but what those
# keep it fills with zeros for the parts that are skipped, and for each of them adds zeros to all gradients of weights.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _first_parts(encode, number, chosen, images, weights):
    """encode(chosen[n], images, *weights) of the parts n < number, 0 of the others."""

    def step(n, found):
        return _put(found, encode(chosen[n], images, *weights), n)

    shape = jax.eval_shape(encode, chosen[0], images, *weights)
    return jax.lax.fori_loop(0, number, step, _room(shape, len(chosen)))


def _first_parts_forward(encode, number, chosen, images, weights):
    number, chosen, images = number.value, chosen.value, images.value
    values = [w.value for w in weights]

    def of_part(n):
        return jax.vjp(encode, chosen[n], images, *values)

    found, pull = jax.eval_shape(of_part, 0)

    def step(n, so_far):
        found, pull = of_part(n)
        return _put(so_far, (found, pull.opaque_residuals), n)

    found, kept = jax.lax.fori_loop(0, number, step, _room((found, pull.opaque_residuals), len(chosen)))
    pull = dataclasses.replace(pull, args_res=[], opaque_residuals=kept)
    trained = [w.value if w.perturbed else None for w in weights]
    return found, (pull, number, chosen, images, values, trained)


def _first_parts_backward(encode, saved, d_found):
    pull, number, chosen, images, weights, trained = saved

    def step(n, sums):
        arguments = [chosen[n], images, *weights]  # what each part's backward pass reads of them is kept once
        of_part = dataclasses.replace(pull, args_res=arguments, opaque_residuals=[x[n] for x in pull.opaque_residuals])
        _, _, *more = of_part(d_found[n])
        return [None if x is None else x + y for x, y in zip(sums, more, strict=True)]

    zeros = jax.tree.map(jnp.zeros_like, trained)
    return None, None, None, jax.lax.fori_loop(0, number, step, zeros)


_first_parts.defvjp(_first_parts_forward, _first_parts_backward, symbolic_zeros=True)


def _room(of_part, parts: int):
    return jax.tree.map(lambda x: jnp.zeros((parts, *x.shape), x.dtype), of_part)


def _put(room, of_part, n):
    return jax.tree.map(lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, n, 0), room, of_part)
