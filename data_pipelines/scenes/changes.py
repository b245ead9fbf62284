"""What can happen between two pictures of one scene: an object comes, goes, turns another colour or moves."""

import dataclasses
import random

from data_pipelines.scenes.scene import Level, Object, Pair, Scene, apart, make, place

CHANGES = ("added", "removed", "recoloured", "moved", "swapped")


@dataclasses.dataclass(frozen=True)
class Change:
    """`before` and `after` are one object in the two scenes; `other` is the one it swapped places with, before."""

    kind: str
    before: Object | None = None
    after: Object | None = None
    other: Object | None = None


Outcome = tuple[tuple[Object, ...], Change] | None  # None: not possible in this scene


def change(
    rng: random.Random, level: Level, scene: Scene, kind: str, pair: Pair | None = None
) -> tuple[Scene, Change] | None:
    """The scene after a change of a kind among CHANGES, or None where that is not possible.

    With `pair`, an object of that pair comes, goes, moves, swaps places, or is what another one turns into.
    """
    outcome = _MAKE[kind](rng, level, scene.objects, pair)
    if outcome is None:
        return None
    objects, result = outcome
    return Scene(objects, scene.background, rng.getrandbits(32)), result


def _subject(rng: random.Random, objects: tuple[Object, ...], pair: Pair | None) -> Object | None:
    found = [o for o in objects if pair is None or o.pair == pair]
    return rng.choice(found) if found else None


def _free_place(rng: random.Random, level: Level, pair: Pair, objects: tuple[Object, ...]) -> Object | None:
    """An object of the pair where there is room for one."""
    if not level.slots:
        return place(rng, level, pair, list(objects))
    free = [slot for slot in level.slots if all(abs(o.x - slot) > 0.1 for o in objects)]
    return make(rng, level, pair, rng.choice(free)) if free else None


def _replaced(objects: tuple[Object, ...], new: dict[Object, Object]) -> tuple[Object, ...]:
    return tuple(new.get(o, o) for o in objects)


def _added(rng: random.Random, level: Level, objects: tuple[Object, ...], pair: Pair | None) -> Outcome:
    kinds = {o.kind for o in objects}
    pairs = [p for p in ((pair,) if pair else level.seen) if p[1] not in kinds]
    if not pairs or len(objects) == level.most:
        return None
    new = _free_place(rng, level, rng.choice(pairs), objects)
    return ((*objects, new), Change("added", after=new)) if new else None


def _removed(rng: random.Random, level: Level, objects: tuple[Object, ...], pair: Pair | None) -> Outcome:
    old = _subject(rng, objects, pair)
    if old is None or len(objects) == 1:
        return None
    return tuple(o for o in objects if o is not old), Change("removed", before=old)


def _recoloured(rng: random.Random, level: Level, objects: tuple[Object, ...], pair: Pair | None) -> Outcome:
    new_pairs = [pair] if pair else list(level.seen)
    options = [(o, p) for o in objects for p in new_pairs if o.kind == p[1] and o.pair != p]
    if not options:
        return None
    old, (colour, _) = rng.choice(options)
    new = dataclasses.replace(old, colour=colour)
    return _replaced(objects, {old: new}), Change("recoloured", before=old, after=new)


def _moved(rng: random.Random, level: Level, objects: tuple[Object, ...], pair: Pair | None) -> Outcome:
    old = _subject(rng, objects, pair)
    spot = _free_place(rng, level, old.pair, objects) if old else None
    if spot is None or abs(spot.x - old.x) < 0.2:
        return None
    # The object keeps its looks; only where it is comes from the draw.
    new = dataclasses.replace(old, x=spot.x, y=old.y if level.slots else spot.y)
    if not level.slots and not all(apart(new, o) for o in objects if o is not old):
        return None
    return _replaced(objects, {old: new}), Change("moved", before=old, after=new)


def _swapped(rng: random.Random, level: Level, objects: tuple[Object, ...], pair: Pair | None) -> Outcome:
    a = _subject(rng, objects, pair)
    others = [o for o in objects if a and abs(o.x - a.x) > 0.1]
    if not others:
        return None
    b = rng.choice(others)
    new = {a: dataclasses.replace(a, x=b.x, y=b.y), b: dataclasses.replace(b, x=a.x, y=a.y)}
    swapped = _replaced(objects, new)
    if not level.slots and not all(apart(o, p) for o in new.values() for p in swapped if o is not p):
        return None
    return swapped, Change("swapped", before=a, after=new[a], other=b)


_MAKE = {
    "added": _added,
    "removed": _removed,
    "recoloured": _recoloured,
    "moved": _moved,
    "swapped": _swapped,
}
