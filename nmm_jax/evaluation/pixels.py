"""How well AIM and AIMv2 predict the patches of held-out images, behind prefixes that are the same for all models.

prefix                       1, P/4, P/2 and 3 P/4 of P patches are given, the others predicted
loss                         over all four, as in training (training/pixel_loss.py)
zero                         the same patches' loss if zero is predicted: each patch's own mean; about 1
explained = 1 - loss / zero  0 of a model that knows nothing, 1 of one that knows the image
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from data_pipelines.stream import HeldOut
from nmm_jax.evaluation.batching import fixed_batches, place, size_on
from nmm_jax.evaluation.held_out import spread
from nmm_jax.evaluation.statistics import Estimate, ratio
from nmm_jax.models.aim import PixelModel
from nmm_jax.parallel.sharding import Constrain, replicated
from nmm_jax.training.checkpoints import Run
from nmm_jax.training.pixel_loss import next_patches, predicted, squared_error

PixelSums = Callable[[Any, dict[str, Array]], Float[Array, "3 B"]]


@dataclasses.dataclass(frozen=True)
class PixelLoss:
    """Of one source, over `rows` images."""

    loss: Estimate
    zero: Estimate
    explained: Estimate
    by_prefix: dict[int, Estimate]  # the loss behind each prefix
    rows: int

    def to_json(self) -> dict[str, Any]:
        return {
            "loss": self.loss.value,
            "standard_error": self.loss.standard_error,
            "zero": self.zero.value,
            "explained": dataclasses.asdict(self.explained),
            "by_prefix": {str(prefix): dataclasses.asdict(loss) for prefix, loss in self.by_prefix.items()},
            "rows": self.rows,
        }


def prefixes(patches: int) -> tuple[int, ...]:
    """Of 64 patches (1, 16, 32, 48)."""
    return tuple(sorted({1, *(max(1, patches * quarter // 4) for quarter in (1, 2, 3))}))


def make_pixel_sums(run: Run) -> PixelSums:
    """(params, batch with "prefix") -> each row's sums of the loss, of the loss of zero, and of patches that count."""
    constrain, model, vision = Constrain(run.mesh), run.model, run.model.spec.vision
    assert isinstance(model, PixelModel) and vision

    def pixel_sums(params: Any, batch: dict[str, Array]) -> Float[Array, "3 B"]:
        targets, counts = next_patches(vision, batch["images"]), predicted(batch, vision.patches)
        pixels, _ = model.predictions(params, batch, constrain=constrain)
        losses = (squared_error(pixels, targets), jnp.square(targets).mean(-1), jnp.ones(counts.shape))
        return jnp.stack([(counts * loss).sum(1) for loss in losses])

    return jax.jit(pixel_sums, out_shardings=replicated(run.mesh))


def pixel_loss(run: Run, pixel_sums: PixelSums, source: str, held_out: HeldOut, rows: int) -> PixelLoss:
    """Of one source, over at most `rows` rows, spread evenly over the plan."""
    batch = held_out.batch(spread(rows, len(held_out)).tolist())
    assert run.model.spec.vision
    images, given = len(batch["tokens"]), prefixes(run.model.spec.vision.patches)
    size = size_on(run.mesh, run.config.evaluation.batch_rows)
    sums = np.zeros((len(given), 3, images))
    for chosen, real in fixed_batches(images, size, f"{source}, pixels"):
        part = {name: array[chosen] for name, array in batch.items()}
        for of_prefix, prefix in zip(sums, given, strict=True):
            placed = place(part | {"prefix": np.full(size, prefix, np.int32)}, run.mesh)
            of_prefix[:, chosen[:real]] = jax.device_get(pixel_sums(run.params, placed))[:, :real]

    losses, zeros, counts = sums.sum(0)
    kept = ratio(losses, zeros)  # of the same patches, so what makes an image hard cancels
    return PixelLoss(
        loss=ratio(losses, counts),
        zero=ratio(zeros, counts),
        explained=Estimate(1 - kept.value, kept.standard_error),
        by_prefix={prefix: ratio(one[0], one[2]) for prefix, one in zip(given, sums, strict=True)},
        rows=images,
    )
