"""One training step, a pure function (state, batch, ends) -> (state, metrics).

The loss is over the global batch, whatever the mesh and the number of microbatches:

    loss = sum over terms of  weight * sum(mask * loss) / sum(mask)          (training/objectives.py)

Its denominators are known before the forward pass, so each microbatch's gradient is that of its share of the sums,
and the shares add up: no mean of means. Gradients are taken of the parameters that are trained, and of no others.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from nmm_jax.models import LanguageModel, Model
from nmm_jax.models.router import load_imbalance
from nmm_jax.parallel.mesh import BATCH_AXES
from nmm_jax.parallel.sharding import batch_sharding, param_shardings, replicated
from nmm_jax.training import freezing
from nmm_jax.training.losses import masked_sums
from nmm_jax.training.objectives import Batch, Objective, make_objective
from nmm_jax.training.schedule import Ends, make_schedule
from nmm_jax.training.state import Params, State, abstract_state, shardings_of

Metrics = dict[str, Any]
Step = Callable[[State, Batch, Ends], tuple[State, Metrics]]  # ends: training/schedule.py


def make_step(model: Model, optimizer: optax.GradientTransformationExtraArgs, config: ConfigDict, mesh: Mesh) -> Step:
    """The step, not yet jitted.

    Metrics, all computed from the global batch; K is the number of sources:
      loss, learning_rate, param_norm (after the update)                                float32 []
      grad_norm (of what is trained, before clipping)                                   float32 []
      terms: of each term of the objective its loss                                     {name: float32 []}
      loss_sum_by_source, mask_sum_by_source, whose quotient is a source's loss         float32 [K]
      tokens_by_source (real positions)                                                 int32 [K]
      images (filled slots), attended_pairs (of a query and a key it sees)              int32 [], float32 []
      vision_slots (that a vision tower between patches and decoder went through)       int32 []; 0 without one
      router: {}, or what Model.hidden returns, summed over microbatches (its losses: their mean), and
        load_imbalance (the busiest expert's tokens over its group's mean)              float32 [layers with experts]
      logged: what else the objective tells                                             {name: float32 []}
    """
    schedule = make_schedule(config)
    objective = make_objective(model, config, mesh)
    gradients = _make_gradients(objective, config, mesh)
    num_sources, patterns = len(config.data.sources), model.config.optimizer.freeze
    shardings, _ = freezing.split(param_shardings(model.abstract, model.logical_axes, mesh), patterns)

    def step(state: State, batch: Batch, ends: Ends) -> tuple[State, Metrics]:
        # Of the seed and the step alone, so that a run that goes on from a checkpoint draws the same.
        batch = objective.prepare(batch, jax.random.fold_in(jax.random.key(config.seed), state["step"]))
        trainable, frozen = freezing.split(state["params"], patterns)
        (sums, told), grads = gradients(trainable, frozen, batch)
        # Left to itself the compiler returns most of them unsharded (measured on 8 devices: 7 of 7 weights).
        grads = jax.lax.with_sharding_constraint(grads, shardings)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state["opt_state"], trainable, ends=ends)
            params = freezing.merge(optax.apply_updates(trainable, updates), frozen)
        router = told.pop("router", {})
        if router and isinstance(model, LanguageModel) and model.spec.moe:
            params = model.rebalanced(params, router["expert_tokens"])
            router = router | {"load_imbalance": load_imbalance(model.spec.moe, router["expert_tokens"])}
        params = freezing.merge(model.after_update(params), frozen)
        terms = {name: of_term["loss_sum"] / _total(of_term["mask_sum"]) for name, of_term in sums.items()}
        metrics = {
            "loss": _weighted(objective, terms),
            "terms": terms,
            **_by_source(objective, sums),
            "learning_rate": schedule(state["step"], ends),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "tokens_by_source": _tokens_by_source(batch, num_sources),
            "images": batch["image_mask"].sum(dtype=jnp.int32),
            "vision_slots": told.pop("vision_slots", jnp.zeros((), jnp.int32)),
            "attended_pairs": _attended_pairs(batch),
            "router": router,
            "logged": told,
        }
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    return step


def jit_step(model: Model, optimizer: optax.GradientTransformationExtraArgs, config: ConfigDict, mesh: Mesh) -> Any:
    """The step jitted with explicit shardings; the old state's memory is given to the new one."""
    state = shardings_of(abstract_state(model, optimizer, mesh))
    return jax.jit(
        make_step(model, optimizer, config, mesh),
        in_shardings=(state, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )


Sums = dict[str, dict[str, Array]]  # by term, of masked_sums


def _make_gradients(
    objective: Objective, config: ConfigDict, mesh: Mesh
) -> Callable[[Params, Params, Batch], tuple[tuple[Sums, Metrics], Params]]:
    """(trainable, frozen, batch) -> (sums over the batch and the objective's metrics, gradients of the trainable)."""
    num_sources, accumulation = len(config.data.sources), config.gradient_accumulation

    def loss(trainable: Params, frozen: Params, part: Batch, totals: dict[str, Array]) -> tuple[Array, Any]:
        losses, penalties, auxiliary, told = objective.losses(freezing.merge(trainable, frozen), part)
        masks, sums, shares = objective.masks(part), {}, {}
        for name, _ in objective.terms:
            source = part["source"] if name == "text" else part["source"][:, :1]
            sums[name] = masked_sums(losses[name], masks[name], source, num_sources)
            penalised = sums[name]["loss_sum"]
            if name in penalties:
                penalised += (masks[name] * penalties[name]).sum()
            shares[name] = penalised / totals[name]
        return _weighted(objective, shares) + auxiliary, (sums, told)

    def of_part(trainable: Params, frozen: Params, part: Batch, totals: dict[str, Array]) -> tuple[Any, Params]:
        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, part, totals)
        return found, grads

    def of_batch(trainable: Params, frozen: Params, batch: Batch) -> tuple[Any, Params]:
        totals = {name: _total(mask.sum()) for name, mask in objective.masks(batch).items()}
        if accumulation == 1:
            return of_part(trainable, frozen, batch, totals)
        parts = jax.tree.map(lambda x: _microbatches(x, accumulation, mesh), batch)
        shapes = jax.eval_shape(of_part, trainable, frozen, jax.tree.map(lambda x: x[0], parts), totals)

        def add(so_far: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, of_part(trainable, frozen, part, totals)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        summed, _ = jax.lax.scan(add, zeros, parts)
        return summed

    return of_batch


def _weighted(objective: Objective, of_terms: dict[str, Array]) -> Float[Array, ""]:
    first, *others = [weight * of_terms[name] for name, weight in objective.terms]
    return sum(others, first)


def _by_source(objective: Objective, sums: Sums) -> dict[str, Array]:
    """Of one term its own sums; of several the first one's mask, and what makes the quotient their weighted sum."""
    first, *others = [sums[name] for name, _ in objective.terms]
    loss, mask = first["loss_sum_by_source"], first["mask_sum_by_source"]
    if others:
        quotients = {name: s["loss_sum_by_source"] / _total(s["mask_sum_by_source"]) for name, s in sums.items()}
        loss = mask * _weighted(objective, quotients)
    return {"loss_sum_by_source": loss, "mask_sum_by_source": mask}


def _microbatches(x: Array, accumulation: int, mesh: Mesh) -> Array:
    """[B, ...] -> [A, B/A, ...], microbatch a holding rows a, A + a, 2A + a, ...: each device keeps its own rows."""
    x = jnp.moveaxis(x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]), 1, 0)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))


def _total(mask_sum: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.maximum(mask_sum, 1.0)  # a batch of images alone has loss 0, not 0/0


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
