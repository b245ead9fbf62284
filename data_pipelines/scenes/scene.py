"""What is in a picture: objects with attributes and places, how scenes are drawn at random and how they change.

Coordinates are fractions of the image, x to the right and y downwards, so a scene does not depend on pixels.
Some (colour, kind) pairs are held out: training sees every colour and every kind, but never these together, in
no image and in no text, so that questions about them measure composition.
"""

import dataclasses
import random

COLOURS = {
    "red": (214, 40, 40),
    "green": (52, 176, 70),
    "blue": (48, 92, 228),
    "yellow": (240, 214, 48),
    "purple": (160, 62, 206),
    "white": (240, 240, 240),
    "orange": (244, 138, 30),
    "cyan": (60, 212, 220),
    "pink": (250, 150, 190),
}
HELD_OUT = frozenset(
    {
        ("red", "cross"),
        ("green", "square"),
        ("blue", "circle"),
        ("yellow", "triangle"),
        ("purple", "star"),
        ("white", "ring"),
        ("orange", "diamond"),
        ("cyan", "heart"),
    }
)


@dataclasses.dataclass(frozen=True)
class Level:
    """How rich the scenes and their language are."""

    name: str
    kinds: tuple[str, ...]
    colours: tuple[str, ...]
    textures: tuple[str, ...]
    sizes: dict[str, float]  # name -> radius, as a fraction of the image
    most: int  # objects of a scene
    slots: tuple[float, ...]  # x of the places objects stand on; empty: anywhere

    def pairs(self, combination: str) -> list[tuple[str, str]]:
        """The (colour, kind) pairs that are "seen" in training, or "held_out"."""
        held_out = combination == "held_out"
        return [(c, k) for c in self.colours for k in self.kinds if ((c, k) in HELD_OUT) == held_out]


LEVELS = {
    "quickstart": Level(
        name="quickstart",
        kinds=("circle", "square", "triangle", "cross"),
        colours=("red", "green", "blue", "yellow", "purple", "white"),
        textures=("solid",),
        sizes={"small": 0.11, "large": 0.165},
        most=3,
        slots=(0.19, 0.5, 0.81),
    ),
    "full": Level(
        name="full",
        kinds=("circle", "square", "triangle", "cross", "star", "ring", "diamond", "heart"),
        colours=tuple(COLOURS),
        textures=("solid", "striped", "dotted", "checked"),
        sizes={"small": 0.075, "medium": 0.115, "large": 0.165},
        most=6,
        slots=(),
    ),
}


