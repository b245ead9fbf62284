"""What a model says about pictures it has not seen, beside what is true. Examples are taken in order, never chosen."""

import base64
import collections
import dataclasses
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from data_pipelines import images
from data_pipelines.document import Document
from data_pipelines.tokenizer import Tokenizer
from nmm_jax.evaluation.sampling import Sampler, Sampling

CAPTION = "caption"  # the kind of question whose answer describes the picture
MOST_TOKENS = 64  # that are written of a caption or a text
SMALL = 64  # pixels; up to here a picture is kept exactly


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with its pictures, the true continuation and the model's."""

    kind: str
    combination: str  # of attributes: "seen" in training, "held_out" from it, or "" where that is not known
    pictures: tuple[str, ...]  # data URIs
    prompt: str
    truth: str
    said: str
    right: bool | None  # None where there are many right answers


def captions_of(documents: Iterable[Document], count: int) -> list[Document]:
    """The first documents of one picture and one text, each as (picture, text): something to describe."""
    found = []
    for document in documents:
        if len(document.images) == len(document.texts) == 1:
            found.append(dataclasses.replace(document, parts=(*document.images, *document.texts)))
        if len(found) == count:
            break
    return found


def first_of_kinds(questions: Iterable[Document], count: int, of_caption: int) -> list[Document]:
    """The first `count` questions of every kind, and `of_caption` of the kind that describes."""
    taken: dict[str, list[Document]] = collections.defaultdict(list)
    for question in questions:
        kind = question.metadata["kind"]
        if len(taken[kind]) < (of_caption if kind == CAPTION else count):
            taken[kind].append(question)
    return [question for kind in taken.values() for question in kind]


def answer(sampler: Sampler, tokenizer: Tokenizer, questions: Sequence[Document], size: int) -> list[Example]:
    """The model's answers, each as long as the true one; right as evaluation counts it, word for word."""
    prompts = [dataclasses.replace(q, parts=q.parts[:-1]) for q in questions]
    truths = [tokenizer.encode(q.texts[-1]).tolist() for q in questions]
    written = sampler.generate(prompts, max(map(len, truths), default=0), title="answers")
    examples = []
    for question, truth, tokens in zip(questions, truths, written, strict=True):
        tokens = tokens[: len(truth)]
        examples.append(
            Example(
                question.metadata["kind"],
                question.metadata["combination"],
                _pictures(question, size),
                " ".join(question.texts[:-1]),
                question.texts[-1],
                tokenizer.decode(tokens),
                tokens == truth,
            )
        )
    return examples


def describe(sampler: Sampler, tokenizer: Tokenizer, captions: Sequence[Document], size: int) -> list[Example]:
    """What the model says of each picture until it ends the document, or MOST_TOKENS."""
    prompts = [dataclasses.replace(c, parts=c.images) for c in captions]
    written = sampler.generate(prompts, MOST_TOKENS, title="captions")
    return [
        Example(CAPTION, "", _pictures(c, size), "", c.texts[0], tokenizer.decode(tokens), None)
        for c, tokens in zip(captions, written, strict=True)
    ]


def continue_texts(sampler: Sampler, tokenizer: Tokenizer, texts: Sequence[str], sampling: Sampling) -> list[Example]:
    """The first third of each text (at most 400 characters), and how the model goes on."""
    starts = []
    for text in texts:
        start = text[: min(400, max(1, len(text) // 3))]
        starts.append(start.rsplit(" ", 1)[0] if " " in start else start)
    prompts = [Document(f"text {i}", "text", (start,)) for i, start in enumerate(starts)]
    written = sampler.generate(prompts, MOST_TOKENS, sampling, title="texts")
    return [
        Example("text", "", (), start, text[len(start) :][:600], tokenizer.decode(tokens), None)
        for start, text, tokens in zip(starts, texts, written, strict=True)
    ]


def _pictures(document: Document, size: int) -> tuple[str, ...]:
    return tuple(_data_uri(data, size) for data in document.images)


def _data_uri(data: bytes, size: int) -> str:
    """The picture as the model sees it: small ones exactly, larger ones as a JPEG."""
    file = io.BytesIO()
    kind = "png" if size <= SMALL else "jpeg"
    Image.fromarray(images.to_eval(data, size)).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
