"""Shows where the routers of a mixture of experts send text and images: restores a step of a run, runs held-out rows.

    python -m nmm_jax.routing --workdir=RUN [--step=N] [--rows=128] [--data_root=D] [--output=RUN/routing-<step>.html]

Prints a table and writes a page that needs nothing else, and RUN/evaluation/routing-<step>.json:

    step       of the checkpoint
    experts    count E, top_k, modality (model.moe.modality), image (experts, the last, that see images only),
               labels [E], layers [L] (the layers with experts, from 0)
    sources    by name: the statistics of at most --rows rows of its held_out split
    all        the statistics of all these rows together, whatever the weights of the mixture

    Statistics. null is what is not defined: an expert without tokens has no share of images, a source without
    images no entropy of theirs. {…} has text, image and what is said of both.
    rows, tokens {…}         that were routed; boi and eoi are of the modality that model.delimiter_weights says
    expert_tokens {…}        [L,E] tokens by expert; one that goes to k experts counts at each
    dropped                  [L] share of those that found no room in a bounded buffer
    load {…, all}            [L,E] the same, as shares of a layer
    image_share              [L,E] share of images among an expert's tokens
    empty_experts            [L] how many have no tokens
    imbalance                [L] busiest expert / mean of all experts
    specialisation           [L] mean over experts with tokens of 1 - H(image_share), H in bits (arXiv 2504.07951, 4.4)
    specialisation_baseline  what that is for routers that do not look at modality, from the share of images alone
    deviation {…, mean}      [L] mean over experts of |load - 1/E|: the other definition (the paper's E.2, our reading)
    entropy {…, all}         [L] of the router's probabilities, mean over tokens, in nats
    entropy_share {…, all}   [L] the same / log of the number of experts that the router chooses among
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from absl import flags, logging
from etils import epath
from jaxtyping import Array

from configs import command_line
from data_pipelines import paths
from data_pipelines.stream import HeldOut, Stream
from nmm_jax.evaluate import held_out_plans
from nmm_jax.evaluation import results, routing_figures
from nmm_jax.evaluation.batching import fixed_batches, place, size_on
from nmm_jax.evaluation.held_out import spread
from nmm_jax.evaluation.restored import RunFlags
from nmm_jax.evaluation.routing import Counts, Experts, statistics
from nmm_jax.models.deep_fusion import IMAGE, TEXT, modalities
from nmm_jax.parallel.sharding import Constrain, replicated
from nmm_jax.training.checkpoints import Run

Route = Callable[[Any, dict[str, Array]], dict[str, Array]]


def experts_of(run: Run) -> Experts:
    """Raises ValueError if there are none."""
    moe = run.model.spec.moe
    if moe is None:
        raise ValueError(
            "this run's model has no experts (model.moe.experts = 0), so no routing to show; configs/moe.py has "
            "models that do"
        )
    layers = tuple(range(moe.every - 1, run.model.spec.depth, moe.every))
    return Experts(moe.experts, layers, moe.top_k, moe.modality, moe.image_experts)


def measure(run: Run, rows: int) -> results.Results:
    """The JSON that the command writes.

    Raises:
      ValueError: a dense model, or a source without a held_out split.
    """
    experts = experts_of(run)
    held_out_plans(run)
    route = make_route(run)
    counts = {
        source: count(run, route, source, Stream.held_out(run.config, source), rows)
        for source in run.config.data.sources
    }
    first, *others = counts.values()
    return {
        "step": run.step,
        "experts": experts.to_json(),
        "sources": {source: statistics(one, experts) for source, one in counts.items()},
        "all": statistics(sum(others, first), experts),
    }


def make_route(run: Run) -> Route:
    """(params, batch) -> what the model's routers did with the batch; compiled once per batch shape."""
    constrain = Constrain(run.mesh)

    def route(params: Any, batch: dict[str, Array]) -> dict[str, Array]:
        _, aux = run.language_model.hidden(params, batch, constrain=constrain)
        modality = modalities(run.model.spec, batch)
        tokens = jnp.stack([(modality == each).sum() for each in (TEXT, IMAGE)])
        return {name: aux[name] for name in ("expert_tokens", "router_entropy", "dropped_tokens")} | {"tokens": tokens}

    return jax.jit(route, out_shardings=replicated(run.mesh))


