"""A plan (nmm_jax.scaling.plan) as tables for a reader, and as plain values for JSON."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from nmm_jax.pages.numbers import count
from nmm_jax.scaling.forecast import Quantity
from nmm_jax.scaling.mixtures import source_of

_WIDTH = 118  # of lines of prose


def plain(found: Any) -> Any:
    """For JSON: quantities as {"value", "low", "high"}, what is not finite as null."""
    if isinstance(found, Quantity):
        return plain(found._asdict())
    if isinstance(found, Mapping):
        return {key: plain(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [plain(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def table(plan: Mapping[str, Any]) -> str:
    """All of it, the answer first."""
    lines = []
    budget, N = plan["budget"], plan["model"]
    if budget:
        flops = f"{budget['flops']:.4g} FLOPs"
        lines.append("budget: " + (flops if budget["told"] == flops else f"{budget['told']}: {flops}"))
    if N:
        lines.append(f"model: N = {count(N)}")
    rows = [["", "N", "D", "D / N", "loss"]]
    for law in plan["laws"]:
        sizes = ["–"] * 3
        if law["N"]:
            sizes = [counted(law["N"]), counted(law["D"]), f"{law['D'].value / law['N'].value:.3g}"]
        rows.append([law["name"], *sizes, f"{law['loss']:.4g}"])
    lines += ["", ("best for its own budget" if N else "least loss"), *aligned(rows)]
    if levels := {(law["level"], law["draws"]) for law in plan["laws"] if law["draws"]}:
        lines += [f"  in brackets: {level:.0%} intervals of {draws} bootstrap draws" for level, draws in sorted(levels)]
    if plan.get("differences"):
        lines += ["", f"least loss of this budget, above that of {plan['laws'][0]['name']}"]
        lines += aligned(
            [[d["of"], percent(d["percent"]) if d["percent"] else "–", d["verdict"]] for d in plan["differences"]]
        )
    for law in plan["laws"]:
        lines += ["", f"{law['name']}: L = {law['formula']}", f"  {law['source']}", *_of_law(law)]
        told = [f"warning: {text}" for text in law["warnings"] + law.get("config", {}).get("warnings", [])]
        for text in told + [f"note: {text}" for text in law["notes"]]:
            lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _of_law(law: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if "mixture" in law:
        shares = {source_of(name): share.map(lambda v: 100 * v) for name, share in law["mixture"].items()}
        lines += ["  best mixture: " + ", ".join(f"{name} {share:.1f}%" for name, share in shares.items())]
    if "smaller" in law:
        lines += ["", "  a smaller model for the same FLOPs, or trained until it is as good"]
        rows = [["N", "of the best", "D", "loss", "more", "D, as good", "FLOPs", ""]]
        for row in law["smaller"]:
            reached = math.isfinite(row["D_same_loss"])
            same = [counted(row["D_same_loss"]), f"{row['C_same_loss'] / law['smaller'][0]['C']:.2f} x"]
            cells = [counted(row["N"]), f"{row['share']:.0%}", counted(row["D"]), f"{row['loss'].value:.4g}"]
            rows.append([*cells, percent(row["excess"]), *(same if reached else ["never", ""]), _beyond(row)])
        lines += aligned(rows, 4)
    if "longer" in law:
        lines += ["", "  tokens, and the loss after them"]
        rows = [["D", "D / N", "FLOPs", "loss", "above the best N's", ""]]
        for row in law["longer"]:
            cells = [counted(row["D"]), f"{row['D'] / row['N']:.3g}", f"{row['C']:.3g}", f"{row['loss']:.4g}"]
            rows.append([*cells, percent(row["excess"]), _beyond(row)])
        lines += aligned(rows, 4)
    if row := law.get("in_budget"):
        lines += [
            "",
            f"  in this budget: D = {counted(row['D'])}, {row['D'] / row['N']:.3g} for each parameter, "
            f"loss {row['loss']:.4g}, {percent(row['excess'])} above that of the best N",
        ]
    if served := law.get("served"):
        lines += [
            "",
            f"  to serve {counted(served['tokens'])} tokens: N = {counted(served['N'])}, D = {counted(served['D'])} "
            f"has the same loss; {served['C']:.3g} FLOPs of training, {served['saved']:.1%} less for both together",
        ]
    if (config := law.get("config")) and "loss" not in config:
        of = f"  {config['steps']:,} steps, D = {count(config['D'])}, {config['flops']:.3g} FLOPs with attention"
        lines += ["", of, f"  {config['command']}"]
    elif config:
        hours = f", {config['hours']:.3g} hours" if config["hours"] else ""
        total = "" if config["N_total"] == config["N"] else f" of {count(config['N_total'])}"
        lines += [
            "",
            f"  nearest config: {config['path']}, N = {count(config['N'])}{total}, D = {count(config['D'])}",
            f"  loss {config['loss']:.4g}, {percent(config['excess'])} above the least; {config['steps']:,} steps, "
            f"{config['flops']:.3g} FLOPs with attention{hours}",
            f"  {config['command']}",
        ]
    return lines


def counted(value: float | Quantity | None) -> str:
    """1.83B [1.70B, 2.02B]."""
    if isinstance(value, Quantity):
        ends = "" if value.low is None or value.high is None else f" [{count(value.low)}, {count(value.high)}]"
        return count(value.value) + ends
    return "–" if value is None else count(value)


def percent(value: Quantity) -> str:
    """+0.42% [+0.10, +0.91]."""
    ends = "" if value.low is None or value.high is None else f" [{value.low:+.2f}, {value.high:+.2f}]"
    return f"{value.value:+.2f}%{ends}"


def aligned(rows: Sequence[Sequence[str]], indent: int = 2) -> list[str]:
    """Columns, as wide as their widest cells."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [" " * indent + "   ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _beyond(row: Mapping[str, Any]) -> str:
    return f"{' and '.join(row['beyond'])} beyond the fit" if row["beyond"] else ""
