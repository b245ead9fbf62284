"""Another captioner's words beside the original ones or instead of them; what is held out stays as it is."""

import gzip
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from small_corpus import picture

from data_pipelines.document import Document
from data_pipelines.recaption import read_captions, recaption
from data_pipelines.store import Dataset, DatasetWriter, read_card

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [
    Document("a", "old", (picture(1), "a dog"), {"license": "CC0"}),
    Document("b", "old", ("a cat", picture(2))),
    Document("c", "old", (picture(3), "a hen")),
]
HELD_OUT = Document("d", "old", (picture(4), "a cow"))


@pytest.fixture
def folder(tmp_path):
    with DatasetWriter(tmp_path / "old", "old") as writer:
        for document in DOCUMENTS:
            writer.add(document)
        writer.add(HELD_OUT, "held_out")
    return tmp_path / "old"


def told(path, split="train"):
    return [(d.id, d.source, d.parts) for d in Dataset.open(path, split)]


def test_beside(folder, tmp_path):
    report = recaption(folder, {"a": "brown", "b": "grey", "d": "black and white"}, tmp_path / "both")
    assert told(tmp_path / "both") == [
        ("a", "both", (picture(1), "a dog")),
        ("a#recaption", "both", (picture(1), "brown")),
        ("b", "both", ("a cat", picture(2))),
        ("b#recaption", "both", ("grey", picture(2))),
        ("c", "both", (picture(3), "a hen")),
    ]
    assert told(tmp_path / "both", "held_out") == [("d", "both", HELD_OUT.parts)]
    assert Dataset.open(tmp_path / "both")[1].metadata == {"license": "CC0"}
    assert "train     2 documents with a caption beside the original one, 1 as they were" in report


def test_instead_and_of_all_splits(folder, tmp_path):
    captions = {"a": "brown", "d": "black and white"}
    recaption(folder, captions, tmp_path / "new", "instead", ("train", "held_out"))
    assert [parts for _, _, parts in told(tmp_path / "new")] == [
        (picture(1), "brown"),
        ("a cat", picture(2)),
        (picture(3), "a hen"),
    ]
    assert told(tmp_path / "new", "held_out") == [("d", "new", (picture(4), "black and white"))]


def test_wrong_captions_leave_no_dataset(folder, tmp_path):
    output = tmp_path / "new"
    with pytest.raises(
        ValueError, match=r"no document of dataset .*old has the id 'x', nor 1 other ids; ids look like"
    ):
        recaption(folder, {"a": "brown", "x": "?", "y": "?"}, output)
    with pytest.raises(ValueError, match="none is of a document in the splits train"):
        recaption(folder, {"d": "black and white"}, output)
    with pytest.raises(ValueError, match=r"has no documents in a split 'test'; it has \['held_out', 'train'\]"):
        recaption(folder, {"a": "brown"}, output, splits=("test",))
    with pytest.raises(ValueError, match="--mode=over is not known; it is one of beside, instead"):
        recaption(folder, {"a": "brown"}, output, "over")
    with DatasetWriter(tmp_path / "pages", "pages") as writer:
        writer.add(Document("p", "pages", ("see", picture(1), "and", picture(2))))
    with pytest.raises(ValueError, match="document 'p' has 2 images and 2 texts"):
        recaption(tmp_path / "pages", {"p": "two"}, output)
    assert not output.exists() and not output.with_name("new.incomplete").exists()


def test_lines_from_several_files_plain_and_compressed(tmp_path):
    (tmp_path / "1.jsonl").write_text('{"id": "a", "caption": "brown", "model": "m"}\n\n')
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(b'{"id": "b", "caption": "grey"}\n'))
    assert read_captions([str(tmp_path / "*.jsonl*")]) == {"a": "brown", "b": "grey"}
    with pytest.raises(FileNotFoundError, match="names no file"):
        read_captions([str(tmp_path / "*.parquet")])


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": "b"', r"captions.jsonl:2 is not a JSON object"),
        ('["b", "grey"]', r"captions.jsonl:2 is not a JSON object: a list"),
        ('{"id": "b", "text": "grey"}', r"captions.jsonl:2 is no caption: .* found the keys \['id', 'text'\]"),
        ('{"id": "b", "caption": " "}', "captions.jsonl:2 is no caption"),
        ('{"id": 7, "caption": "grey"}', "captions.jsonl:2 is no caption"),
        ('{"id": "a", "caption": "grey"}', "captions.jsonl:2: 'a' had a caption before"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"id": "a", "caption": "brown"}) + f"\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_captions([str(path)])


def test_the_command(folder, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"id": "a", "caption": "brown"}\n')
    command = [sys.executable, "-m", "data_pipelines.recaption", f"--input={folder}", f"--output={tmp_path / 'both'}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, f"--captions={tmp_path}/new.jsonl"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(told(tmp_path / "both")) == 4
    assert "--captions=" in read_card(tmp_path / "both")["command"]
    done = subprocess.run(
        [*command, f"--captions={tmp_path}/new.jsonl"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "recaption: " in done.stderr and "already exists" in done.stderr
    assert "Traceback" not in done.stderr


def test_captions_by_colour():
    spec = importlib.util.spec_from_file_location("by_colour", ROOT / "launch" / "caption_by_colour.py")
    by_colour = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(by_colour)
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[8:40, 8:40] = 220, 30, 30
    pixels[40:56, 8:40] = 5, 5, 5
    assert by_colour.caption(pixels) == "a drawing on white, mostly red and black"
    assert by_colour.caption(np.full((64, 64, 3), (20, 20, 120), np.uint8)) == "a dark drawing on blue, mostly blue"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert by_colour.caption(noise).startswith("a photo, mostly ")
    names = by_colour.colour_names(np.array([[200, 200, 200], [250, 220, 30], [120, 70, 20], [240, 90, 170]], np.uint8))
    assert names.tolist() == ["grey", "yellow", "brown", "pink"]
