"""Questions about images, with known answers: the share of answers that greedy decoding gets right, word for word.

A question document is (image, ..., question, answer), its metadata {"kind", "combination": "seen" | "held_out"}.
Greedy decoding writes the answer exactly when, given the question and the right tokens before it, every token of the
answer is the likeliest; so one forward pass over question and answer decides, and nothing is generated.
What follows the answer is not looked at, as a training document may go on with the next question.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from data_pipelines.document import Document
from data_pipelines.geometry import Geometry
from data_pipelines.rows import build_documents
from data_pipelines.store import Dataset
from data_pipelines.tokenizer import Tokenizer
from nmm_jax.evaluation.batching import fixed_batches, place, size_on
from nmm_jax.evaluation.sampling import token_logits, writable
from nmm_jax.evaluation.statistics import proportion
from nmm_jax.parallel.sharding import Constrain, replicated
from nmm_jax.training.checkpoints import Run

FOLDER, SPLIT = "questions", "questions"


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question and whether the model answers it right."""

    kind: str
    combination: str
    answer: str
    right: bool
    choices: int = 0  # a blind guess among the objects in the picture is right once in so many; 0: does not apply


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracy over `count` questions; all shares are between 0 and 1."""

    accuracy: float
    standard_error: float | None  # of accuracy, and of gain
    base: float  # always giving the commonest answer to each kind, known from these very questions
    gain: float  # accuracy - base
    count: int
    guess: float | None  # guessing among the objects in the picture, where that applies to all


def select(dataset: Dataset, per_kind: int) -> list[Document]:
    """The first `per_kind` questions of each kind.

    Raises:
      ValueError: a document is no question.
    """
    taken: collections.Counter[str] = collections.Counter()
    chosen = []
    for document in dataset:
        if not {"kind", "combination"} <= document.metadata.keys() or len(document.texts) < 2:
            raise ValueError(
                f"{dataset.folder}: document {document.id!r} is no question; expected parts (image, question, answer) "
                f"and metadata with 'kind' and 'combination', found {len(document.texts)} texts and metadata "
                f"{sorted(document.metadata)}"
            )
        taken[document.metadata["kind"]] += 1
        if taken[document.metadata["kind"]] <= per_kind:
            chosen.append(document)
    return chosen


def ask(run: Run, tokenizer: Tokenizer, questions: Sequence[Document], title: str = "questions") -> list[Answered]:
    """Puts all questions to the model."""
    geometry = Geometry.from_config(run.config)
    answers = [tokenizer.encode(question.texts[-1]) for question in questions]
    longest = max(map(len, answers))
    is_right = _make_is_right(run, tokenizer)
    size = size_on(run.mesh, run.config.evaluation.batch_rows)
    right: list[bool] = []
    for chosen, real in fixed_batches(len(questions), size, title):
        batch = build_documents([questions[i] for i in chosen], tokenizer, geometry, append_eos=False)
        expected = np.full((size, longest), -1, np.int32)
        for row, i in enumerate(chosen):
            expected[row, : len(answers[i])] = answers[i]
        right += is_right(run.params, place({**batch, "expected": expected}, run.mesh))[:real].tolist()
    return [
        Answered(q.metadata["kind"], q.metadata["combination"], q.texts[-1], r, q.metadata.get("choices", 0))
        for q, r in zip(questions, right, strict=True)
    ]


def _make_is_right(run: Run, tokenizer: Tokenizer) -> Callable[[Any, Mapping[str, Array]], Bool[Array, "B"]]:
    constrain = Constrain(run.mesh)
    allowed = jnp.asarray(writable(tokenizer, run.config.model.vocab_size))

    def is_right(params: Any, batch: Mapping[str, Array]) -> Bool[Array, "B"]:
        """`expected` [B, A] are the tokens at the end of each row, filled up with -1."""
        batch = dict(batch)
        expected: Int[Array, "B A"] = batch.pop("expected")
        hidden, _ = run.language_model.hidden(params, batch, constrain=constrain)
        counts = (expected >= 0).sum(1)
        start = (batch["segment_ids"] > 0).sum(1) - counts
        before = start[:, None] + jnp.arange(expected.shape[1]) - 1  # token t is predicted at t - 1
        before = jnp.minimum(before, hidden.shape[1] - 1)  # only where expected is -1
        at_answer = jnp.take_along_axis(hidden, before[..., None], 1)
        likeliest = jnp.argmax(token_logits(at_answer, run.language_model.unembedding(params), allowed), -1)
        return ((likeliest == expected) | (expected < 0)).all(1)

    return jax.jit(is_right, out_shardings=replicated(run.mesh))


def score(answered: Iterable[Answered]) -> Score:
    """Over questions of one kind or of several; the base rate is the commonest answer's of each kind."""
    answered = list(answered)
    accuracy = proportion(np.array([a.right for a in answered], np.float64))
    by_kind: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for a in answered:
        by_kind[a.kind][a.answer] += 1
    base = sum(max(counts.values()) for counts in by_kind.values()) / len(answered)
    guess = float(np.mean([1 / a.choices for a in answered])) if all(a.choices for a in answered) else None
    return Score(accuracy.value, accuracy.standard_error, base, accuracy.value - base, len(answered), guess)


def score_all(answered: Sequence[Answered]) -> dict[str, Any]:
    """Scores by kind (each also with "seen" and "held_out_combinations" inside), and pooled.

    "colour_and_count" pools these two kinds; "seen" and "held_out_combinations" pool all kinds, over questions whose
    answer is about a pair of attributes that was in training, and that never was.
    """
    kinds = list(dict.fromkeys(a.kind for a in answered))
    scores: dict[str, Any] = {}
    for kind in kinds:
        of_kind = [a for a in answered if a.kind == kind]
        scores[kind] = {**dataclasses.asdict(score(of_kind)), **_by_combination(of_kind)}
    if {"colour", "count"} <= set(kinds):
        pooled = [a for a in answered if a.kind in ("colour", "count")]
        scores["colour_and_count"] = {**dataclasses.asdict(score(pooled)), **_by_combination(pooled)}
    return scores | _by_combination(answered)


def _by_combination(answered: Sequence[Answered]) -> dict[str, Any]:
    names = {"seen": "seen", "held_out": "held_out_combinations"}
    split = {name: [a for a in answered if a.combination == combination] for combination, name in names.items()}
    return {name: dataclasses.asdict(score(part)) for name, part in split.items() if part}
