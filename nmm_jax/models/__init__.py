"""What the network computes: Flax NNX modules inside, pure functions of arrays outside."""

from nmm_jax.models.model import Model, build

__all__ = ["Model", "build"]
