"""Cutting documents that are longer than a row, and packing fragments into rows on two budgets at once.

A row has S positions and I image slots. Packing is best-fit-decreasing (Johnson 1973): the largest fragment first,
each into the row where it leaves the least room; among equals into the one with the fewest free slots.

    S = 8, I = 1      fragments (positions, images): a (5, 1), b (4, 1), c (3, 0), d (3, 0), e (1, 0)

    row 0   a a a a a c c c      a opens a row; b has no slot left there and opens another;
    row 1   b b b b d d d e      c fits row 0 exactly; d goes where it leaves one position; e fills that.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Cut(NamedTuple):
    """A run of positions [start, stop) of a document that goes into one row."""

    start: int
    stop: int
    piece: int  # the piece that holds position `start`
    origin: int  # the position where that piece begins
    images: int


def cut(lengths: Sequence[int], is_image: Sequence[bool], row_length: int, per_row: int) -> Iterator[Cut]:
    """Cuts a document, given the lengths of its pieces, into as few runs as fit rows: never inside an image.

    Raises:
      ValueError: for an image that fits no row.
    """
    start = position = piece = origin = images = 0
    for k, (length, image) in enumerate(zip(lengths, is_image, strict=True)):
        begin = position
        if image:
            if length > row_length or not per_row:
                raise ValueError(
                    f"piece {k} is an image of {length} positions; rows have {row_length} positions and {per_row} "
                    "image slots (row_length, image.positions, image.per_row)"
                )
            if position - start + length > row_length or images == per_row:
                yield Cut(start, position, piece, origin, images)
                start, piece, origin, images = position, k, position, 0
            images += 1
        position += length
        while position - start > row_length:  # only a text gets here
            yield Cut(start, start + row_length, piece, origin, images)
            start, images = start + row_length, 0
            piece, origin = k, begin
    if position > start:
        yield Cut(start, position, piece, origin, images)


def pack(positions: Sequence[int], images: Sequence[int], row_length: int, per_row: int) -> list[list[int]]:
    """Best-fit-decreasing; fragment n has positions[n] positions and images[n] images.

    Returns the fragments of each row, ascending. At most one row is at most half full in both budgets: a fragment
    of a second one would have fitted the first.
    """
    rows: list[list[int]] = []
    # Rows by what they have left. free[i] is a bit set of the positions left among the rows with i slots left, so the
    # best fit for p positions is the lowest bit of free[i] >> p: constant time, however many rows are open.
    free = [0] * (per_row + 1)
    left: list[dict[int, list[int]]] = [{} for _ in free]
    for n in sorted(range(len(positions)), key=lambda n: (-positions[n], -images[n], n)):
        p, m = positions[n], images[n]
        best = (row_length + 1, 0)  # (positions, slots) left in the row before it takes the fragment
        for slots in range(m, per_row + 1):
            fitting = free[slots] >> p
            if fitting:
                best = min(best, (p + (fitting & -fitting).bit_length() - 1, slots))
        room, slots = best
        if room > row_length:
            room, slots = row_length, per_row
            row = len(rows)
            rows.append([n])
        else:
            row = left[slots][room].pop()
            rows[row].append(n)
            if not left[slots][room]:
                free[slots] &= ~(1 << room)
        room, slots = room - p, slots - m
        left[slots].setdefault(room, []).append(row)
        free[slots] |= 1 << room
    return [sorted(row) for row in rows]
