"""MMC4: JSON lines with `text_list` and `image_info`, the images in a folder or a tar (--image_root).

An image stands before the text that it was matched with (matched_text_index). Texts that follow each other without an
image between them are joined by a line break.
"""

import dataclasses
import io
from collections.abc import Iterator

from data_pipelines.document import Document, Part
from data_pipelines.formats.found_images import MissingImage, image_bytes
from data_pipelines.formats.json_lines import json_objects
from data_pipelines.rejects import Rejected


@dataclasses.dataclass(frozen=True)
class Mmc4:
    source: str
    image_root: str = ""

    def read(self, file: io.BufferedIOBase, name: str) -> Iterator[Document | Rejected]:
        for item in json_objects(file, name):
            if isinstance(item, Rejected):
                yield item
                continue
            number, line, record = item
            id = f"{name}:{number}"
            try:
                texts = [str(text) for text in record.pop("text_list")]
                placed: list[list[Part]] = [[] for _ in texts]
                described = []
                for k, info in enumerate(record.pop("image_info")):
                    place = dict(enumerate(placed))[info["matched_text_index"]]  # no negative index
                    try:
                        place.append(image_bytes(info["image_name"], self.image_root))
                        described.append(info)
                    except MissingImage as e:
                        yield Rejected(f"{id}#{k}", name, "missing image", str(e))
            except (KeyError, IndexError, TypeError) as e:
                yield Rejected(id, name, "not an MMC4 record", f"{type(e).__name__}: {e}", line)
                continue
            parts: list[Part] = []
            for images, text in zip(placed, texts, strict=True):
                parts += images
                if parts and isinstance(parts[-1], str):
                    parts[-1] += "\n" + text
                else:
                    parts.append(text)
            yield Document(id, self.source, tuple(parts), record | {"images": described})
