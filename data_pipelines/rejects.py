"""Records that could not be used: counted by reason, and kept aside for a look.

    OUTPUT/rejected/rejected.jsonl    one line a record: {"id", "file", "reason", "detail", "data"}
    OUTPUT/rejected/000000.bin        the bytes of the record that "data" names, as they were found

Every rejected record has its line; bytes are kept for the first of them only (KEPT_FILES, KEPT_BYTES).
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import IO

KEPT_FILES = 100
KEPT_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class Rejected:
    """What a reader yields in the place of a document, or beside it for one of its images."""

    id: str
    file: str
    reason: str  # one of a few, as they are counted: "bad image", "empty text", ...
    detail: str = ""  # what was wrong with this one
    data: bytes = dataclasses.field(default=b"", repr=False)


class Quarantine:
    """Takes the rejected records of one part of a conversion. `merge` then joins the parts."""

    def __init__(self, folder: pathlib.Path, part: int):
        self._folder = folder
        self._part = part
        self._lines: IO[str] | None = None
        self._kept_files = self._kept_bytes = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, Rejected] = {}

    def add(self, rejected: Rejected) -> None:
        self.counts[rejected.reason] += 1
        self.examples.setdefault(rejected.reason, dataclasses.replace(rejected, data=b""))
        line = dataclasses.asdict(rejected) | {"data": self._keep(rejected.data)}
        if self._lines is None:
            self._folder.mkdir(exist_ok=True)
            self._lines = open(self._folder / f"part-{self._part:05d}.jsonl", "w")
        self._lines.write(json.dumps(line) + "\n")

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def _keep(self, data: bytes) -> str | None:
        if not data or self._kept_files >= KEPT_FILES or self._kept_bytes + len(data) > KEPT_BYTES:
            return None
        self._folder.mkdir(exist_ok=True)
        name = f"part-{self._part:05d}-{self._kept_files:06d}.bin"
        (self._folder / name).write_bytes(data)
        self._kept_files += 1
        self._kept_bytes += len(data)
        return name


def merge(folder: pathlib.Path) -> None:
    """Joins the parts in a folder, in their order, into one rejected.jsonl, and holds the limits over all of them."""
    parts = sorted(folder.glob("part-*.jsonl"))
    if not parts:
        return
    kept_files = kept_bytes = 0
    with open(folder / "rejected.jsonl", "w") as merged:
        for part in parts:
            with open(part) as lines:
                for line in lines:
                    record = json.loads(line)
                    if record["data"]:
                        data = folder / record["data"]
                        size = data.stat().st_size
                        if kept_files < KEPT_FILES and kept_bytes + size <= KEPT_BYTES:
                            record["data"] = f"{kept_files:06d}.bin"
                            data.rename(folder / record["data"])
                            kept_files += 1
                            kept_bytes += size
                        else:
                            record["data"] = None
                            data.unlink()
                    merged.write(json.dumps(record) + "\n")
            part.unlink()


def table(counts: Mapping[str, int], examples: Sequence[Mapping[str, Rejected]]) -> str:
    """The reasons as a table for people: reason, count, and the first record of each."""
    rows = [("rejected because", "count", "for example")]
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        example = next(part[reason] for part in examples if reason in part)
        where = example.id if example.file in example.id else f"{example.id} in {example.file}"
        rows.append((reason, f"{count:,}", f"{where}: {example.detail}" if example.detail else where))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}" for row in rows)
