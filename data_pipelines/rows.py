"""Rows: from the fragments of a plan, or from whole documents, to the arrays that a model takes.

A row of two documents, S = 12, P = 4, images that see themselves both ways (`until` is attend_until, excluded):

    index      0    1    2    3    4    5    6    7  |  8    9   10  |  11
    token     BOS  img  img  img  img   a   dog  EOS | BOS   hi  EOS |  pad
    segment    1    1    1    1    1    1    1    1  |  2    2    2  |   0
    until      1    5    5    5    5    6    7    8  |  9   10   11  |  12
    position   0    1    2    3    4    5    6    7  |  0    1    2  |   0
    image     -1    0    1    2    3   -1   -1   -1  | -1   -1   -1  |  -1
    target     0    0    0    0    a   dog  EOS   0  |  hi  EOS   0  |   0
    loss       0    0    0    0    1    1    1    0  |  1    1    0  |   0

A target is the document's next token, so that a cut loses none: the last position of a fragment predicts the first
token of the next one, which stands in another row. Only text tokens and EOS are predicted.

A pair is one document a row, its image in slot 0 and at no position: the row above would be BOS a dog EOS and padding.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines import images, pieces
from data_pipelines.document import Document
from data_pipelines.geometry import Geometry
from data_pipelines.packing import cut
from data_pipelines.pieces import Mark, Piece
from data_pipelines.plan import FRAGMENT, Plan
from data_pipelines.store import Dataset
from data_pipelines.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
ToPixels = Callable[[bytes, int], np.ndarray]  # (encoded image, its slot in the row) -> uint8 [size, size, 3]


def batch_spec(geometry: Geometry, rows: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every field of a batch."""
    g = geometry
    per_position = (rows, g.row_length)
    return {
        "tokens": (per_position, np.dtype(np.int32)),
        "targets": (per_position, np.dtype(np.int32)),
        "loss_mask": (per_position, np.dtype(np.float32)),
        "segment_ids": (per_position, np.dtype(np.int32)),
        "attend_until": (per_position, np.dtype(np.int32)),
        "positions": (per_position, np.dtype(np.int32)),
        "image_index": (per_position, np.dtype(np.int32)),
        "images": ((rows, g.per_row, g.size, g.size, 3), np.dtype(np.uint8)),
        "image_mask": ((rows, g.per_row), np.dtype(np.bool_)),
        "source": (per_position, np.dtype(np.int8)),
    }


def allocate(rows: int, geometry: Geometry, pad: int) -> Batch:
    """Empty rows: padding everywhere, which attends to itself and has no loss."""
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in batch_spec(geometry, rows).items()}
    batch["tokens"][:] = pad
    batch["attend_until"][:] = np.arange(1, geometry.row_length + 1)
    batch["image_index"][:] = -1
    return batch


class RowBuilder:
    """Builds rows of one source into the slots of a batch. Thread-safe; may be sent to another process."""

    def __init__(self, dataset: Dataset, plan: Plan, tokenizer: Tokenizer, geometry: Geometry, source_index: int):
        self.dataset = dataset
        self.plan = plan
        self.geometry = geometry
        self.tokenizer = tokenizer
        self.source_index = source_index
        self._bad: set[tuple[int, int]] = set()  # (document, its n-th image)

    @property
    def bad_images(self) -> int:
        """Different images, of those built so far, that could not be decoded. Their segments have no loss."""
        return len(self._bad)

    def build(self, row: int, out: Batch, b: int, to_pixels: ToPixels | None = None) -> None:
        """Fills slot b of a freshly allocated batch with a row of the plan."""
        writer = _RowWriter(out, b, self.tokenizer, self.geometry, to_pixels)
        out["source"][b] = self.source_index
        for fragment in self.plan[row]:
            document = self.dataset[int(fragment["document"])]
            try:
                if self.geometry.pairs:
                    bad = writer.add_pair(document, fragment)
                else:
                    bad = writer.add(pieces.of_document(document, self.geometry.caption_order), fragment)
            except _Mismatch as e:
                raise ValueError(
                    f"document {document.id!r} of dataset {self.dataset.folder} is not what plan {self.plan.folder} "
                    f"was made of ({e}); remove that plan's folder to have it made again"
                ) from e
            for nth, reason in bad:
                self._report(int(fragment["document"]), document.id, nth, reason)

    def _report(self, index: int, document: str, nth: int, reason: str) -> None:
        if (index, nth) not in self._bad:
            self._bad.add((index, nth))
            logging.warning(
                "dataset %s, document %r, image %d cannot be decoded (%s); it stays black, its segment has no loss",
                self.dataset.folder, document, nth, reason,
            )  # fmt: skip


def build_documents(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    geometry: Geometry,
    source: int = 0,
    append_eos: bool = True,
) -> Batch:
    """A batch of one whole document a row, its parts in the order given; images resized as for evaluation.

    Raises:
      ValueError: for a document that does not fit a row, or an image that cannot be decoded; names the document.
    """
    batch = allocate(len(documents), geometry, tokenizer.pad)
    batch["source"][:] = source
    for b, document in enumerate(documents):
        parts = [Mark.BOS, *pieces.of_parts(document.parts), *([Mark.EOS] if append_eos else [])]
        lengths = [pieces.length(piece, tokenizer, geometry.image_span) for piece in parts]
        positions, count = sum(lengths), len(document.images)
        if positions > geometry.row_length or count > geometry.per_row:
            raise ValueError(
                f"document {document.id!r} has {positions} positions and {count} images; a row has "
                f"{geometry.row_length} (row_length) and {geometry.per_row} (image.per_row)"
            )
        (whole,) = cut(lengths, [isinstance(piece, bytes) for piece in parts], geometry.row_length, geometry.per_row)
        fragment = np.array((b, *whole), FRAGMENT)
        for nth, reason in _RowWriter(batch, b, tokenizer, geometry).add(parts, fragment):
            raise ValueError(f"document {document.id!r}, image {nth} cannot be decoded: {reason}")
    return batch


