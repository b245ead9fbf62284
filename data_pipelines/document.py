"""A document: an ordered list of parts, each text or an encoded image.

    caption      [image, "a dog on a beach"]  or  ["a dog on a beach", image]
    text         ["The whole of the page ..."]
    interleaved  ["First, chop the onions.", image, image, "Then fry them.", ...]

One document is one msgpack record: {"id", "source", "parts", "metadata"}; in "parts" a msgpack
str is text and a msgpack bin is an image, its bytes as they were found (JPEG, PNG, WebP, ...).
"""

import dataclasses
from typing import Any

import msgpack

Part = str | bytes  # text | an encoded image


@dataclasses.dataclass(frozen=True)
class Document:
    """What a converter makes of one record, and what packing starts from."""

    id: str
    source: str
    parts: tuple[Part, ...]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for k, part in enumerate(self.parts):
            if not isinstance(part, str | bytes):
                raise TypeError(
                    f"document {self.id!r}: part {k} is a {type(part).__name__}; expected str (text) or bytes "
                    "(an encoded image)"
                )

    @property
    def images(self) -> tuple[bytes, ...]:
        return tuple(p for p in self.parts if isinstance(p, bytes))

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(p for p in self.parts if isinstance(p, str))

    def to_bytes(self) -> bytes:
        return msgpack.packb(
            {"id": self.id, "source": self.source, "parts": list(self.parts), "metadata": self.metadata}
        )

    @classmethod
    def from_bytes(cls, record: bytes) -> "Document":
        try:
            fields = msgpack.unpackb(record)
            return cls(fields["id"], fields["source"], tuple(fields["parts"]), fields["metadata"])
        except (msgpack.UnpackException, ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"not a document record ({type(e).__name__}: {e}); was this shard written by convert?"
            ) from e
