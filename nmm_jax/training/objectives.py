"""What a run minimises: terms, each a quotient of sums over the global batch, and what is added to them.

    loss = sum over terms of  weight * sum(mask * loss) / sum(mask)

The masks are known before the forward pass, so a microbatch's gradient is that of its share of each sum, and shares add
up (training/step.py).
"""

from typing import Any, Protocol

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from nmm_jax.models import LanguageModel, Model
from nmm_jax.models.aim import PixelModel
from nmm_jax.models.contrastive import ContrastiveModel
from nmm_jax.parallel.sharding import Constrain
from nmm_jax.training.contrastive_loss import ContrastiveObjective
from nmm_jax.training.losses import cross_entropy
from nmm_jax.training.pixel_loss import PixelObjective

Params = dict[str, Any]
Batch = dict[str, Array]
ByTerm = dict[str, Float[Array, "B N"]]


class Objective(Protocol):
    """One way to train a model. N is what a term is about: positions of a row, patches of an image, or 1.

    Attributes:
      terms: (name, weight) pairs. Of the term "text" each position of a row has a loss; of others a row has one source.
    """

    @property
    def terms(self) -> tuple[tuple[str, float], ...]: ...

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        """The global batch with what randomness decides about it; the key is the seed's and the step's."""

    def masks(self, batch: Batch) -> ByTerm:
        """The weight of each of a term's losses."""

    def losses(self, params: Params, batch: Batch) -> tuple[ByTerm, ByTerm, Float[Array, ""], dict[str, Any]]:
        """The forward pass over a batch, or over a microbatch.

        Returns:
          Each term's losses. Penalties of terms, {} or by name: in the gradient with the term's mask and quotient, but
          in no metric. What is added to the loss in the gradient alone. Metrics, which are summed over microbatches:
          "router" and "vision_slots" as Model.hidden returns them, and by other names scalars for metrics.jsonl.
        """


class LanguageObjective:
    """The next token, after text and images."""

    terms = (("text", 1.0),)

    def __init__(self, model: LanguageModel, config: ConfigDict, mesh: Mesh):
        moe, by_loss = config.model.moe, config.model.moe.balance == "loss"
        self._model = model
        self._chunks, self._z_loss = config.model.vocab_chunks, config.optimizer.z_loss
        self._router_weights = {"balance_loss": moe.balance_loss if by_loss else 0.0, "router_z_loss": moe.z_loss}
        self._accumulation = config.gradient_accumulation
        self._constrain = Constrain(mesh)

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        return batch

    def masks(self, batch: Batch) -> ByTerm:
        return {"text": batch["loss_mask"]}

    def losses(self, params: Params, batch: Batch) -> tuple[ByTerm, ByTerm, Float[Array, ""], dict[str, Any]]:
        """Cross-entropy; z-loss, to keep the softmax's normaliser near 1 (PaLM, arXiv:2204.02311); routers' losses."""
        hidden, statistics = self._model.hidden(params, batch, constrain=self._constrain)
        ce, log_z = cross_entropy(
            hidden, self._model.unembedding(params), batch["targets"], self._chunks, self._constrain
        )
        penalties = {"text": self._z_loss * jnp.square(log_z)} if self._z_loss else {}
        slots = {"vision_slots": statistics["vision_slots"]} if "vision_slots" in statistics else {}
        router = {name: x for name, x in statistics.items() if name not in slots}
        # The routers' losses are products of means over tokens: of the microbatch, where there are several.
        router |= {name: router[name] / self._accumulation for name in self._router_weights if router}
        auxiliary = sum(
            (weight * router[name] for name, weight in self._router_weights.items() if router), jnp.zeros(())
        )
        return {"text": ce}, penalties, auxiliary, {"router": router, **slots}


def make_objective(model: Model, config: ConfigDict, mesh: Mesh) -> Objective:
    """The objective that the model is made for."""
    match model:
        case LanguageModel():
            return LanguageObjective(model, config, mesh)
        case ContrastiveModel():
            return ContrastiveObjective(model, config, mesh)
        case PixelModel():
            return PixelObjective(model, config, mesh)
    raise TypeError(f"{type(model).__name__} has no objective")
