"""Words for scenes: phrases, captions, questions with their answers, and sentences about changes.

Lower case, with ordinary punctuation. The words are few and known and a sentence that lists
objects does so from left to right unless it says otherwise, so that a text is predictable from its picture.
"""

import dataclasses
import random

from data_pipelines.scenes.changes import Added, Change, Moved, Recoloured, Removed, Swapped
from data_pipelines.scenes.scene import Level, Object, Scene, occluded_pair

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
PLURALS = {"cross": "crosses"}
LINE_UP = "from left to right:"  # opens the caption whose every word the picture decides; asked, too
CORNERS = {"circle": "no", "square": "four", "triangle": "three", "ring": "no", "diamond": "four", "star": "ten"}

# Besides the level's own names of kinds, colours, sizes and textures.
WORDS = """
    , - . : ? a above added also and are as before below came changed colour comes corners first five four from gone
    hand has here how in is it left many middle more moved no now of on one picture place places removed right shape
    shapes side six swapped than the then there three to turned two was went were what where which
"""
FULL_WORDS = "an at behind bottom by front hidden or partly ten top zero"


def vocabulary(level: Level) -> list[str]:
    """Every word and mark of the level's texts, sorted."""
    words = set(WORDS.split()) | {*level.kinds, *map(plural, level.kinds), *level.colours, *level.sizes}
    if not level.slots:
        words |= {*FULL_WORDS.split(), *level.textures}
    return sorted(words)


@dataclasses.dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def plural(kind: str) -> str:
    return PLURALS.get(kind, kind + "s")


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def join(phrases: list[str]) -> str:
    """a | a and b | a, b and c"""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def name(o: Object) -> str:
    return f"{o.colour} {o.kind}"


def refer(o: Object, scene: Scene) -> str:
    """The shortest phrase that means this object in this scene."""
    same_kind = [p for p in scene.objects if p.kind == o.kind]
    if len(same_kind) == 1:
        return f"the {o.kind}"
    return f"the {name(o)}"


def unique(scene: Scene) -> list[Object]:
    """The objects that share colour and kind with no other, so that `refer` names one."""
    pairs = [o.pair for o in scene.objects]
    return [o for o in scene.objects if pairs.count(o.pair) == 1]


def place(o: Object) -> str:
    """on the left | in the middle | on the right"""
    return "on the left" if o.x < 0.4 else "on the right" if o.x > 0.6 else "in the middle"


def outermost(scene: Scene) -> dict[str, Object]:
    """left, right, top, bottom -> the object there; only sides of the picture where one of several plainly stands."""
    found = {}
    if len(scene.objects) > 1:
        for axis, (low, high) in {"x": ("left", "right"), "y": ("top", "bottom")}.items():
            ordered = sorted(scene.objects, key=lambda o: getattr(o, axis))
            at = [getattr(o, axis) for o in ordered]
            # 0.12 is more than radii differ, so that the outermost centre is the outermost edge as well.
            if at[0] < 0.4 and at[1] - at[0] > 0.12:
                found[low] = ordered[0]
            if at[-1] > 0.6 and at[-1] - at[-2] > 0.12:
                found[high] = ordered[-1]
    return found


def in_line(scene: Scene) -> bool:
    """Whether the order from left to right is plain: no two objects stand nearly above each other."""
    line = scene.from_left()
    return all(b.x - a.x > 0.05 for a, b in zip(line, line[1:], strict=False))


