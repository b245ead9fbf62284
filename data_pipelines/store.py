"""A dataset on disk: ArrayRecord shards of documents, and the card that counts them.

    captions/
      train-00000-of-00002.array_record       one msgpack document a record (document.py), group_size:1,
      train-00001-of-00002.array_record       so that any record is one read away
      held_out-00000-of-00001.array_record
      card.json                               what is here, where it is from, what was rejected
      rejected/                               records that could not be used (rejects.py), if there were any

A dataset is written in FOLDER.incomplete, its card last, and the folder takes its name at the very end:
whatever carries the name is whole.
"""

import collections
import contextlib
import dataclasses
import datetime
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines import paths
from data_pipelines.document import Document

FORMAT_VERSION = 1
SHARD_BYTES = 256 << 20
CARD = "card.json"
TRAIN, HELD_OUT = "train", "held_out"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records, as the card lists it."""

    file: str
    documents: int
    images: int
    text_bytes: int
    image_bytes: int
    file_bytes: int
    digest: str  # of the records in their order


class Dataset:
    """One split of a dataset folder, read at random: `dataset[i]` is a Document.

    Files are opened when first read, reads may come from many threads, and a dataset may be sent to another process.
    """

    def __init__(self, folder: pathlib.Path, split: str, card: dict):
        self.folder = folder
        self.split = split
        self.card = card
        self.source: str = card["source"]
        self.shards = tuple(Shard(**shard) for shard in card["splits"][split]["shards"])
        content = [(shard.documents, shard.digest) for shard in self.shards]
        self.fingerprint: str = hashlib.sha256(repr((FORMAT_VERSION, split, content)).encode()).hexdigest()[:16]
        self._records = ArrayRecordDataSource([_Whole(str(folder / s.file), s.documents) for s in self.shards])

    @classmethod
    def open(cls, folder: str | os.PathLike, split: str = TRAIN) -> "Dataset":
        """Opens a split that exists, has documents, and whose files are all there in full.

        Raises FileNotFoundError when there is no dataset, ValueError when there is no such split, when it is empty,
        or when its shards are missing or cut.
        """
        require_on_disk(folder)
        folder = pathlib.Path(folder).absolute()
        card = read_card(folder)
        if split not in card["splits"]:
            raise ValueError(f"dataset {folder} has no split {split!r}; it has {sorted(card['splits'])}")
        if not card["splits"][split]["documents"]:
            raise ValueError(
                f"dataset {folder}: split {split!r} is empty (0 documents); see 'rejected' in {folder / CARD} for what "
                "was turned away, convert more input, or for a held-out split convert with a larger --held_out"
            )
        for shard in card["splits"][split]["shards"]:
            path = folder / shard["file"]
            found = path.stat().st_size if path.exists() else None
            if found != shard["file_bytes"]:
                have = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(
                    f"dataset {folder}: {shard['file']} {have}, its card says {shard['file_bytes']} bytes; "
                    "copy the folder again or convert again with --overwrite"
                )
        return cls(folder, split, card)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of dataset {self.folder} split {self.split!r}, which has {len(self)}")
        try:
            return Document.from_bytes(self._records[index])
        except (RuntimeError, ValueError) as e:  # RuntimeError: ArrayRecord could not read it
            raise ValueError(f"dataset {self.folder} split {self.split!r}, document {index}: {e}") from e

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


@dataclasses.dataclass(frozen=True)
class _Whole:
    """Tells ArrayRecordDataSource a shard's length, so that it need not open every file to count."""

    filename: str
    examples_in_shard: int
    skip: int = 0

    @property
    def take(self) -> int:
        return self.examples_in_shard


def require_on_disk(folder: str | os.PathLike) -> None:
    """Raises ValueError for a folder in a bucket: a row is many small random reads, which take a disk."""
    if paths.is_remote(folder):
        raise ValueError(
            f"{folder}: documents are read from a disk. Copy them there with python -m data_pipelines.stage "
            f"--input={folder} --output=FOLDER, or mount the bucket, and name that folder"
        )


