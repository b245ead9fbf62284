"""Retrieval: is the text of an image among the k nearest of all texts, and the image of a text among the images?

    cosines      text 0   text 1   text 2      recall@1 of image -> text: row 0 yes, row 1 no, row 2 yes: 2/3
    image 0       0.9      0.2      0.1        recall@1 of text -> image: down the columns: 0 yes, 1 no, 2 yes
    image 1       0.6      0.5      0.3
    image 2       0.1      0.6      0.8

Pairs of one source are ranked among each other. Those of the same text, or of the same picture, are right for one
another too. Chance is the recall of a random order, which such twins raise; a model that gives all the same cosine has
none of it, as a wrong candidate of equal cosine counts as nearer.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.stream import HeldOut
from nmm_jax.evaluation.batching import fixed_batches, place, size_on
from nmm_jax.evaluation.held_out import spread
from nmm_jax.evaluation.statistics import Estimate, proportion
from nmm_jax.models.contrastive import ContrastiveModel
from nmm_jax.parallel.sharding import Constrain, replicated
from nmm_jax.training.checkpoints import Run

RANKS = (1, 5, 10)
MOST = 1_000  # pairs of a source, so that recalls of larger held-out splits can be compared with others'


@dataclasses.dataclass(frozen=True)
class Recalls:
    """Of one direction: recall@k, and that of a random order."""

    recall: dict[int, Estimate]
    chance: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        return {
            f"recall@{k}": {"value": r.value, "standard_error": r.standard_error, "chance": self.chance[k]}
            for k, r in self.recall.items()
        }


Embed = Callable[[Any, dict[str, Array]], tuple[Float[Array, "B E"], Float[Array, "B E"]]]


def make_embed(run: Run) -> Embed:
    """(params, batch) -> embeddings of images and of texts; compiled once per batch shape."""
    model, constrain = run.model, Constrain(run.mesh)
    assert isinstance(model, ContrastiveModel)

    def both(params: Any, batch: dict[str, Array]) -> tuple[Array, Array]:
        return model.embeddings(params, batch, constrain=constrain)[:2]

    return jax.jit(both, out_shardings=replicated(run.mesh))


def retrieve(run: Run, embed: Embed, held_out: HeldOut, source: str) -> dict[str, Any]:
    """Recalls both ways over a source's held-out pairs, MOST of them at most.

    Returns:
      {"pairs": int, "image_to_text", "text_to_image": {"recall@k": {"value", "standard_error", "chance"}}}
    """
    images, texts, same = embed_pairs(run, embed, held_out, source)
    cosines = images @ texts.T
    directions = {"image_to_text": recalls(cosines, same), "text_to_image": recalls(cosines.T, same)}
    return {"pairs": len(cosines)} | {name: found.to_json() for name, found in directions.items()}


def recalls(cosines: Float[np.ndarray, "N N"], same: Bool[np.ndarray, "N N"]) -> Recalls:
    """Of each row's query among the columns, of which `same` says which are right; each row has one at least."""
    best = np.where(same, cosines, -np.inf).max(1, keepdims=True)
    above = (~same & (cosines >= best)).sum(1)  # before the first right one
    recall = {k: proportion((above < k).astype(np.float64)) for k in RANKS}
    return Recalls(recall, {k: float(chance(same.sum(1), same.shape[1], k).mean()) for k in RANKS})


def chance(right: Int[np.ndarray, "N"], candidates: int, k: int) -> Float[np.ndarray, "N"]:
    """That one of `right` candidates is among the first k of a random order: 1 - C(n - right, k) / C(n, k)."""
    drawn = np.arange(min(k, candidates))
    left = np.maximum(candidates - np.asarray(right)[:, None] - drawn, 0)
    return 1 - np.prod(left / (candidates - drawn), axis=1)


def embed_pairs(
    run: Run, embed: Embed, held_out: HeldOut, source: str
) -> tuple[Float[np.ndarray, "N E"], Float[np.ndarray, "N E"], Bool[np.ndarray, "N N"]]:
    """Embeddings of images and texts, and which pairs have the same picture or the same text. Pairs whose image could
    not be decoded are left out."""
    chosen = spread(MOST, len(held_out))
    images, texts, pictures, captions = [], [], [], []
    size = size_on(run.mesh, run.config.evaluation.batch_rows)
    for rows, real in fixed_batches(len(chosen), size, f"{source}, retrieval"):
        batch = held_out.batch(chosen[rows].tolist())
        image, text = jax.device_get(embed(run.params, place(batch, run.mesh)))
        for b in np.flatnonzero(batch["image_mask"][:real, 0]):
            images.append(image[b])
            texts.append(text[b])
            pictures.append(_digest(batch["images"][b]))
            captions.append(_digest(batch["tokens"][b]))
    if not images:
        raise ValueError(f"source {source!r} has no held-out pair whose image can be decoded")
    of_pictures, of_captions = np.array(pictures), np.array(captions)
    same = (of_pictures[:, None] == of_pictures) | (of_captions[:, None] == of_captions)
    return np.stack(images), np.stack(texts), same


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
