"""Each format, on small files written here by other libraries, and on the broken ones the world is full of."""

import gzip
import hashlib
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipelines.document import Document
from data_pipelines.formats import FORMATS, UNREADABLE, reader
from data_pipelines.rejects import Rejected


def read(format, data, name="f", **options):
    return list(reader(format, "demo", options).read(io.BytesIO(data), name))


def parts(items):
    assert all(isinstance(item, Document) for item in items), items
    return [item.parts for item in items]


def tar(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


def parquet(columns):
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def lines(*records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


# WebDataset -------------------------------------------------------------------------------------------------

PAIRS = [
    ("000.jpg", b"one"),
    ("000.txt", b" a dog \n"),
    ("000.json", b'{"width": 3}'),
    ("dir/001.PNG", b"two"),
    ("dir/001.json", '{"caption": "un café"}'.encode()),
    ("dir/001.cls", b"7"),
]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_webdataset(compress):
    first, second = read("webdataset", compress(tar(PAIRS)), "s.tar")
    assert first == Document("s.tar/000", "demo", (b"one", "a dog"), {"width": 3})
    assert second == Document("s.tar/dir/001", "demo", (b"two", "un café"), {"caption": "un café"})


def test_webdataset_bad_records_do_not_stop_the_others():
    members = [
        ("a.jpg", b"A"),
        ("b.txt", b"text without an image"),
        ("c.jpg", b"C"),
        ("c.txt", b"\xff\xfe"),
        ("d.jpg", b"D"),
        ("d.txt", b"d"),
        ("d.json", b'{"broken": '),
        ("e.jpg", b"E"),
        ("e.txt", b"good"),
    ]
    *bad, good = read("webdataset", tar(members))
    assert [(r.id, r.reason) for r in bad] == [
        ("f/a", "no text"),
        ("f/b", "no image"),
        ("f/c", "text is not UTF-8"),
        ("f/d", "broken json"),
    ]
    assert bad[0].data == b"A"
    assert good.parts == (b"E", "good")


def cut_points():
    """Every kind of place to cut a tar of three pairs, each member a header and one block."""
    return [*range(512, 6 * 1024, 512), 700, 1500, 5000, 6 * 1024]


@pytest.mark.parametrize("at", cut_points())
def test_webdataset_cut_anywhere_is_an_error_after_whole_records(at):
    """tarfile alone takes a cut between two members, or within a header, for the end of the tar."""
    data = tar([(f"{k}.{x}", x.encode() * 100) for k in range(3) for x in ("jpg", "txt")])[:at]
    whole = []
    with pytest.raises(UNREADABLE):
        for item in reader("webdataset", "demo", {}).read(io.BytesIO(data), "f"):
            whole.append(item)
    assert parts(whole) == [(b"jpg" * 100, "txt" * 100)] * len(whole)
    assert len(whole) >= max(0, at // 2048 - 1)  # a record takes 2048 bytes; the last may be in doubt


def test_webdataset_with_a_damaged_header_in_the_middle():
    data = bytearray(tar([(f"{k}.{x}", b"x") for k in range(3) for x in ("jpg", "txt")]))
    data[2048 + 10] ^= 0xFF
    with pytest.raises(tarfile.ReadError, match="at byte 2,048"):
        read("webdataset", bytes(data))


# Image-text parquet -----------------------------------------------------------------------------------------


def test_parquet_bytes_structs_and_other_columns():
    data = parquet(
        {
            "image": [b"one", b"two"],
            "text": ["a", "b"],
            "license": ["CC0", None],
            "id": pa.array([2**63, 1], pa.uint64()),
        }
    )
    items = read("image_text_parquet", data, "t.parquet")
    assert parts(items) == [(b"one", "a"), (b"two", "b")]
    assert [i.id for i in items] == ["t.parquet/0", "t.parquet/1"]
    assert items[0].metadata == {"license": "CC0", "id": 2**63}
    data = parquet({"jpg": [{"bytes": b"one", "path": None}], "alt": ["a"]})
    assert parts(read("image_text_parquet", data, image_column="jpg", text_column="alt")) == [(b"one", "a")]


def test_parquet_paths_are_looked_up(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(b"X")
    (tmp_path / "secret").write_bytes(b"S")
    struct = [{"bytes": None, "path": p} for p in ("x.png", "elsewhere/x.png", "../secret", "y.png", None)]
    items = read(
        "image_text_parquet", parquet({"image": struct, "text": list("abcde")}), image_root=str(tmp_path / "images")
    )
    assert parts(items[:2]) == [(b"X", "a"), (b"X", "b")]
    assert [item.reason for item in items[2:]] == ["missing image"] * 3
    [item] = read("image_text_parquet", parquet({"image": ["x.png"], "text": ["a"]}))
    assert "--image_root" in item.detail


def test_parquet_without_the_columns_says_what_there_is():
    data = parquet({"picture": [b"x"], "caption": ["y"]})
    with pytest.raises(ValueError, match="t.parquet has no column 'image'.*--image_column.*'text'.*picture, caption"):
        read("image_text_parquet", data, "t.parquet")
    with pytest.raises(ValueError, match="no column 'images'.*no column 'texts'.*picture, caption"):
        read("obelics", data)


def test_parquet_cut_short_is_unreadable():
    with pytest.raises(UNREADABLE):
        read("image_text_parquet", parquet({"image": [b"x"], "text": ["y"]})[:-10])


# Interleaved ------------------------------------------------------------------------------------------------


def test_obelics_with_bytes():
    data = parquet(
        {
            "images": [[None, {"bytes": b"i", "path": None}, None], [{"bytes": b"j", "path": None}]],
            "texts": [["First", None, "then"], [None]],
            "general_metadata": ['{"url": "http://x"}', "not json"],
            "metadata": ['[null, {"alt_text": "an i"}, null]', None],
        }
    )
    first, second = read("obelics", data, "o")
    assert first == Document(
        "o/0", "demo", ("First", b"i", "then"), {"url": "http://x", "images": [{"alt_text": "an i"}]}
    )
    assert second.parts == (b"j",)


def test_obelics_urls_in_a_folder(tmp_path):
    url = ["https://a.org/p/one.jpg", "https://b.org/two%20x.jpg?w=3", "https://c.org/three.jpg", "https://d.org/four"]
    (tmp_path / (hashlib.sha256(url[0].encode()).hexdigest() + ".jpg")).write_bytes(b"1")
    (tmp_path / "one.jpg").write_bytes(b"an image of another page")
    (tmp_path / "b.org").mkdir()
    (tmp_path / "b.org" / "two x.jpg").write_bytes(b"2")
    (tmp_path / "three.jpg").write_bytes(b"3")
    data = parquet({"images": [[*url, None]], "texts": [[None] * 4 + ["end"]]})
    missing, document = read("obelics", data, image_root=str(tmp_path))
    assert document.parts == (b"1", b"2", b"3", "end")
    assert (missing.id, missing.reason) == ("f/0#3", "missing image") and url[3] in missing.detail


def test_obelics_unequal_lists():
    data = parquet({"images": [[b"x"], [None]], "texts": [[None, "y"], ["z"]]})
    bad, good = read("obelics", data)
    assert bad.reason == "lists of unequal length" and good.parts == ("z",)


def test_mmc4_in_a_tar(tmp_path):
    (tmp_path / "images.tar").write_bytes(tar([("./a.jpg", b"A"), ("b.jpg", b"B")]))
    info = [{"image_name": n, "matched_text_index": k} for n, k in (("b.jpg", 2), ("a.jpg", 0), ("c.jpg", 1))]
    data = gzip.compress(
        lines(
            {"url": "u", "text_list": ["zero", "one", "two", "three"], "image_info": info},
            {"text_list": ["only"], "image_info": [{"image_name": "a.jpg", "matched_text_index": 7}]},
        )
    )
    missing, document, bad = read("mmc4", data, image_root=str(tmp_path / "images.tar"))
    assert document.parts == (b"A", "zero\none", b"B", "two\nthree")
    assert document.metadata == {"url": "u", "images": info[:2]}
    assert missing.reason == "missing image" and "c.jpg" in missing.detail
    assert bad.reason == "not an MMC4 record"


def test_image_root_that_does_not_exist():
    with pytest.raises(ValueError, match="--image_root=/nowhere does not exist"):
        read("obelics", parquet({"images": [["a.jpg"]], "texts": [[None]]}), image_root="/nowhere")


# Text -------------------------------------------------------------------------------------------------------

RECORDS = [{"id": "a", "text": "Alpha ✓", "lang": "en"}, {"text": "Beta"}, {"id": 3, "text": "\n Gamma\n"}]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_json_lines(compress):
    items = read("jsonl", compress(lines(*RECORDS[:2]) + b"\n" + lines(RECORDS[2])), "t.jsonl")
    assert parts(items) == [("Alpha ✓",), ("Beta",), ("\n Gamma\n",)]
    assert [i.id for i in items] == ["a", "t.jsonl:2", "3"]
    assert items[0].metadata == {"lang": "en"}


def test_json_lines_of_several_frames_are_read_to_the_end():
    for compress in (gzip.compress, zstandard.compress):
        items = read("jsonl", compress(lines(RECORDS[0])) + compress(lines(RECORDS[1])))
        assert len(items) == 2


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_compression_is_an_error_not_an_end(compress, damage):
    data = compress(lines(*({"text": hashlib.sha256(bytes([k % 256, k // 256])).hexdigest()} for k in range(20_000))))
    half = len(data) // 2
    data = data[:half] if damage == "cut" else data[:half] + bytes(200) + data[half + 200 :]
    with pytest.raises(UNREADABLE):
        read("jsonl", data)


def test_bad_json_lines():
    data = (
        b'{"text": "good"}\n{"text": broken\n["text"]\n{"body": "x"}\n'
        + b"[" * 100_000
        + b'\n\xff\xfe\n{"text": null}\n{"text": "end"}'
    )
    items = read("jsonl", data)
    assert [getattr(i, "reason", "fine") for i in items] == [
        "fine",
        "broken json",
        "broken json",
        "no text",
        "broken json",
        "broken json",
        "no text",
        "fine",
    ]
    assert items[1].id == "f:2" and items[1].data == b'{"text": broken\n'
    assert "--text_key" in items[3].detail and "body" in items[3].detail
    assert parts(read("jsonl", b'{"body": "x"}', text_key="body")) == [("x",)]


TEXT = "\ufeffOne\nstill one\n\n \nTwo\n= H =\nThree"


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("file", ["One\nstill one\n\n \nTwo\n= H =\nThree"]),
        ("line", ["One", "still one", "Two", "= H =", "Three"]),
        ("blank_lines", ["One\nstill one", "Two\n= H =\nThree"]),
        ("separator:= (", ["One\nstill one\n\n \nTwo\n= H =\nThree"]),
        ("separator:still", ["One", " one\n\n \nTwo\n= H =\nThree"]),
        ("separator:o", ["One\nstill", "ne\n\n \nTw", "= H =\nThree"]),
        ("start:^= .* =$", ["One\nstill one\n\n \nTwo", "= H =\nThree"]),
    ],
)
def test_plain_text_rules(rule, expected):
    items = read("text", TEXT.encode(), split_on=rule)
    assert [text.strip(" ") for (text,) in parts(items)] == [text.strip(" ") for text in expected]
    assert [i.id for i in items] == [f"f/{k}" for k in range(len(expected))]


def test_plain_text_that_is_not_utf8():
    first, second = read("text", b"caf\xe9\n\nfine", split_on="blank_lines")
    assert isinstance(first, Rejected) and first.reason == "text is not UTF-8" and first.data == b"caf\xe9"
    assert second.parts == ("fine",)


@pytest.mark.parametrize("rule", ["sentence", "separator:", "line:x", "separator:a\nb", "start:"])
def test_wrong_rules_are_refused(rule):
    with pytest.raises(ValueError, match="--split_on="):
        reader("text", "demo", {"split_on": rule})


def test_a_broken_regex_is_refused():
    with pytest.raises(ValueError, match="--split_on=start:\\("):
        reader("text", "demo", {"split_on": "start:("})


# Options ----------------------------------------------------------------------------------------------------


def test_options_of_another_format_are_refused():
    with pytest.raises(ValueError, match="--text_key means nothing to --format=obelics, which has --image_root"):
        reader("obelics", "demo", {"text_key": "x"})
    with pytest.raises(ValueError, match="--format=csv is not known"):
        reader("csv", "demo", {})


@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_file_is_unreadable_or_holds_nothing(format):
    try:
        assert read(format, b"") == []
    except UNREADABLE:
        pass
