"""Tables of one image and one text a row, as on the Hugging Face hub.

The image column holds encoded bytes, a struct {bytes, path}, or a path that is looked up in --image_root.
The other columns become the document's metadata.
"""

import dataclasses
import io
from collections.abc import Iterator

from data_pipelines.document import Document
from data_pipelines.formats.found_images import MissingImage, image_bytes
from data_pipelines.formats.parquet_rows import plain, rows
from data_pipelines.rejects import Rejected


@dataclasses.dataclass(frozen=True)
class ImageTextParquet:
    source: str
    image_column: str = "image"
    text_column: str = "text"
    image_root: str = ""

    def read(self, file: io.BufferedIOBase, name: str) -> Iterator[Document | Rejected]:
        wanted = {self.image_column: "--image_column", self.text_column: "--text_column"}
        for number, row in rows(file, name, wanted):
            id = f"{name}/{number}"
            text = row.pop(self.text_column)
            if not isinstance(text, str | None):
                raise ValueError(
                    f"{name}: column {self.text_column!r} (--text_column) holds {type(text).__name__}, not text"
                )
            try:
                image = image_bytes(row.pop(self.image_column), self.image_root)
            except MissingImage as e:
                yield Rejected(id, name, "missing image", str(e))
                continue
            yield Document(id, self.source, (image, (text or "").strip()), plain(row))
