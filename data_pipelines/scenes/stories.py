"""What the documents of each source say: a story is a tuple of texts and of scenes still to be rendered.

captions      one picture with a caption, or with one to three questions and answers (never both: an answer must
              come from the picture)
interleaved   two to four pictures of a changing scene, told as it goes; or two and the question what changed
text          no picture: imagined scenes with questions, changes told in words, sums, facts
"""

import random

from data_pipelines.scenes import language
from data_pipelines.scenes.changes import CHANGES, Added, Change, Recoloured, change
from data_pipelines.scenes.language import NUMBERS, join, name, plural, refer, with_article
from data_pipelines.scenes.scene import Level, Pair, Scene, sample, sample_group, sample_occluded

Story = tuple[str | Scene, ...]
WHAT_CHANGED = "what changed?"


def some_scene(rng: random.Random, level: Level, first: Pair | None = None) -> Scene:
    """A scene of any sort the level has."""
    sort = rng.random()
    if not level.slots and sort < 0.2:
        return sample_group(rng, level, first)
    if not level.slots and sort < 0.4:
        return sample_occluded(rng, level, first)
    return sample(rng, level, first=first)


def some_change(rng: random.Random, level: Level, scene: Scene) -> tuple[Scene, Change]:
    """The scene after a change of a random kind among those possible in it."""
    for kind in rng.sample(list(CHANGES), len(CHANGES)):
        outcome = change(rng, level, scene, kind)
        if outcome is not None:
            return outcome
    raise AssertionError(f"nothing can change in {scene}")  # one object can always be recoloured or joined


def captions(rng: random.Random, level: Level) -> Story:
    scene = some_scene(rng, level)
    if rng.random() < 0.5:
        return (scene, *language.caption(rng, level, scene))
    asked = [q for q in language.questions(rng, level, scene) if q.kind != "caption"]
    asked = rng.sample(asked, min(len(asked), rng.randint(1, 3)))
    return (scene, *(text for q in asked for text in (q.text, q.answer)))


def interleaved(rng: random.Random, level: Level) -> Story:
    scene = sample(rng, level)
    if rng.random() < 0.4:
        after, happened = some_change(rng, level, scene)
        return scene, after, WHAT_CHANGED, language.happened(happened)
    first = scene
    parts: list[str | Scene] = [first, language.line_up(first)]
    for _ in range(rng.randint(1, 3)):
        after, happened = some_change(rng, level, scene)
        parts += [after, language.retold(rng, happened, scene, first=scene is first)]
        scene = after
    if rng.random() < 0.5:
        asked = [
            ("how many shapes were in the first picture?", NUMBERS[len(first.objects)]),
            ("how many shapes are there now?", NUMBERS[len(scene.objects)]),
        ]
        for side, o in language.outermost(first).items():
            if side in ("left", "right"):
                asked.append((f"which one was on the {side}-hand side in the first picture?", name(o)))
        parts += rng.choice(asked)
    return tuple(parts)


def _imagined(rng: random.Random, level: Level) -> str:
    """A row of objects described pair by pair, then questions that the sentences answer."""
    scene = sample(rng, level, count=rng.randint(2, 3))
    line = scene.from_left()
    sentences = []
    for a, b in zip(line, line[1:], strict=False):
        if rng.random() < 0.5:
            sentences.append(f"{with_article(name(a))} is to the left of {with_article(name(b))}.")
        else:
            sentences.append(f"{with_article(name(b))} is to the right of {with_article(name(a))}.")
    asked = [q for q in language.questions(rng, level, scene) if q.kind in ("colour", "right", "left")]
    asked.append(language.Question("count", "how many shapes are there?", NUMBERS[len(line)]))
    for q in rng.sample(asked, min(2, len(asked))):
        sentences.append(f"{q.text} {q.answer}.")
    return " ".join(sentences)


def _told(rng: random.Random, level: Level) -> str:
    """A scene and its changes in words alone."""
    scene = sample(rng, level)
    sentences = [f"there {'was' if len(scene.objects) == 1 else 'were'} {language.line_up(scene)}"]
    for _ in range(rng.randint(1, 3)):
        after, happened = some_change(rng, level, scene)
        sentences.append(language.happened(happened))
        scene = after
    o = rng.choice(scene.objects)
    sentences.append(
        rng.choice(
            [
                f"now there {'is' if len(scene.objects) == 1 else 'are'} {language.line_up(scene)}",
                f"how many shapes are there now? {NUMBERS[len(scene.objects)]}.",
                f"what colour is {refer(o, scene)} now? {o.colour}.",
            ]
        )
    )
    return " ".join(sentences)


