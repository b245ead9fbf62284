"""AdamW with fully decoupled weight decay, after clipping by the global norm.

With gradient g of the whole batch, clipped to clip_norm, Adam's direction m_hat / (sqrt(v_hat) + eps), and the
learning rate lr_t of the schedule with peak lr_peak:

    w <- w (1 - weight_decay * lr_t / lr_peak) - lr_t * m_hat / (sqrt(v_hat) + eps)

so the decay follows the schedule's shape but not the peak: weight_decay means the same at every learning rate
(Loshchilov and Hutter 2019, arXiv:1711.05101; Wortsman et al. 2023, arXiv:2309.14322, call it independent).
"""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from nmm_jax.training.schedule import make_schedule


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The chain of `config.optimizer` and `config.schedule`; its updates are added to the parameters."""
    c = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        optax.scale_by_adam(c.beta1, c.beta2, c.eps),
        # The rate below multiplies this too, so what reaches the weights is weight_decay * lr_t / lr_peak.
        optax.add_decayed_weights(c.weight_decay / c.learning_rate, mask=lambda p: decayed(p, c.decay_exclude)),
        optax.scale_by_learning_rate(make_schedule(config)),
    )


def decayed(params: Any, exclude: tuple[str, ...]) -> Any:
    """Which parameters decay: those whose path ("layers/mlp/up") holds none of the substrings `exclude`."""

    def one(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return not any(part in name for part in exclude)

    return jax.tree_util.tree_map_with_path(one, params)
