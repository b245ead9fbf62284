"""Copies datasets from a bucket to a local disk, where training reads documents at random.

    python -m data_pipelines.stage --input=gs://bucket/data --output=/local/data [--only=captions,text] [--workers=16]

Everything under --input comes along: datasets, tokenizers, row plans; --only takes some of the names right under it.
Every machine of a run needs the data on its disk, and runs this command by itself. Where each of its processes runs it,
one copies and the others wait.

A file is written beside its name and takes it when it is complete: of the size that the bucket tells and, where it is a
dataset's shard, of the size and with the records that the card tells (store.py). A dataset's card comes last. So
whatever has its name is whole, and the same command goes on where it was stopped.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import fsspec
import tqdm
from absl import flags

from configs import command_line
from data_pipelines import paths, store
from data_pipelines.locking import locked

BLOCK = 8 << 20  # bytes
LOCK = ".staging.lock"  # in --output, held by the process that copies


class StageError(RuntimeError):
    """What was copied is not what should be there; the message names the file and what to do."""


@dataclasses.dataclass(frozen=True)
class File:
    """One to copy."""

    source: str  # as its file system calls it
    name: str  # under --input and under --output
    size: int  # bytes
    shard: store.Shard | None  # as the card of its dataset lists it

    @property
    def is_card(self) -> bool:
        return os.path.basename(self.name) == store.CARD


def stage(source: str, target: str | os.PathLike, only: Iterable[str] = (), workers: int = 16) -> str:
    """Copies what is missing; returns what was done, in words.

    Raises:
      BucketError: `source` cannot be reached.
      ValueError: it is in no bucket, or `target` is in one.
      FileNotFoundError: there is nothing.
      StageError: a file that arrived is not as it should be, or there is no room for all.
    """
    if not paths.is_remote(source):
        raise ValueError(f"--input={source} is not in a bucket; expected gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
    if paths.is_remote(target):
        raise ValueError(f"--output={target} is in a bucket; give a folder on a disk")
    folder = pathlib.Path(target).absolute()
    files, root = fsspec.core.url_to_fs(str(paths.reach(source)))
    found = listing(files, root, frozenset(only))
    whole = sum(file.size for file in found)
    with locked(folder / LOCK):
        missing = _missing(found, folder)
        _copy_all(files, missing, folder, whole, workers)
    return f"{folder}: {len(found)} files, {whole / 1e9:.3f} GB, of which {len(missing)} were copied"


def listing(files: fsspec.AbstractFileSystem, root: str, only: frozenset[str]) -> list[File]:
    """The files under `root`, with what the cards among them tell.

    Raises:
      FileNotFoundError: there are none, or one of `only` is not among them.
      StageError: a card lists a shard that is not there, or one of another size.
    """
    about = {path[len(root) :].lstrip("/"): entry for path, entry in files.find(root, detail=True).items()}
    about = {name: entry for name, entry in about.items() if name and not name.endswith("/")}  # no folder's placeholder
    there = {name.split("/")[0] for name in about}
    if absent := sorted(only - there):
        raise FileNotFoundError(f"--only: there is no {absent[0]!r} in {root}; there are {', '.join(sorted(there))}")
    if only:
        about = {name: entry for name, entry in about.items() if name.split("/")[0] in only}
    if not about:
        raise FileNotFoundError(f"--input: there is nothing in {root}")
    shards: dict[str, store.Shard] = {}
    for name in about:
        if os.path.basename(name) == store.CARD:
            shards |= _shards(name, json.loads(files.cat_file(f"{root}/{name}")))
    for name, shard in shards.items():
        has = about[name]["size"] if name in about else None
        if has != shard.file_bytes:
            what = "is missing" if has is None else f"has {has:,} bytes"
            raise StageError(
                f"{root}/{name} {what}, its card says {shard.file_bytes:,} bytes: the dataset in the bucket is not "
                "whole; copy it there again"
            )
    return [File(entry["name"], name, entry["size"], shards.get(name)) for name, entry in sorted(about.items())]


def _shards(card_name: str, card: Mapping) -> dict[str, store.Shard]:
    listed = [store.Shard(**shard) for split in card["splits"].values() for shard in split["shards"]]
    return {os.path.join(os.path.dirname(card_name), shard.file): shard for shard in listed}


def _missing(found: Sequence[File], folder: pathlib.Path) -> list[File]:
    """Those that are not there as they are in the bucket now, and the card of each dataset that has such a file."""
    before: dict[str, store.Shard] = {}
    for card in (file.name for file in found if file.is_card):
        if (folder / card).exists():
            before |= _shards(card, json.loads((folder / card).read_text()))

    def is_there(file: File) -> bool:
        path = folder / file.name
        same = file.shard is None or before.get(file.name, file.shard) == file.shard
        return same and path.exists() and path.stat().st_size == file.size

    missing = {file.name for file in found if not is_there(file)}
    folders = {os.path.dirname(name) for name in missing}
    return [file for file in found if file.name in missing or (file.is_card and os.path.dirname(file.name) in folders)]


def _copy_all(
    files: fsspec.AbstractFileSystem, missing: Sequence[File], folder: pathlib.Path, whole: int, workers: int
) -> None:
    """whole: bytes that there will be, of these files and of those that are there."""
    needed = sum(file.size for file in missing)
    if needed > (free := shutil.disk_usage(folder).free):
        raise StageError(f"{folder} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are to come: make room")
    cards = [file for file in missing if file.is_card]
    for card in cards:
        (folder / card.name).unlink(missing_ok=True)
    with tqdm.tqdm(total=whole, initial=whole - needed, unit="B", unit_scale=True, desc="staging") as bar:
        lock = threading.Lock()

        def arrived(count: int) -> None:
            with lock:
                bar.update(count)

        for batch in ([file for file in missing if not file.is_card], cards):
            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                copies = [pool.submit(_copy, files, file, folder / file.name, arrived) for file in batch]
                try:
                    for copy in concurrent.futures.as_completed(copies):
                        copy.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise


def _copy(files: fsspec.AbstractFileSystem, file: File, target: pathlib.Path, arrived: Callable[[int], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with files.open(file.source, "rb", block_size=BLOCK) as source, open(partial, "wb") as sink:
        while block := source.read(BLOCK):
            sink.write(block)
            arrived(len(block))
    size = partial.stat().st_size
    if size != file.size:
        raise StageError(f"{target}: {size:,} bytes came, {file.size:,} are in the bucket; run the same command again")
    if file.shard:
        try:
            digest = store.digest(partial)
        except ValueError as e:
            digest = f"none: {e}"
        if digest != file.shard.digest:
            raise StageError(
                f"{target}: its records are not those of the dataset's card (digest {digest}, expected "
                f"{file.shard.digest}); run the same command again, and if that does not help copy the dataset to the "
                "bucket again"
            )
    os.replace(partial, target)


if __name__ == "__main__":
    _INPUT = flags.DEFINE_string("input", None, "gs://bucket/folder or s3://bucket/folder", required=True)
    _OUTPUT = flags.DEFINE_string("output", None, "folder on a local disk", required=True)
    _ONLY = flags.DEFINE_list("only", [], "datasets and files right under --input; all of them, unless given")
    _WORKERS = flags.DEFINE_integer("workers", 16, "files copied at a time", lower_bound=1)

    def main(_):
        print(stage(_INPUT.value, _OUTPUT.value, _ONLY.value, _WORKERS.value))

    command_line.run(main)
