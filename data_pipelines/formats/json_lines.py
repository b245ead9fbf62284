"""JSON lines of text: plain, .gz or .zst, an object a line (Dolma, C4, FineWeb and most text corpora).

The other keys become the document's metadata; a document is called by its "id" where it has one, else by its line.
"""

import dataclasses
import io
import json
from collections.abc import Iterator

from data_pipelines.document import Document
from data_pipelines.formats.streams import decompressed
from data_pipelines.rejects import Rejected


def json_objects(file: io.BufferedIOBase, name: str) -> Iterator[tuple[int, bytes, dict] | Rejected]:
    """Yields (line number from 1, the line, its object); blank lines are passed over."""
    for number, line in enumerate(decompressed(file), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a {type(record).__name__}, not an object")
            yield number, line, record
        except (ValueError, RecursionError) as e:
            yield Rejected(f"{name}:{number}", name, "broken json", str(e), line)


@dataclasses.dataclass(frozen=True)
class JsonLines:
    source: str
    text_key: str = "text"

    def read(self, file: io.BufferedIOBase, name: str) -> Iterator[Document | Rejected]:
        for item in json_objects(file, name):
            if isinstance(item, Rejected):
                yield item
                continue
            number, line, record = item
            id = str(record.pop("id", None) or f"{name}:{number}")
            text = record.pop(self.text_key, None)
            if not isinstance(text, str):
                detail = f"no text under {self.text_key!r} (--text_key); its keys are {', '.join(record) or 'none'}"
                yield Rejected(id, name, "no text", detail, line)
                continue
            yield Document(id, self.source, (text,), record)