def count(run: Run, route: Route, source: str, held_out: HeldOut, rows: int) -> Counts:
    """Of one source, over at most `rows` rows, spread evenly over the plan as for the held-out loss."""
    chosen = spread(rows, len(held_out))
    parts = []
    for indices, real in fixed_batches(len(chosen), size_on(run.mesh, run.config.evaluation.batch_rows), source):
        batch = held_out.batch(chosen[indices[:real]].tolist(), rows=len(indices))  # filled up with rows of padding
        found = jax.device_get(route(run.params, place(batch, run.mesh)))
        parts.append(
            Counts(
                found["expert_tokens"].astype(np.int64),
                found["router_entropy"].astype(np.float64),
                found["dropped_tokens"].astype(np.int64),
                found["tokens"].astype(np.int64),
                real,
            )
        )
    return sum(parts[1:], parts[0])


def table(found: results.Results) -> str:
    """What the terminal shows: every layer over all sources, and every source over its layers."""
    experts, every = found["experts"], found["all"]
    head = f"{'specialisation':>15}{'deviation':>11}{'entropy: text':>15}{'image':>8}{'imbalance':>11}"
    lines = [
        f"step {found['step']}: {experts['count']} experts, top {experts['top_k']}, {experts['modality']}",
        "",
        f"{'layer, all sources':20}{head}{'busiest expert':>24}{'empty':>7}",
    ]
    for i, layer in enumerate(experts["layers"]):
        busiest = int(np.argmax(every["load"]["all"][i]))
        share, images = every["load"]["all"][i][busiest], every["image_share"][i][busiest]
        busy = f"{experts['labels'][busiest]}: {share:.0%}, {images:.0%} images"
        lines.append(
            f"  {layer:<18}{_scores(every, experts['count'], slice(i, i + 1))}{busy:>24}{every['empty_experts'][i]:>7}"
        )
    lines += ["", f"{'mean over layers':20}{head}{'baseline':>24}{'images':>7}"]
    for name, one in {**found["sources"], "all": every}.items():
        images = one["tokens"]["image"] / sum(one["tokens"].values())
        lines.append(
            f"  {name:18}{_scores(one, experts['count'])}{one['specialisation_baseline']:>24.3f}{images:>7.0%}"
        )
    return "\n".join(
        [
            *lines,
            "",
            "specialisation: mean over experts of 1 - H(image share); baseline: of routers blind to modality",
            "deviation: mean |share - 1/E|, times E; entropy: share of the largest possible",
        ]
    )


def _scores(one: dict[str, Any], count: int, layers: slice = slice(None)) -> str:
    def mean(values: list[float | None], times: float = 1) -> str:
        known = [value for value in values[layers] if value is not None]
        return f"{times * sum(known) / len(known):.3f}" if known else "-"

    return (
        f"{mean(one['specialisation']):>15}{mean(one['deviation']['mean'], count):>11}"
        f"{mean(one['entropy_share']['text']):>15}{mean(one['entropy_share']['image']):>8}"
        f"{mean(one['imbalance']):>11}"
    )


def render(found: results.Results, title: str, model: str) -> str:
    """The page."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("nmm_jax", "evaluation"), autoescape=True)
    return environment.get_template("routing_page.html").render(
        title=title,
        model=model,
        found=found,
        statistics={**found["sources"], "all sources": found["all"]},
        figures={
            "image_share": routing_figures.image_shares(found),
            "load": routing_figures.loads(found),
            "layers": routing_figures.by_layer(found),
        },
        alone=[name for name, one in found["sources"].items() if not all(one["tokens"].values())],
    )


def model_name(run: Run) -> str:
    """The model in a few words."""
    parameters = sum(x.size for x in jax.tree.leaves(run.model.abstract))
    model = run.config.model
    return f"{model.family.replace('_', ' ')}, {model.depth} layers of width {model.width}, {parameters:,} parameters"


if __name__ == "__main__":
    RUN = RunFlags()
    ROWS = flags.DEFINE_integer("rows", 128, "held-out rows of each source, at most", 1)
    OUTPUT = flags.DEFINE_string("output", "", "the page; routing-<step>.html in the run's folder unless given")

    def main(_: list[str]) -> None:
        run = RUN.restore()[0]
        found = measure(run, ROWS.value)
        if jax.process_index() == 0:
            print(table(found), flush=True)
            workdir = paths.absolute(RUN.workdir)
            path = workdir / "evaluation" / f"routing-{run.step}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            results.write(found, path)
            page = epath.Path(OUTPUT.value or workdir / f"routing-{run.step}.html")
            paths.write_text(page, render(found, workdir.name, model_name(run)))
            logging.info("wrote %s and %s", path, page)

    command_line.run(main)
