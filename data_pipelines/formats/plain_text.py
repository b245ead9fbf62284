"""Plain text in UTF-8 (also .gz, .zst), cut into documents by a rule, --split_on:

file              the whole file is one document
line              each line is one
blank_lines       blank lines stand between documents
separator:TEXT    TEXT stands between documents, anywhere in a line (separator:<|endoftext|>)
start:REGEX       a document begins at each line that REGEX matches ("start:^ = [^=].* = $" for WikiText)
"""

import dataclasses
import io
import re
from collections.abc import Iterator

from data_pipelines.document import Document
from data_pipelines.formats.streams import decompressed
from data_pipelines.rejects import Rejected


@dataclasses.dataclass(frozen=True)
class PlainText:
    source: str
    split_on: str = "file"

    def __post_init__(self):
        rule, _, argument = self.split_on.partition(":")
        if rule not in ("file", "line", "blank_lines", "separator", "start"):
            raise ValueError(
                f"--split_on={self.split_on} is no rule; it is file, line, blank_lines, separator:TEXT or start:REGEX"
            )
        if (rule in ("separator", "start")) != bool(argument) or "\n" in argument:
            raise ValueError(
                f"--split_on={self.split_on}: separator: and start: take one line of text, the others none"
            )
        try:
            re.compile(argument if rule == "start" else "")
        except re.error as e:
            raise ValueError(f"--split_on={self.split_on}: not a regular expression ({e})") from e

    def read(self, file: io.BufferedIOBase, name: str) -> Iterator[Document | Rejected]:
        for number, data in enumerate(self._pieces(decompressed(file))):
            id = f"{name}/{number}"
            try:
                text = data.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError as e:
                yield Rejected(id, name, "text is not UTF-8", str(e), data)
                continue
            yield Document(id, self.source, (text,))

    def _pieces(self, stream: io.BufferedIOBase) -> Iterator[bytes]:
        """The documents' bytes, without separators and the line breaks beside them; blank ones are left out."""
        rule, _, argument = self.split_on.partition(":")
        start = re.compile(argument.encode() if rule == "start" else b"")
        piece: list[bytes] = []
        for line in stream:
            *ends, rest = line.split(argument.encode()) if rule == "separator" else [line]
            if rule == "blank_lines" and not line.strip():
                ends, rest = [b""], b""
            elif rule == "line":
                ends, rest = [line.rstrip(b"\r\n")], b""
            elif rule == "start" and start.search(line.rstrip(b"\r\n")):
                ends, rest = [b""], line
            for end in ends:
                yield from self._unless_blank(b"".join([*piece, end]))
                piece = []
            piece.append(rest)
        yield from self._unless_blank(b"".join(piece))

    def _unless_blank(self, data: bytes) -> Iterator[bytes]:
        if data.strip():
            yield data if self.split_on == "file" else data.strip(b"\r\n")
