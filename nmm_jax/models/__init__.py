"""What the network computes: Flax NNX modules inside, pure functions of arrays outside."""

from nmm_jax.models.families import build
from nmm_jax.models.model import LanguageModel, Model

__all__ = ["LanguageModel", "Model", "build"]
