"""Writes a corpus of scenes: three sources, questions with known answers, a tokenizer.

python -m data_pipelines.scenes --output=ROOT [--captions=N --interleaved=N --text=N] [--seed=0] [--size=32] [--level=…]
"""

import sys
import time

from absl import flags, logging

from configs import command_line
from data_pipelines.scenes import preview
from data_pipelines.scenes.corpus import Corpus
from data_pipelines.scenes.scene import LEVELS

_OUTPUT = flags.DEFINE_string("output", None, "folder of the datasets, the questions and the tokenizer", required=True)
_CAPTIONS = flags.DEFINE_integer(
    "captions", 8000, "training documents of one image: captions, or questions", lower_bound=1
)
_INTERLEAVED = flags.DEFINE_integer("interleaved", 3000, "training documents of two to four images", lower_bound=1)
_TEXT = flags.DEFINE_integer("text", 3000, "training documents without images", lower_bound=1)
_HELD_OUT = flags.DEFINE_integer("held_out", 500, "held-out documents of each source", lower_bound=1)
_QUESTIONS = flags.DEFINE_integer("questions", 2400, "questions with known answers, all kinds together", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "another seed, another corpus")
_SIZE = flags.DEFINE_integer("size", 32, "pixels of an image, height and width", lower_bound=16)
_LEVEL = flags.DEFINE_enum("level", "quickstart", list(LEVELS), "how rich the scenes and their language are")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace datasets that are there already")
_PREVIEW = flags.DEFINE_string("preview", "", "also write a contact sheet of the first documents to this .png")


def main(_: list[str]) -> None:
    started = time.monotonic()
    corpus = Corpus(level=_LEVEL.value, size=_SIZE.value, seed=_SEED.value)
    counts = {"captions": _CAPTIONS.value, "interleaved": _INTERLEAVED.value, "text": _TEXT.value}
    command = " ".join(["python -m data_pipelines.scenes", *sys.argv[1:]])
    corpus.write(_OUTPUT.value, counts, _HELD_OUT.value, _QUESTIONS.value, command, _OVERWRITE.value)
    total = sum(counts.values()) + 3 * _HELD_OUT.value + _QUESTIONS.value
    logging.info("%d documents in %s, %.1f s", total, _OUTPUT.value, time.monotonic() - started)
    if _PREVIEW.value:
        preview.write(_PREVIEW.value, corpus)


if __name__ == "__main__":
    command_line.run(main)
