import math

import numpy as np
import pytest

from data_pipelines.document import Document
from data_pipelines.store import Dataset, DatasetWriter
from nmm_jax.evaluation import questions
from nmm_jax.evaluation.questions import Answered, ask, score, score_all


def question(i, parts, kind="colour", combination="seen"):
    return Document(f"q{i}", "questions", tuple(parts), {"kind": kind, "combination": combination, "answer": parts[-1]})


def test_one_pass_says_what_greedy_decoding_says(run, letters, sampler, noise):
    """Answers of the model's own, and the same with a letter changed at a random place."""
    rng = np.random.default_rng(0)
    prompts = [(noise(i), noise(i + 99), "what") if i % 3 == 0 else (noise(i), "abc"[: 1 + i % 3]) for i in range(18)]
    said = sampler.generate([Document("", "", p) for p in prompts], 4)
    asked = []
    for i, (prompt, tokens) in enumerate(zip(prompts, said, strict=True)):
        answer = letters.decode(tokens)[: rng.integers(1, 5)]
        if i % 2 and answer:
            at = rng.integers(len(answer))
            answer = answer[:at] + letters.decode([6 + (ord(answer[at]) - 96) % 26]) + answer[at + 1 :]
        if answer:
            asked.append(question(i, (*prompt, answer)))
    assert len(asked) > 12

    answers = [letters.encode(q.texts[-1]).tolist() for q in asked]
    greedy = sampler.generate([Document(q.id, "", q.parts[:-1]) for q in asked], 4)
    decoded = [written[: len(answer)] == answer for written, answer in zip(greedy, answers, strict=True)]
    found = [a.right for a in ask(run, letters, asked, title="")]
    assert found == decoded
    assert 0 < sum(found) < len(found), "all right or all wrong tests nothing"


ANSWERED = [
    *(Answered("colour", "seen", "red", r) for r in (True, True, False)),
    *(Answered("colour", "held_out", "blue", r) for r in (True, False)),
    *(Answered("count", "seen", a, r) for a, r in (("one", True), ("two", True), ("two", True))),
    *(
        Answered("left", "held_out", a, r, choices)
        for a, r, choices in (("red square", False, 2), ("pink disc", True, 4))
    ),
]


def test_scores_by_hand():
    scores = score_all(ANSWERED)
    colour = scores["colour"]
    assert (colour["accuracy"], colour["base"], colour["count"]) == (0.6, 0.6, 5)  # "red" is 3 of 5
    assert colour["gain"] == pytest.approx(0)
    assert colour["standard_error"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert colour["seen"]["base"] == 1 and colour["held_out_combinations"]["accuracy"] == 0.5
    both = scores["colour_and_count"]
    assert (both["count"], both["accuracy"]) == (8, 6 / 8)
    assert both["base"] == (3 + 2) / 8  # the commonest answer of each kind, not of all together
    assert scores["seen"]["count"] == 6 and scores["held_out_combinations"]["count"] == 4
    assert scores["left"]["guess"] == (1 / 2 + 1 / 4) / 2
    assert colour["guess"] is None


def test_a_model_that_gives_the_commonest_answer_gains_nothing():
    rng = np.random.default_rng(2)
    answers = rng.choice(["red", "green", "blue"], 300, p=[0.5, 0.3, 0.2])
    assert score([Answered("colour", "seen", str(a), a == "red") for a in answers]).gain == 0


def write(folder, documents):
    with DatasetWriter(folder, "questions", licence="generated") as writer:
        for document in documents:
            writer.add(document, questions.SPLIT)
    return Dataset.open(folder, questions.SPLIT)


def test_so_many_of_each_kind(tmp_path, noise):
    kinds = ["colour", "count", "colour", "colour", "left"]
    documents = [question(i, (noise(i), "q", "a"), kind) for i, kind in enumerate(kinds)]
    dataset = write(tmp_path / "questions", documents)
    assert [d.id for d in questions.select(dataset, 2)] == ["q0", "q1", "q2", "q4"]


def test_a_document_that_is_no_question_is_named(tmp_path, noise):
    dataset = write(tmp_path / "questions", [Document("caption-7", "questions", (noise(0), "a dog"), {"kind": "x"})])
    with pytest.raises(ValueError, match=r"'caption-7' is no question.*found 1 texts"):
        questions.select(dataset, 5)
