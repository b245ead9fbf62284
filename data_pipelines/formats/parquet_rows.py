"""Rows of a parquet file, with the columns checked first."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.parquet

ROWS_AT_ONCE = 64  # images make rows large


def rows(file: io.BufferedIOBase, name: str, wanted: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number, {column: value}). `wanted` maps each column that must exist to what chooses it."""
    table = pyarrow.parquet.ParquetFile(file)
    found = table.schema_arrow.names
    missing = [f"{column!r} ({chosen_by})" for column, chosen_by in wanted.items() if column not in found]
    if missing:
        raise ValueError(f"{name} has no column {' and no column '.join(missing)}; its columns are {', '.join(found)}")
    number = 0
    for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
        for row in batch.to_pylist():
            yield number, row
            number += 1


def plain(value: Any) -> Any:
    """A cell as metadata: text, numbers and truth values as they are, anything else (dates, decimals) as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:  # beyond msgpack
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
