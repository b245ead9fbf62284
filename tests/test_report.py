import html.parser
import json

import pytest

from configs import loading
from nmm_jax import models, report
from nmm_jax.evaluation.gallery import Example
from nmm_jax.training.checkpoints import Run

VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
    """Open tags must close; resources and text are collected."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.classes, self.links, self.text = [], [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.classes += (attributes.get("class") or "").split()
        self.links += [attributes[a] for a in ("src", "href", "xlink:href", "data") if a in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run():
    config = loading.load("configs/quickstart.py")
    return Run(config, models.build(config), None, 20, None)


def line(step, **more):
    fixed = {"learning_rate": 1e-3, "grad_norm": 1.0, "time/step": 6.0, "time/data_wait": 0.6}
    return {"step": step, "tokens": 1000 * step, "images": 7 * step, "speed/tokens_per_second": 166.7, **fixed, **more}


LINES = [
    line(1, **{"loss/captions": 5.0, "loss/text": 5.1}),
    line(10, **{"loss/captions": 3.0}),  # this batch had no text
    line(20, **{"loss/captions": 2.0, "loss/interleaved": 2.5, "loss/text": 2.2}),
    line(30, **{"loss/captions": 1.0}),  # after the step that is reported on
]


def part(accuracy, **more):
    return {
        "accuracy": accuracy,
        "standard_error": 0.05,
        "base": 0.25,
        "gain": accuracy - 0.25,
        "count": 80,
        "guess": None,
    } | more


EVALUATION = {
    "step": 20,
    "notes": ["a note"],
    "held_out": {
        "captions": {"loss": 0.5, "standard_error": 0.01, "tokens": 1234, "rows": 16},
        "text": {"loss": 0.9, "standard_error": None, "tokens": 99, "rows": 1},
    },
    "shuffled_images": {"captions": {"loss": 2.0, "standard_error": 0.02}},
    "image_gain": {"captions": {"drop": 0.75, "standard_error": 0.006}},
    "questions": {
        "colour": part(0.8125, seen=part(0.9), held_out_combinations=part(0.725)),
        "right": part(0.5, guess=0.4, seen=part(0.5)),
        "colour_and_count": part(0.8125, seen=part(0.9)),
        "seen": part(0.7),
    },
}
PIXEL = "data:image/png;base64,AAAA"
SHOWN = {
    "described": [
        Example("caption", "seen", (PIXEL,), "", f"a <b>red</b> square {i}", "a dog", False) for i in range(12)
    ],
    "answered": [
        Example("colour", "held_out", (PIXEL,), "what colour?", "red", "red", True),
        Example("change", "seen", (PIXEL, PIXEL), "what changed?", "it moved", "it left", False),
    ],
    "texts": [Example("text", "", (), "once upon", "a time", "a midnight", None)],
}


def test_the_page_stands_alone_and_says_it_all(run):
    page = Page(report.render(run, LINES, EVALUATION, SHOWN, "my run"))
    assert not page.open
    assert all(link.startswith(("data:", "#")) for link in page.links), "something would be fetched"
    assert "script" not in page.tags and "link" not in page.tags
    assert page.tags.count("svg") == 4
    assert page.tags.count("img") == 12 + 3
    assert page.classes.count("card") == 14
    assert page.classes.count("right") == 1 and page.classes.count("wrong") == 13
    for expected in (
        "my run", "step 20", "75.0", "2.0000", "± 0.0200", "81.2", "+56.2", "40.0", "a note",
        "a <b>red</b> square 7", "a midnight", "519,424",
        "20,000 positions, 140 images", "2.0 minutes",  # of the step that is reported on
        "loss (nats per text token)", "learning rate", "gradient norm", "positions per second", "interleaved",
    ):  # fmt: skip
        assert expected in page.text, expected


def test_a_run_without_evaluation_pictures_or_questions(run):
    page = Page(report.render(run, LINES[:1], None, {"described": [], "answered": [], "texts": []}, "bare"))
    assert "This step has not been evaluated" in page.text
    assert page.tags.count("svg") == 3 and "card" not in page.classes


def test_metrics_are_read_up_to_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line(1)) + "\n" + json.dumps(line(2)) + "\n" + '{"step": 3, "lo')
    assert [one["step"] for one in report.read_metrics(path)] == [1, 2]
    with pytest.raises(FileNotFoundError, match="metrics of the training run"):
        report.read_metrics(tmp_path / "nowhere.jsonl")
