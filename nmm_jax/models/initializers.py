"""How weights begin: one scheme per code base that the paper builds on, chosen by `model.init`.

    scheme                embeddings      matrices          added to the residual stream   head
    fan_in_depth_scaled   U(-0.1, 0.1)    truncated normal of variance 1 / ((1 + depth) fan_in), all of them
    open_lm               width^-1/2      fan_in^-1/2       / sqrt(2 (layer + 1))          width^-1/2
    normal                0.02            0.02              / sqrt(2 depth)                0.02

(standard deviations, where nothing else is said)

The first is ml-l3m's (Shukor et al. 2025, arXiv 2504.07951), the second open_lm's (DCLM), its normals cut at three
standard deviations, the third GPT-2's. A truncated normal here has the standard deviation named before its cut, as
in both code bases.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from nmm_jax.models.spec import StackSpec

Role = Literal["embedding", "inner", "residual", "head"]


def initialize(
    spec: StackSpec, key: Key[Array, ""], shape: tuple[int, ...], *, role: Role, fan_in: int, layer: Array | int = 0
) -> Float[Array, "..."]:
    """A float32 weight of `shape`.

    Args:
      role: "embedding" (a lookup table), "inner" (a matrix whose output is not added to the residual stream),
        "residual" (one whose output is), "head" (the unembedding).
      fan_in: inputs that each output of the matrix sums over.
      layer: index of the decoder layer, from 0.
    """
    if spec.init == "fan_in_depth_scaled":
        if role == "embedding":
            return jax.random.uniform(key, shape, jnp.float32, -0.1, 0.1)
        return _truncated_normal(key, shape, 2.0) * ((1 + spec.depth) * fan_in) ** -0.5
    if spec.init == "open_lm":
        std = (spec.width if role in ("embedding", "head") else fan_in) ** -0.5
        shrink = jnp.sqrt(2.0 * (layer + 1)) if role == "residual" else 1.0
        return _truncated_normal(key, shape, 3.0) * (std / shrink)
    if spec.init == "normal":
        shrink = (2 * spec.depth) ** 0.5 if role == "residual" else 1.0
        return jax.random.normal(key, shape, jnp.float32) * (0.02 / shrink)
    raise ValueError(f"model.init = {spec.init!r}; expected fan_in_depth_scaled, open_lm or normal")


def _truncated_normal(key: Key[Array, ""], shape: tuple[int, ...], cut: float) -> Float[Array, "..."]:
    """Standard normal values between -cut and cut."""
    return jax.random.truncated_normal(key, -cut, cut, shape, jnp.float32)
