"""Tokenizers: bytes, or any Hugging Face tokenizer.json that has the six special tokens.

    python -m data_pipelines.tokenizer train --input=data/captions,data/text --output=data/tokenizer.json
    python -m data_pipelines.tokenizer prepare --input=theirs/tokenizer.json --output=data/tokenizer.json

`prepare` adds the special tokens to a tokenizer that lacks them. The ids of a model's tokens are a tokenizer's; so
model.vocab_size must be at least its `vocab_size`.
"""

import abc
import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator

import numpy as np
from absl import app, flags
from etils import epath

from configs import command_line
from data_pipelines import paths

SPECIALS = {
    "pad": "<|pad|>",
    "bos": "<|bos|>",
    "eos": "<|eos|>",
    "image": "<|image|>",
    "boi": "<|boi|>",
    "eoi": "<|eoi|>",
}


class TokenizerError(ValueError):
    """A tokenizer that cannot be used; the message names the file and what to do."""


class Tokenizer(abc.ABC):
    """Text to token ids and back. Thread-safe; may be sent to another process.

    Attributes:
      vocab_size: one more than the largest id.
      pad, bos, eos, image, boi, eoi: ids of the special tokens, which `encode` never returns.
      fingerprint: changes when any text could be encoded otherwise.
    """

    vocab_size: int
    fingerprint: str
    pad: int
    bos: int
    eos: int
    image: int
    boi: int
    eoi: int

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 [tokens], without special tokens."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens say nothing."""


class ByteTokenizer(Tokenizer):
    """The special tokens are ids 0 to 5 in the order of SPECIALS; byte b of the UTF-8 text is 6 + b."""

    def __init__(self):
        for i, name in enumerate(SPECIALS):
            setattr(self, name, i)
        self.vocab_size = len(SPECIALS) + 256
        self.fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        # A lone surrogate is no UTF-8; it becomes a question mark rather than an error in the middle of a run.
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32) + len(SPECIALS)

    def decode(self, ids: Iterable[int]) -> str:
        data = bytes(i - len(SPECIALS) for i in map(int, ids) if len(SPECIALS) <= i < self.vocab_size)
        return data.decode("utf-8", "replace")


class JsonTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json, through the `tokenizers` library."""

    def __init__(self, path: str | os.PathLike):
        self._text = epath.Path(path).read_text(encoding="utf-8")
        ids = {name: self._tokenizer.token_to_id(token) for name, token in SPECIALS.items()}
        missing = [SPECIALS[name] for name, i in ids.items() if i is None]
        if missing:
            raise TokenizerError(
                f"{path} lacks the special tokens {' '.join(missing)}; add them with\n"
                f"  python -m data_pipelines.tokenizer prepare --input={path} --output=NEW.json"
            )
        for name, i in ids.items():
            setattr(self, name, i)
        self._special_ids = frozenset(ids.values())
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.fingerprint = hashlib.sha256(self._text.encode()).hexdigest()[:16]

    @functools.cached_property
    def _tokenizer(self):
        # Rows are encoded by many threads and processes at once; a pool inside each of them would only be in the way.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer as Library

        library = Library.from_str(self._text)
        library.no_truncation()
        library.no_padding()
        # "<|eos|>" in a web page is text like any other.
        library.encode_special_tokens = True
        return library

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if int(i) not in self._special_ids])


@functools.lru_cache(maxsize=8)
def _read(path: str, modified_ns: int) -> JsonTokenizer:
    del modified_ns  # part of the key: a file that was written anew is read anew
    return JsonTokenizer(path)


def load(name: str, root: str = "") -> Tokenizer:
    """The tokenizer "bytes", or that of a tokenizer.json; a relative path is looked up here, then in `root`.

    One in a bucket is read once in a process.

    Raises:
      FileNotFoundError: neither is there.
      BucketError: the bucket that it is in cannot be reached.
      TokenizerError: it is no tokenizer.json, or lacks the special tokens.
    """
    if name == "bytes":
        return ByteTokenizer()
    places = [paths.reach(name)] if paths.is_remote(name) else [epath.Path(name), epath.Path(root) / name]
    for path in places:
        if path.is_file():
            try:
                return _read(str(path), 0 if paths.is_remote(path) else os.stat(path).st_mtime_ns)
            except TokenizerError:
                raise
            except Exception as e:  # the library raises Exception itself for JSON that is no tokenizer
                raise TokenizerError(f"{path} is no tokenizer.json ({str(e)[:200]})") from e
    looked = " and ".join(dict.fromkeys(str(p) for p in places))
    raise FileNotFoundError(
        f"there is no tokenizer {name!r} (looked for {looked}); set data.tokenizer to 'bytes' or to a tokenizer.json, "
        "or make one with python -m data_pipelines.tokenizer train"
    )


def train_words(texts: Iterable[str], path: str | os.PathLike) -> None:
    """Writes a word-level tokenizer of every word and mark in `texts`. Words it has not seen become "<|unknown|>"."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    unknown = "<|unknown|>"
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    names = [*SPECIALS.values(), unknown, *words]
    library = Library(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=unknown))
    library.pre_tokenizer = split
    library.decoder = decoders.WordPiece(cleanup=True)
    library.add_special_tokens(list(SPECIALS.values()))
    _save(library, path)


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> None:
    """Writes a byte-level BPE tokenizer (any text can be encoded) of at most `vocab_size` tokens."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS.values()),
        show_progress=sys.stderr.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(texts, trainer)
    _save(library, path)


def prepare(source: str | os.PathLike, path: str | os.PathLike) -> list[str]:
    """Adds the special tokens that a tokenizer.json lacks, behind its own tokens; returns those added."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(epath.Path(source).read_text())
    missing = [token for token in SPECIALS.values() if library.token_to_id(token) is None]
    library.add_special_tokens(missing)
    _save(library, path)
    return missing


