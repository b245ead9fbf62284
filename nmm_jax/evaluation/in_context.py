"""In-context gain: what an earlier picture and its caption, in the same row, do to the loss on a caption.

    alone         [BOS            image_b caption_b]
    pair          [BOS image_a caption_a image_b caption_b]      gain = loss of alone - loss of pair
    text          [BOS         caption_a image_b caption_b]      the same without the earlier picture
    other_image   [BOS image_c caption_a image_b caption_b]      with another caption's picture in its place

The loss is over the tokens of caption_b, in nats a token, and a gain is that of the same captions: paired. Which a
comes before which b is fixed by a seed. A gain says that the model goes on in the manner of the row; that it has looked
at the earlier picture too is said by `picture`, what the pair gains beyond other_image. (MM1 measures the few-shot
accuracy of models a thousand times larger; this puts its question to a loss. McKinzie et al. 2024, arXiv 2403.09611.)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.document import Document, Part
from data_pipelines.geometry import Geometry
from data_pipelines.rows import Batch, build_documents
from data_pipelines.store import Dataset
from data_pipelines.tokenizer import Tokenizer
from nmm_jax.evaluation.batching import fixed_batches, place, size_on
from nmm_jax.evaluation.held_out import RowSums, spread
from nmm_jax.evaluation.statistics import Estimate, ratio
from nmm_jax.training.checkpoints import Run

LONGEST = 48  # tokens of a caption; the same for all models, so that they are measured on the same tokens
LEAST = 3  # captions that the arms are made of
LOOKED_AT = 16  # documents for each caption that is asked for, at most
ARMS = ("alone", "pair", "text", "other_image")


@dataclasses.dataclass(frozen=True)
class Caption:
    """An image and the beginning of its text."""

    image: bytes
    text: str
    tokens: int
    cut: bool  # whether the text went on


@dataclasses.dataclass(frozen=True)
class InContext:
    """Over `captions` with `tokens` tokens in all, nats a token; `cut` of them had more tokens than were taken."""

    loss: dict[str, Estimate]  # by arm
    gain: dict[str, Estimate]  # by arm but the first: the loss of alone less the arm's
    picture: Estimate  # of the earlier picture in it: the loss of other_image less that of pair
    captions: int
    tokens: int
    cut: int

    def to_json(self) -> dict[str, Any]:
        """As docs/evaluation.md lists it."""
        arms: dict[str, Any] = {}
        for arm, loss in self.loss.items():
            arms[arm] = {"loss": loss.value, "standard_error": loss.standard_error}
            if arm in self.gain:
                arms[arm] |= {"gain": self.gain[arm].value, "gain_error": self.gain[arm].standard_error}
        picture = {"gain": self.picture.value, "gain_error": self.picture.standard_error}
        return {"captions": self.captions, "tokens": self.tokens, "cut": self.cut} | arms | {"picture": picture}


def room(geometry: Geometry) -> int:
    """Tokens that each of two captions may have beside two images; below 1 where rows have no place for a pair."""
    if geometry.per_row < 2:
        return 0
    return min(LONGEST, (geometry.row_length - 1 - 2 * geometry.image_span) // 2)


def select(dataset: Dataset | Sequence[Document], tokenizer: Tokenizer, longest: int, count: int) -> list[Caption]:
    """At most `count` of the documents of one image and one text; texts of at most `longest` tokens.

    First `count` documents spread evenly, then others in a random order that is always the same, until enough are found
    or LOOKED_AT times as many have been read.
    """
    first = spread(count, len(dataset))
    others = np.setdiff1d(np.arange(len(dataset)), first)
    order = np.concatenate([first, np.random.default_rng(0).permutation(others)])
    found: dict[int, Caption] = {}
    for i in order[: LOOKED_AT * count].tolist():
        if len(found) == count:
            break
        document = dataset[i]
        if len(document.images) == len(document.texts) == 1:
            text = beginning(document.texts[0], tokenizer, longest)
            if tokens := len(tokenizer.encode(text)):
                found[i] = Caption(document.images[0], text, tokens, text != document.texts[0])
    return [found[i] for i in sorted(found)]


def beginning(text: str, tokenizer: Tokenizer, longest: int) -> str:
    """The text if it has at most `longest` tokens, else as many of its first words; of one word, a part."""
    while (tokens := len(tokenizer.encode(text))) > longest:
        text = text[: min(len(text) - 1, len(text) * longest // tokens)]
        text = text.rsplit(maxsplit=1)[0] if len(text.split()) > 1 else text.rstrip()
    return text


def measure(
    run: Run, tokenizer: Tokenizer, row_sums: RowSums, captions: Sequence[Caption], title: str = ""
) -> InContext:
    """Each caption in all arms.

    Args:
      captions: LEAST of them or more, of one source.
      row_sums: as nmm_jax.evaluation.held_out.make_row_sums makes it.
    """
    geometry, size = Geometry.from_config(run.config), size_on(run.mesh, run.config.evaluation.batch_rows)
    tokens = np.array([caption.tokens for caption in captions], np.float64)
    losses = {}
    for arm, rows in arms(captions).items():
        sums = []
        for chosen, real in fixed_batches(len(rows), size, f"{title}, {arm}"):
            batch = build_documents([rows[i] for i in chosen], tokenizer, geometry, append_eos=False)
            only_last(batch, [captions[i].tokens for i in chosen])
            sums.append(jax.device_get(row_sums(run.params, place(batch, run.mesh)))[0][:real])
        losses[arm] = np.concatenate(sums).astype(np.float64)
    return InContext(
        {arm: ratio(loss, tokens) for arm, loss in losses.items()},
        {arm: ratio(losses["alone"] - losses[arm], tokens) for arm in ARMS[1:]},
        ratio(losses["other_image"] - losses["pair"], tokens),
        len(captions),
        int(tokens.sum()),
        sum(caption.cut for caption in captions),
    )


def arms(captions: Sequence[Caption]) -> dict[str, list[Document]]:
    """The rows of every arm, b by b. In a circle in random order, a comes before b and c before a: three captions."""
    circle = np.random.default_rng(0).permutation(len(captions))
    rows: dict[str, list[Document]] = {arm: [] for arm in ARMS}
    for b, at in enumerate(np.argsort(circle)):
        last, earlier, other = captions[b], captions[circle[at - 1]], captions[circle[at - 2]]
        before: dict[str, tuple[Part, ...]] = {
            "alone": (),
            "pair": (earlier.image, earlier.text),
            "text": (earlier.text,),
            "other_image": (other.image, earlier.text),
        }
        for arm in ARMS:
            rows[arm].append(Document(f"{arm} {b}", "in_context", (*before[arm], last.image, last.text)))
    return rows


def only_last(batch: Batch, counts: Sequence[int]) -> None:
    """Leaves loss on the last counts[b] tokens of each row, in place; the row is one document, without EOS."""
    batch["loss_mask"][:] = 0
    for mask, end, count in zip(batch["loss_mask"], (batch["segment_ids"] > 0).sum(1), counts, strict=True):
        mask[end - 1 - count : end - 1] = 1  # a token is predicted one position before it
