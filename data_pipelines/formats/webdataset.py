"""WebDataset tars as img2dataset writes them: KEY.jpg (or png, webp, ...), KEY.txt and KEY.json side by side.

The text is KEY.txt, or else "caption" of KEY.json; the rest of the json becomes the document's metadata. A tar may be
compressed as a whole. Other members (KEY.cls, ...) are passed over.
"""

import dataclasses
import io
import json
import pathlib
import tarfile
from collections.abc import Iterator

from data_pipelines.document import Document
from data_pipelines.formats.streams import decompressed
from data_pipelines.rejects import Rejected

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class _CheckedTarInfo(tarfile.TarInfo):
    """tarfile takes a header that is cut or damaged, anywhere but at the start, for the end of the tar; it is not."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # missing in typeshed
            raise
        except tarfile.HeaderError as e:
            raise tarfile.ReadError(f"the tar ends, or is damaged, at byte {tar.offset:,} ({e})") from e


@dataclasses.dataclass(frozen=True)
class WebDataset:
    source: str

    def read(self, file: io.BufferedIOBase, name: str) -> Iterator[Document | Rejected]:
        key = ""
        members: dict[str, bytes] = {}
        with tarfile.open(fileobj=decompressed(file), mode="r|", tarinfo=_CheckedTarInfo) as tar:
            for member in tar:
                path = pathlib.PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                contents = tar.extractfile(member)
                if contents is None or not stem:  # folders
                    continue
                if str(path.parent / stem) != key:
                    yield from self._record(name, key, members)
                    key, members = str(path.parent / stem), {}
                if extension.lower() in (*IMAGES, "txt", "json"):
                    members[extension.lower()] = contents.read()
        yield from self._record(name, key, members)

    def _record(self, name: str, key: str, members: dict[str, bytes]) -> Iterator[Document | Rejected]:
        if not members:
            return
        id = f"{name}/{key}"
        image = next((members[extension] for extension in IMAGES if extension in members), None)
        if image is None:
            yield Rejected(id, name, "no image", f"its members are {', '.join(sorted(members))}")
            return
        try:
            metadata = json.loads(members.get("json", b"{}"))
            if not isinstance(metadata, dict):
                raise ValueError(f"a {type(metadata).__name__}, not an object")
        except (ValueError, RecursionError) as e:
            yield Rejected(id, name, "broken json", str(e), members["json"])
            return
        try:
            text = members["txt"].decode() if "txt" in members else metadata.get("caption")
        except UnicodeDecodeError as e:
            yield Rejected(id, name, "text is not UTF-8", str(e), members["txt"])
            return
        if not isinstance(text, str):
            yield Rejected(id, name, "no text", f"its members are {', '.join(sorted(members))}", image)
            return
        yield Document(id, self.source, (image, text.strip()), metadata)
