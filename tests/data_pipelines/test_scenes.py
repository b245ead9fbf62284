"""The scenes' texts are checked against what is seen in the rendered pixels, not against the generator's own notes."""

import collections
import dataclasses
import os
import random
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest

from data_pipelines.document import Document
from data_pipelines.scenes import language, preview, stories
from data_pipelines.scenes.corpus import QUESTIONS, SOURCES, Corpus
from data_pipelines.scenes.render import NOISE, SHADE, encode, render
from data_pipelines.scenes.scene import COLOURS, HELD_OUT, LEVELS, Object, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
QUICK = LEVELS["quickstart"]
BIG = 96  # a scene knows no pixels, so the same documents can be looked at in a size where shapes are plain


def documents(source: str, count: int, level: str = "quickstart", size: int = 32, seed: int = 0) -> list[Document]:
    corpus = Corpus(level, size, seed)
    return [corpus.document(source, "train", i) for i in range(count)]


def questions(count: int, level: str = "quickstart", size: int = 32) -> list[Document]:
    corpus = Corpus(level, size)
    return [corpus.question(i) for i in range(count)]


def pixels(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(np.int32)


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def colour_map(image: np.ndarray, shades: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """Names of each pixel's colour, "" for the background and for what lies between colours."""
    names = np.array([name for name in COLOURS for _ in shades])
    palette = np.array([np.array(rgb) * shade for rgb in COLOURS.values() for shade in shades])
    colours = np.full(image.shape[:2], "", names.dtype)
    lit = image.max(-1) > 66  # most of the background is not
    distance = np.abs(image[lit][:, None] - palette).max(-1)
    colours[lit] = np.where(distance.min(-1) <= NOISE + 3, names[distance.argmin(-1)], "")
    return colours


def kind_of(mask: np.ndarray) -> str | None:
    """circle | square | triangle | cross by which parts of its bounding box a shape fills; None: none of these."""
    h, w = mask.shape
    corner = max(2, h // 7)
    top = mask[:corner, :corner].any() or mask[:corner, -corner:].any()
    bottom = mask[-corner:, : corner // 2 + 1].any() and mask[-corner:, -corner // 2 :].any()
    fill = mask.mean()
    if abs(h - w) > 0.15 * h + 2:
        return None
    if top and bottom and fill > 0.9:
        return "square"
    if not top and not bottom and 0.7 < fill < 0.85:
        return "circle"
    if not top and not bottom and 0.45 < fill < 0.65:
        return "cross"
    if not top and bottom and 0.4 < fill < 0.65:
        return "triangle"
    return None


def see(image: np.ndarray) -> list[tuple[str, str, float]] | None:
    """(colour, kind, x of the centre) of the shapes from the left; None where some touch and are not plain to see."""
    colours = colour_map(image)
    found = []
    for colour in set(np.unique(colours)) - {""}:
        _, labels, stats, centres = cv2.connectedComponentsWithStats((colours == colour).astype(np.uint8))
        for k in range(1, len(stats)):
            x, y, w, h, area = stats[k]
            if area > 12:  # smaller ones are edge pixels between two colours
                if x == 0 or y == 0 or x + w == image.shape[1] or y + h == image.shape[0]:
                    return None
                kind = kind_of(labels[y : y + h, x : x + w] == k)
                if kind is None:
                    return None
                found.append((str(colour), kind, x + w / 2))
    return sorted(found, key=lambda shape: shape[2])


def seen_in(data: bytes) -> list[str] | None:
    shapes = see(pixels(data))
    return None if shapes is None else [f"{colour} {kind}" for colour, kind, _ in shapes]


def named(text: str) -> list[str]:
    """The "colour kind" pairs of a text, in order, whatever else stands between."""
    return [f"{c} {k}" for c, k in re.findall(rf"({'|'.join(QUICK.colours)}) ({'|'.join(QUICK.kinds)})", text)]


def test_captions_tell_what_is_seen_in_the_picture():
    checked = collections.Counter()
    total = 0
    for document in documents("captions", 600, size=BIG):
        if "?" in "".join(document.texts):
            continue
        total += 1
        shapes, text = seen_in(document.images[0]), " ".join(document.texts)
        if shapes is None:
            continue
        pairs = named(text)
        assert set(pairs) <= set(shapes), text
        if text.startswith(("from left to right", "on the left is")) or "shapes:" in text:
            assert pairs == shapes, text
            checked["list"] += 1
        elif "right-hand side" in text:
            assert pairs == shapes[-1:], text
            checked["right"] += 1
        elif "left-hand side" in text:
            assert pairs == shapes[:1], text
            checked["left"] += 1
        elif "to the left of" in text:
            assert shapes.index(pairs[0]) < shapes.index(pairs[1]), text
            checked["left of"] += 1
        elif "to the right of" in text:
            assert shapes.index(pairs[0]) > shapes.index(pairs[1]), text
            checked["right of"] += 1
        if text.startswith(("two", "three")):
            assert len(shapes) == NUMBERS.index(text.split()[0])
    assert sum(checked.values()) > 0.4 * total
    assert min(checked[k] for k in ("list", "right", "left", "left of", "right of")) >= 5, checked


def test_answers_about_one_picture_are_true_of_its_pixels():
    checked, unclear = collections.Counter(), 0
    for question in questions(480, size=BIG):
        kind, answer = question.metadata["kind"], question.parts[-1]
        assert answer == question.metadata["answer"]
        if kind == "change":
            continue
        shapes = seen_in(question.images[0])
        if shapes is None:
            unclear += 1
            continue
        if kind == "colour":
            asked = question.texts[0].removeprefix("what colour is the ").removesuffix("?")
            truth = next(shape for shape in shapes if shape.endswith(asked)).split()[0]
        elif kind == "count":
            truth = NUMBERS[len(shapes)]
        elif kind == "caption":
            assert named(answer) == shapes
            truth = answer
        else:
            truth = shapes[-1] if kind == "right" else shapes[0]
        assert answer == truth, (question.texts, shapes)
        checked[kind] += 1
    assert unclear < 0.15 * 400
    assert set(checked) == {"colour", "count", "caption", "left", "right"} and min(checked.values()) > 60, checked


def test_what_changed_is_the_difference_of_the_two_pictures():
    checked = collections.Counter()
    for question in questions(900, size=BIG):
        if question.metadata["kind"] != "change":
            continue
        before, after = (see(pixels(data)) for data in question.images)
        if before is None or after is None:
            continue
        first, second = ([f"{c} {k}" for c, k, _ in shapes] for shapes in (before, after))
        gone = collections.Counter(first) - collections.Counter(second)
        new = collections.Counter(second) - collections.Counter(first)
        answer = question.parts[-1]
        if answer.endswith("was added."):
            assert not gone and list(new) == named(answer)
            change = "added"
        elif answer.endswith("was removed."):
            assert not new and list(gone) == named(answer)
            change = "removed"
        elif "turned" in answer:
            colour = answer.removesuffix(".").split()[-1]
            assert list(gone) == named(answer) and list(new) == [f"{colour} {named(answer)[0].split()[1]}"]
            change = "turned"
        else:
            assert not gone and not new
            moved = [
                a for (*a, x), (*b, y) in zip(sorted(before), sorted(after), strict=True) if abs(x - y) > 0.1 * BIG
            ]
            assert sorted(f"{c} {k}" for c, k in moved) == sorted(named(answer))
            change = "swapped" if "swapped" in answer else "moved"
            if change == "moved":
                x, y = (next(s[2] for s in shapes if f"{s[0]} {s[1]}" in answer) for shapes in (before, after))
                assert ("right" in answer) == (y > x)
            else:
                assert named(answer) == [shape for shape in first if shape in named(answer)]  # the left one first
        checked[change] += 1
    assert set(checked) == {"added", "removed", "turned", "moved", "swapped"} and min(checked.values()) > 8, checked


def test_stories_begin_with_what_the_first_picture_shows_and_end_with_true_answers():
    checked = collections.Counter()
    for document in documents("interleaved", 250, size=BIG):
        assert 2 <= len(document.images) <= 4
        first, last = seen_in(document.images[0]), seen_in(document.images[-1])
        if first is None or last is None or "what changed?" in document.texts:
            continue
        assert named(document.texts[0]) == first
        *_, asked, answer = document.texts
        if asked == "how many shapes are there now?":
            assert answer == NUMBERS[len(last)]
        elif asked == "how many shapes were in the first picture?":
            assert answer == NUMBERS[len(first)]
        elif asked == "which one was on the right-hand side in the first picture?":
            assert answer == first[-1]
        elif asked == "which one was on the left-hand side in the first picture?":
            assert answer == first[0]
        checked[asked if asked.endswith("?") else "none"] += 1
    assert len(checked) == 5 and min(checked.values()) >= 3, checked


def test_the_sides_of_small_and_textured_pictures_have_the_answers_colours():
    for level in ("quickstart", "full"):
        checked = collections.Counter()
        for question in questions(400, level, 32 if level == "quickstart" else 64):
            kind = question.metadata["kind"]
            if kind not in ("left", "right", "top", "bottom"):
                continue
            colours = colour_map(pixels(question.images[0]), (1.0, SHADE) if level == "full" else (1.0,))
            rows, columns = np.nonzero(colours != "")
            along = {"left": columns, "right": -columns, "top": rows, "bottom": -rows}[kind]
            edge = colours[rows, columns][along <= along.min() + len(colours) // 20]
            commonest = collections.Counter(edge.tolist()).most_common(1)[0][0]
            checked[kind, commonest == question.parts[-1].split()[0]] += 1
        for kind in {kind for kind, _ in checked}:
            # Blends at the edges of dark textures can look like another colour.
            assert checked[kind, True] >= (0.99 if level == "quickstart" else 0.9) * sum(
                checked[kind, b] for b in (0, 1)
            )


@pytest.mark.parametrize("level", LEVELS)
def test_held_out_pairs_are_in_no_training_text_and_in_every_question_about_them(level):
    rich = LEVELS[level]
    pattern = re.compile(rf"({'|'.join(rich.colours)}) ({'|'.join(rich.kinds)})")

    def pairs(story):
        told = {pair for part in story if isinstance(part, str) for pair in pattern.findall(part)}
        return told | {o.pair for part in story if isinstance(part, Scene) for o in part.objects}

    drawn = set()
    for source, tell in SOURCES.items():
        for i in range(1500):
            drawn |= pairs(tell(random.Random(f"{source}{i}"), rich))
    everything = {(c, k) for c in rich.colours for k in rich.kinds}
    assert drawn == everything - HELD_OUT
    assert len(everything & HELD_OUT) == len(rich.kinds)

    for i in range(200):
        kind = QUESTIONS[level][i % len(QUESTIONS[level])]
        seen, _ = stories.question(random.Random(i), rich, kind, "seen")
        held_out, _ = stories.question(random.Random(i), rich, kind, "held_out")
        assert not pairs(seen) & HELD_OUT
        assert len(pairs(held_out) & HELD_OUT) == 1


def test_no_held_out_pair_is_seen_in_training_pictures():
    for document in documents("captions", 200, size=BIG) + documents("interleaved", 60, size=BIG):
        for data in document.images:
            assert not {tuple(shape.split()) for shape in seen_in(data) or []} & HELD_OUT


@pytest.mark.parametrize("level", LEVELS)
def test_the_vocabulary_is_what_the_texts_use(level):
    used = set()
    for source, tell in SOURCES.items():
        for i in range(4000):
            used |= {
                w
                for part in tell(random.Random(f"{source}{i}"), LEVELS[level])
                if isinstance(part, str)
                for w in words(part)
            }
    for document in questions(300, level):
        used |= {w for part in document.texts for w in words(part)}
    assert used == set(language.vocabulary(LEVELS[level]))


@pytest.mark.parametrize("level", LEVELS)
def test_no_answer_is_far_commoner_than_others(level):
    answers = collections.defaultdict(collections.Counter)
    for question in questions(1200, level):
        assert set(question.metadata) - {"choices"} == {"kind", "combination", "answer", "level"}
        if question.metadata["combination"] == "seen":
            answers[question.metadata["kind"]][question.metadata["answer"]] += 1
    assert set(answers) == set(QUESTIONS[level])
    most = {"colour": 0.3, "count": 0.42, "texture": 0.4}
    for kind, counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() < most.get(kind, 0.15), (kind, counts.most_common(3))


def test_a_document_depends_on_seed_source_split_and_index_alone():
    in_order = [d.to_bytes() for d in documents("interleaved", 5)]
    assert documents("interleaved", 5, seed=1)[4].to_bytes() != in_order[4]
    assert Corpus().document("interleaved", "held_out", 4).parts != documents("interleaved", 5)[4].parts
    script = (
        "from data_pipelines.scenes.corpus import Corpus;"
        "d = Corpus().document('interleaved', 'train', 4);"
        "print(d.to_bytes().hex())"
    )
    for hash_seed in ("1", "2"):  # the order of sets must not matter
        environment = dict(os.environ, PYTHONHASHSEED=hash_seed)
        run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == in_order[4].hex(), run.stderr


def test_what_is_drawn_later_covers_what_is_behind():
    def square(colour, x, texture="solid"):
        return Object("square", colour, texture, "large", x, 0.5, 0.165)

    back, front = square("red", 0.45), square("blue", 0.55)
    scene = Scene((back, front), (30, 30, 30), 7)
    image = render(scene, 100).astype(int)
    assert np.abs(image[50, 50] - COLOURS["blue"]).max() <= NOISE
    assert np.abs(image[50, 35] - COLOURS["red"]).max() <= NOISE
    assert np.abs(image[5, 5] - 30).max() <= NOISE
    asked = {q.kind: q for q in language.questions(random.Random(0), LEVELS["full"], scene)}
    assert asked["front"].text == "what is in front of the red square?" and asked["front"].answer == "blue square"
    turned = render(dataclasses.replace(scene, objects=(front, back)), 100).astype(int)
    assert np.abs(turned[50, 50] - COLOURS["red"]).max() <= NOISE


@pytest.mark.parametrize(("texture", "share"), [("solid", 1.0), ("striped", 0.5), ("checked", 0.5), ("dotted", 0.75)])
def test_textures_darken_their_share_of_a_shape(texture, share):
    scene = Scene((Object("square", "white", texture, "large", 0.5, 0.5, 0.3),), (30, 30, 30), 0)
    inside = render(scene, 200)[100 - 48 : 100 + 48, 100 - 48 : 100 + 48].mean(-1)
    assert abs((inside > 170).mean() - share) < 0.1
    stripes_run_across = inside.std(axis=1).mean() < 10 < inside.std(axis=0).mean()
    assert stripes_run_across == (texture == "striped")


def test_no_pixel_can_leave_its_range_and_images_survive_encoding():
    channels = [c * shade for rgb in COLOURS.values() for c in rgb for shade in (1, SHADE)]
    assert min(channels) >= NOISE and max(channels) + NOISE <= 255
    for i in range(200):
        scene = stories.some_scene(random.Random(i), LEVELS["full"])
        assert NOISE <= min(scene.background) and max(scene.background) + NOISE <= 255
    image = render(scene, 48)
    assert np.array_equal(pixels(encode(image)), image)


def test_the_written_corpus_opens_and_its_tokenizer_knows_every_word(tmp_path):
    from data_pipelines import tokenizer
    from data_pipelines.store import Dataset

    corpus = Corpus(seed=3)
    corpus.write(str(tmp_path), {"captions": 60, "interleaved": 30, "text": 20}, held_out=10, questions=48)
    read = tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert read.vocab_size < 100
    for source, count in (("captions", 60), ("interleaved", 30), ("text", 20), ("questions", 48)):
        splits = {"questions": 48} if source == "questions" else {"train": count, "held_out": 10}
        for split, n in splits.items():
            dataset = Dataset.open(str(tmp_path / source), split)
            assert len(dataset) == n
            for i in range(n):
                for text in dataset[i].texts:
                    assert words(read.decode(read.encode(text))) == words(text)
    assert Dataset.open(str(tmp_path / "captions"))[59] == corpus.document("captions", "train", 59)


def test_the_contact_sheet_shows_the_pictures(tmp_path):
    shown = documents("captions", 3) + documents("text", 2)
    sheet = preview.contact_sheet(shown)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    preview.write(str(tmp_path / "sheet.png"), Corpus())
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[1] == sheet.shape[1]
    with pytest.raises(OSError, match="does the folder exist"):
        preview.write(str(tmp_path / "none" / "sheet.png"), Corpus())
    with pytest.raises(ValueError, match="end it in .png"):
        preview.write(str(tmp_path / "sheet"), Corpus())
