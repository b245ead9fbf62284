"""One training step, a pure function (state, batch) -> (state, metrics).

The loss is over the global batch, whatever the mesh and the number of microbatches:

    loss = sum(loss_mask * CE) / sum(loss_mask)

Its denominator is known before the forward pass, so each microbatch's gradient is that of its share of the sum,
and the shares add up: no mean of means.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from nmm_jax.models import Model
from nmm_jax.models.router import load_imbalance
from nmm_jax.parallel.mesh import BATCH_AXES
from nmm_jax.parallel.sharding import Constrain, batch_sharding, param_shardings, replicated
from nmm_jax.training.losses import cross_entropy, masked_sums
from nmm_jax.training.schedule import make_schedule
from nmm_jax.training.state import State, abstract_state, shardings_of

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
Step = Callable[[State, Batch], tuple[State, Metrics]]


def make_step(model: Model, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh) -> Step:
    """The step, not yet jitted.

    Metrics, all computed from the global batch; K is the number of sources:
      loss, learning_rate, grad_norm (before clipping), param_norm (after the update)   float32 []
      loss_sum_by_source, mask_sum_by_source                                            float32 [K]
      tokens_by_source (real positions)                                                 int32 [K]
      images (filled slots), attended_pairs (of a query and a key it sees)              int32 [], float32 []
      router: {}, or what Model.hidden returns, summed over microbatches (its losses: their mean), and
        load_imbalance (the busiest expert's tokens over its group's mean)                float32 [layers with experts]
    """
    schedule = make_schedule(config)
    shardings = param_shardings(model.abstract, model.logical_axes, mesh)
    gradients = _make_gradients(model, config, mesh)
    num_sources = len(config.data.sources)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        sums, grads = gradients(state["params"], batch)
        # Left to itself the compiler returns most of them unsharded (measured on 8 devices: 7 of 7 weights).
        grads = jax.lax.with_sharding_constraint(grads, shardings)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        router = sums["router"]
        if model.spec.moe:
            params = model.rebalanced(params, router["expert_tokens"])
            router = router | {"load_imbalance": load_imbalance(model.spec.moe, router["expert_tokens"])}
        metrics = {
            "loss": sums["loss_sum"] / _total(batch),
            "loss_sum_by_source": sums["loss_sum_by_source"],
            "mask_sum_by_source": sums["mask_sum_by_source"],
            "learning_rate": schedule(state["step"]),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "tokens_by_source": _tokens_by_source(batch, num_sources),
            "images": batch["image_mask"].sum(dtype=jnp.int32),
            "attended_pairs": _attended_pairs(batch),
            "router": router,
        }
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    return step


def jit_step(model: Model, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh) -> Any:
    """The step jitted with explicit shardings; the old state's memory is given to the new one."""
    state = shardings_of(abstract_state(model, optimizer, mesh))
    return jax.jit(
        make_step(model, optimizer, config, mesh),
        in_shardings=(state, batch_sharding(mesh)),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )


def _make_gradients(model: Model, config: ConfigDict, mesh: Mesh) -> Callable[[Any, Batch], tuple[Metrics, Any]]:
    """(params, batch) -> (sums over the batch, gradients of loss + z_loss + the routers' losses)."""
    num_sources, chunks, z_loss = len(config.data.sources), config.model.vocab_chunks, config.optimizer.z_loss
    accumulation = config.gradient_accumulation
    moe, balance_by_loss = config.model.moe, config.model.moe.balance == "loss"
    router_weights = {"balance_loss": moe.balance_loss if balance_by_loss else 0.0, "router_z_loss": moe.z_loss}
    constrain = Constrain(mesh)

    def objective(params: Any, batch: Batch, total: Float[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        hidden, router = model.hidden(params, batch, constrain=constrain)
        ce, log_z = cross_entropy(hidden, model.unembedding(params), batch["targets"], chunks)
        sums = masked_sums(ce, batch, num_sources)
        penalised = sums["loss_sum"]
        if z_loss:  # keeps the normaliser of the softmax near 1 (PaLM, arXiv:2204.02311)
            penalised += z_loss * (batch["loss_mask"] * jnp.square(log_z)).sum()
        # The routers' losses are products of means over tokens: of the microbatch, where there are several.
        router |= {name: router[name] / accumulation for name in router_weights if router}
        auxiliary = sum(weight * router[name] for name, weight in router_weights.items() if router)
        return penalised / total + auxiliary, {**sums, "router": router}

    def of_part(params: Any, part: Batch, total: Float[Array, ""]) -> tuple[Metrics, Any]:
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params, part, total)
        return sums, grads

    def of_batch(params: Any, batch: Batch) -> tuple[Metrics, Any]:
        total = _total(batch)
        if accumulation == 1:
            return of_part(params, batch, total)
        parts = jax.tree.map(lambda x: _microbatches(x, accumulation, mesh), batch)
        shapes = jax.eval_shape(of_part, params, jax.tree.map(lambda x: x[0], parts), total)

        def add(so_far: tuple[Metrics, Any], part: Batch) -> tuple[tuple[Metrics, Any], None]:
            return jax.tree.map(jnp.add, so_far, of_part(params, part, total)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        summed, _ = jax.lax.scan(add, zeros, parts)
        return summed

    return of_batch


def _microbatches(x: Array, accumulation: int, mesh: Mesh) -> Array:
    """[B, ...] -> [A, B/A, ...], microbatch a holding rows a, A + a, 2A + a, ...: each device keeps its own rows."""
    x = jnp.moveaxis(x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]), 1, 0)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))


def _total(batch: Batch) -> Float[Array, ""]:
    return jnp.maximum(batch["loss_mask"].sum(), 1.0)  # a batch of images alone has loss 0, not 0/0


def _tokens_by_source(batch: Batch, num_sources: int) -> Array:
    real = batch["segment_ids"] > 0
    return jnp.stack([(real & (batch["source"] == k)).sum(dtype=jnp.int32) for k in range(num_sources)])


def _attended_pairs(batch: Batch) -> Float[Array, ""]:
    """Pairs of a query and a key it sees: attend_until minus the start of the query's segment, over real positions."""
    ids = batch["segment_ids"]
    place = jnp.arange(ids.shape[1])
    opens = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    start = jax.lax.cummax(jnp.where(opens, place, 0), axis=1)
    return jnp.where(ids > 0, batch["attend_until"] - start, 0).sum(dtype=jnp.float32)
