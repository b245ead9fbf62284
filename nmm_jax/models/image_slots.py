"""The vision tower on the image slots that are filled, and on few others.

    row 0   [a b . .]   row 1   [c d e f]   row 2   [. . . .]   row 3   [g . . .]       slots; . is empty
    sorted  [a b c d | e f g . | . . . . | . . . .]     filled first; parts of which only two are computed
    put back in place

Rows differ in how many images they have, so with fixed shapes a good part of the slots is empty. Each device sorts the
slots of the rows it has, and goes through them part by part until no device has a filled one left; the loader deals
out rows so that devices have about as many (data_pipelines/balance.py). benchmarks/image_slots.py counts what is empty.
"""

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
      policy: what of a part is kept for the backward pass. (Left to itself the conditional keeps what it reads too: a
        copy of the tower's weights for every part.)
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
    most = filled.sum(1).max()  # the same number on all devices, so that they take the same branch below

    def encoded(chosen: Int[Array, "devices part"]) -> Float[Array, "devices part P D"]:
        of_part = jnp.take_along_axis(images, chosen[:, :, None, None, None], axis=1)
        found = encode(constrain(of_part.reshape(-1, *images.shape[2:]), ("batch",)))
        return found.reshape(devices, part, *found.shape[1:])

    shape = jax.eval_shape(encoded, padded[:, 0])

    @partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def step(_, inputs: tuple[Array, Array]) -> tuple[None, Array]:
        number, chosen = inputs
        empty = lambda _: jnp.zeros(shape.shape, shape.dtype)  # noqa: E731
        return None, constrain(jax.lax.cond(number * part < most, encoded, empty, chosen), ("batch",))

    _, found = jax.lax.scan(step, None, (jnp.arange(parts), padded.swapaxes(0, 1)))
    found = constrain(found.swapaxes(0, 1).reshape(devices, parts * part, *shape.shape[2:]), ("batch",))
    found = jnp.take_along_axis(found, place[:, :, None, None], axis=1)
    computed = jnp.minimum(-(-most // part), parts) * part * devices
    return constrain(found.reshape(b, i, *shape.shape[2:]), ("batch",)), computed.astype(jnp.int32)
