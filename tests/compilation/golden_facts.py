"""Facts of a compiled step that are recorded, and in what a step differs from its record."""

from collections.abc import Iterator, Mapping
from typing import Any

Facts = Mapping[str, Any]

MEMORY = ("peak", "parameters", "optimizer", "gradients", "activations", "batch", "workspace")
SMALL = 1 << 16  # bytes of a buffer: metrics and norms, of which a change of little loses nothing
NEAR = 0.02
SLACK = 1 << 20  # bytes that are always near


def record(facts: Facts) -> dict[str, Any]:
    """What is kept of `python -m nmm_jax.compile --format=json`."""
    rows = [row for row in facts["collectives"] if row["largest"] >= SMALL]
    return {
        "versions": facts["versions"],
        "mesh": facts["mesh"],
        "memory": {kind: facts["memory"][kind] for kind in MEMORY},
        "products": facts["products"],
        "collectives": {name: {"count": n, "bytes": size} for name, n, size in sorted(_named(rows))},
        "host_transfers": facts["host_transfers"],
        "warnings": facts["warnings"],
    }


def differences(recorded: Facts, found: Facts) -> list[str]:
    """A line each: collectives and their counts have to be the same, bytes and FLOPs within 2%."""
    told = []
    for name in ("versions", "mesh", "host_transfers", "warnings"):
        if recorded[name] != found[name]:
            told.append(f"{name}: {found[name]}, recorded {recorded[name]}")
    for kind, before in recorded["memory"].items():
        after = found["memory"][kind]
        if not _near(before, after):
            told.append(
                f"memory, {kind}: {_mebibytes(after)}, recorded {_mebibytes(before)} ({_change(before, after)})"
            )
    if not _near(recorded["products"], found["products"]):
        change = _change(recorded["products"], found["products"])
        told.append(f"products: {found['products']:.4g} FLOP, recorded {recorded['products']:.4g} ({change})")
    for name in sorted({*recorded["collectives"], *found["collectives"]}):
        before, after = (each["collectives"].get(name) for each in (recorded, found))
        if before is None or after is None:
            there = after or before
            told.append(
                f"{name}: {'new' if after else 'gone'}, {there['count']} of {_mebibytes(there['bytes'])} in all"
            )
            continue
        if before["count"] != after["count"]:
            told.append(f"{name}: {after['count']} runs, recorded {before['count']}")
        if not _near(before["bytes"], after["bytes"]):
            change = _change(before["bytes"], after["bytes"])
            told.append(f"{name}: {_mebibytes(after['bytes'])}, recorded {_mebibytes(before['bytes'])} ({change})")
    return told


def _named(rows: list[Facts]) -> Iterator[tuple[str, int, int]]:
    """(all-gather over fsdp of 16, bf16, in loops; runs; bytes)"""
    for row in rows:
        name = f"{row['kind']} over {' '.join(row['axes']) or 'other'} of {row['group']}, {row['dtype']}"
        name += ", in loops" if row["in_loop"] else ", outside"
        name += ", across slices" if row["across_slices"] else ""
        name += f", for an {row['emulates']}" if row["emulates"] else ""
        name += ", uncertain" if row["uncertain"] else ""
        yield name, row["count"], row["bytes"]


def _near(before: float, after: float) -> bool:
    return abs(after - before) <= max(NEAR * before, SLACK)


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else "from none"


def _mebibytes(n: float) -> str:
    return f"{n / 2**20:,.1f} MiB"
