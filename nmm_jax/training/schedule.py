"""Learning rates over the steps of a run.

    wsd      warm-up, stable, cooldown: linear up to the peak, flat, then down over the last `cooldown` steps
    cosine   linear up to the peak, then half a cosine down to the last step

Step t is the update with t updates before it. With warm-up W, cooldown K, N steps and u the part of the way down,

    t < W           peak * (t + 1) / W
    wsd             u = (t - (N - K)) / K for t >= N - K      1-sqrt: 1 - sqrt(u)   linear: 1 - u
    cosine          u = (t - W) / (N - W)                     (1 + cos(pi u)) / 2

where the last factor f is stretched to end at final_ratio: peak * (final_ratio + (1 - final_ratio) * f).
Warm-up–stable–cooldown and the 1-sqrt shape: Hägele et al. 2024, arXiv:2405.18392.

Where a run ends, N and K, is an argument of a compiled step and no part of it: a trunk, prolonged, and all that cool
down off it are one program. With constants each was compiled, 10 to 27 s for steps of 40 ms (configs/ladder.py, CPU).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

Ends = Mapping[str, Float[Array, ""] | np.float32]
Schedule = Callable[..., Float[Array, "*T"]]  # (step, ends): of other ends than the config's, if they are given


def ends(config: ConfigDict) -> Ends:
    """Where the config's run ends: `steps` N and `cooldown` K, float32 []."""
    return {"steps": np.float32(config.steps), "cooldown": np.float32(config.schedule.cooldown)}


def make_schedule(config: ConfigDict) -> Schedule:
    """The learning rate of step t, a float32 scalar; `config.schedule`, peak `config.optimizer.learning_rate`."""
    c, peak, its_own = config.schedule, config.optimizer.learning_rate, ends(config)

    def learning_rate(step: jax.Array | int, ends: Ends = its_own) -> jax.Array:
        t, steps, cooldown = jnp.asarray(step, jnp.float32), ends["steps"], ends["cooldown"]
        if c.kind == "cosine":
            u = jnp.clip((t - c.warmup) / jnp.maximum(steps - c.warmup, 1), 0.0, 1.0)
            factor = (1 + jnp.cos(jnp.pi * u)) / 2
        else:
            u = jnp.clip((t - (steps - cooldown)) / jnp.maximum(cooldown, 1), 0.0, 1.0)
            factor = 1 - jnp.sqrt(u) if c.cooldown_shape == "1-sqrt" else 1 - u
        factor = c.final_ratio + (1 - c.final_ratio) * factor
        warm = jnp.minimum((t + 1) / c.warmup, 1.0) if c.warmup else 1.0
        return peak * jnp.minimum(warm, factor)

    return learning_rate