@dataclasses.dataclass(frozen=True)
class Object:
    kind: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.kind


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in drawing order: a later one covers an earlier one where they overlap."""

    objects: tuple[Object, ...]
    background: tuple[int, int, int]
    noise: int  # seed of the noise over the picture

    def from_left(self) -> list[Object]:
        return sorted(self.objects, key=lambda o: o.x)


@dataclasses.dataclass(frozen=True)
class Change:
    """What happened between two scenes. `after` is the same object afterwards; `other` the one it swapped with."""

    kind: str  # added | removed | recoloured | moved | swapped
    before: Object | None = None
    after: Object | None = None
    other: Object | None = None


def pick_pairs(
    rng: random.Random, level: Level, count: int, first: tuple[str, str] | None = None
) -> list[tuple[str, str]]:
    """`count` different (colour, kind) pairs seen in training, save that `first` may be any.

    A kind comes once as long as the kinds last, so that "the circle" is one object.
    """
    chosen = [first] if first else []
    pairs = level.pairs("seen")
    while len(chosen) < count:
        pair = rng.choice(pairs)
        kinds = {kind for _, kind in chosen}
        if pair[1] not in kinds or (len(kinds) == len(level.kinds) and pair not in chosen):
            chosen.append(pair)
    return chosen


def _background(rng: random.Random) -> tuple[int, int, int]:
    grey = rng.randint(16, 56)
    return tuple(grey + rng.randint(-8, 8) for _ in range(3))


def _make(rng: random.Random, level: Level, pair: tuple[str, str], slot: float | None) -> Object:
    size = rng.choice(list(level.sizes))
    radius = level.sizes[size]
    x = slot + rng.uniform(-0.03, 0.03) if slot is not None else rng.uniform(radius, 1 - radius)
    return Object(pair[1], pair[0], rng.choice(level.textures), size, x, rng.uniform(radius, 1 - radius), radius)


def _overlap(a: Object, b: Object, margin: float = 0.02) -> bool:
    # Shapes fill at most the square around their circle; 1.25 is between the two.
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < (1.25 * (a.radius + b.radius) + margin) ** 2


def _place(rng: random.Random, level: Level, pair: tuple[str, str], others: list[Object]) -> Object | None:
    """An object at a free place, or None where none was found in 30 tries."""
    for _ in range(30):
        o = _make(rng, level, pair, None)
        if not any(_overlap(o, other) for other in others):
            return o
    return None


def sample(rng: random.Random, level: Level, count: int = 0, first: tuple[str, str] | None = None) -> Scene:
    """A random scene of `count` objects (0: any number); one is of the pair `first`, where given.

    With slots, two objects stand on the outer ones, so that "on the left" and "on the right" are also parts of
    the picture. Without slots, crowded draws may hold fewer objects than asked, and never fewer than one.
    """
    count = count or rng.randint(1, level.most)
    pairs = pick_pairs(rng, level, count, first)
    rng.shuffle(pairs)
    if level.slots:
        slots = {1: [rng.choice(level.slots)], 2: [level.slots[0], level.slots[-1]]}.get(count, level.slots)
        objects = [_make(rng, level, pair, slot) for pair, slot in zip(pairs, slots, strict=True)]
        return Scene(tuple(objects), _background(rng), rng.getrandbits(32))
    while True:
        objects = []
        for pair in pairs:
            o = _place(rng, level, pair, objects)
            if o is not None:
                objects.append(o)
        if len(objects) == count:
            return Scene(tuple(objects), _background(rng), rng.getrandbits(32))


def sample_group(rng: random.Random, level: Level, first: tuple[str, str] | None = None) -> Scene:
    """Several objects of one colour and kind, and perhaps some others: a scene to count in."""
    count = rng.randint(2, level.most)
    same = rng.randint(2, count)
    first = first or rng.choice(level.pairs("seen"))
    pairs = [first] * same + pick_pairs(rng, level, count - same + 1, first)[1:]
    while True:
        objects = []
        for pair in pairs:
            o = _place(rng, level, pair, objects)
            if o is not None:
                objects.append(o)
        if len(objects) == count:
            rng.shuffle(objects)
            return Scene(tuple(objects), _background(rng), rng.getrandbits(32))


def sample_occluded(rng: random.Random, level: Level, first: tuple[str, str] | None = None) -> Scene:
    """Two large objects, the second partly in front of the first, and perhaps others beside them."""
    pairs = pick_pairs(rng, level, rng.randint(2, max(2, level.most - 2)), first)
    if first and rng.random() < 0.5:
        pairs[0], pairs[1] = pairs[1], pairs[0]
    radius = level.sizes["large"]
    while True:
        back = dataclasses.replace(
            _make(rng, level, pairs[0], None),
            size="large",
            radius=radius,
            x=rng.uniform(0.3, 0.7),
            y=rng.uniform(0.3, 0.7),
        )
        dx, dy = rng.choice([(-1, 0), (1, 0), (0, -1), (0, 1), (-0.8, -0.8), (0.8, -0.8), (-0.8, 0.8), (0.8, 0.8)])
        front = dataclasses.replace(
            _make(rng, level, pairs[1], None),
            size="large",
            radius=radius,
            x=back.x + dx * radius,
            y=back.y + dy * radius,
        )
        objects = [back, front]
        for pair in pairs[2:]:
            o = _place(rng, level, pair, objects)
            if o is not None:
                objects.append(o)
        if len(objects) == len(pairs):
            return Scene(tuple(objects), _background(rng), rng.getrandbits(32))


def occluded_pair(scene: Scene) -> tuple[Object, Object] | None:
    """The (back, front) objects of which one covers a part of the other, where there are such."""
    for j, front in enumerate(scene.objects):
        for back in scene.objects[:j]:
            if (back.x - front.x) ** 2 + (back.y - front.y) ** 2 < (0.8 * (back.radius + front.radius)) ** 2:
                return back, front
    return None


def change(rng: random.Random, level: Level, scene: Scene, kind: str, pair: tuple[str, str] | None = None):
    """-> (the scene afterwards, the Change), or None where `kind` of change is not possible in this scene.

    With `pair`, the change is one of the object of that pair: it is added, removed, moved or swapped, or another
    of its kind takes its colour.
    """
    objects = list(scene.objects)
    k = next((i for i, o in enumerate(objects) if o.pair == pair), None) if pair else rng.randrange(len(objects))
    if kind == "added":
        taken = {o.kind for o in objects}
        pairs = [p for p in ([pair] if pair else level.pairs("seen")) if p[1] not in taken]
        if len(objects) == level.most or not pairs:
            return None
        if level.slots:
            free = [s for s in level.slots if all(abs(o.x - s) > 0.1 for o in objects)]
            new = _make(rng, level, rng.choice(pairs), rng.choice(free)) if free else None
        else:
            new = _place(rng, level, rng.choice(pairs), objects)
        if new is None:
            return None
        objects.append(new)
        result = Change("added", after=new)
    elif kind == "removed":
        if k is None or len(objects) == 1:
            return None
        result = Change("removed", before=objects.pop(k))
    elif kind == "recoloured":
        k = next((i for i, o in enumerate(objects) if o.kind == pair[1] and o.pair != pair), None) if pair else k
        if k is None:
            return None
        before = objects[k]
        taken = {o.pair for o in objects}
        colours = [pair[0]] if pair else [c for c, kind in level.pairs("seen") if kind == before.kind]
        colours = [c for c in colours if (c, before.kind) not in taken]
        if not colours:
            return None
        objects[k] = dataclasses.replace(before, colour=rng.choice(colours))
        result = Change("recoloured", before=before, after=objects[k])
    elif kind == "moved":
        if k is None:
            return None
        before, others = objects[k], objects[:k] + objects[k + 1 :]
        if level.slots:
            free = [s for s in level.slots if all(abs(o.x - s) > 0.1 for o in objects)]
            if not free:
                return None
            after = dataclasses.replace(before, x=rng.choice(free) + rng.uniform(-0.03, 0.03))
        else:
            new = _place(rng, level, before.pair, others)
            if new is None or abs(new.x - before.x) < 0.25:
                return None
            after = dataclasses.replace(before, x=min(max(new.x, before.radius), 1 - before.radius))
            if any(_overlap(after, o) for o in others):
                return None
        objects[k] = after
        result = Change("moved", before=before, after=after)
    elif kind == "swapped":
        if k is None or len(objects) == 1:
            return None
        j = rng.choice([j for j in range(len(objects)) if j != k])
        a, b = objects[k], objects[j]
        if abs(a.x - b.x) < 0.1:
            return None
        objects[k], objects[j] = dataclasses.replace(a, x=b.x, y=b.y), dataclasses.replace(b, x=a.x, y=a.y)
        if not level.slots and any(_overlap(objects[i], o) for i in (k, j) for m, o in enumerate(objects) if m != i):
            return None
        result = Change("swapped", before=a, after=objects[k], other=b)
    else:
        raise ValueError(f"no change of kind {kind!r}; one of added, removed, recoloured, moved, swapped")
    return Scene(tuple(objects), scene.background, rng.getrandbits(32)), result
