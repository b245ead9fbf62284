"""How files in the wild are read: one file a format, each a reader of documents.

A reader is a frozen dataclass whose fields are the options of its format (flags of the same names, see convert.py).
`read(file, name)` takes an open binary file and its name and yields, in the order of the file, a Document for each
record and a Rejected for each record, or image, that cannot be used. It may raise what the libraries raise on a file
that is broken (UNREADABLE): what it has yielded before is kept. It raises ValueError when an option is wrong.
"""

import dataclasses
import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import Protocol

import pyarrow

from data_pipelines.document import Document
from data_pipelines.formats.image_text_parquet import ImageTextParquet
from data_pipelines.formats.json_lines import JsonLines
from data_pipelines.formats.mmc4 import Mmc4
from data_pipelines.formats.obelics import Obelics
from data_pipelines.formats.plain_text import PlainText
from data_pipelines.formats.webdataset import WebDataset
from data_pipelines.rejects import Rejected

FORMATS = {
    "webdataset": WebDataset,
    "image_text_parquet": ImageTextParquet,
    "obelics": Obelics,
    "mmc4": Mmc4,
    "jsonl": JsonLines,
    "text": PlainText,
}
UNREADABLE = (OSError, EOFError, tarfile.TarError, zlib.error, pyarrow.ArrowException)


class Reader(Protocol):
    source: str

    def read(self, file: io.BufferedIOBase, name: str) -> Iterator[Document | Rejected]: ...


def reader(format: str, source: str, options: dict[str, str]) -> Reader:
    """The reader of a format; refuses options that the format does not have."""
    if format not in FORMATS:
        raise ValueError(f"--format={format} is not known; it is one of {', '.join(FORMATS)}")
    known = [field.name for field in dataclasses.fields(FORMATS[format]) if field.name != "source"]
    for name in options:
        if name not in known:
            has = ", ".join(f"--{k}" for k in known) or "no options of its own"
            raise ValueError(f"--{name} means nothing to --format={format}, which has {has}")
    return FORMATS[format](source, **options)
