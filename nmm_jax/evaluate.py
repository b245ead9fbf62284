"""Restores a step of a run and measures it on what it was not trained on.

    python -m nmm_jax.evaluate --workdir=RUN [--step=N] [--tasks=held_out,questions] [--rows=128] [--output=F.json]

held_out    loss on the held_out split of every source, and the same with images shuffled between documents
questions   accuracy on data.root/questions, by kind; skipped with a note where there are none
in_context  loss on held-out captions with and without an earlier picture and caption in the row
retrieval   of encoders by pairs: whether images find their texts among the held-out ones, and texts their images
pixels      of AIM and AIMv2: loss on the next patches of held-out images

The result is printed and written to RUN/evaluation/<step>.json (docs/evaluation.md has its keys). The run's config
says where the data is (--data_root, where it is now); the model is restored over all devices there are.
"""

import pathlib
from collections.abc import Sequence

import jax
from absl import flags, logging

from configs import command_line
from data_pipelines import store
from data_pipelines.geometry import Geometry
from data_pipelines.plan import Plan, ensure_plans
from data_pipelines.stream import Stream
from data_pipelines.tokenizer import Tokenizer
from nmm_jax.evaluation import in_context, pixels, questions, results, retrieval
from nmm_jax.evaluation.held_out import RowSums, held_out_loss, make_row_sums
from nmm_jax.evaluation.restored import RunFlags
from nmm_jax.parallel import processes
from nmm_jax.training.checkpoints import Run

TASKS = ("held_out", "questions", "in_context")  # of language models
TASKS_OF = {"contrastive": ("retrieval",), "aim": ("pixels",), "aimv2": ("pixels", "held_out")}  # of other families


def evaluate(run: Run, tokenizer: Tokenizer, tasks: Sequence[str], rows: int) -> results.Results:
    """The JSON that the command writes.

    Raises:
      ValueError: an unknown task, or a source without a held_out split.
    """
    there_are = TASKS_OF.get(run.config.model.family, TASKS)
    unknown = sorted(set(tasks) - set(there_are))
    if unknown:
        raise ValueError(f"--tasks: there is no task {unknown[0]!r}; there are {', '.join(there_are)}")
    tasks = tasks or there_are
    found: results.Results = {"step": run.step, "notes": []}
    if "retrieval" in tasks:
        found["retrieval"] = evaluate_retrieval(run)
        return found
    if "pixels" in tasks:
        found["pixels"] = evaluate_pixels(run, rows)
    row_sums = make_row_sums(run)
    if "held_out" in tasks:
        found |= evaluate_held_out(run, row_sums, rows)
    if "questions" in tasks:
        folder = pathlib.Path(run.config.data.root) / questions.FOLDER
        if (folder / store.CARD).exists():
            dataset = store.Dataset.open(folder, questions.SPLIT)
            asked = questions.select(dataset, run.config.evaluation.questions)
            found["questions"] = questions.score_all(questions.ask(run, tokenizer, asked))
        else:
            found["notes"].append(f"no questions: there is no dataset {folder}")
    if "in_context" in tasks:
        gains, why_not = evaluate_in_context(run, tokenizer, row_sums, rows)
        found |= {"in_context": gains} if gains else {}
        found["notes"] += [f"no in_context: {why_not}"] if why_not else []
    return found


def evaluate_held_out(run: Run, row_sums: RowSums, rows: int) -> results.Results:
    """Losses of all sources; shuffled_images and image_gain of those whose images can be shuffled."""
    _require_held_out(run)
    plans = held_out_plans(run)
    losses: results.Results = {"held_out": {}, "shuffled_images": {}, "image_gain": {}}
    for source in run.config.data.sources:
        found = held_out_loss(run, row_sums, source, Stream.held_out(run.config, source), plans[source], rows)
        losses["held_out"][source] = {
            "loss": found.loss.value,
            "standard_error": found.loss.standard_error,
            "tokens": found.tokens,
            "rows": found.rows,
        }
        if found.shuffled and found.drop:
            shuffled, drop = found.shuffled, found.drop
            losses["shuffled_images"][source] = {"loss": shuffled.value, "standard_error": shuffled.standard_error}
            losses["image_gain"][source] = {"drop": drop.value, "standard_error": drop.standard_error}
    return losses


