"""Loss on held-out rows, source by source, with the right images and with images shuffled between documents."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.plan import Plan
from data_pipelines.stream import HeldOut
from nmm_jax.evaluation.batching import fixed_batches, place, size_on
from nmm_jax.evaluation.shuffled_images import donors, exchange
from nmm_jax.evaluation.statistics import Estimate, ratio
from nmm_jax.models.aim import PixelTextModel
from nmm_jax.parallel.sharding import Constrain, replicated
from nmm_jax.training.checkpoints import Run
from nmm_jax.training.losses import cross_entropy


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """Nats per text token over `rows` rows with `tokens` targets. `shuffled` and `drop` are None without images."""

    loss: Estimate
    shuffled: Estimate | None  # the loss with images of other documents
    drop: Estimate | None  # 1 - loss / shuffled; 0 when images do not matter
    tokens: int
    rows: int


RowSums = Callable[[Any, dict[str, Array]], tuple[Float[Array, "B"], Float[Array, "B"]]]


def make_row_sums(run: Run) -> RowSums:
    """(params, batch) -> for each row the sums of loss_mask * CE and of loss_mask; compiled once per batch shape."""
    constrain, chunks = Constrain(run.mesh), run.config.model.vocab_chunks

    def row_sums(params: Any, batch: dict[str, Array]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        model = run.model if isinstance(run.model, PixelTextModel) else run.language_model
        hidden, _ = model.hidden(params, batch, constrain=constrain)
        ce, _ = cross_entropy(hidden, model.unembedding(params), batch["targets"], chunks, constrain)
        return (batch["loss_mask"] * ce).sum(1), batch["loss_mask"].sum(1)

    return jax.jit(row_sums, out_shardings=replicated(run.mesh))


def held_out_loss(run: Run, row_sums: RowSums, source: str, held_out: HeldOut, plan: Plan, rows: int) -> HeldOutLoss:
    """Of one source, over at most `rows` rows, spread evenly over the plan (the first rows of a window are fuller).

    Every process builds every row, since images may be exchanged between any two.
    """
    chosen = spread(rows, len(held_out))
    batch = held_out.batch(chosen.tolist())
    losses, counts = _sums(run, row_sums, batch, source)
    loss = ratio(losses, counts)
    tokens = int(counts.sum())

    takes = donors(image_documents(plan, chosen, batch["image_mask"]))
    if takes is None:
        return HeldOutLoss(loss, None, None, tokens, len(chosen))
    batch["images"] = exchange(batch["images"], takes)
    shuffled, _ = _sums(run, row_sums, batch, f"{source}, shuffled images")
    kept = ratio(losses, shuffled)  # of the same rows, so what makes a row hard cancels
    drop = Estimate(1 - kept.value, kept.standard_error)
    return HeldOutLoss(loss, ratio(shuffled, counts), drop, tokens, len(chosen))


def spread(rows: int, total: int) -> Int[np.ndarray, "R"]:
    """At most `rows` of range(total), evenly spaced, its ends among them."""
    return np.unique(np.linspace(0, total - 1, min(rows, total)).round().astype(np.int64))


def image_documents(
    plan: Plan, rows: Int[np.ndarray, "R"], image_mask: Bool[np.ndarray, "R I"]
) -> Int[np.ndarray, "R I"]:
    """Which document of the dataset each image slot of these rows is from; -1 for an empty slot.

    Slots are filled in the order of a row's fragments. A document that is cut over rows keeps its number. A pair whose
    image could not be decoded has an empty one.
    """
    documents = np.full(image_mask.shape, -1, np.int64)
    for slots, row in zip(documents, rows, strict=True):
        fragments = plan[int(row)]
        of_images = np.repeat(fragments["document"], fragments["images"])
        slots[: len(of_images)] = of_images
    if image_mask.shape[1] == 1:
        documents[~image_mask] = -1
    assert ((documents >= 0) == image_mask).all(), "the plan and the rows built from it disagree about image slots"
    return documents


def _sums(
    run: Run, row_sums: RowSums, batch: Mapping[str, np.ndarray], title: str
) -> tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]]:
    size = size_on(run.mesh, run.config.evaluation.batch_rows)
    sums = []
    for rows, real in fixed_batches(len(batch["tokens"]), size, title):
        part = place({name: array[rows] for name, array in batch.items()}, run.mesh)
        sums.append(np.stack(jax.device_get(row_sums(run.params, part)))[:, :real])
    losses, counts = np.concatenate(sums, axis=1).astype(np.float64)
    return losses, counts