def _sum(rng: random.Random, level: Level) -> str:
    kinds = rng.sample(level.kinds, 2)
    a = rng.randint(1, 5)
    b = rng.randint(1, 6 - a)
    groups = [f"{NUMBERS[n]} {kind if n == 1 else plural(kind)}" for n, kind in zip((a, b), kinds, strict=True)]
    more, fewer = (kinds[0], kinds[1]) if a > b else (kinds[1], kinds[0])
    compared = f"more {plural(more)} than {plural(fewer)}"
    if a == b:
        compared = f"as many {plural(kinds[0])} as {plural(kinds[1])}"
    return rng.choice(
        [
            f"{join(groups)} are {NUMBERS[a + b]} shapes.",
            f"{join(groups)}: how many shapes are there? {NUMBERS[a + b]}.",
            f"{join(groups)}: there are {compared}.",
        ]
    )


def _fact(rng: random.Random, level: Level) -> str:
    kind = rng.choice(level.kinds)
    colours = [c for c, k in level.seen if k == kind]
    number = rng.randint(1, 5)
    facts = [
        f"{with_article(kind)} is a shape.",
        f"{rng.choice(level.colours)} is a colour.",
        f"{NUMBERS[number + 1]} is one more than {NUMBERS[number]}.",
        f"{NUMBERS[number]} comes before {NUMBERS[number + 1]}.",
        f"here is {with_article(rng.choice(colours) + ' ' + kind)}. what shape is it? {with_article(kind)}.",
    ]
    if kind in language.CORNERS:
        facts.append(f"{with_article(kind)} has {language.CORNERS[kind]} corners.")
    return rng.choice(facts)


def text(rng: random.Random, level: Level) -> Story:
    told = rng.choices((_imagined, _told, _sum, _fact), weights=(3, 3, 2, 2), k=rng.randint(1, 3))
    return (" ".join(tell(rng, level) for tell in told),)


def question(rng: random.Random, level: Level, kind: str, combination: str) -> tuple[Story, int]:
    """A question of `kind` about a pair of `combination`, "seen" or "held_out" -> (story, choices).

    The story is one or two pictures, the question, the answer. Answers are drawn evenly: any number, any pair.
    `choices` is how many answers a guesser who sees all but places would choose from, for left, right, top and
    bottom; else 0.
    """
    pairs = level.held_out if combination == "held_out" else level.seen
    wanted = rng.choice(NUMBERS[1 if level.slots else 0 : level.most + 1])  # if it is a count
    while True:
        pair = rng.choice(pairs)
        if kind == "change":
            story = _changed(rng, level, pair)
            if story:
                return story, 0
            continue
        scene = some_scene(rng, level, first=pair)
        for q in language.questions(rng, level, scene):
            if q.kind == kind and _is_about(q, pair, wanted):
                choices = len({o.pair for o in scene.objects}) if kind in ("left", "right", "top", "bottom") else 0
                return (scene, q.text, q.answer), choices


def _is_about(q: language.Question, pair: Pair, wanted: str) -> bool:
    """Whether the answer needs the object of the pair (a count or a caption: the scene has it anyway)."""
    colour, kind = pair
    if q.kind == "count":
        return q.answer == wanted
    if q.kind == "caption":
        return True
    if q.kind in ("colour", "texture"):
        return f"the {kind}" in q.text
    return q.answer == f"{colour} {kind}"


def _changed(rng: random.Random, level: Level, pair: Pair) -> Story | None:
    """Two pictures between which something happens to the object of `pair`, or by which it comes to be."""
    kind = rng.choice(list(CHANGES))
    comes = kind in (Added, Recoloured)
    scene = sample(rng, level, first=None if comes else pair)
    if comes and pair in [o.pair for o in scene.objects]:
        return None
    outcome = change(rng, level, scene, kind, pair)
    if outcome is None:
        return None
    after, happened = outcome
    return scene, after, WHAT_CHANGED, language.happened(happened)
