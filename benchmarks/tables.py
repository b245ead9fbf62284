"""A table of results, for a terminal and for Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

Columns = Mapping[str, tuple[str, str]]  # key of a row -> (title, format); words stand left, numbers right


def table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """A line for each row; what a row does not have, or is None, stays empty."""
    cells = [[_cell(row.get(key), form) for key, (_, form) in columns.items()] for row in rows]
    titles = [title for title, _ in columns.values()]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    words = [not form for _, form in columns.values()]

    def line(row: Sequence[str]) -> str:
        placed = (x.ljust(w) if left else x.rjust(w) for x, w, left in zip(row, widths, words, strict=True))
        return f"| {' | '.join(placed)} |"

    rule = "|".join("-" * (w + 2) if left else "-" * (w + 1) + ":" for w, left in zip(widths, words, strict=True))
    return "\n".join([line(titles), f"|{rule}|", *map(line, cells)])


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
