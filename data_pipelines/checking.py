"""Which documents, and which of their images, are fit to be stored; and which are held out."""

import dataclasses
import hashlib

from data_pipelines import images
from data_pipelines.document import Document, Part
from data_pipelines.rejects import Rejected

VERIFY = ("decode", "header", "none")


def is_held_out(id: str, fraction: float) -> bool:
    """Whether a document is held out: a matter of its id alone, so it stays where it is when the data grows."""
    return (
        int.from_bytes(hashlib.blake2b(id.encode(errors="replace"), digest_size=8).digest(), "big") < fraction * 2**64
    )


def usable(document: Document, file: str, verify: str, max_pixels: int) -> tuple[Document | None, list[Rejected]]:
    """The document without its unusable images and blank texts, or None, and what was left out with the reasons."""
    found = len(document.images)
    parts: list[Part] = []
    left_out: list[Rejected] = []
    for k, part in enumerate(document.parts):
        if isinstance(part, str):
            if part.strip() and parts and isinstance(parts[-1], str):
                parts[-1] += "\n\n" + part  # what stood between them is gone
            elif part.strip():
                parts.append(part)
        elif problem := image_problem(part, verify, max_pixels):
            id = document.id if found == 1 else f"{document.id}#{k}"
            left_out.append(Rejected(id, file, *problem, part))
        else:
            parts.append(part)
    if not any(isinstance(part, str) for part in parts):
        left_out.append(Rejected(document.id, file, "empty text", "no text but white space"))
        return None, left_out
    if found and not any(isinstance(part, bytes) for part in parts):
        if found > 1:
            left_out.append(Rejected(document.id, file, "no image left", f"none of {found} is usable"))
        return None, left_out
    return dataclasses.replace(document, parts=tuple(parts)), left_out


def image_problem(data: bytes, verify: str, max_pixels: int) -> tuple[str, str] | None:
    """(reason, detail) when an encoded image is not usable. The header is read first: no large image is decoded."""
    if verify == "none":
        return None
    try:
        format, width, height = images.probe(data)
        if width * height > max_pixels:
            return "image too large", f"{format} of {width}x{height} pixels, --max_pixels={max_pixels}"
        if verify == "decode":
            images.decode(data, max_pixels)
    except images.BadImage as e:
        return "bad image", str(e)
    return None
