import json

import numpy as np
import pytest

from data_pipelines import tokenizer
from nmm_jax.generate import as_text, read_prompt, read_prompts


@pytest.fixture
def images(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    return [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_images_take_the_places_of_their_marks(images):
    prompt = read_prompt("first <image> then <image> what changed?", images)
    assert prompt.parts == ("first", b"a", "then", b"b", "what changed?")
    assert read_prompt("<image>", images[:1]).parts == (b"a",)
    assert read_prompt("no image at all", []).parts == ("no image at all",)


@pytest.mark.parametrize("text, count", [("<image> <image> what?", 1), ("what?", 1), ("<image>", 2), ("<image>", 0)])
def test_marks_and_images_must_be_as_many(images, text, count):
    with pytest.raises(ValueError, match=rf"has {text.count('<image>')} <image> marks and {count} images"):
        read_prompt(text, images[:count])


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image file .*nowhere.png"):
        read_prompt("<image>", [str(tmp_path / "nowhere.png")])


def test_a_file_of_prompts(tmp_path, images):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "hello"}) + "\n" + json.dumps({"prompt": "<image>?", "images": ["b.png"]}))
    assert [p.parts for p in read_prompts(str(path))] == [("hello",), (b"b", "?")]
    path.write_text('{"prompt": "hello"}\n{"text": "x"}\n')
    with pytest.raises(ValueError, match="line 2: expected"):
        read_prompts(str(path))


def test_text_arrives_in_whole_characters():
    t = tokenizer.load("bytes")
    tokens = [np.array([i]) for i in t.encode("né ✓!")]
    pieces = list(as_text(tokens, t))
    assert "".join(pieces) == "né ✓!"
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) > 3
