"""Facts of compiled steps as text: of one for a reader, of a search in order, of many for docs/pods.md."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nmm_jax.compilation.quantities import duration, gibibytes, short, traffic
from nmm_jax.compilation.timeline import beside, in_turn

Facts = Mapping[str, Any]  # facts.facts, or its JSON

KINDS = ("parameters", "optimizer", "gradients", "activations", "batch", "workspace")  # of memory
SHORT = {
    "all-gather": "AG",
    "reduce-scatter": "RS",
    "all-reduce": "AR",
    "all-to-all": "A2A",
    "ragged-all-to-all": "RA2A",
    "collective-permute": "CP",
}
_BAR = 40  # characters
_LEAST = 0.01  # of a step's traffic, that a collective has to have a share of to be named in docs/pods.md


def table(facts: Facts) -> str:
    """One step, for a reader."""
    f = facts
    lines = [
        f"{f['config']} on {topology(f)}: {f['devices']:,} devices, {mesh(f['mesh'])}",
        f"{short(f['parameters'])} parameters, {f['rows']:,} rows a device, {short(f['positions'])} positions a step, "
        f"remat {f['remat']}, gradient accumulation {f['gradient_accumulation']}",
        f"fits: {fit(f)}",
        *_section("Memory of a device, GiB", _memory(f)),
        *_section("Collectives of a step, bytes of a device", _collectives(f)),
    ]
    for title, key in (("Transfers to the host", "host_transfers"), ("Warnings", "warnings")):
        lines += _section(title, f[key])
    lines += _section("Estimate of a step", _estimate(f))
    lines += _section("It assumes", f["estimate"]["assumptions"])
    return "\n".join([*lines, "", compiler(f)])


def ranking(found: Sequence[Facts]) -> str:
    """Steps that a search compiled: those that fit by estimated time, then the others by what is too much."""
    rows = [
        [
            str(place),
            mesh(f["mesh"], whole=False),
            f["remat"],
            str(f["gradient_accumulation"]),
            f"{gibibytes(f['memory']['peak'])} of {gibibytes(f['memory']['capacity'])} GiB",
            duration(f["estimate"]["seconds"]) if f["fits"] else "",
            f"{f['estimate']['mfu']:.1%}" if f["fits"] else "",
            f["estimate"]["bound"] if f["fits"] else f"does not fit: {_too_much(f)}",
        ]
        for place, f in enumerate(in_order(found), 1)
    ]
    if not rows:
        return "no step compiled"
    header = ["", "mesh", "remat", "accumulation", "peak memory", "step", "MFU", "bound by"]
    return "\n".join(_aligned([header, *rows], left=(1, 2, 7)))


def in_order(found: Sequence[Facts]) -> list[Facts]:
    """The fastest first; behind all that fit, those that do not."""
    return sorted(
        found, key=lambda f: (not f["fits"], -f["estimate"]["tokens_per_second"] if f["fits"] else f["memory"]["peak"])
    )


def markdown(rows: Sequence[tuple[str, Facts]]) -> str:
    """A table of configs by name."""
    header = (
        "config", "slice", "mesh", "remat", "parameters", "memory, GiB", "over count", "collectives of a device",
        "step", "MFU", "bound by",
    )  # fmt: skip
    numbers = {"parameters", "memory, GiB", "over count", "step", "MFU"}
    rule = [":".rjust(4, "-") if name in numbers else "---" for name in header]
    return "\n".join([_row(header), _row(rule), *(markdown_row(name, f) for name, f in rows)])


def markdown_row(name: str, facts: Facts) -> str:
    e, m = facts["estimate"], facts["memory"]
    return _row(
        (
            name,
            topology(facts),
            mesh(facts["mesh"], whole=False),
            facts["remat"],
            short(facts["parameters"]),
            f"{gibibytes(m['peak'])} of {gibibytes(m['capacity'])}" + ("" if facts["fits"] else ", **does not fit**"),
            f"{m['peak'] / sum(facts['needed'].values()):.2f}",
            in_short(facts["collectives"]),
            duration(e["seconds"]),
            f"{e['mfu']:.1%}",
            e["bound"],
        )
    )


def in_short(collectives: Sequence[Facts]) -> str:
    """AG 21.3 GB, RS 10.6 GB over fsdp; A2A 3.2 GB over expert. Without what is less than a hundredth of all.

    What crosses slices, over a slower network, is compared with all that does.
    """
    all_of = {across: _bytes(c for c in collectives if c["across_slices"] is across) for across in (False, True)}
    moved: dict[str, dict[str, list[Facts]]] = {}
    for c in collectives:
        moved.setdefault(_where(c), {}).setdefault(c["kind"], []).append(c)
    told = []
    for where, kinds in sorted(moved.items(), key=lambda item: -_bytes(itertools.chain(*item[1].values()))):
        most = [
            f"{SHORT.get(kind, kind)} {_traffic(found)}"
            for kind, found in sorted(kinds.items(), key=lambda item: -_bytes(item[1]))
            if _bytes(found) > _LEAST * all_of[found[0]["across_slices"]]
        ]
        if most:
            told.append(f"{', '.join(most)} over {where}")
    return "; ".join(told) or "none"


def collective_rows(facts: Facts) -> list[list[str]]:
    """Of each: kind, over what, type, where, count, bytes, the largest; and of all together."""
    rows = []
    for c in facts["collectives"]:
        instead = f", in the place of {_article(c['emulates'])} {c['emulates']}" if c["emulates"] else ""
        count = f"{_at_least(c)}{c['count']:,}"
        inside = "in loops" if c["in_loop"] else "outside"
        over = _where(c, facts["mesh"])
        rows.append([c["kind"] + instead, over, c["dtype"], inside, count, _traffic([c]), traffic(c["largest"])])
    return [*rows, ["all", "", "", "", "", _traffic(facts["collectives"]), ""]]


def topology(facts: Facts) -> str:
    return facts["topology"] if facts["slices"] == 1 else f"{facts['slices']} x {facts['topology']}"


def mesh(sizes: Mapping[str, int], *, whole: bool = True) -> str:
    """replica 2 x fsdp 64 x expert 1 x tensor 1; not `whole`: without axes of 1."""
    return " x ".join(f"{axis} {n}" for axis, n in sizes.items() if whole or n > 1) or "1 device"


def fit(facts: Facts) -> str:
    """yes, 12.3 of 95.7 GiB (13%)."""
    peak, capacity = facts["memory"]["peak"], facts["memory"]["capacity"]
    told = f"{gibibytes(peak)} of {gibibytes(capacity)} GiB ({peak / capacity:.0%})"
    return f"yes, {told}" if facts["fits"] else f"no, {_too_much(facts)}: {told}"


def compiler(facts: Facts) -> str:
    """Its options and versions."""
    options = ", ".join(f"{name}={value}" for name, value in facts["options"].items()) or "none"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"compiled in {facts['compile_seconds']:.0f} s by {versions}; options: {options}"


def _too_much(facts: Facts) -> str:
    return f"{gibibytes(facts['memory']['peak'] - facts['memory']['capacity'])} GiB too much"


def _memory(facts: Facts) -> list[str]:
    """What the compiler takes, what is needed by count, and the former against the capacity."""
    m, needed = facts["memory"], facts["needed"]
    total = sum(needed.values())
    rows = [["", "compiled", "by count", f"of {gibibytes(m['capacity'])}", ""]]
    for kind in KINDS:
        if m[kind] or kind in needed:
            counted = gibibytes(needed[kind], 2) if kind in needed else ""
            rows.append([kind, gibibytes(m[kind], 2), counted, *_against(m[kind], m["capacity"])])
    rows += [[name, "", gibibytes(n, 2), "", ""] for name, n in needed.items() if name not in KINDS]
    rows.append(["peak", gibibytes(m["peak"], 2), gibibytes(total, 2), *_against(m["peak"], m["capacity"])])
    return [*_aligned(rows, left=(0, 4)), f"The peak is {m['peak'] / total:.2f} times what is needed by count."]


def _against(n: float, capacity: float) -> tuple[str, str]:
    """A share, and its bar; a bar that is longer than the capacity goes on behind a mark."""
    filled = math.ceil(_BAR * n / capacity - 0.5)
    bar = "█" * min(filled, _BAR)
    return f"{n / capacity:.1%}", bar + ("|" + "█" * (filled - _BAR) if filled > _BAR else "")


def _collectives(facts: Facts) -> list[str]:
    if not facts["collectives"]:
        return ["none"]
    return _aligned([["", "over", "type", "", "count", "bytes", "largest"], *collective_rows(facts)], left=(0, 1, 2, 3))


def _where(collective: Facts, sizes: Mapping[str, int] | None = None) -> str:
    """replica, across slices; with the sizes of axes also what it joins of them, fsdp of 32. Else `other`."""
    axes, group = collective["axes"], collective["group"]
    part = f" of {group}" if sizes and group < math.prod(sizes[axis] for axis in axes) else ""
    return (" ".join(axes) or "other") + part + (", across slices" if collective["across_slices"] else "")


def _bytes(collectives: Iterable[Facts]) -> float:
    return sum(c["bytes"] for c in collectives)


def _traffic(collectives: Sequence[Facts]) -> str:
    return _at_least(*collectives) + traffic(_bytes(collectives))


def _at_least(*collectives: Facts) -> str:
    """Before a number that is too small where a loop has more turns than the one that is counted."""
    return "at least " if any(c["uncertain"] for c in collectives) else ""


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _estimate(facts: Facts) -> list[str]:
    e, flops = facts["estimate"], facts["flops"]
    step = e["seconds"]
    rows = [
        *([name, duration(n, step), f"{n / step:.1%}"] for name, n in in_turn(e).items()),
        ["a step", duration(step, step), f"bound by {e['bound']}"],
        *([f"beside compute: {name}", duration(n, step), f"{n / step:.1%}"] for name, n in beside(e).items()),
        ["FLOPs", f"{flops['needed']:.4g}", f"and {flops['repeated']:.4g} repeated"],
        ["tokens/s", short(e["tokens_per_second"]), f"{e['tokens_per_second'] / facts['devices']:,.0f} a device"],
        ["MFU", f"{e['mfu']:.1%}", ""],
    ]
    return _aligned(rows, left=(0, 2))


def _section(title: str, lines: Sequence[str]) -> list[str]:
    """Nothing where there are no lines."""
    return ["", title, *(f"  {line}" for line in lines)] if lines else []


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Lines of columns, two spaces between; columns are right-aligned but those of `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
