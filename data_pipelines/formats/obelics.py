"""OBELICS: parquet with parallel lists `images` and `texts`, of which exactly one is set at each place.

Images are URLs or file names, looked up in --image_root, or encoded bytes, or structs {bytes, path}. The columns
`general_metadata` (JSON of the page) and `metadata` (JSON list, one entry an image) are kept where they exist.
"""

import dataclasses
import io
import json
from collections.abc import Iterator
from typing import Any

from data_pipelines.document import Document, Part
from data_pipelines.formats.found_images import MissingImage, image_bytes
from data_pipelines.formats.parquet_rows import rows
from data_pipelines.rejects import Rejected


@dataclasses.dataclass(frozen=True)
class Obelics:
    source: str
    image_root: str = ""

    def read(self, file: io.BufferedIOBase, name: str) -> Iterator[Document | Rejected]:
        wanted = {"images": "--format=obelics needs it", "texts": "--format=obelics needs it"}
        for number, row in rows(file, name, wanted):
            id = f"{name}/{number}"
            images, texts = row["images"] or [], row["texts"] or []
            if len(images) != len(texts):
                yield Rejected(id, name, "lists of unequal length", f"{len(images)} images, {len(texts)} texts")
                continue
            of_images = _parsed(row.get("metadata"), list)
            parts: list[Part] = []
            described = []
            for k, (image, text) in enumerate(zip(images, texts, strict=True)):
                if text:
                    parts.append(text)
                if image is None:
                    continue
                try:
                    parts.append(image_bytes(image, self.image_root))
                    described.append(of_images[k] if k < len(of_images) else None)
                except MissingImage as e:
                    yield Rejected(f"{id}#{k}", name, "missing image", str(e))
            metadata = _parsed(row.get("general_metadata"), dict)
            yield Document(id, self.source, tuple(parts), metadata | {"images": described})


def _parsed(text: Any, kind: type) -> Any:
    """The JSON in a metadata column, or an empty one: metadata is no reason to lose a document."""
    try:
        value = json.loads(text or "null")
    except (ValueError, TypeError):
        value = None
    return value if isinstance(value, kind) else kind()
