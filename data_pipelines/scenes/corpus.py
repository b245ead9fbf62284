"""Writes the corpus: stories rendered into documents, datasets of them, question sets and the tokenizer.

Document i of a source depends on (seed, source, split, i) alone, so any of them can be made anywhere, and a
larger corpus begins with the smaller one.
"""

import os
import random
from collections.abc import Callable

from data_pipelines import tokenizer
from data_pipelines.document import Document
from data_pipelines.scenes import language, stories
from data_pipelines.scenes.render import encode, render
from data_pipelines.scenes.scene import LEVELS, Level, Scene
from data_pipelines.store import DatasetWriter

SOURCES: dict[str, Callable[[random.Random, Level], stories.Story]] = {
    "captions": stories.captions,
    "interleaved": stories.interleaved,
    "text": stories.text,
}
COMBINATIONS = ("seen", "held_out")
QUESTIONS = {  # the kinds of a level
    "quickstart": ("colour", "count", "right", "left", "change", "caption"),
    "full": ("colour", "count", "right", "left", "change", "caption", "texture", "top", "bottom", "front"),
}


def _rng(seed: int, *what: str | int) -> random.Random:
    return random.Random("/".join(map(str, (seed, *what))))  # a string is hashed in full, on every platform alike


def _parts(story: stories.Story, size: int) -> tuple[str | bytes, ...]:
    return tuple(encode(render(part, size)) if isinstance(part, Scene) else part for part in story)


def document(source: str, split: str, index: int, *, seed: int, level: str, size: int) -> Document:
    """Document `index` of a source's split ("train" or "held_out": new draws, same combinations)."""
    story = SOURCES[source](_rng(seed, source, split, index), LEVELS[level])
    return Document(f"{source}-{split}-{index:08d}", source, _parts(story, size), {"level": level})


def question(index: int, *, seed: int, level: str, size: int) -> Document:
    """Question `index`: (image[, image], question, answer). Kinds and combinations take turns."""
    kinds = QUESTIONS[level]
    kind, combination = kinds[index % len(kinds)], COMBINATIONS[index // len(kinds) % 2]
    story, choices = stories.question(_rng(seed, "questions", index), LEVELS[level], kind, combination)
    metadata = {"kind": kind, "combination": combination, "answer": story[-1], "level": level}
    if choices:
        metadata["choices"] = choices
    return Document(f"question-{index:06d}", "questions", _parts(story, size), metadata)


def write(
    root: str,
    counts: dict[str, int],
    held_out: int,
    questions: int,
    command: str = "",
    *,
    seed: int,
    level: str,
    size: int,
) -> None:
    """Writes ROOT/<source> for each of `counts`, ROOT/questions and ROOT/tokenizer.json.

    `counts` are training documents by source; each source has `held_out` documents more in its held_out split.
    `command` is kept on the datasets' cards.
    """
    make = {"seed": seed, "level": level, "size": size}
    card = {"licence": "generated", "command": command}
    for source, count in counts.items():
        with DatasetWriter(os.path.join(root, source), source, **card) as writer:
            for split, n in (("train", count), ("held_out", held_out)):
                for i in range(n):
                    writer.add(document(source, split, i, **make), split)
    with DatasetWriter(os.path.join(root, "questions"), "questions", **card) as writer:
        for i in range(questions):
            writer.add(question(i, **make), "questions")
    tokenizer.train_words([" ".join(language.vocabulary(LEVELS[level]))], os.path.join(root, "tokenizer.json"))
