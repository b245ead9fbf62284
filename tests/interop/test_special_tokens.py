"""A model's own special tokens keep their ids under our names, in every kind of tokenizer.json."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data_pipelines import tokenizer
from nmm_jax.interop.special_tokens import adopt

WORDS = ["<unk>", "<s>", "</s>", "a", "dog", "<image>"]


def ids(words):
    return {word: i for i, word in enumerate(words)}


def library(kind):
    if kind == "unigram":
        made = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(WORDS)], unk_id=0))
    elif kind == "bpe":
        made = Tokenizer(
            models.BPE({w: i for i, w in enumerate([*WORDS, "d", "o", "g", "do"])}, [("d", "o"), ("do", "g")])
        )
    else:
        made = Tokenizer(models.WordLevel(ids(WORDS), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@pytest.mark.parametrize("kind", ["words", "bpe", "unigram"])
def test_ids_stay(tmp_path, kind):
    theirs = library(kind)
    theirs.save(str(tmp_path / "theirs.json"))
    added = adopt(tmp_path / "theirs.json", tmp_path / "ours.json", {"bos": 1, "eos": 2, "pad": None, "image": 5})
    ours = tokenizer.load(str(tmp_path / "ours.json"))
    assert (ours.bos, ours.eos, ours.image) == (1, 2, 5)
    assert added == ["<|pad|>", "<|boi|>", "<|eoi|>"]
    assert sorted((ours.pad, ours.boi, ours.eoi)) == list(range(theirs.get_vocab_size(), theirs.get_vocab_size() + 3))
    assert ours.encode("a dog").tolist() == theirs.encode("a dog", add_special_tokens=False).ids
    # Their library goes on putting the same id in front.
    again = Tokenizer.from_file(str(tmp_path / "ours.json"))
    assert again.encode("a dog").ids == theirs.encode("a dog").ids
    assert [p.name for p in tmp_path.glob("*.renamed")] == []


def test_one_token_for_two_tasks_is_the_end_of_texts(tmp_path):
    library("words").save(str(tmp_path / "theirs.json"))
    added = adopt(tmp_path / "theirs.json", tmp_path / "ours.json", {"bos": 2, "eos": 2, "pad": 2})
    ours = tokenizer.load(str(tmp_path / "ours.json"))
    assert ours.eos == 2 and min(ours.bos, ours.pad) == 6 and {"<|bos|>", "<|pad|>"} < set(added)


def test_a_token_that_is_not_there_is_added(tmp_path):
    library("words").save(str(tmp_path / "theirs.json"))
    assert "<|bos|>" in adopt(tmp_path / "theirs.json", tmp_path / "ours.json", {"bos": 77})
    assert tokenizer.load(str(tmp_path / "ours.json")).vocab_size == len(WORDS) + 6
