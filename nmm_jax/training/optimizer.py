"""AdamW with fully decoupled weight decay, after clipping by the global norm.

With gradient g of the whole batch, clipped to clip_norm, Adam's direction m_hat / (sqrt(v_hat) + eps), and the
learning rate lr_t of the schedule with peak lr_peak:

    w <- w (1 - weight_decay * lr_t / lr_peak) - lr_t * m_hat / (sqrt(v_hat) + eps)

so the decay follows the schedule's shape but not the peak: weight_decay means the same at every learning rate
(Loshchilov and Hutter 2019, arXiv:1711.05101; Wortsman et al. 2023, arXiv:2309.14322, call it independent).

Of the vision tower both terms are multiplied by vision_scale: the code base of Shukor et al. (arXiv 2504.07951)
divides the decay by the optimizer's initial rate, so that a group with a lower one decays less, too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from nmm_jax.training.schedule import Ends, Schedule, ends, make_schedule


def make_optimizer(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """The chain of `config.optimizer` and `config.schedule`; its updates are added to the parameters.

    `update` takes `ends` (training/schedule.py) of another run than the config's.
    """
    c = config.optimizer
    chain = optax.chain(
        _clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        optax.scale_by_adam(c.beta1, c.beta2, c.eps),
        # The rate below multiplies this too, so what reaches the weights is weight_decay * lr_t / lr_peak.
        optax.add_decayed_weights(c.weight_decay / c.learning_rate, mask=lambda p: decayed(p, c.decay_exclude)),
        _scale_by_learning_rate(make_schedule(config), ends(config)),
    )
    return chain if c.vision_scale == 1 else _scaled(chain, c.vision_scale, lambda name: name.startswith("vision/"))


def decayed(params: Any, exclude: tuple[str, ...]) -> Any:
    """Which parameters decay: those whose path ("layers/mlp/up") holds none of the substrings `exclude`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not any(part in _name(path) for part in exclude), params)


def _clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm, its state too, as a product with one number: it chooses element by element between
    the gradient and a quotient, which XLA:CPU goes through memory for."""

    def update(gradients: Any, state: optax.EmptyState, _: Any = None) -> tuple[Any, optax.EmptyState]:
        norm = optax.tree.norm(gradients)
        scale = largest / jnp.maximum(norm, largest)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _scale_by_learning_rate(schedule: Schedule, its_own: Ends) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_learning_rate, its state too, of a schedule whose ends are an argument."""

    def init(_: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, *, ends: Ends = its_own, **_: Any) -> tuple[Any, Any]:
        rate = schedule(state.count, ends)
        scaled = jax.tree.map(lambda x: (-rate).astype(x.dtype) * x, updates)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _scaled(
    inner: optax.GradientTransformationExtraArgs, factor: float, chosen: Callable[[str], bool]
) -> optax.GradientTransformationExtraArgs:
    """`inner` with the updates of the parameters with `chosen` names times `factor`; the state is inner's."""

    def update(gradients: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = inner.update(gradients, state, params, **extra)
        scale = lambda path, x: x * factor if chosen(_name(path)) else x  # noqa: E731
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
