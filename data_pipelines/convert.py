"""Converts files in the wild to a dataset of documents (store.py).

    python -m data_pipelines.convert --format=webdataset --input='laion/*.tar' --output=data/captions
    python -m data_pipelines.convert --format=obelics --input='obelics/*.parquet' --image_root=obelics/images \\
        --output=data/interleaved
    python -m data_pipelines.convert --format=jsonl --input='dclm/*.jsonl.zst' --output=data/text --held_out=0.001

Records that cannot be used are counted, kept aside in OUTPUT/rejected and reported; the run goes on. Input files are
read by parallel processes; what comes out does not depend on how many. docs/data.md says what each format expects.
"""

import collections
import concurrent.futures
import dataclasses
import glob
import io
import multiprocessing
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from configs import command_line
from data_pipelines import rejects
from data_pipelines.checking import VERIFY, is_held_out, usable
from data_pipelines.document import Document
from data_pipelines.formats import FORMATS, UNREADABLE, Reader, reader
from data_pipelines.images import MAX_PIXELS
from data_pipelines.progress import CountedFile, Progress
from data_pipelines.rejects import Quarantine, Rejected
from data_pipelines.store import HELD_OUT, SHARD_BYTES, TRAIN, DatasetFolder, Shard, ShardWriter


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a process needs to know to convert a file."""

    reader: Reader
    held_out: float = 0.01  # of the documents, chosen by their ids
    verify: str = "decode"
    max_pixels: int = MAX_PIXELS
    shard_bytes: int = SHARD_BYTES
    licence: str = ""

    def __post_init__(self):
        if self.verify not in VERIFY:
            raise ValueError(f"--verify={self.verify} is not known; it is one of {', '.join(VERIFY)}")
        if not 0 <= self.held_out < 1:
            raise ValueError(
                f"--held_out={self.held_out} is no fraction of the documents; it is at least 0 and below 1"
            )
        if not 0 < self.max_pixels <= MAX_PIXELS:
            raise ValueError(f"--max_pixels={self.max_pixels} is not in 1..{MAX_PIXELS}, what training decodes")
        if self.shard_bytes <= 0:
            raise ValueError(f"--shard_bytes={self.shard_bytes} must be positive")


@dataclasses.dataclass(frozen=True)
class Converted:
    """What came of one part of the input."""

    shards: dict[str, list[Shard]]
    licences: collections.Counter[str]
    rejected: collections.Counter[str]
    examples: dict[str, Rejected]


def convert(
    conversion: Conversion,
    inputs: Sequence[str],
    output: str | os.PathLike,
    *,
    workers: int = 1,
    overwrite: bool = False,
    command: str = "",
) -> dict:
    """Makes the dataset `output` of the files that the patterns `inputs` name, prints a report, returns the card.

    Raises ValueError when an option is wrong or no document came out, FileNotFoundError when a pattern names no file,
    FileExistsError when the output exists, OSError when it cannot be written; then there is no dataset.
    """
    files = input_files(inputs)
    folder = DatasetFolder(output, overwrite)
    names = document_prefixes(files)
    groups = _grouped(files, conversion.shard_bytes)
    parts = [(folder.path, part, [(f, names[f]) for f in group]) for part, group in enumerate(groups)]
    context = multiprocessing.get_context("spawn")
    progress = Progress(context)
    with folder, progress.shown(sum(map(os.path.getsize, files))):
        if min(workers, len(parts)) <= 1:
            converted = [_convert_part(conversion, progress, *part) for part in parts]
        else:
            converted = _in_processes(conversion, progress, parts, min(workers, len(parts)), context)
        shards = {split: [s for part in converted for s in part.shards.get(split, ())] for split in (TRAIN, HELD_OUT)}
        licences = sum((part.licences for part in converted), collections.Counter())
        rejected = sum((part.rejected for part in converted), collections.Counter())
        examples = [part.examples for part in converted]
        if not any(shards.values()):
            why = rejects.table(rejected, examples) if rejected else "  (the files held no records)"
            raise ValueError(f"no document came out of {len(files)} files, so no dataset was made:\n{why}")
        rejects.merge(folder.path / "rejected")
        card = folder.publish(conversion.reader.source, shards, licences, rejected, command)
    print(report(card, examples, folder.final))
    return card


def input_files(patterns: Sequence[str]) -> list[str]:
    """The files that glob patterns name, sorted; each pattern must name one."""
    files = set()
    for pattern in patterns:
        found = [path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)]
        if not found:
            raise FileNotFoundError(f"--input={pattern} names no file (looked in {os.getcwd()})")
        files.update(found)
    return sorted(files)


def document_prefixes(files: Sequence[str]) -> dict[str, str]:
    """What the ids of each file's documents begin with: its name, or where two share one, its path below them all."""
    names = {file: os.path.basename(file) for file in files}
    if len(set(names.values())) < len(files):
        above = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
        names = {file: os.path.relpath(file, above) for file in files}
    return names


def report(card: dict, examples: Sequence[dict[str, Rejected]], folder: pathlib.Path) -> str:
    """What was made and what was turned away, for people."""
    lines = [f"dataset {folder}"]
    for split, counts in card["splits"].items():
        lines.append(
            f"  {split:<8}  {counts['documents']:,} documents, {counts['images']:,} images, "
            f"{counts['text_bytes'] / 1e6:,.2f} MB of text, {counts['image_bytes'] / 1e6:,.2f} MB of images, "
            f"{len(counts['shards'])} shards"
        )
    for split, counts in card["splits"].items():
        if not counts["documents"]:
            lines.append(f"  no document fell to the split {split!r}: reading it will be refused; see --held_out")
    if card["rejected"]:
        lines.append(f"  {sum(card['rejected'].values()):,} rejected, kept in {folder / 'rejected'}:")
        lines.append(rejects.table(card["rejected"], examples))
    else:
        lines.append("  nothing rejected")
    return "\n".join(lines)