def relation(a: Object, b: Object) -> str | None:
    """How a stands to b, where one direction is plain: to the left of | to the right of | above | below."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > 0.15 and abs(dx) >= abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    if abs(dy) > 0.15 and abs(dy) > 1.5 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def line_up(scene: Scene) -> str:
    """a red circle, a blue square and a white cross."""
    return join([with_article(name(o)) for o in scene.from_left()]) + "."


def tally(scene: Scene) -> str:
    """three red circles and a blue square, in the order in which the first of each stands from the left"""
    counts: dict[tuple[str, str], int] = {}
    for o in scene.from_left():
        counts[o.pair] = counts.get(o.pair, 0) + 1
    return join(
        [
            with_article(f"{colour} {kind}") if n == 1 else f"{NUMBERS[n]} {colour} {plural(kind)}"
            for (colour, kind), n in counts.items()
        ]
    )


def caption(rng: random.Random, level: Level, scene: Scene) -> tuple[str, ...]:
    """A true caption, in one text or two: one of the templates that the scene allows."""
    with_size, with_texture = rng.random() < 0.5, len(level.textures) > 1 and rng.random() < 0.7

    def phrase(o: Object) -> str:
        words = [o.size] * with_size + [o.texture] * (with_texture and o.texture != "solid") + [name(o)]
        return with_article(" ".join(words))

    line = scene.from_left()
    if len(unique(scene)) < len(line):
        return (f"{tally(scene)}.",)
    left, right = phrase(line[0]), phrase(line[-1])
    if len(line) == 1:
        return (rng.choice([f"{left}.", f"{left} {place(line[0])}.", f"{place(line[0])} is {left}."]),)

    number = f"{NUMBERS[len(line)]} shapes: {join([phrase(o) for o in line])}."
    templates: list[tuple[str, ...]] = [(number,)]
    if in_line(scene):
        templates += [(LINE_UP, line_up(scene))] * 2
        if place(line[0]) == "on the left" and place(line[-1]) == "on the right":
            templates += [(f"on the left-hand side is {left}.",), (f"on the right-hand side is {right}.",)]
            if len(line) == 2:
                templates.append((f"on the left is {left}, on the right is {right}.",))
            elif len(line) == 3 and place(line[1]) == "in the middle":
                middle = phrase(line[1])
                templates.append((f"on the left is {left}, in the middle is {middle}, on the right is {right}.",))
    a, b = rng.sample(line, 2)
    related = relation(a, b)
    if related:
        templates += [(f"{phrase(a)} {related} {phrase(b)}.",)] * 2
    hidden = None if level.slots else occluded_pair(scene)
    if hidden:
        back, front = map(phrase, hidden)
        templates += [(f"{front} in front of {back}.",), (f"{back} behind {front}.",)]
        templates += [(f"{back} is partly hidden by {front}.",)]
    return rng.choice(templates)


def questions(rng: random.Random, level: Level, scene: Scene) -> list[Question]:
    """What can be asked of this scene, one of each kind, each with the only right answer."""
    line = scene.from_left()
    found = []
    single = [o for o in unique(scene) if sum(p.kind == o.kind for p in scene.objects) == 1]
    if single:
        o = rng.choice(single)
        found.append(Question("colour", f"what colour is the {o.kind}?", o.colour))
        if len(level.textures) > 1:
            found.append(Question("texture", f"is the {o.kind} solid, striped, dotted or checked?", o.texture))
    if level.slots or rng.random() < 0.4:
        found.append(Question("count", "how many shapes are there?", NUMBERS[len(line)]))
    else:
        kind = rng.choice(level.kinds) if rng.random() < 0.2 else rng.choice(line).kind
        count = sum(o.kind == kind for o in line)
        found.append(Question("count", f"how many {plural(kind)} are there?", NUMBERS[count]))
    for side, o in outermost(scene).items():
        if side in ("left", "right"):
            found.append(Question(side, f"which one is on the {side}-hand side?", name(o)))
        elif not level.slots:
            found.append(Question(side, f"which one is at the {side}?", name(o)))
    hidden = None if level.slots else occluded_pair(scene)
    if hidden:
        back, front = hidden
        found.append(Question("front", f"what is in front of the {name(back)}?", name(front)))
    if len(unique(scene)) == len(line) and len(line) > 1 and in_line(scene):
        found.append(Question("caption", LINE_UP, line_up(scene)))
    return found


def _side(change: Moved) -> str:
    return "right" if change.new.x > change.old.x else "left"


def happened(change: Change) -> str:
    """The answer to "what changed?" after two pictures."""
    match change:
        case Added(new):
            return f"{with_article(name(new))} was added."
        case Removed(old):
            return f"the {name(old)} was removed."
        case Recoloured(old, new):
            return f"the {name(old)} turned {new.colour}."
        case Moved(old, _):
            return f"the {name(old)} moved to the {_side(change)}."
        case Swapped(first, second):
            left, right = sorted((first, second), key=lambda o: o.x)
            return f"the {name(left)} and the {name(right)} swapped places."


def retold(rng: random.Random, change: Change, before: Scene, first: bool) -> str:
    """A sentence after a picture that refers back to the one before it, which may have been the first."""
    match change:
        case Added(new):
            a = with_article(name(new))
            tellings = [f"now there is also {a} {place(new)}.", f"{a} came.", f"then {a} was added."]
        case Removed(old):
            the = refer(old, before)
            tellings = [f"{the} is gone.", f"now {the} is gone.", f"{the} was removed."]
        case Recoloured(old, new):
            the, then = refer(old, before), "in the first picture" if first else "before"
            tellings = [f"{the} turned {new.colour}.", f"now {the} is {new.colour}."]
            tellings.append(f"{then} {the} was {old.colour}, now it is {new.colour}.")
        case Moved(old, new):
            the, side = refer(old, before), _side(change)
            tellings = [f"{the} moved to the {side}.", f"{the} went to the {side}.", f"now {the} is {place(new)}."]
        case Swapped(one, other):
            a, b = rng.sample([refer(one, before), refer(other, before)], 2)
            tellings = [f"now {a} is where {b} was.", f"{a} and {b} swapped places."]
            tellings.append(f"{b} is now in the place of {a}.")
    return rng.choice(tellings)
