"""What can happen between two pictures of one scene: an object comes, goes, turns another colour or moves."""

import dataclasses
import random
from collections.abc import Callable

from data_pipelines.scenes.scene import Level, Object, Pair, Scene, apart, make, place


@dataclasses.dataclass(frozen=True)
class Added:
    new: Object


@dataclasses.dataclass(frozen=True)
class Removed:
    old: Object


@dataclasses.dataclass(frozen=True)
class Recoloured:
    old: Object
    new: Object


@dataclasses.dataclass(frozen=True)
class Moved:
    old: Object
    new: Object


@dataclasses.dataclass(frozen=True)
class Swapped:
    """Two objects, as they were, that took each other's place."""

    first: Object
    second: Object


Change = Added | Removed | Recoloured | Moved | Swapped
Objects = tuple[Object, ...]
Outcome = tuple[Objects, Change] | None  # None: not possible in this scene


def change(
    rng: random.Random, level: Level, scene: Scene, kind: type, pair: Pair | None = None
) -> tuple[Scene, Change] | None:
    """The scene after a change of a kind among CHANGES, or None where that is not possible.

    With `pair`, an object of that pair comes, goes, moves, swaps places, or is what another one turns into.
    """
    outcome = CHANGES[kind](rng, level, scene.objects, pair)
    if outcome is None:
        return None
    objects, what = outcome
    return Scene(objects, scene.background, rng.getrandbits(32)), what


def _subject(rng: random.Random, objects: Objects, pair: Pair | None) -> Object | None:
    found = [o for o in objects if pair is None or o.pair == pair]
    return rng.choice(found) if found else None


def _free_place(rng: random.Random, level: Level, pair: Pair, objects: Objects) -> Object | None:
    """An object of the pair where there is room for one."""
    if not level.slots:
        return place(rng, level, pair, list(objects))
    free = [slot for slot in level.slots if all(abs(o.x - slot) > 0.1 for o in objects)]
    return make(rng, level, pair, rng.choice(free)) if free else None


def _replaced(objects: Objects, new: dict[Object, Object]) -> Objects:
    return tuple(new.get(o, o) for o in objects)


def _added(rng: random.Random, level: Level, objects: Objects, pair: Pair | None) -> Outcome:
    kinds = {o.kind for o in objects}
    pairs = [p for p in ((pair,) if pair else level.seen) if p[1] not in kinds]
    if not pairs or len(objects) == level.most:
        return None
    new = _free_place(rng, level, rng.choice(pairs), objects)
    return ((*objects, new), Added(new)) if new else None


def _removed(rng: random.Random, level: Level, objects: Objects, pair: Pair | None) -> Outcome:
    old = _subject(rng, objects, pair)
    if old is None or len(objects) == 1:
        return None
    return tuple(o for o in objects if o is not old), Removed(old)


def _recoloured(rng: random.Random, level: Level, objects: Objects, pair: Pair | None) -> Outcome:
    new_pairs = [pair] if pair else list(level.seen)
    options = [(o, p) for o in objects for p in new_pairs if o.kind == p[1] and o.pair != p]
    if not options:
        return None
    old, (colour, _) = rng.choice(options)
    new = dataclasses.replace(old, colour=colour)
    return _replaced(objects, {old: new}), Recoloured(old, new)


def _moved(rng: random.Random, level: Level, objects: Objects, pair: Pair | None) -> Outcome:
    old = _subject(rng, objects, pair)
    if old is None:
        return None
    spot = _free_place(rng, level, old.pair, objects)
    if spot is None or abs(spot.x - old.x) < 0.2:
        return None
    # The object keeps its looks; only where it is comes from the draw.
    new = dataclasses.replace(old, x=spot.x, y=old.y if level.slots else spot.y)
    if not level.slots and not all(apart(new, o) for o in objects if o is not old):
        return None
    return _replaced(objects, {old: new}), Moved(old, new)


def _swapped(rng: random.Random, level: Level, objects: Objects, pair: Pair | None) -> Outcome:
    a = _subject(rng, objects, pair)
    if a is None:
        return None
    others = [o for o in objects if abs(o.x - a.x) > 0.1]
    if not others:
        return None
    b = rng.choice(others)
    new = {a: dataclasses.replace(a, x=b.x, y=b.y), b: dataclasses.replace(b, x=a.x, y=a.y)}
    swapped = _replaced(objects, new)
    if not level.slots and not all(apart(o, p) for o in new.values() for p in swapped if o is not p):
        return None
    return swapped, Swapped(a, b)


CHANGES: dict[type, Callable[[random.Random, Level, Objects, Pair | None], Outcome]] = {
    Added: _added,
    Removed: _removed,
    Recoloured: _recoloured,
    Moved: _moved,
    Swapped: _swapped,
}
