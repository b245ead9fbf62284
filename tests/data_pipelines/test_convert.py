"""Conversion as a whole: what is kept, what is turned away, and that neither hangs on the number of processes."""

import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import resource
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import rejects, store
from data_pipelines.checking import is_held_out
from data_pipelines.convert import Conversion, convert
from data_pipelines.formats import reader
from data_pipelines.progress import CountedFile, Progress
from data_pipelines.store import Dataset

ROOT = pathlib.Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


def picture(seed, format="JPEG", size=(48, 40)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def huge_png(side=30_000):
    """A valid PNG of side x side black pixels: 109 MB as bits, 2.7 GB as RGB, a file of 0.5 MB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deflate = zlib.compressobj(1)
    rows = b"".join(deflate.compress(bytes(1 + (side + 7) // 8)) for _ in range(side)) + deflate.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def write_tar(path, members):
    with tarfile.open(path, "w") as t:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))


def pairs(keys):
    for k in keys:
        yield f"{k:03d}.jpg", picture(k)
        yield f"{k:03d}.txt", f"caption {k}".encode()


def run(format, inputs, output, *, workers=1, overwrite=False, options=None, **settings):
    settings = {"held_out": 0.0} | settings
    return convert(
        Conversion(reader(format, "demo", options or {}), **settings),
        [str(i) for i in inputs],
        output,
        workers=workers,
        overwrite=overwrite,
    )


def rejected(output):
    return [json.loads(line) for line in (output / "rejected" / "rejected.jsonl").read_text().splitlines()]


def test_bad_records_are_counted_kept_aside_and_skipped(tmp_path, capsys):
    jpeg = picture(1, size=(200, 200))
    write_tar(
        tmp_path / "in.tar",
        [
            *pairs([0]),
            ("010.jpg", jpeg[: len(jpeg) // 2]),
            ("010.txt", b"a truncated JPEG"),
            ("011.png", huge_png()),
            ("011.txt", b"a very large PNG"),
            ("012.jpg", picture(2)),
            ("012.txt", b" \n"),
            ("013.jpg", picture(3)),
            ("014.webp", b"not an image at all"),
            ("014.txt", b"no image"),
            ("015.jpg", picture(4)),
            ("015.txt", b"lone surrogate"),
            ("015.json", b'{"x": "\\ud800"}'),
            *pairs([20]),
        ],
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    card = run("webdataset", [tmp_path / "in.tar"], tmp_path / "out")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"{grown:,} kB more memory at the peak; the large PNG decoded is 2.7 GB"
    assert [d.texts for d in Dataset.open(tmp_path / "out")] == [("caption 0",), ("caption 20",)]
    reasons = {r["id"]: r["reason"] for r in rejected(tmp_path / "out")}
    assert reasons == {
        "in.tar/010": "bad image",
        "in.tar/011": "image too large",
        "in.tar/012": "empty text",
        "in.tar/013": "no text",
        "in.tar/014": "bad image",
        "in.tar/015": "cannot be stored",
    }
    counts = {"bad image": 2, "image too large": 1, "empty text": 1, "no text": 1, "cannot be stored": 1}
    assert card["rejected"] == counts == store.read_card(tmp_path / "out")["rejected"]
    kept = {r["id"]: r["data"] for r in rejected(tmp_path / "out")}
    assert (tmp_path / "out" / "rejected" / kept["in.tar/010"]).read_bytes() == jpeg[: len(jpeg) // 2]
    report = capsys.readouterr().out
    assert "2 documents, 2 images" in report and "30000x30000" in report
    assert all(f"{reason}" in report for reason in counts)


def test_header_only_and_no_verification(tmp_path):
    jpeg = picture(1, size=(200, 200))
    write_tar(
        tmp_path / "in.tar", [("a.jpg", jpeg[: len(jpeg) // 2]), ("a.txt", b"a"), ("b.jpg", b"x"), ("b.txt", b"b")]
    )
    assert run("webdataset", [tmp_path / "in.tar"], tmp_path / "h", verify="header")["rejected"] == {"bad image": 1}
    assert run("webdataset", [tmp_path / "in.tar"], tmp_path / "n", verify="none")["rejected"] == {}


def test_an_interleaved_document_loses_its_bad_images_only(tmp_path):
    good, bad = picture(1), picture(2)[:60]
    documents = [[good, "a", bad, "b"], [bad, "c", bad], [bad, "d"], [good, " "], ["e"]]
    columns = {
        "images": [[p if isinstance(p, bytes) else None for p in d] for d in documents],
        "texts": [[p if isinstance(p, str) else None for p in d] for d in documents],
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    run("obelics", [tmp_path / "in.parquet"], tmp_path / "out")
    assert [d.parts for d in Dataset.open(tmp_path / "out")] == [(good, "a\n\nb"), ("e",)]
    assert [(r["id"].removeprefix("in.parquet/"), r["reason"]) for r in rejected(tmp_path / "out")] == [
        ("0#2", "bad image"),
        ("1#0", "bad image"),
        ("1#2", "bad image"),
        ("1", "no image left"),
        ("2", "bad image"),
        ("3", "empty text"),
    ]


def test_a_tar_cut_in_half_keeps_what_was_read_and_the_run_goes_on(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(range(20)))
    with tarfile.open(tmp_path / "a.tar") as t:
        starts = [member.offset for member in t if member.name.endswith("jpg")]
    data = (tmp_path / "a.tar").read_bytes()
    half = len(data) // 2
    (tmp_path / "a.tar").write_bytes(data[:half])
    whole = sum(start + 512 <= half for start in starts) - 1  # the header of the next record closes the one before
    write_tar(tmp_path / "b.tar", pairs(range(20, 23)))
    card = run("webdataset", [tmp_path / "*.tar"], tmp_path / "out")
    ids = [d.id for d in Dataset.open(tmp_path / "out")]
    assert 5 < whole < 15 and ids[:whole] == [f"a.tar/{k:03d}" for k in range(whole)]
    assert ids[whole:] == [f"b.tar/{k:03d}" for k in (20, 21, 22)]
    assert card["rejected"] == {"file broken off": 1}
    [line] = rejected(tmp_path / "out")
    assert line["file"] == "a.tar" and f"after {whole} records" in line["detail"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_broken_compressed_file_does_not_stop_the_others(tmp_path, suffix):
    (tmp_path / f"bad.jsonl.{suffix}").write_bytes(
        {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd"}[suffix] + b"junk" * 9
    )
    (tmp_path / "good.jsonl").write_text('{"text": "fine"}\n')
    card = run("jsonl", [tmp_path / "*"], tmp_path / "out")
    assert card["splits"]["train"]["documents"] == 1 and card["rejected"] == {"file broken off": 1}


def test_the_number_of_processes_does_not_show(tmp_path):
    for t in range(5):
        write_tar(
            tmp_path / f"{t}.tar", [*pairs(range(t * 10, t * 10 + 10)), (f"bad{t}.jpg", b"x"), (f"bad{t}.txt", b"y")]
        )
    outputs = {}
    for workers in (1, 2, 3):
        folder = tmp_path / f"out{workers}"
        run("webdataset", [tmp_path / "*.tar"], folder, workers=workers, shard_bytes=30_000, held_out=0.2)
        outputs[workers] = {
            str(f.relative_to(folder)): f.read_bytes()
            for f in folder.rglob("*")
            if f.is_file() and f.name != "card.json"
        }
    assert len([name for name in outputs[1] if "train" in name]) >= 5
    assert "rejected/000004.bin" in outputs[1]
    assert outputs[1] == outputs[2] == outputs[3]
    ids = [d.id for d in Dataset.open(tmp_path / "out2")] + [d.id for d in Dataset.open(tmp_path / "out2", "held_out")]
    assert sorted(ids) == sorted(f"{k // 10}.tar/{k:03d}" for k in range(50))


def test_held_out_is_a_stable_fraction_of_ids():
    ids = [f"f.tar/{k}" for k in range(20_000)]
    one = {i for i in ids if is_held_out(i, 0.01)}
    five = {i for i in ids if is_held_out(i, 0.05)}
    assert one < five  # a larger fraction adds to a smaller one
    assert abs(len(one) - 200) < 4 * 200**0.5 and abs(len(five) - 1000) < 4 * 1000**0.5
    assert not any(is_held_out(i, 0.0) for i in ids)


def test_wrong_use_is_explained(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    with pytest.raises(FileNotFoundError, match=r"--input=.*\*.tar names no file"):
        run("webdataset", [tmp_path / "*.tar"], tmp_path / "out")
    run("jsonl", [tmp_path / "a.jsonl"], tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run("jsonl", [tmp_path / "a.jsonl"], tmp_path / "out")
    run("jsonl", [tmp_path / "a.jsonl"], tmp_path / "out", overwrite=True)
    with pytest.raises(ValueError, match="no document came out of 1 files.*\n.*\n.*no text .*--text_key"):
        run("jsonl", [tmp_path / "a.jsonl"], tmp_path / "out2", options={"text_key": "body"})
    with pytest.raises(ValueError, match="--held_out=2"):
        run("jsonl", [tmp_path / "a.jsonl"], tmp_path / "out2", held_out=2)
    with pytest.raises(ValueError, match="--verify=some"):
        run("jsonl", [tmp_path / "a.jsonl"], tmp_path / "out2", verify="some")
    with pytest.raises(ValueError, match="--max_pixels=1000000000 is not in"):
        run("jsonl", [tmp_path / "a.jsonl"], tmp_path / "out2", max_pixels=10**9)
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "a.parquet")
    for k in range(3):
        pq.write_table(pa.table({"image": [picture(k)], "text": ["good"]}), tmp_path / f"{k}.parquet")
    with pytest.raises(ValueError, match="a.parquet has no column 'image'.*its columns are picture"):
        run("image_text_parquet", [tmp_path / "*.parquet"], tmp_path / "out2", workers=2, shard_bytes=10)
    assert not (tmp_path / "out2").exists() and not (tmp_path / "out2.incomplete").exists()


def test_files_of_one_name_in_two_folders_keep_their_documents_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.jsonl").write_text('{"text": "fine"}\n')
    run("jsonl", [tmp_path / "*/0.jsonl"], tmp_path / "out")
    assert [d.id for d in Dataset.open(tmp_path / "out")] == ["a/0.jsonl:1", "b/0.jsonl:1"]


def test_rejected_bytes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(rejects, "KEPT_FILES", 3)
    (tmp_path / "a.jsonl").write_text("broken\n" * 10 + '{"text": "fine"}\n')
    (tmp_path / "b.jsonl").write_text("broken\n" * 10)
    run("jsonl", [tmp_path / "*.jsonl"], tmp_path / "out", shard_bytes=10)
    records = rejected(tmp_path / "out")
    assert len(records) == 20 and [r["data"] for r in records] == [f"00000{k}.bin" for k in range(3)] + [None] * 17
    assert sorted(os.listdir(tmp_path / "out" / "rejected")) == [f"00000{k}.bin" for k in range(3)] + ["rejected.jsonl"]


def test_progress_ends_at_the_size_of_the_input(tmp_path):
    """Parquet reads its footer twice and passes over columns; a broken file is left early: each counts once."""
    pq.write_table(pa.table({"images": [[picture(1)]] * 9, "texts": [[None]] * 9}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1" + bytes(1000))
    progress = Progress(multiprocessing.get_context("spawn"))
    size = 0
    for name in ("a.parquet", "b.parquet"):
        size += (tmp_path / name).stat().st_size
        with io.BufferedReader(CountedFile(str(tmp_path / name), progress.bytes)) as file:
            with contextlib.suppress(pa.ArrowException):
                list(reader("obelics", "demo", {}).read(file, name))
            assert progress.bytes.value <= size
        assert progress.bytes.value == size


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "data_pipelines.convert", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )


def test_command(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(range(10)))
    write_tar(tmp_path / "b.tar", pairs(range(10, 20)))
    arguments = [f"--input={tmp_path}/a.tar,{tmp_path}/b.tar", f"--output={tmp_path}/captions", "--format=webdataset"]
    first = command(*arguments, "--workers=2", "--shard_bytes=20000", "--licence=CC0", "--held_out=0")
    assert first.returncode == 0, first.stderr
    assert "20 documents, 20 images" in first.stdout and "20 documents" in first.stderr
    card = store.read_card(tmp_path / "captions")
    assert card["source"] == "captions" and card["licences"] == {"CC0": 20}
    assert card["command"].startswith("python -m data_pipelines.convert --input=")
    again = command(*arguments)
    assert again.returncode == 1 and "--overwrite" in again.stderr and "Traceback" not in again.stderr


def test_command_on_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        for t in range(2):
            write_tar(tmp_path / f"{t}.tar", [(f"{t}.png", picture(t, "PNG", (600, 600))), (f"{t}.txt", b"noise")])
        made = command(
            "--format=webdataset",
            f"--input={tmp_path}/*.tar",
            f"--output={disk}/out",
            "--workers=2",
            "--shard_bytes=1000000",
        )
        assert made.returncode == 1
        assert "the disk is full" in made.stderr and "Traceback" not in made.stderr
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the sample data in ../shared/data")
@pytest.mark.parametrize(
    "format, inputs, options, documents, images",
    [
        ("webdataset", ["captions/openstax-biology-*.tar"], {}, 1348, 1348),
        ("webdataset", ["captions/coco-open-000000.tar"], {}, 51, 51),
        ("image_text_parquet", ["captions/openmoji.parquet"], {}, 2346, 2346),
        ("obelics", ["interleaved/18f-blog.obelics.parquet"], {}, 327, 632),
        (
            "mmc4",
            ["interleaved/openstax-sociology.mmc4.jsonl.gz"],
            {"image_root": str(SHARED / "interleaved/openstax-sociology.mmc4_images.tar")},
            67,
            208,
        ),
        ("jsonl", ["text/*.jsonl.gz", "text/*.jsonl.zst"], {}, 350 + 703 + 257, 0),
        ("text", ["text/wikitext-2/valid.txt"], {"split_on": "start:^ = [^=].* = $"}, 60, 0),
        ("text", ["text/wikitext-2/test.txt"], {"split_on": "start:^ = [^=].* = $"}, 60 + 2, 0),
    ],
)
def test_counts_of_the_sample_data(tmp_path, format, inputs, options, documents, images):
    card = run(format, [SHARED / i for i in inputs], tmp_path / "out", options=options, verify="header", workers=1)
    train = card["splits"]["train"]
    assert (train["documents"], train["images"], card["rejected"]) == (documents, images, {})