def read_card(folder: str | os.PathLike) -> dict:
    """The card of a dataset folder."""
    require_on_disk(folder)
    path = pathlib.Path(folder) / CARD
    if not path.exists():
        unfinished = incomplete(folder)
        hint = f" (there is an unfinished {unfinished.name} beside it)" if unfinished.exists() else ""
        raise FileNotFoundError(
            f"no dataset in {path.parent}{hint}: it has no {CARD}; make one with python -m data_pipelines.convert "
            f"--output={path.parent}"
        )
    card = json.loads(path.read_text())
    if card["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {card['format_version']}, this code reads {FORMAT_VERSION}; convert again"
        )
    return card


def digest(shard: str | os.PathLike) -> str:
    """Of the records in a shard's file, as the card has it.

    Raises:
      ValueError: it is no shard, or a damaged one.
    """
    found = _Digest()
    try:
        with ArrayRecordDataSource([os.fspath(shard)]) as records:
            for i in range(len(records)):
                found.add(records[i])
    except (RuntimeError, ValueError) as e:
        raise ValueError(f"{shard}: {e}") from e
    return found.value


class _Digest:
    """Of records in their order."""

    def __init__(self):
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, record: bytes) -> None:
        self._hash.update(len(record).to_bytes(8, "little") + record)

    @property
    def value(self) -> str:
        return self._hash.hexdigest()


def incomplete(folder: str | os.PathLike) -> pathlib.Path:
    """Where a dataset is written until it is whole."""
    folder = pathlib.Path(folder)
    return folder.with_name(folder.name + ".incomplete")


class ShardWriter:
    """Writes documents into shards of at most about `shard_bytes`, each split apart, and counts them.

    Several may write into one folder, each with a `part` of its own: the order of parts is then the order of documents.
    """

    def __init__(self, folder: pathlib.Path, part: int = 0, shard_bytes: int = SHARD_BYTES, licence: str = ""):
        self._folder = folder
        self._part = part
        self._shard_bytes = shard_bytes
        self._licence = licence
        self._open: dict[str, _OpenShard] = {}
        self.shards: dict[str, list[Shard]] = collections.defaultdict(list)
        self.licences: collections.Counter[str] = collections.Counter()

    def add(self, document: Document, split: str = TRAIN) -> None:
        record = document.to_bytes()
        shard = self._open.get(split)
        if shard and shard.bytes + len(record) > self._shard_bytes:
            self._close(split)
            shard = None
        if shard is None:
            name = f"{split}.part-{self._part:05d}-{len(self.shards[split]):05d}"
            shard = self._open[split] = _OpenShard(self._folder / name)
        shard.add(document, record)
        metadata = document.metadata
        self.licences[str(metadata.get("license") or metadata.get("licence") or self._licence or "unknown")] += 1

    def close(self) -> None:
        """Finishes the open shards; without it they cannot be read."""
        for split in list(self._open):
            self._close(split)

    def abandon(self) -> None:
        """Lets go of the open files after an error."""
        for shard in self._open.values():
            with contextlib.suppress(OSError):
                shard.close()
        self._open.clear()

    def _close(self, split: str) -> None:
        self.shards[split].append(self._open[split].close())
        del self._open[split]


class _OpenShard:
    def __init__(self, path: pathlib.Path):
        self._path = path
        self._writer = self._write(ArrayRecordWriter, str(path), "group_size:1")
        self._digest = _Digest()
        self._documents = self._images = self._text_bytes = self._image_bytes = 0
        self.bytes = 0

    def add(self, document: Document, record: bytes) -> None:
        self._write(self._writer.write, record)
        self._digest.add(record)
        self.bytes += len(record)
        self._documents += 1
        self._images += len(document.images)
        self._text_bytes += sum(len(text.encode()) for text in document.texts)
        self._image_bytes += sum(map(len, document.images))

    def close(self) -> Shard:
        self._write(self._writer.close)
        return Shard(
            self._path.name,
            self._documents,
            self._images,
            self._text_bytes,
            self._image_bytes,
            self._path.stat().st_size,
            self._digest.value,
        )

    def _write(self, action, *arguments):
        """ArrayRecord reports a failed write, now or at the next one, as RuntimeError('... No space left ...')."""
        try:
            return action(*arguments)
        except RuntimeError as e:
            number = errno.ENOSPC if os.strerror(errno.ENOSPC) in str(e) else errno.EIO
            raise OSError(number, f"writing a dataset failed ({e})", str(self._path)) from e


