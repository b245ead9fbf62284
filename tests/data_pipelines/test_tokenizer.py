"""Tokenizers: nothing is lost, special tokens come from nowhere but their names, and refusals say what to do."""

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_pipelines import tokenizer
from data_pipelines.document import Document
from data_pipelines.store import DatasetWriter

TEXTS = ["The red square is left of the blue circle.", "two dogs, one beach", "naïve café, 東京, 🦊\n\tend", ""]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.train_bpe(TEXTS * 20, 400, path)
    return path


def foreign(path) -> None:
    """A tokenizer.json without special tokens, as found elsewhere."""
    library = Tokenizer(models.BPE(unk_token=None))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    library.enable_truncation(3)
    library.save(str(path))


def test_bytes_by_hand():
    t = tokenizer.load("bytes")
    assert (t.pad, t.bos, t.eos, t.image, t.boi, t.eoi) == (0, 1, 2, 3, 4, 5) and t.vocab_size == 262
    ids = t.encode("Aé")
    assert ids.dtype == np.int32 and ids.tolist() == [6 + 0x41, 6 + 0xC3, 6 + 0xA9]
    assert t.decode([t.bos, *ids, t.image, t.eos]) == "Aé"
    assert t.decode(t.encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(bpe, text):
    for t in (tokenizer.load("bytes"), tokenizer.load(str(bpe))):
        ids = t.encode(text)
        assert ids.ndim == 1 and ids.dtype == np.int32 and t.decode(ids) == text
        assert t.decode([t.bos, *ids, t.eos, t.pad]) == text


def test_bpe_agrees_with_the_library_and_has_the_size_asked(bpe):
    t, library = tokenizer.load(str(bpe)), Tokenizer.from_file(str(bpe))
    assert t.vocab_size == library.get_vocab_size() <= 400
    assert [getattr(t, name) for name in tokenizer.SPECIALS] == list(range(6))
    assert t.encode(TEXTS[0]).tolist() == library.encode(TEXTS[0]).ids
    assert len(t.encode(TEXTS[0])) < len(TEXTS[0]) / 2  # it has learned something


@pytest.mark.parametrize("name", tokenizer.SPECIALS.values())
def test_a_special_token_in_a_text_is_text(bpe, name):
    for t in (tokenizer.load("bytes"), tokenizer.load(str(bpe))):
        ids = t.encode(f"see {name} here")
        assert not set(ids.tolist()) & {getattr(t, special) for special in tokenizer.SPECIALS}
        assert t.decode(ids) == f"see {name} here"


def test_words(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.train_words(["a red square.", "a blue circle, a red one."], path)
    t = tokenizer.load(str(path))
    assert t.vocab_size == 6 + 1 + len({"a", "red", "square", ".", "blue", "circle", ",", "one"})
    assert len(t.encode("a red circle.")) == 4
    assert t.decode(t.encode("a red circle, one square.")) == "a red circle, one square."
    assert t.encode("green").tolist() == t.encode("purple").tolist() and len(t.encode("green")) == 1


def test_missing_special_tokens_are_named_and_can_be_added(tmp_path):
    theirs, ours = tmp_path / "theirs.json", tmp_path / "ours.json"
    foreign(theirs)
    with pytest.raises(tokenizer.TokenizerError) as e:
        tokenizer.load(str(theirs))
    assert all(name in str(e.value) for name in tokenizer.SPECIALS.values())
    assert f"prepare --input={theirs}" in str(e.value)
    assert tokenizer.prepare(theirs, ours) == list(tokenizer.SPECIALS.values())
    t, library = tokenizer.load(str(ours)), Tokenizer.from_file(str(theirs))
    assert t.vocab_size == library.get_vocab_size() + 6
    library.no_truncation()
    assert t.encode("two dogs, one beach").tolist() == library.encode("two dogs, one beach").ids  # not cut at 3
    assert tokenizer.prepare(ours, ours) == []


def test_relative_paths_are_looked_up_in_the_root_too(bpe):
    assert tokenizer.load(bpe.name, root=str(bpe.parent)).fingerprint == tokenizer.load(str(bpe)).fingerprint
    with pytest.raises(FileNotFoundError, match="no tokenizer 'none.json'.*none.json and .*none.json.*tokenizer train"):
        tokenizer.load("none.json", root=str(bpe.parent))


def test_what_is_no_tokenizer_is_refused(tmp_path):
    for content in ("not json", "{}", json.dumps({"model": 3})):
        path = tmp_path / "broken.json"
        path.write_text(content)
        with pytest.raises(tokenizer.TokenizerError, match="broken.json is no tokenizer.json"):
            tokenizer.load(str(path))


def test_fingerprint_follows_the_content(bpe, tmp_path):
    other = tmp_path / "tokenizer.json"
    tokenizer.train_bpe(TEXTS * 20, 300, other)
    marks = {tokenizer.load(name).fingerprint for name in ("bytes", str(bpe), str(other))}
    assert len(marks) == 3
    before = tokenizer.load(str(other)).fingerprint
    other.write_bytes(bpe.read_bytes())
    assert tokenizer.load(str(other)).fingerprint == tokenizer.load(str(bpe)).fingerprint != before


def test_threads_and_other_processes_agree(bpe):
    t = tokenizer.load(str(bpe))
    expected = [t.encode(text).tolist() for text in TEXTS] * 20
    with ThreadPoolExecutor(4) as pool:
        assert [ids.tolist() for ids in pool.map(t.encode, TEXTS * 20)] == expected
    copy = pickle.loads(pickle.dumps(t))
    assert copy.encode(TEXTS[0]).tolist() == expected[0] and copy.fingerprint == t.fingerprint


def test_commands(tmp_path):
    with DatasetWriter(tmp_path / "text", "text") as writer:
        for k, text in enumerate(TEXTS[:3] * 10):
            writer.add(Document(str(k), "text", (text,)))

    def run(*arguments):
        command = [sys.executable, "-m", "data_pipelines.tokenizer", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    output = tmp_path / "made" / "tokenizer.json"
    done = run("train", f"--input={tmp_path / 'text'}", "--vocab_size=320", f"--output={output}")
    assert done.returncode == 0, done.stderr
    t = tokenizer.load(str(output))
    assert t.vocab_size <= 320 and t.decode(t.encode(TEXTS[2])) == TEXTS[2]
    assert "model.vocab_size must be at least" in done.stdout
    foreign(tmp_path / "theirs.json")
    done = run("prepare", f"--input={tmp_path / 'theirs.json'}", f"--output={tmp_path / 'ours.json'}")
    assert done.returncode == 0 and "<|image|>" in done.stdout, done.stderr
    assert run("learn", "--input=x", "--output=y").returncode != 0