def _grouped(files: Sequence[str], size: int) -> list[list[str]]:
    """Consecutive files together up to `size` bytes, so that small files do not make a shard each."""
    groups: list[list[str]] = []
    total = 0
    for file in files:
        total += os.path.getsize(file)
        if not groups or total > size:
            groups.append([])
            total = os.path.getsize(file)
        groups[-1].append(file)
    return groups


def _in_processes(conversion, progress, parts, workers, context) -> list[Converted]:
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_process, (conversion, progress)) as pool:
        futures = [pool.submit(_convert_in_process, *part) for part in parts]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()  # the first error ends the run, whichever part it is in
            return [future.result() for future in futures]
        except concurrent.futures.process.BrokenProcessPool as e:
            raise OSError(
                "a process of the conversion was killed, perhaps for want of memory; try again with fewer --workers"
            ) from e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_in_this_process: tuple[Conversion, Progress]  # of a worker process, set when it starts


def _start_process(conversion: Conversion, progress: Progress) -> None:
    global _in_this_process
    _in_this_process = (conversion, progress)


def _convert_in_process(*part) -> Converted:
    return _convert_part(*_in_this_process, *part)


def _convert_part(
    conversion: Conversion, progress: Progress, folder: pathlib.Path, part: int, files: Sequence[tuple[str, str]]
) -> Converted:
    """Converts some files, given with their prefixes, into shards of their own in the unfinished folder."""
    writer = ShardWriter(folder, part, conversion.shard_bytes, conversion.licence)
    quarantine = Quarantine(folder / "rejected", part)

    def reject(rejected: Rejected) -> None:
        quarantine.add(rejected)
        progress.add(progress.rejected, 1)

    try:
        for path, name in files:
            for item in _records(conversion.reader, path, name, progress):
                if isinstance(item, Rejected):
                    reject(item)
                    continue
                document, left_out = usable(item, name, conversion.verify, conversion.max_pixels)
                for rejected in left_out:
                    reject(rejected)
                if document is None:
                    continue
                try:
                    writer.add(document, HELD_OUT if is_held_out(document.id, conversion.held_out) else TRAIN)
                except (ValueError, OverflowError, TypeError) as e:  # lone surrogates, integers beyond 64 bits
                    reject(Rejected(document.id, name, "cannot be stored", str(e)))
                    continue
                progress.add(progress.documents, 1)
        writer.close()
    finally:
        writer.abandon()
        quarantine.close()
    return Converted(dict(writer.shards), writer.licences, quarantine.counts, quarantine.examples)


def _records(reader: Reader, path: str, name: str, progress: Progress) -> Iterator[Document | Rejected]:
    """The records of a file; where the file is broken they end with a Rejected that says so."""
    count = 0
    with io.BufferedReader(CountedFile(path, progress.bytes), 1 << 20) as file:
        try:
            for item in reader.read(file, name):
                count += 1
                yield item
        except UNREADABLE as e:
            yield Rejected(name, name, "file broken off", f"after {count:,} records: {e}")


def define_flags() -> None:
    flags.DEFINE_enum("format", None, list(FORMATS), "of the input files", required=True)
    flags.DEFINE_list("input", None, "files, as glob patterns", required=True)
    flags.DEFINE_string("output", None, "folder of the dataset to make", required=True)
    flags.DEFINE_string("source", None, "name of the source; the output folder's name if not given")
    flags.DEFINE_float("held_out", 0.01, "fraction of the documents for the held_out split, chosen by their ids")
    flags.DEFINE_integer("workers", os.cpu_count(), "parallel processes")
    flags.DEFINE_enum("verify", "decode", VERIFY, "images: decode each, read the header only, or trust them")
    flags.DEFINE_integer("max_pixels", MAX_PIXELS, "images with more are rejected from their header")
    flags.DEFINE_integer("shard_bytes", SHARD_BYTES, "of documents a shard, about")
    flags.DEFINE_string("licence", "", "of the documents that name none in their metadata")
    flags.DEFINE_bool("overwrite", False, "replace the dataset that is in the output folder")
    flags.DEFINE_string("image_column", None, "image_text_parquet: column of the images ('image')")
    flags.DEFINE_string("text_column", None, "image_text_parquet: column of the texts ('text')")
    flags.DEFINE_string("text_key", None, "jsonl: key of the text ('text')")
    flags.DEFINE_string("image_root", None, "image_text_parquet, obelics, mmc4: folder or tar of images that are named")
    flags.DEFINE_string("split_on", None, "text: file, line, blank_lines, separator:TEXT or start:REGEX ('file')")


def main(_) -> None:
    given = flags.FLAGS
    option_names = {field.name for format in FORMATS.values() for field in dataclasses.fields(format)} - {"source"}
    options = {name: str(given[name].value) for name in sorted(option_names) if given[name].value is not None}
    convert(
        Conversion(
            reader(given.format, given.source or pathlib.Path(given.output).absolute().name, options),
            given.held_out,
            given.verify,
            given.max_pixels,
            given.shard_bytes,
            given.licence,
        ),
        given.input,
        given.output,
        workers=given.workers,
        overwrite=given.overwrite,
        command=shlex.join(["python", "-m", "data_pipelines.convert", *sys.argv[1:]]),
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
