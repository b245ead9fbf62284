"""The state of a run on the devices: {"step", "params", "opt_state"}, a pure pytree.

The position in the data is the step, so this and the host's counters (training/checkpoints.py) are all there is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nmm_jax.models import Model
from nmm_jax.parallel.sharding import param_shardings, replicated

State = dict[str, Any]


def abstract_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state's shapes, types and shardings; allocates nothing. The optimizer's moments lie as their parameters."""
    shardings = param_shardings(model.abstract, model.logical_axes, mesh)
    moments = jax.eval_shape(optimizer.init, model.abstract)
    everywhere = replicated(mesh)
    opt_shardings = optax.tree.map_params(
        optimizer, lambda _, s: s, moments, shardings, transform_non_params=lambda _: everywhere
    )
    shapes = {"step": jax.ShapeDtypeStruct((), jnp.int32), "params": model.abstract, "opt_state": moments}
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        {"step": everywhere, "params": shardings, "opt_state": opt_shardings},
    )


def shardings_of(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


def initial_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> State:
    """The state before the first step, made in place: no device and no host ever holds more than its shards."""

    def init() -> State:
        params = model.init(jax.random.key(seed))
        return {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(params)}

    return jax.jit(init, out_shardings=shardings_of(abstract_state(model, optimizer, mesh)))()
