"""Continues a prompt of text and images.

    python -m nmm_jax.generate --workdir=RUN --prompt="<image> what colour is the square?" --image=F.png
    python -m nmm_jax.generate --workdir=RUN --prompt="<image> <image> what changed?" --image=A.png --image=B.png
    python -m nmm_jax.generate --workdir=RUN --prompts=F.jsonl          lines {"prompt": "...", "images": ["A.png"]}

Each <image> stands for the next --image. Text is written as it is made; from --prompts, one line of JSON per prompt.
Without --temperature decoding is greedy. `--step` chooses another checkpoint than the last.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from absl import app, flags

from configs import command_line
from data_pipelines.document import Document, Part
from data_pipelines.tokenizer import Tokenizer
from nmm_jax.evaluation.restored import RunFlags
from nmm_jax.evaluation.sampling import Sampler, Sampling

MARK = "<image>"
_BATCH = 8  # prompts of a file that are continued together


def read_prompt(text: str, images: Sequence[str], name: str = "the prompt") -> Document:
    """The document that a prompt begins.

    Raises:
      ValueError: the marks in `text` and the images are not as many, or there is nothing at all.
      FileNotFoundError: there is no such image file.
    """
    texts = text.split(MARK)
    if len(texts) - 1 != len(images):
        raise ValueError(
            f"{name} has {len(texts) - 1} {MARK} marks and {len(images)} images; give one image per mark, in order"
        )
    parts: list[Part] = []
    for i, piece in enumerate(texts):
        if piece.strip():
            parts.append(piece.strip())
        if i < len(images):
            path = pathlib.Path(images[i])
            if not path.is_file():
                raise FileNotFoundError(f"{name}: there is no image file {path}")
            parts.append(path.read_bytes())
    return Document(name, "prompt", tuple(parts), {"prompt": text})


def read_prompts(path: str) -> list[Document]:
    """One document per line of a jsonl file; image paths are relative to its folder.

    Raises:
      ValueError: a line that is no such record, by its number.
    """
    prompts = []
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
            text, images = record["prompt"], record.get("images", [])
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as e:
            raise ValueError(f'{where}: expected {{"prompt": "...", "images": [...]}}, found {line[:80]!r}') from e
        prompts.append(read_prompt(text, [str(pathlib.Path(path).parent / i) for i in images], where))
    if not prompts:
        raise ValueError(f"{path} has no lines")
    return prompts


def as_text(tokens: Iterable[np.ndarray], tokenizer: Tokenizer) -> Iterator[str]:
    """Pieces of text as the tokens of one prompt arrive; a character split over tokens is held back until whole."""
    ids: list[int] = []
    written = ""
    for token in tokens:
        ids.append(int(token[0]))
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(written) :]
            written = text
    rest = tokenizer.decode(ids)[len(written) :]
    if rest:
        yield rest


if __name__ == "__main__":
    RUN = RunFlags()
    PROMPT = flags.DEFINE_string("prompt", "", f"text, with {MARK} where an image goes")
    IMAGE = flags.DEFINE_multi_string("image", [], "file of the next image; give it once per mark")
    PROMPTS = flags.DEFINE_string("prompts", "", 'instead: a file of lines {"prompt": ..., "images": [files]}')
    MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "at most so many tokens are written", 1)
    TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token; 1 samples from the model")
    TOP_K = flags.DEFINE_integer("top_k", 0, "sample among the k likeliest tokens; 0 is all")
    TOP_P = flags.DEFINE_float("top_p", 1.0, "sample among the likeliest tokens that together have this probability")
    SEED = flags.DEFINE_integer("seed", 0, "of the samples")

    def main(_: list[str]) -> None:
        if bool(PROMPT.value) == bool(PROMPTS.value):
            raise app.UsageError("give either --prompt or --prompts")
        sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
        if PROMPTS.value:
            prompts = read_prompts(PROMPTS.value)
        else:
            prompts = [read_prompt(PROMPT.value, IMAGE.value)]
        run, tokenizer = RUN.restore()
        sampler = Sampler(run, tokenizer, min(_BATCH, len(prompts)))
        speaks = jax.process_index() == 0
        if PROMPTS.value:
            written = sampler.generate(prompts, MAX_TOKENS.value, sampling, SEED.value, "prompts")
            for prompt, ids in zip(prompts, written, strict=True):
                if speaks:
                    print(json.dumps({**prompt.metadata, "text": tokenizer.decode(ids)}), flush=True)
        else:
            for piece in as_text(sampler.stream(prompts, MAX_TOKENS.value, sampling, SEED.value), tokenizer):
                print(piece if speaks else "", end="", flush=True)
            print()

    command_line.run(main)