class _Mismatch(ValueError):
    """The document is not the one that was planned."""


class _RowWriter:
    """Writes fragments one after another into slot b of a batch."""

    def __init__(self, out: Batch, b: int, tokenizer: Tokenizer, geometry: Geometry, to_pixels: ToPixels | None = None):
        self._row = {name: array[b] for name, array in out.items()}
        self._tokenizer = tokenizer
        self._geometry = geometry
        self._to_pixels = to_pixels or (lambda data, slot: images.to_eval(data, geometry.size))
        self._at = self._slot = self._segment = 0

    def add(self, parts: Sequence[Piece], fragment: Any) -> list[tuple[int, str]]:
        """Writes one fragment; returns (n-th image of the document, reason) of those that could not be decoded."""
        row, geometry = self._row, self._geometry
        start, stop = int(fragment["start"]), int(fragment["stop"])
        n = stop - start
        here = slice(self._at, self._at + n)
        # One position more than the fragment has: what its last position predicts.
        tokens = np.zeros(n + 1, np.int32)
        predicted = np.zeros(n + 1, np.bool_)
        positions = np.arange(n, dtype=np.int32)
        bad = []
        begin = int(fragment["origin"]) - start  # of a piece, counted from the fragment's start
        for k in range(int(fragment["piece"]), len(parts)):
            piece = parts[k]
            if begin > n:
                break
            if isinstance(piece, bytes):
                if begin < n:
                    reason = self._add_image(piece, begin, tokens, positions)
                    if reason:
                        bad.append((sum(isinstance(p, bytes) for p in parts[:k]), reason))
                begin += geometry.image_span
            else:
                ids = self._encode(piece)
                span = slice(max(begin, 0), min(begin + len(ids), n + 1))
                tokens[span] = ids[span.start - begin : max(span.stop - begin, 0)]
                predicted[span] = piece is not Mark.BOS
                begin += len(ids)
        if begin < n:
            raise _Mismatch(f"it ends at position {start + begin}, the fragment at {stop}")
        self._segment += 1
        row["tokens"][here] = tokens[:n]
        row["targets"][here] = tokens[1:] * predicted[1:]
        row["loss_mask"][here] = predicted[1:]
        row["segment_ids"][here] = self._segment
        row["positions"][here] = positions
        if bad:
            row["targets"][here] = 0
            row["loss_mask"][here] = 0
        self._at += n
        return bad

    def add_pair(self, document: Document, fragment: Any) -> list[tuple[int, str]]:
        """Writes the row of a pair. Without its image it is none: its slot counts as empty, and it has no loss."""
        row, n = self._row, int(fragment["stop"])
        pair = pieces.of_pair(document)
        if not pair:
            raise _Mismatch("it is no pair")
        image, text = pair
        tokens = pieces.pair_tokens(text, self._tokenizer, self._geometry.row_length)
        if len(tokens) != n:
            raise _Mismatch(f"it has {len(tokens)} positions, not {n}")
        row["tokens"][:n] = tokens
        row["segment_ids"][:n] = 1
        row["positions"][:n] = np.arange(n)
        reason = self._add_pixels(image)
        if reason:
            row["image_mask"][0] = False
            return [(0, reason)]
        row["targets"][: n - 1] = tokens[1:]
        row["loss_mask"][: n - 1] = 1
        return []

    def _encode(self, piece: Mark | str) -> np.ndarray:
        if isinstance(piece, str):
            return self._tokenizer.encode(piece)
        return np.array([self._tokenizer.bos if piece is Mark.BOS else self._tokenizer.eos], np.int32)

    def _add_image(self, data: bytes, begin: int, tokens: np.ndarray, positions: np.ndarray) -> str:
        """Puts an image at position `begin` of the fragment; returns why it could not be decoded, or ""."""
        row, geometry = self._row, self._geometry
        if begin < 0 or begin + geometry.image_span > len(tokens) - 1 or self._slot == geometry.per_row:
            raise _Mismatch("an image does not stand where it was planned")
        if geometry.image_delimiters:
            tokens[begin] = self._tokenizer.boi
            tokens[begin + geometry.image_span - 1] = self._tokenizer.eoi
            begin += 1
        end = begin + geometry.positions
        tokens[begin:end] = self._tokenizer.image
        if geometry.image_rotary == "shared":
            positions[end:] -= geometry.positions - 1
            positions[begin:end] = positions[begin]
        span = slice(self._at + begin, self._at + end)
        row["image_index"][span] = np.arange(geometry.positions) + self._slot * geometry.positions
        if geometry.image_attention == "bidirectional":
            row["attend_until"][span] = self._at + end
        return self._add_pixels(data)

    def _add_pixels(self, data: bytes) -> str:
        """Fills the next slot; returns why it could not, or ""."""
        row = self._row
        row["image_mask"][self._slot] = True
        try:
            row["images"][self._slot] = self._to_pixels(data, self._slot)
        except images.BadImage as e:
            return str(e)
        finally:
            self._slot += 1
        return ""
