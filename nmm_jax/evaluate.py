"""Restores a step of a run and measures it on what it was not trained on.

    python -m nmm_jax.evaluate --workdir=RUN [--step=N] [--tasks=held_out,questions] [--rows=128] [--output=F.json]

held_out    loss on the held_out split of every source, and the same with images shuffled between documents
questions   accuracy on data.root/questions, by kind; skipped with a note where there are none

The result is printed and written to RUN/evaluation/<step>.json (docs/evaluation.md has its keys). The run's config
says where the data is (--data_root, where it is now); the model is restored over all devices there are.
"""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags, logging
from jax.experimental import multihost_utils

from data_pipelines import store
from data_pipelines.plan import ensure_plans
from data_pipelines.stream import Stream
from data_pipelines.tokenizer import Tokenizer
from nmm_jax.evaluation import questions, restored
from nmm_jax.evaluation.held_out import held_out_loss, make_row_sums
from nmm_jax.training.checkpoints import Run

TASKS = ("held_out", "questions")

_TASKS = flags.DEFINE_list("tasks", list(TASKS), f"which of {', '.join(TASKS)}")
_ROWS = flags.DEFINE_integer("rows", None, "held-out rows of each source, at most; evaluation.rows unless given", 1)
_OUTPUT = flags.DEFINE_string("output", None, "also write the JSON here")

Results = dict[str, Any]


def evaluate(run: Run, tokenizer: Tokenizer, tasks: Sequence[str], rows: int) -> Results:
    """The JSON that the command writes.

    Raises:
      ValueError: an unknown task, or a source without a held_out split.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"--tasks: there is no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    results: Results = {"step": run.step, "notes": []}
    if "held_out" in tasks:
        results |= evaluate_held_out(run, rows)
    if "questions" in tasks:
        folder = pathlib.Path(run.config.data.root) / questions.FOLDER
        if (folder / store.CARD).exists():
            dataset = store.Dataset.open(folder, questions.SPLIT)
            asked = questions.select(dataset, run.config.evaluation.questions)
            results["questions"] = questions.score_all(questions.ask(run, tokenizer, asked))
        else:
            results["notes"].append(f"no questions: there is no dataset {folder}")
    return results


def evaluate_held_out(run: Run, rows: int) -> Results:
    """Losses of all sources; shuffled_images and image_gain of those whose images can be shuffled."""
    _require_held_out(run)
    if jax.process_index() == 0:
        ensure_plans(run.config, store.HELD_OUT)
    multihost_utils.sync_global_devices("plans are made")
    row_sums = make_row_sums(run)
    results: Results = {"held_out": {}, "shuffled_images": {}, "image_gain": {}}
    for source in run.config.data.sources:
        found = held_out_loss(run, row_sums, Stream.held_out(run.config, source), rows)
        results["held_out"][source] = {
            "loss": found.loss.value,
            "standard_error": found.loss.standard_error,
            "tokens": found.tokens,
            "rows": found.rows,
        }
        if found.shuffled and found.drop:
            shuffled, drop = found.shuffled, found.drop
            results["shuffled_images"][source] = {"loss": shuffled.value, "standard_error": shuffled.standard_error}
            results["image_gain"][source] = {"drop": drop.value, "standard_error": drop.standard_error}
    return results


def _require_held_out(run: Run) -> None:
    for source in run.config.data.sources:
        folder = pathlib.Path(run.config.data.root) / source
        splits = store.read_card(folder)["splits"]
        if store.HELD_OUT not in splits:
            raise ValueError(
                f"source {source!r} has no {store.HELD_OUT} split: {folder} has {sorted(splits)}. Convert it again "
                "with --held_out=N documents set apart, or evaluate with --tasks=questions alone"
            )


def table(results: Results) -> str:
    """What the terminal shows."""
    lines = [f"step {results['step']}"]
    if "held_out" in results:
        lines += ["", f"{'held-out loss (nats a token)':30}{'loss':>15}{'shuffled images':>18}{'drop':>14}{'rows':>7}"]
        for source, loss in results["held_out"].items():
            shuffled, drop = results["shuffled_images"].get(source), results["image_gain"].get(source)
            lines.append(
                f"  {source:28}{_pm(loss['loss'], loss['standard_error'], 4):>15}"
                + (f"{_pm(shuffled['loss'], shuffled['standard_error'], 4):>18}" if shuffled else f"{'-':>18}")
                + (f"{_pm(100 * drop['drop'], 100 * drop['standard_error'], 1) + '%':>14}" if drop else f"{'-':>14}")
                + f"{loss['rows']:>7}"
            )
    if "questions" in results:
        lines += [
            "",
            f"{'questions (% right)':30}{'accuracy':>15}{'base':>8}{'gain':>8}{'seen':>8}{'held out':>10}{'n':>7}",
        ]
        for kind, score in results["questions"].items():
            inner = [score.get(part) for part in ("seen", "held_out_combinations")]
            seen, unseen = (f"{100 * part['accuracy']:.1f}" if part else "" for part in inner)
            accuracy = _pm(100 * score["accuracy"], 100 * score["standard_error"], 1)
            lines.append(
                f"  {kind:28}{accuracy:>15}{100 * score['base']:>8.1f}{100 * score['gain']:>+8.1f}"
                f"{seen:>8}{unseen:>10}{score['count']:>7}"
            )
    return "\n".join(lines + [f"\nnote: {note}" for note in results["notes"]])


def _pm(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ±{error:.{digits}f}")


def path_of(workdir: str, step: int) -> pathlib.Path:
    """Where the evaluation of a step is kept."""
    return pathlib.Path(workdir) / "evaluation" / f"{step}.json"


def write(results: Results, path: str | os.PathLike) -> None:
    """Writes JSON; the tasks of an earlier evaluation of the same step that were not done again are kept."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if earlier.get("step") == results["step"]:
        results = earlier | results
    unfinished = path.with_name(path.name + ".incomplete")
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(path)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; all settings are flags")
    run, tokenizer = restored.restore()
    results = evaluate(run, tokenizer, _TASKS.value, _ROWS.value or run.config.evaluation.rows)
    if jax.process_index() == 0:
        print(table(results), flush=True)
        for path in [path_of(restored.workdir(), run.step)] + ([_OUTPUT.value] if _OUTPUT.value else []):
            write(results, path)
            logging.info("wrote %s", path)


if __name__ == "__main__":
    restored.require()
    app.run(main)
