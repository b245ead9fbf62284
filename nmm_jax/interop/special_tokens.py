"""A model's own tokenizer.json with our names for the special tokens that it has, under their ids.

    <s>   id 1   becomes   <|bos|>   id 1

So a text begins with the token that the model has always seen there. Those it lacks are added behind its tokens.
"""

import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath

from data_pipelines import tokenizer

# Where one token has two of these tasks, the first is its name; most models end texts with it and begin none.
_ORDER = ("eos", "bos", "image", "pad")


def adopt(source: pathlib.Path, target: epath.Path, ids: Mapping[str, int | None]) -> list[str]:
    """Writes the tokenizer; returns the special tokens that the model has none of, which have new ids.

    Args:
      ids: of the model's own special tokens; None where it has none.
    """
    content = json.loads(source.read_text(encoding="utf-8"))
    taken: set[int] = set()
    for name in _ORDER:
        own = ids.get(name)
        if own is not None and own not in taken and _rename(content, own, tokenizer.SPECIALS[name]):
            taken.add(own)
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as renamed:
        json.dump(content, renamed, ensure_ascii=False)
        renamed.flush()
        return tokenizer.prepare(renamed.name, target)


def _rename(content: dict[str, Any], own: int, new: str) -> bool:
    """Gives the token with this id another name, wherever it stands; False if there is no such token."""
    added = next((t for t in content.get("added_tokens", ()) if t["id"] == own), None)
    model = content.get("model", {})
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, dict):
        old = added["content"] if added else next((word for word, i in vocabulary.items() if i == own), None)
        if old in vocabulary:
            model["vocab"] = {new if word == old else word: i for word, i in vocabulary.items()}
    else:  # of Unigram, [word, score] in order
        old = added["content"] if added else vocabulary[own][0] if own < len(vocabulary) else None
        model["vocab"] = [[new if word == old else word, score] for word, score in vocabulary]
    if old is None:
        return False
    if added:
        added |= {"content": new, "special": True}
    if model.get("unk_token") == old:
        model["unk_token"] = new
    if content.get("post_processor"):
        content["post_processor"] = _replaced(content["post_processor"], old, new)
    return True


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {new if key == old else key: _replaced(x, old, new) for key, x in value.items()}
    if isinstance(value, list):
        return [_replaced(x, old, new) for x in value]
    return new if value == old else value
