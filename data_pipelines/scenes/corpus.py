"""Writes the corpus: stories rendered into documents, datasets of them, question sets and the tokenizer.

Document i of a source depends on (seed, source, split, i) alone, so any of them can be made anywhere, and a
larger corpus begins with the smaller one.
"""

import dataclasses
import os
import random
from collections.abc import Callable

from data_pipelines.document import Document, Part
from data_pipelines.scenes import language, stories
from data_pipelines.scenes.render import encode, render
from data_pipelines.scenes.scene import LEVELS, Level
from data_pipelines.store import DatasetWriter
from data_pipelines.tokenizer import train_words

SOURCES: dict[str, Callable[[random.Random, Level], stories.Story]] = {
    "captions": stories.captions,
    "interleaved": stories.interleaved,
    "text": stories.text,
}
LICENCE = "generated"
COMBINATIONS = ("seen", "held_out")
QUESTIONS = {  # the kinds of a level
    "quickstart": ("colour", "count", "right", "left", "change", "caption"),
    "full": ("colour", "count", "right", "left", "change", "caption", "texture", "top", "bottom", "front"),
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All documents of a seed, a level and an image size."""

    level: str = "quickstart"
    size: int = 32  # pixels of an image, height and width
    seed: int = 0

    def document(self, source: str, split: str, index: int) -> Document:
        """Document `index` of a source's split, "train" or "held_out" (new draws, of the same pairs)."""
        story = SOURCES[source](self._rng(source, split, index), LEVELS[self.level])
        return Document(f"{source}-{split}-{index:08d}", source, self._parts(story), {"level": self.level})

    def question(self, index: int) -> Document:
        """Question `index`: (image[, image], question, answer). Kinds and combinations take turns."""
        kinds = QUESTIONS[self.level]
        kind, combination = kinds[index % len(kinds)], COMBINATIONS[index // len(kinds) % 2]
        story, choices = stories.question(self._rng("questions", index), LEVELS[self.level], kind, combination)
        metadata: dict[str, str | int] = {
            "kind": kind,
            "combination": combination,
            "answer": str(story[-1]),
            "level": self.level,
        }
        if choices:
            metadata["choices"] = choices
        return Document(f"question-{index:06d}", "questions", self._parts(story), metadata)

    def write(
        self,
        root: str,
        counts: dict[str, int],
        held_out: int,
        questions: int,
        command: str = "",
        overwrite: bool = False,
    ) -> None:
        """Writes ROOT/<source> for each of `counts`, ROOT/questions, ROOT/tokenizer.json and ROOT/sample.png.

        `counts` are training documents by source; each source has `held_out` documents more in its held_out split.
        `command` is kept on the datasets' cards. The sample is a picture no training document has.
        """

        def writer_of(source: str) -> DatasetWriter:
            folder = os.path.join(root, source)
            return DatasetWriter(folder, source, licence=LICENCE, command=command, overwrite=overwrite)

        for source, count in counts.items():
            with writer_of(source) as writer:
                for split, n in (("train", count), ("held_out", held_out)):
                    for i in range(n):
                        writer.add(self.document(source, split, i), split)
        with writer_of("questions") as writer:
            for i in range(questions):
                writer.add(self.question(i), "questions")
        asked_side = QUESTIONS[self.level].index("right")
        with open(os.path.join(root, "sample.png"), "wb") as f:
            f.write(self.question(asked_side).images[0])
        words = " ".join(language.vocabulary(LEVELS[self.level]))
        train_words([words], os.path.join(root, "tokenizer.json"))

    def _rng(self, *what: str | int) -> random.Random:
        # A string is hashed in full, and on every platform alike.
        return random.Random("/".join(map(str, (self.seed, *what))))

    def _parts(self, story: stories.Story) -> tuple[Part, ...]:
        return tuple(part if isinstance(part, str) else encode(render(part, self.size)) for part in story)