class DatasetFolder:
    """The folder of a dataset that is being made: refuses to overwrite, cleans up on errors, publishes when whole.

    with DatasetFolder(output) as folder:
        ...  # write shards into folder.path
        folder.publish(...)
    """

    def __init__(self, folder: str | os.PathLike, overwrite: bool = False):
        require_on_disk(folder)
        self.final = pathlib.Path(folder).absolute()
        self.path = incomplete(self.final)
        if self.final.exists() and not (self.final / CARD).exists():
            raise FileExistsError(f"{self.final} exists and is no dataset (it has no {CARD}); choose another --output")
        for path, what in ((self.final, "already exists"), (self.path, "is left from, or in use by, another run")):
            if path.exists() and not overwrite:
                raise FileExistsError(f"{path} {what}; choose another --output, or replace it with --overwrite")

    def __enter__(self) -> "DatasetFolder":
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # nothing is there after publish
        if isinstance(exception, OSError) and exception.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: dataset {self.final} was not made and its unfinished files were removed; "
                "free some space, or choose another --output, and run the command again",
                exception.filename or str(self.path),
            ) from exception

    def publish(
        self,
        source: str,
        shards: Mapping[str, list[Shard]],
        licences: Mapping[str, int],
        rejected: Mapping[str, int],
        command: str,
    ) -> dict:
        """Numbers the shards, writes the card, and gives the folder its name. Returns the card."""
        splits = {}
        for split in sorted(shards) or [TRAIN]:
            named = []
            for k, shard in enumerate(shards.get(split, ())):
                file = f"{split}-{k:05d}-of-{len(shards[split]):05d}.array_record"
                os.rename(self.path / shard.file, self.path / file)
                named.append(dataclasses.replace(shard, file=file))
            totals = {
                name: sum(getattr(shard, name) for shard in named)
                for name in ("documents", "images", "text_bytes", "image_bytes")
            }
            splits[split] = totals | {"shards": [dataclasses.asdict(shard) for shard in named]}
        card = {
            "format_version": FORMAT_VERSION,
            "source": source,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
            "splits": splits,
            "rejected": dict(rejected),
            "licences": dict(sorted(licences.items(), key=lambda item: (-item[1], item[0]))),
        }
        (self.path / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
        if self.final.exists():
            replaced = self.final.with_name(self.final.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.final, replaced)
            os.rename(self.path, self.final)
            shutil.rmtree(replaced)
        else:
            os.rename(self.path, self.final)
        return card


class DatasetWriter:
    """Makes a dataset in one process.

    with DatasetWriter("data/captions", "captions") as writer:
        writer.add(Document("0", "captions", (jpeg, "a dog on a beach")))
        writer.add(Document("1", "captions", (jpeg2, "a red boat")), split="held_out")

    The folder exists from the end of the block on; after an exception there is none.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        source: str,
        *,
        licence: str = "",
        command: str = "",
        shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
    ):
        self._folder = DatasetFolder(folder, overwrite)
        self._source = source
        self._command = command
        self._shards = ShardWriter(self._folder.path, shard_bytes=shard_bytes, licence=licence)

    def __enter__(self) -> "DatasetWriter":
        self._folder.__enter__()
        return self

    def add(self, document: Document, split: str = TRAIN) -> None:
        self._shards.add(document, split)

    def __exit__(self, exception_type, exception, traceback) -> None:
        with contextlib.ExitStack() as stack:
            stack.push(self._folder)  # sees the exception of the block, or one of closing and publishing
            if exception is not None:
                self._shards.abandon()
                raise exception
            self._shards.close()
            self._folder.publish(self._source, self._shards.shards, self._shards.licences, {}, self._command)