def _save(library, path: str | os.PathLike) -> None:
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    paths.write_text(path, library.to_str(pretty=True))


def _texts(folders: list[str], limit: int) -> Iterator[str]:
    """Texts of the training documents of datasets, taking turns, until `limit` bytes."""
    from data_pipelines.store import Dataset

    readers = [iter(Dataset.open(folder)) for folder in folders]
    taken = 0
    while readers and taken < limit:
        for reader in list(readers):
            document = next(reader, None)
            if document is None:
                readers.remove(reader)
                continue
            for text in document.texts:
                taken += len(text)
                yield text


def main(argv: list[str]) -> None:
    command = argv[1] if len(argv) == 2 else ""
    if command == "train":
        texts = _texts(_INPUT.value.split(","), _MEGABYTES.value << 20)
        if _KIND.value == "words":
            train_words(texts, _OUTPUT.value)
        else:
            train_bpe(texts, _VOCAB_SIZE.value, _OUTPUT.value)
        made = load(_OUTPUT.value)
        print(f"{_OUTPUT.value}: {made.vocab_size} tokens; model.vocab_size must be at least that")
    elif command == "prepare":
        added = prepare(_INPUT.value, _OUTPUT.value)
        made = load(_OUTPUT.value)
        print(f"{_OUTPUT.value}: {made.vocab_size} tokens, of which added: {' '.join(added) or 'none'}")
    else:
        raise app.UsageError("give a command: python -m data_pipelines.tokenizer train|prepare --input=… --output=…")


if __name__ == "__main__":
    _INPUT = flags.DEFINE_string(
        "input", None, "train: dataset folders, with commas; prepare: a tokenizer.json", required=True
    )
    _OUTPUT = flags.DEFINE_string("output", None, "tokenizer.json to write", required=True)
    _VOCAB_SIZE = flags.DEFINE_integer(
        "vocab_size", 16_384, "of a BPE tokenizer, special tokens included", lower_bound=300
    )
    _KIND = flags.DEFINE_enum("kind", "bpe", ["bpe", "words"], "byte-level BPE, or whole words")
    _MEGABYTES = flags.DEFINE_integer("megabytes", 512, "of text to train on, at most", lower_bound=1)
    command_line.run(main, words=True)
