"""The position axis of a document: BOS, its parts, EOS.

    document    ["Look:", image, "a dog"]                        (P = 3, with image delimiters)
    pieces      BOS  "Look:"    image             "a dog"  EOS
    positions   0    1  2       3   4  5  6  7    8  9     10
                          boi p0 p1 p2 eoi

A piece is what is measured and encoded at once: a mark, an image, or a text of at most 4,096 characters. Longer
texts are several pieces, cut before whitespace, so that a row in the middle of a book does not tokenise the book.

A pair, for encoders, is a document of one image and some text; only its text has positions, and what a row has no room
for is left out.
"""

import enum
import hashlib

import numpy as np

from data_pipelines.document import Document, Part
from data_pipelines.tokenizer import Tokenizer

LONGEST_PIECE = 4_096  # characters; with 16,384 a row of S = 1024 of the mixture tokenised 4,700 of them, now 2,950


class Mark(enum.Enum):
    BOS = "bos"
    EOS = "eos"


Piece = Mark | str | bytes


def of_document(document: Document, caption_order: str) -> list[Piece]:
    """The pieces of a stored document, captions in the order asked for."""
    return [Mark.BOS, *of_parts(_ordered(document, caption_order)), Mark.EOS]


def of_parts(parts: tuple[Part, ...]) -> list[str | bytes]:
    pieces: list[str | bytes] = []
    for part in parts:
        pieces += [part] if isinstance(part, bytes) else cut_text(part)
    return pieces


def of_pair(document: Document) -> tuple[bytes, str] | None:
    """The image and the text of a document of one image and some text; several texts are joined by a blank line.

    None for any other document.
    """
    text = "\n\n".join(text for text in document.texts if text.strip())
    return (document.images[0], text) if text and len(document.images) == 1 else None


def pair_tokens(text: str, tokenizer: Tokenizer, row_length: int) -> np.ndarray:
    """BOS, the text, EOS: int32 [at most row_length]. A longer text is cut and EOS kept, as CLIP's tokenizer does."""
    ids, room = [np.array([tokenizer.bos], np.int32)], row_length - 2
    for piece in cut_text(text):
        if room <= 0:
            break
        ids.append(tokenizer.encode(piece)[:room])
        room -= len(ids[-1])
    return np.concatenate([*ids, np.array([tokenizer.eos], np.int32)])


def length(piece: Piece, tokenizer: Tokenizer, image_span: int) -> int:
    """Positions that a piece takes."""
    if isinstance(piece, str):
        return len(tokenizer.encode(piece))
    return image_span if isinstance(piece, bytes) else 1


def cut_text(text: str, longest: int = LONGEST_PIECE) -> list[str]:
    """Cuts a long text before whitespace, if there is some in the last half of a piece; joined it is the text again."""
    pieces = []
    begin = 0
    while len(text) - begin > longest:
        end = begin + longest
        space = max(text.rfind(c, begin + longest // 2, end) for c in " \n\t")
        end = space if space > 0 else end
        pieces.append(text[begin:end])
        begin = end
    return [*pieces, text[begin:]]


def _ordered(document: Document, caption_order: str) -> tuple[Part, ...]:
    """Only captions (one image and one text) have an order to choose; `random` is decided by the id, once for ever."""
    parts = document.parts
    if len(parts) != 2 or len(document.images) != 1:
        return parts
    image, text = document.images[0], document.texts[0]
    if caption_order == "random":
        digest = hashlib.blake2b(document.id.encode(), digest_size=1, person=b"caption order").digest()
        caption_order = "text_first" if digest[0] & 1 else "image_first"
    return (text, image) if caption_order == "text_first" else (image, text)
