"""The Document store: what is written comes back, and what is not whole does not look like a dataset."""

import concurrent.futures
import errno
import json
import os
import pickle
import subprocess
from multiprocessing import get_context

import pytest
from array_record.python.array_record_module import ArrayRecordReader

from data_pipelines import store
from data_pipelines.document import Document
from data_pipelines.store import Dataset, DatasetWriter

DOCUMENTS = [Document(f"d{i}", "demo", (f"text {i} ", bytes([i]) * 1000, "é" * i), {"n": i}) for i in range(20)]


def write(folder, documents=DOCUMENTS, **options):
    with DatasetWriter(folder, "demo", **options) as writer:
        for i, document in enumerate(documents):
            writer.add(document, "held_out" if i % 5 == 4 else "train")
    return folder


def test_documents_come_back_in_order_over_several_shards(tmp_path):
    folder = write(tmp_path / "demo", shard_bytes=3500)
    assert list(Dataset.open(folder)) == [d for i, d in enumerate(DOCUMENTS) if i % 5 != 4]
    assert list(Dataset.open(folder, "held_out")) == DOCUMENTS[4::5]
    shards = sorted(folder.glob("train-*.array_record"))
    assert len(shards) > 2
    assert shards[0].name == f"train-00000-of-{len(shards):05d}.array_record"
    assert "group_size:1," in ArrayRecordReader(str(shards[0])).writer_options_string()


def test_card_counts(tmp_path):
    documents = [
        Document("a", "demo", (b"12345", "né")),
        Document("b", "demo", ("x",), {"license": "CC0"}),
        Document("c", "demo", (b"1", b"22", "yy")),
    ]
    with DatasetWriter(tmp_path / "demo", "demo", licence="MIT", command="made by hand") as writer:
        for document in documents:
            writer.add(document)
    card = json.loads((tmp_path / "demo" / "card.json").read_text())
    train = card["splits"]["train"]
    assert (train["documents"], train["images"], train["text_bytes"], train["image_bytes"]) == (3, 3, 6, 8)
    assert card["licences"] == {"MIT": 2, "CC0": 1}
    assert card["command"] == "made by hand" and card["source"] == "demo"


def test_index_out_of_range(tmp_path):
    dataset = Dataset.open(write(tmp_path / "demo"))
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError, match="which has 16"):
            dataset[index]


def test_reads_from_threads_and_from_other_processes(tmp_path):
    dataset = Dataset.open(write(tmp_path / "demo", shard_bytes=3500))
    expected = [d.id for d in dataset]
    order = [(7 * i) % len(dataset) for i in range(200)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [d.id for d in pool.map(dataset.__getitem__, order)] == [expected[i] for i in order]
    assert pickle.loads(pickle.dumps(dataset))[3] == dataset[3]
    with concurrent.futures.ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(dataset.__getitem__, 5).result() == dataset[5]


def test_fingerprint_is_of_the_content(tmp_path):
    same = [Dataset.open(write(tmp_path / name, command=name)).fingerprint for name in ("a", "b")]
    assert same[0] == same[1]
    changed = [*DOCUMENTS[:3], Document("d3", "demo", ("text 3!", *DOCUMENTS[3].parts[1:]), {"n": 3}), *DOCUMENTS[4:]]
    assert Dataset.open(write(tmp_path / "c", changed)).fingerprint != same[0]
    assert Dataset.open(tmp_path / "a", "held_out").fingerprint != same[0]


def test_errors_of_opening_name_folder_and_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset in .*nowhere.*data_pipelines.convert"):
        Dataset.open(tmp_path / "nowhere")
    folder = write(tmp_path / "demo", DOCUMENTS[:4])
    with pytest.raises(ValueError, match=r"demo has no split 'held_out'; it has \['train'\]"):
        Dataset.open(folder, "held_out")
    with DatasetWriter(tmp_path / "empty", "demo"):
        pass
    with pytest.raises(ValueError, match="empty.*'train' is empty"):
        Dataset.open(tmp_path / "empty")
    shard = next(folder.glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="train-00000-of-00001.array_record has .* its card says"):
        Dataset.open(folder)
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        Dataset.open(folder)


def test_a_damaged_record_names_itself(tmp_path):
    folder = write(tmp_path / "demo", [Document("a", "demo", (os.urandom(20_000), "x"))])
    shard = next(folder.glob("train-*"))
    data = bytearray(shard.read_bytes())
    data[10_000] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="demo split 'train', document 0"):
        Dataset.open(folder)[0]


def test_existing_datasets_are_replaced_only_when_asked(tmp_path):
    folder = write(tmp_path / "demo")
    with pytest.raises(FileExistsError, match="already exists.*--overwrite"):
        DatasetWriter(folder, "demo")
    write(folder, DOCUMENTS[:3], overwrite=True)
    assert len(Dataset.open(folder)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_a_folder_that_is_no_dataset_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no dataset"):
        DatasetWriter(tmp_path / "thesis", "demo", overwrite=True)


def test_an_exception_leaves_nothing_and_an_overwritten_dataset_stays(tmp_path):
    folder = write(tmp_path / "demo", DOCUMENTS[:3])
    with pytest.raises(ZeroDivisionError), DatasetWriter(folder, "demo", overwrite=True) as writer:
        writer.add(DOCUMENTS[0])
        raise ZeroDivisionError
    assert list(Dataset.open(folder)) == DOCUMENTS[:3]
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_killed_while_writing_looks_unfinished(tmp_path):
    """What kill -9 leaves: the folder with the other name. It is said, refused, and replaced with overwrite."""
    writer = DatasetWriter(tmp_path / "demo", "demo").__enter__()
    writer.add(DOCUMENTS[0])
    with pytest.raises(FileNotFoundError, match="unfinished demo.incomplete"):
        Dataset.open(tmp_path / "demo")
    with pytest.raises(FileExistsError, match="another run.*--overwrite"):
        DatasetWriter(tmp_path / "demo", "demo")
    assert len(Dataset.open(write(tmp_path / "demo", overwrite=True))) == 16


def test_full_disk(tmp_path, monkeypatch):
    """ArrayRecord reports a write that failed as a RuntimeError, at that write or at the next."""

    class FullDisk:
        def __init__(self, path, options):
            pass

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device; writing x; at byte 2097152")

        def close(self):
            pass

    monkeypatch.setattr(store, "ArrayRecordWriter", FullDisk)
    with pytest.raises(OSError, match="the disk is full.*demo was not made") as e:
        write(tmp_path / "demo")
    assert e.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [10_000, 300_000])
def test_really_full_disk(tmp_path, size):
    """On a 1 MB file system, where this user may mount one."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        with pytest.raises(OSError, match="the disk is full") as e:
            write(tmp_path / "demo", [Document(str(i), "demo", (os.urandom(size),)) for i in range(2_000_000 // size)])
        assert e.value.errno == errno.ENOSPC
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
