"""What is in a picture: objects with attributes and places, and how scenes of them are drawn at random.

Coordinates are fractions of the image, x to the right and y downwards, so a scene does not depend on pixels.
Some (colour, kind) pairs are held out: training sees every colour and every kind, but never these together, in
no image and in no text, so that questions about them measure composition.
"""

import dataclasses
import functools
import random

Pair = tuple[str, str]  # (colour, kind)

# With the noise of render.py on top, no channel leaves 0..255, so that nothing has to be clipped.
COLOURS = {
    "red": (214, 40, 40),
    "green": (52, 176, 70),
    "blue": (48, 92, 228),
    "yellow": (240, 214, 48),
    "purple": (160, 62, 206),
    "white": (240, 240, 240),
    "orange": (244, 138, 30),
    "cyan": (60, 212, 220),
    "pink": (244, 150, 190),
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


# y of objects on slots: few places, so that a model of the quickstart's size has few pictures of each kind to learn.
HEIGHTS = (0.25, 0.5, 0.75)


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

    @functools.cached_property
    def seen(self) -> tuple[Pair, ...]:
        """The (colour, kind) pairs of training."""
        return tuple((c, k) for c in self.colours for k in self.kinds if (c, k) not in HELD_OUT)

    @functools.cached_property
    def held_out(self) -> tuple[Pair, ...]:
        """The pairs that only questions have."""
        return tuple((c, k) for c in self.colours for k in self.kinds if (c, k) in HELD_OUT)


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
    def pair(self) -> Pair:
        return self.colour, self.kind


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in drawing order: a later one covers an earlier one where they overlap."""

    objects: tuple[Object, ...]
    background: tuple[int, int, int]
    noise: int  # seed of the noise over the picture

    def from_left(self) -> list[Object]:
        return sorted(self.objects, key=lambda o: o.x)


def _pick_pairs(rng: random.Random, level: Level, count: int, first: Pair | None) -> list[Pair]:
    """`count` pairs of different kinds, so that "the circle" is one object: seen in training, but for `first`."""
    chosen = [first] if first else []
    while len(chosen) < count:
        pair = rng.choice(level.seen)
        if all(pair[1] != kind for _, kind in chosen):
            chosen.append(pair)
    return chosen


def _scene(rng: random.Random, objects: list[Object]) -> Scene:
    grey = rng.randint(20, 56)
    background = (grey + rng.randint(-8, 8), grey + rng.randint(-8, 8), grey + rng.randint(-8, 8))
    return Scene(tuple(objects), background, rng.getrandbits(32))


def make(rng: random.Random, level: Level, pair: Pair, slot: float | None = None) -> Object:
    """An object of the pair, with random other attributes, at a random place or near a slot."""
    size = rng.choice(tuple(level.sizes))
    radius = level.sizes[size]
    if slot is None:
        x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
    else:
        x, y = slot + rng.uniform(-0.03, 0.03), rng.choice(HEIGHTS) + rng.uniform(-0.03, 0.03)
    return Object(pair[1], pair[0], rng.choice(level.textures), size, x, y, radius)


def apart(a: Object, b: Object) -> bool:
    """Whether the two leave each other in full view."""
    # Shapes lie in the square around their circle; 1.25 radii are between the circle and that square's corner.
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (1.25 * (a.radius + b.radius) + 0.02) ** 2


def place(rng: random.Random, level: Level, pair: Pair, others: list[Object]) -> Object | None:
    """An object of the pair apart from the others, or None where 30 tries found no room."""
    for _ in range(30):
        o = make(rng, level, pair)
        if all(apart(o, other) for other in others):
            return o
    return None


def _scatter(rng: random.Random, level: Level, pairs: list[Pair], objects: list[Object]) -> list[Object] | None:
    """`objects` and one more for each pair, all apart, or None where there was no room."""
    objects = list(objects)
    for pair in pairs:
        o = place(rng, level, pair, objects)
        if o is None:
            return None
        objects.append(o)
    return objects


def sample(rng: random.Random, level: Level, count: int = 0, first: Pair | None = None) -> Scene:
    """A random scene of `count` objects (0: any number), in full view; one is of the pair `first`, where given.

    With slots, two objects stand on the outer ones, so that "on the left" and "on the right" are also parts of
    the picture.
    """
    count = count or rng.randint(1, level.most)
    pairs = _pick_pairs(rng, level, count, first)
    if level.slots:
        rng.shuffle(pairs)
        slots = {1: [rng.choice(level.slots)], 2: [level.slots[0], level.slots[-1]]}.get(count, level.slots)
        return _scene(rng, [make(rng, level, pair, slot) for pair, slot in zip(pairs, slots, strict=True)])
    objects = None
    while objects is None:
        objects = _scatter(rng, level, pairs, [])
    return _scene(rng, objects)


def sample_group(rng: random.Random, level: Level, first: Pair | None = None) -> Scene:
    """Several objects of one pair, and perhaps some others: a scene to count in."""
    count = rng.randint(2, level.most)
    same = rng.randint(2, count)
    pairs = _pick_pairs(rng, level, count - same + 1, first)
    objects = None
    while objects is None:
        objects = _scatter(rng, level, pairs[:1] * same + pairs[1:], [])
    return _scene(rng, objects)


def sample_occluded(rng: random.Random, level: Level, first: Pair | None = None) -> Scene:
    """Two large objects, the second partly in front of the first, and perhaps others beside them."""
    count = rng.randint(2, level.most - 2)
    pairs = _pick_pairs(rng, level, count, first)
    while pairs[0][0] == pairs[1][0]:  # of one colour, they would be one shape to the eye
        pairs = _pick_pairs(rng, level, count, first)
    if rng.random() < 0.5:
        pairs[:2] = pairs[1::-1]
    radius = level.sizes["large"]
    objects = None
    while objects is None:
        back, front = (dataclasses.replace(make(rng, level, pair), size="large", radius=radius) for pair in pairs[:2])
        back = dataclasses.replace(back, x=rng.uniform(0.35, 0.65), y=rng.uniform(0.35, 0.65))
        dx, dy = rng.choice([(-1, 0), (1, 0), (0, -1), (0, 1), (-0.8, -0.8), (0.8, -0.8), (-0.8, 0.8), (0.8, 0.8)])
        front = dataclasses.replace(front, x=back.x + dx * radius, y=back.y + dy * radius)
        objects = _scatter(rng, level, pairs[2:], [back, front])
    return _scene(rng, objects)


def occluded_pair(scene: Scene) -> tuple[Object, Object] | None:
    """The (back, front) objects of which one plainly covers a part of the other, where there are such."""
    for j, front in enumerate(scene.objects):
        for back in scene.objects[:j]:
            if (back.x - front.x) ** 2 + (back.y - front.y) ** 2 < (0.75 * (back.radius + front.radius)) ** 2:
                return back, front
    return None
