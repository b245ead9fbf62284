"""Writes a page about a run: how it learned, how well it does, and what it says about pictures it has not seen.

    python -m nmm_jax.report --workdir=RUN [--step=N] [--output=RUN/report.html]

One HTML file that needs nothing else, no network either. Numbers come from RUN/metrics.jsonl and from
RUN/evaluation/<step>.json (python -m nmm_jax.evaluate first); what the model says is generated here.
"""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jinja2
from absl import flags, logging
from etils import epath

from configs import command_line, loading
from data_pipelines import paths, store
from data_pipelines.tokenizer import Tokenizer
from nmm_jax.evaluation import figures, gallery, questions, results
from nmm_jax.evaluation.restored import RunFlags
from nmm_jax.evaluation.sampling import Sampler, Sampling
from nmm_jax.training.checkpoints import Run

_PICTURES = 12  # that are described
_PER_KIND = 4  # questions of each other kind
_TEXTS = 3
_TEXT_SAMPLING = Sampling(temperature=0.7, top_p=0.95)
_BATCH = 8  # prompts continued together


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last line is left out.

    Raises:
      FileNotFoundError: there is none, so no training to report on.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: a report needs the metrics of the training run in --workdir")
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def examples(run: Run, tokenizer: Tokenizer) -> dict[str, list[gallery.Example]]:
    """Pictures described, questions answered, texts continued: from held-out data, as far as there is any."""
    root, size = pathlib.Path(run.config.data.root), run.config.image.size
    sampler = Sampler(run, tokenizer, _BATCH)
    answered: list[gallery.Example] = []
    if (root / questions.FOLDER / store.CARD).exists():
        dataset = store.Dataset.open(root / questions.FOLDER, questions.SPLIT)
        asked = gallery.first_of_kinds(dataset, _PER_KIND, _PICTURES)
        answered = gallery.answer(sampler, tokenizer, asked, size)
    described = [example for example in answered if example.kind == gallery.CAPTION]

    held_out = [
        store.Dataset.open(root / source, store.HELD_OUT)
        for source in run.config.data.sources
        if store.read_card(root / source)["splits"].get(store.HELD_OUT, {}).get("documents")
    ]
    if not described:  # a question that asks for a description gets one; a picture alone has to do elsewhere
        captions = itertools.chain.from_iterable(gallery.captions_of(dataset, _PICTURES) for dataset in held_out)
        described = gallery.describe(sampler, tokenizer, list(itertools.islice(captions, _PICTURES)), size)
    texts = (document.texts[0] for dataset in held_out for document in dataset if not document.images)
    return {
        "described": described,
        "answered": [example for example in answered if example.kind != gallery.CAPTION],
        "texts": gallery.continue_texts(sampler, tokenizer, list(itertools.islice(texts, _TEXTS)), _TEXT_SAMPLING),
    }


def render(
    run: Run,
    lines: Sequence[Mapping[str, Any]],
    evaluation: results.Results | None,
    shown: Mapping[str, Sequence[gallery.Example]],
    title: str,
) -> str:
    """The page."""
    evaluation = evaluation or {}
    held_out = {source: loss["loss"] for source, loss in evaluation.get("held_out", {}).items()}
    scores = evaluation.get("questions", {})
    environment = jinja2.Environment(loader=jinja2.PackageLoader("nmm_jax", "evaluation"), autoescape=True)
    return environment.get_template("report.html").render(
        title=title,
        step=run.step,
        facts=facts(run, lines),
        evaluation=evaluation,
        figures={
            "loss": figures.loss_curves(lines, run.config.data.sources, held_out, run.step),
            "optimization": figures.optimization(lines),
            "experts": figures.experts(lines) if any("moe/load_imbalance" in line for line in lines) else "",
            "speed": figures.speed(lines),
            "questions": figures.question_accuracy(scores) if scores else "",
        },
        shown=shown,
        pixelated=run.config.image.size <= gallery.SMALL,
        text_sampling=_TEXT_SAMPLING,
        most_tokens=gallery.MOST_TOKENS,
        config=loading.to_json(run.config),
    )


def facts(run: Run, lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The run in a few words and numbers."""
    c = run.config
    last = max((line for line in lines if line["step"] <= run.step), key=lambda line: line["step"], default={})
    seconds, before = 0.0, 0
    for line in lines:
        if line["step"] <= run.step:
            seconds += line["time/step"] * (line["step"] - before)  # a mean over the steps since the line before
            before = line["step"]
    mixture = ", ".join(f"{w:.0%} {s}" for s, w in zip(c.data.sources, c.data.weights, strict=True))
    found = {
        "model": f"{c.model.family.replace('_', ' ')}, {c.model.depth} layers of width {c.model.width}",
        "parameters": f"{sum(x.size for x in jax.tree.leaves(run.model.abstract)):,}",
        "images": f"{c.image.size} × {c.image.size} pixels, {c.image.positions} positions each",
        "batch": f"{c.batch_rows} rows of {c.row_length} positions",
        "mixture": mixture,
        "steps": f"{run.step:,} of {c.steps:,}",
    }
    if last:
        found["seen"] = f"{last['tokens']:,} positions, {last['images']:,} images"
        found["training time"] = f"{seconds / 60:,.1f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"
    return found


if __name__ == "__main__":
    RUN = RunFlags()
    OUTPUT = flags.DEFINE_string("output", "", "the page; report.html in the run's folder unless given")

    def main(_: list[str]) -> None:
        workdir = paths.reach(RUN.workdir)
        lines = read_metrics(workdir / "metrics.jsonl")
        run, tokenizer = RUN.restore()
        evaluation = results.read(RUN.workdir, run.step)
        page = render(run, lines, evaluation, examples(run, tokenizer), workdir.name)
        output = epath.Path(OUTPUT.value or workdir / "report.html")
        paths.write_text(output, page)
        logging.info("wrote %s", output)

    command_line.run(main)
