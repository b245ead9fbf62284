"""Facts of compiled steps as a page: one step with its bars, or the steps of a search in order; one file."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2

from nmm_jax.compilation import tables
from nmm_jax.compilation.quantities import duration, gibibytes, short, traffic
from nmm_jax.compilation.tables import KINDS, Facts
from nmm_jax.compilation.timeline import beside, in_turn

_COLOURS = 10  # of the page


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a bar: which colour of the page it has; where it begins and how wide it is, in percent of the bar."""

    name: str
    amount: str
    colour: int
    start: float
    width: float


def write_page(facts: Facts | Sequence[Facts], path: str | os.PathLike[str]) -> None:
    """Of one step, or of a search."""
    pathlib.Path(path).write_text(render([facts] if isinstance(facts, Mapping) else facts), encoding="utf-8")


def render(found: Sequence[Facts]) -> str:
    """The page; of several steps a row of each, the fastest first, and behind it each in full."""
    found = tables.in_order(found)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("nmm_jax", "compilation"), autoescape=True)
    environment.filters |= {"duration": duration, "gib": gibibytes, "short": short, "traffic": traffic}
    bars = _Bars(found)
    room = max((bars.room(f) for f in found), default=0.0)
    longest = max((f["estimate"]["seconds"] for f in found), default=0.0)
    return environment.get_template("page.html").render(
        steps=[_in_full(f, bars) for f in found], rows=[_in_short(f, bars, room, longest) for f in found], tables=tables
    )


def _in_full(facts: Facts, bars: "_Bars") -> dict[str, Any]:
    """A step's facts and its bars: of memory to one scale, of time to another."""
    e, room = facts["estimate"], bars.room(facts)
    longest = max([e["seconds"], *beside(e).values()])
    return {
        "facts": facts,
        "used": bars.memory(_used(facts), room),
        "needed": bars.memory(facts["needed"], room),
        "capacity": 100 * facts["memory"]["capacity"] / room,
        "in_turn": bars.time(in_turn(e), longest),
        "beside": [bars.time({name: seconds}, longest) for name, seconds in beside(e).items()],
    }


def _in_short(facts: Facts, bars: "_Bars", room: float, longest: float) -> dict[str, Any]:
    """The bars of a row, to the scales of all."""
    return {
        "memory": bars.memory(_used(facts), room),
        "capacity": 100 * facts["memory"]["capacity"] / room,
        "time": bars.time(in_turn(facts["estimate"]), longest),
    }


def _used(facts: Facts) -> dict[str, float]:
    return {kind: facts["memory"][kind] for kind in KINDS if facts["memory"][kind]}


class _Bars:
    """Bars of a page's steps, where a part has the same colour in all of them."""

    def __init__(self, found: Sequence[Facts]):
        self._sizes = _colours([*KINDS, *(name for f in found for name in f["needed"])])
        estimates = [f["estimate"] for f in found]
        self._times = _colours([name for e in estimates for name in (*in_turn(e), *beside(e))])

    def memory(self, parts: Mapping[str, float], full: float) -> list[Segment]:
        return self._bar(parts, full, self._sizes, lambda n: f"{gibibytes(n, 2)} GiB")

    def time(self, parts: Mapping[str, float], full: float) -> list[Segment]:
        return self._bar(parts, full, self._times, duration)

    @staticmethod
    def room(facts: Facts) -> float:
        """Bytes that a bar of memory has to have room for."""
        return max(facts["memory"]["capacity"], facts["memory"]["peak"], sum(facts["needed"].values()))

    @staticmethod
    def _bar(
        parts: Mapping[str, float], full: float, colours: Mapping[str, int], written: Callable[[float], str]
    ) -> list[Segment]:
        segments, start = [], 0.0
        for name, n in parts.items():
            segments.append(Segment(name, written(n), colours[name], start, 100 * n / full))
            start += segments[-1].width
        return segments


def _colours(names: Iterable[str]) -> dict[str, int]:
    """The number of a colour for each name."""
    return {name: i % _COLOURS for i, name in enumerate(dict.fromkeys(names))}
