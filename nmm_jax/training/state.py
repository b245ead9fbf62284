"""The state of a run on the devices: {"step", "params", "opt_state"}, a pure pytree.

The position in the data is the step, so this and the host's counters (training/checkpoints.py) are all there is.
Frozen parameters (training/freezing.py) are among `params` and have no place in `opt_state`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from nmm_jax.models import Model
from nmm_jax.models.deep_fusion import with_copies
from nmm_jax.parallel.mesh import make_mesh
from nmm_jax.parallel.sharding import divisor, param_shardings, replicated
from nmm_jax.training import freezing

State = dict[str, Any]
Params = dict[str, Any]

# Run once: optimising it took 9 to 27 s where compiling as it is takes 2 to 6 (configs/ladder.py's models, CPU).
QUICKLY = {"cpu": {"xla_backend_optimization_level": 0}}


def mesh_for(model: Model) -> Mesh:
    """All devices there are, laid out as for a config that leaves every axis of its mesh open."""
    config = model.config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh.update(dict.fromkeys(config.mesh, -1))
    return make_mesh(config, width=divisor(model.abstract, model.logical_axes))


def abstract_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state's shapes, types and shardings; allocates nothing. The optimizer's moments lie as their parameters."""
    shardings = param_shardings(model.abstract, model.logical_axes, mesh)
    moments = jax.eval_shape(optimizer.init, trainable(model, model.abstract))
    everywhere = replicated(mesh)
    opt_shardings = optax.tree.map_params(
        optimizer, lambda _, s: s, moments, trainable(model, shardings), transform_non_params=lambda _: everywhere
    )
    shapes = {"step": jax.ShapeDtypeStruct((), jnp.int32), "params": model.abstract, "opt_state": moments}
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        {"step": everywhere, "params": shardings, "opt_state": opt_shardings},
    )


def shardings_of(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


def trainable(model: Model, tree: Params) -> Params:
    """Of a tree of the model's parameters those that its config trains."""
    return freezing.split(tree, model.config.optimizer.freeze)[0]


def initial_state(
    model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, loaded: Params | None = None
) -> State:
    """The state before the first step, made in place: no device and no host ever holds more than its shards.

    Args:
      loaded: parameters to begin with instead of random ones (training/start.py). One that is smaller fills the first
        rows and columns; the memory of the others is given to the state.
    """
    flat, shapes = flatten_dict(loaded or {}, sep="/"), flatten_dict(model.abstract, sep="/")
    whole = {name: x for name, x in flat.items() if x.shape == shapes[name].shape}
    parts = {name: x for name, x in flat.items() if name not in whole}
    lowered = jit_initial_state(model, optimizer, mesh, seed).lower(whole, parts)
    return lowered.compile(QUICKLY.get(mesh.devices.flat[0].platform))(whole, parts)


def jit_initial_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> Any:
    """(parameters, parts of parameters), both by name, -> the initial state with them.

    Memory of the first is reused, and the compiler leaves out the random values that they replace.
    """

    def init(whole: Params, parts: Params) -> State:
        loaded = whole | parts
        params = _overlaid(model.init(jax.random.key(seed)), loaded)
        if model.spec.deep and model.spec.deep.copied:
            params = _overlaid(with_copies(params), loaded)
        opt_state = optimizer.init(trainable(model, params))
        return {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": opt_state}

    return jax.jit(init, out_shardings=shardings_of(abstract_state(model, optimizer, mesh)), donate_argnums=0)


def _overlaid(params: Params, loaded: Params) -> Params:
    """The parameters with the loaded ones, by name, in their places."""
    flat = flatten_dict(params, sep="/")
    for name, new in loaded.items():
        old = flat[name]
        flat[name] = new if new.shape == old.shape else jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)
    return unflatten_dict(flat, sep="/")