def evaluate_in_context(
    run: Run, tokenizer: Tokenizer, row_sums: RowSums, captions: int
) -> tuple[results.Results, str]:
    """Losses and gains of the sources that have captions, over at most so many of each; or why there are none."""
    _require_held_out(run)
    longest = in_context.room(Geometry.from_config(run.config))
    if run.config.data.caption_order == "text_first" or longest < 1:
        return {}, "captions come before their images" if longest > 0 else "a row has no room for two captions"
    gains = {}
    for source in run.config.data.sources:
        dataset = store.Dataset.open(pathlib.Path(run.config.data.root) / source, store.HELD_OUT)
        chosen = in_context.select(dataset, tokenizer, longest, captions)
        if len(chosen) >= in_context.LEAST:
            gains[source] = in_context.measure(run, tokenizer, row_sums, chosen, source).to_json()
    return gains, "" if gains else "no source has held-out documents of one image and one text"


def evaluate_retrieval(run: Run) -> results.Results:
    """Recalls of all sources."""
    _require_held_out(run)
    held_out_plans(run)
    embed, config = retrieval.make_embed(run), run.config
    return {s: retrieval.retrieve(run, embed, Stream.held_out(config, s), s) for s in config.data.sources}


def evaluate_pixels(run: Run, rows: int) -> results.Results:
    """Pixel losses of all sources, over at most so many rows of each."""
    _require_held_out(run)
    held_out_plans(run)
    sums = pixels.make_pixel_sums(run)
    of_source = {
        s: pixels.pixel_loss(run, sums, s, Stream.held_out(run.config, s), rows) for s in run.config.data.sources
    }
    return {source: found.to_json() for source, found in of_source.items()}


def held_out_plans(run: Run) -> dict[str, Plan]:
    """Of all sources; process 0 makes those that are missing, while the others wait."""
    if jax.process_index() == 0:
        ensure_plans(run.config, store.HELD_OUT)
    processes.meet("plans are made")
    return ensure_plans(run.config, store.HELD_OUT, progress=False)


def _require_held_out(run: Run) -> None:
    other = "" if run.config.model.family in TASKS_OF else ", or evaluate with --tasks=questions alone"
    for source in run.config.data.sources:
        folder = pathlib.Path(run.config.data.root) / source
        splits = store.read_card(folder)["splits"]
        if not splits.get(store.HELD_OUT, {}).get("documents"):
            raise ValueError(
                f"source {source!r} has no held-out documents: {folder} has {sorted(splits)}. Convert it again with a "
                f"larger --held_out=FRACTION of documents set apart{other}"
            )


if __name__ == "__main__":
    RUN = RunFlags()
    TASK_NAMES = flags.DEFINE_list(
        "tasks", [], f"which of {', '.join(TASKS)} (of encoders docs/evaluation.md); all, unless given"
    )
    ROWS = flags.DEFINE_integer("rows", 0, "held-out rows of each source, at most; 0 is evaluation.rows", 0)
    OUTPUT = flags.DEFINE_string("output", "", "also write the JSON here")

    def main(_: list[str]) -> None:
        run, tokenizer = RUN.restore()
        found = evaluate(run, tokenizer, TASK_NAMES.value, ROWS.value or run.config.evaluation.rows)
        if jax.process_index() == 0:
            print(results.table(found), flush=True)
            logging.info("wrote %s", results.save(found, RUN.workdir))
            if OUTPUT.value:
                results.write(found, OUTPUT.value)

    command_line.run(main)
