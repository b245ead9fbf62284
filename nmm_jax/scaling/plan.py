"""What to train for a budget, or how long to train a model: by one's own fits, or by published ones.

    python -m nmm_jax.scaling.plan --flops=1e21 --law=published:early --law=published:moe
    python -m nmm_jax.scaling.plan --topology=v5p:4x8x8 --hours=72 --mfu=0.45 --fit=early.json --fit=late.json
    python -m nmm_jax.scaling.plan --config=configs/early_fusion.py:932m --fit=early.json
    python -m nmm_jax.scaling.plan --n=932e6 --flops=1e21 --fit=early.json
    python -m nmm_jax.scaling.plan --n=932e6 --tokens=10e9,100e9,400e9 --law=published:moe
    python -m nmm_jax.scaling.plan --published

Of a budget: N and D of least loss by each law, which law's loss is least, what a smaller model costs in loss or in
tokens, the shipped config that is nearest, and the command to train it. With --served, N and D that reach the same loss
for the fewest FLOPs of training and of serving so many tokens. Of a model: how many tokens, and what more of them, or
just --tokens, buy.

C is FLOPs as the fit counts them: 6 N D, without attention; late fusion 6 (N_v D_v + N_text D). Intervals are of the
fit's bootstrap draws: how uncertain the curve is. Where a plan leaves the range of the fit, it says by how much.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from configs import command_line
from nmm_jax.parallel.chips import CHIPS
from nmm_jax.parallel.topology import Topology
from nmm_jax.scaling import plan_tables, published, shipped
from nmm_jax.scaling.fitted import read
from nmm_jax.scaling.forecast import Forecast, Quantity, balanced_tokens, cheapest, of_published, tokens_for
from nmm_jax.scaling.mixtures import at_best, at_edges, best_mixture, parse_mixture, source_of

PUBLISHED = "published:"
_SMALLER = (1.0, 0.75, 0.5, 0.35, 0.25)  # of the best N: what a smaller model costs
_LONGER = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of the tokens whose budget has this model for its best
_PAIRS = 2_000  # of draws of two laws, for the interval of their difference
_FAR = 1.5  # between N of a plan and of the nearest config


class PlanError(ValueError):
    """Settings that contradict each other, or say too little."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Training FLOPs, and what they come of; FLOP/s where that is hardware."""

    flops: float
    told: str
    rate: float | None = None

    @classmethod
    def of(
        cls,
        flops: float | None = None,
        chips: int | None = None,
        chip: str = "",
        topology: str = "",
        slices: int = 1,
        hours: float | None = None,
        mfu: float = 0.4,
    ) -> "Budget | None":
        """None if nothing is said of one.

        Raises:
          PlanError: FLOPs and hardware are both given, or hardware without hours, or two kinds of hardware.
        """
        hardware = {"--chips": chips, "--chip": chip, "--topology": topology, "--hours": hours}
        given = [name for name, value in hardware.items() if value]
        if flops is not None:
            if given:
                raise PlanError(f"--flops and {', '.join(given)} both say what the budget is; give one of them")
            if not flops > 0:
                raise PlanError(f"--flops={flops:g}: a budget is positive")
            return cls(flops, f"{flops:.4g} FLOPs")
        if not given:
            return None
        if topology:
            if chips or chip:
                raise PlanError("--topology says which chips and how many; leave out --chips and --chip")
            found = Topology.parse(topology, slices)
            kind, devices, name = found.chip, found.device_count, str(found)
        elif not chips or not chip:
            raise PlanError(f"{', '.join(given)}: a budget of hardware needs --chips and --chip, or --topology")
        elif chip not in CHIPS:
            raise PlanError(f"--chip={chip}: there is none; there are {', '.join(CHIPS)}")
        else:
            kind, devices, name = CHIPS[chip], chips * CHIPS[chip].devices_per_chip, f"{chips} x {chip}"
        if not hours or hours < 0:
            raise PlanError(f"{', '.join(given)}: how long? --hours=72")
        if not 0 < mfu <= 1:
            raise PlanError(f"--mfu={mfu:g}: a share of the peak, above 0 and up to 1")
        rate = devices * kind.peak_flops * mfu
        told = f"{name} for {hours:g} hours at {mfu:.0%} of {kind.peak_flops * devices / 1e15:.4g} PFLOP/s"
        return cls(rate * hours * 3600, told, rate)


def of_budget(forecast: Forecast, budget: Budget, served: float | None = None) -> dict[str, Any]:
    """What a law says of a budget."""
    C = budget.flops
    found: dict[str, Any] = _head(forecast)
    if forecast.mixtures and not forecast.held:
        mixture = best_mixture(forecast, C)
        forecast = dataclasses.replace(forecast, held={name: q.value for name, q in mixture.items()})
        found["mixture"] = mixture
        found["warnings"] += at_edges(forecast, mixture)
    best = forecast.best(C)
    found |= best._asdict()
    found["warnings"] += forecast.beyond(C=C)
    if best.N is None or best.D is None:
        return found
    N, D = best.N.value, best.D.value
    found["warnings"] += forecast.beyond(N=N, D=D)
    found["smaller"] = smaller(forecast, C)
    if served:
        found["served"] = with_serving(forecast, C, served)
    found["config"] = config_for(forecast, N, budget)
    return found


def of_model(
    forecast: Forecast,
    N: float,
    budget: Budget | None = None,
    config: shipped.Config | None = None,
    asked: Sequence[float] = (),
) -> dict[str, Any]:
    """What a law says of a model: how many tokens, of a config in how many steps; with a budget what that comes to.

    Args:
      asked: tokens whose losses are told, instead of those of multiples of the balanced ones.

    Raises:
      PlanError: the law has no N.
    """
    if not forecast.has_sizes:
        raise PlanError(f"{forecast.name}: the law has no N and D, it says nothing of a model; it answers --flops")
    if forecast.mixtures and not forecast.held:
        raise PlanError(f"{forecast.name}: of a model a law of mixtures needs --mixture='captions=0.45,...'")
    found = _head(forecast) | {"N": Quantity(N)}
    tokens = forecast.quantity(lambda values: balanced_tokens(forecast.slice(values), N))
    found |= {"D": tokens, "loss": forecast.loss(N, tokens.value)}
    of = asked or [times * tokens.value for times in _LONGER]
    found["longer"] = [_row(forecast, N, D) | {"times": D / tokens.value} for D in of]
    if budget:
        D = budget.flops / (forecast.per_pair * N)
        found["in_budget"] = _row(forecast, N, D)
        found["warnings"] += forecast.beyond(N=N, D=D, C=budget.flops)
    else:
        found["warnings"] += forecast.beyond(N=N, D=tokens.value)
    if config:
        D = found["in_budget"]["D"] if budget else tokens.value
        steps = max(1, round(D / config.positions))
        found["config"] = {"path": config.path, "steps": steps, "D": steps * config.positions}
        found["config"] |= {"flops": steps * config.flops, "command": shipped.command(config, steps)}
    return found


def _head(forecast: Forecast) -> dict[str, Any]:
    return {
        "name": forecast.name,
        "law": forecast.law.name,
        "formula": forecast.law.formula,
        "source": forecast.source,
        "level": forecast.level if forecast.draws else None,
        "draws": len(forecast.draws),
        "notes": list(forecast.notes),
        "warnings": [],
    }


def _row(forecast: Forecast, N: float, D: float) -> dict[str, Any]:
    """A run: its loss, and by how many percent another N would have had less for the same FLOPs."""
    C = forecast.budget(N, D)
    beyond = [name for name, value in (("N", N), ("D", D)) if forecast.beyond(**{name: value})]
    loss, excess = forecast.loss(N, D), _excess(forecast, N, C)
    return {"N": N, "D": D, "C": C, "loss": loss, "excess": excess, "beyond": beyond}


def _excess(forecast: Forecast, N: float, C: float) -> Quantity:
    def percent(values: Any) -> float:
        curve = forecast.slice(values)
        here = curve.loss(np.asarray(N), np.asarray(C / (forecast.per_pair * N)))
        return 100 * float(here / curve.optimum(np.asarray(C), forecast.per_pair).loss - 1)

    return forecast.quantity(percent)


def smaller(forecast: Forecast, C: float) -> list[dict[str, Any]]:
    """Models of a part of the best size: at the same FLOPs, and trained until their loss is that of the best."""
    curve, best = forecast.slice(forecast.values), forecast.best(C)
    assert best.N is not None
    found = []
    for share in _SMALLER:
        N = share * best.N.value
        same_loss = best.D.value if share == 1 and best.D else tokens_for(curve, N, best.loss.value)
        row = {"share": share} | _row(forecast, N, C / (forecast.per_pair * N))
        found.append(row | {"D_same_loss": same_loss, "C_same_loss": forecast.budget(N, same_loss)})
    return found


def with_serving(forecast: Forecast, C: float, served: float) -> dict[str, float]:
    """N and D that reach the best loss of C for the fewest FLOPs, of training and of serving so many tokens."""
    best = forecast.best(C)
    assert best.N is not None
    N, D = cheapest(forecast.slice(forecast.values), best.loss.value, forecast.per_pair, served)
    training = forecast.budget(N, D)
    total, before = training + 2 * N * served, C + 2 * best.N.value * served
    return {"tokens": served, "N": N, "D": D, "C": training, "total": total, "saved": 1 - total / before}


def config_for(forecast: Forecast, N: float, budget: Budget) -> dict[str, Any]:
    """The nearest shipped config, trained for the budget."""
    config = shipped.nearest(forecast.architecture, N)
    D = budget.flops / (forecast.per_pair * config.N)
    steps = max(1, round(D / config.positions))
    exact = config.flops * steps
    mixture = {source_of(column): share for column, share in forecast.held.items() if column in forecast.mixtures}
    found = {
        "path": config.path,
        "N": config.N,
        "N_total": config.total,
        "D": steps * config.positions,
        "steps": steps,
        "loss": forecast.loss(config.N, D),
        "excess": _excess(forecast, config.N, budget.flops),
        "flops": exact,
        "hours": exact / budget.rate / 3600 if budget.rate else None,
        "command": shipped.command(config, steps, mixture),
        "warnings": [],
    }
    if not 1 / _FAR < config.N / N < _FAR:
        found["warnings"] = [f"no shipped config is near: {config.path} has {config.N / N:.2g} times the N of the plan"]
    return found


def differences(forecasts: Sequence[Forecast], C: float) -> list[dict[str, Any]]:
    """How far the least losses of others are from the first's, in percent, by independent draws of both."""
    losses = []
    for forecast in forecasts:
        losses.append(np.array([forecast.optima(values, C)[2] for values in (forecast.values, *forecast.draws)]))
    draw = np.random.default_rng(0)
    (base, *base_draws), *others = losses
    found = []
    for forecast, (value, *draws) in zip(forecasts[1:], others, strict=True):
        one: dict[str, Any] = {"of": forecast.name, "to": forecasts[0].name}
        if forecast.data != forecasts[0].data:
            verdict = f"not comparable: its losses are {forecast.data}, not {forecasts[0].data}"
            found.append(one | {"percent": None, "verdict": verdict})
            continue
        pairs = np.array([])
        if draws and base_draws:
            pairs = 100 * (draw.choice(draws, _PAIRS) / draw.choice(base_draws, _PAIRS) - 1)
        percent = forecast.interval(100 * (value / base - 1), pairs)
        found.append(one | {"percent": percent, "verdict": _verdict(percent)})
    return found


def _verdict(percent: Quantity) -> str:
    if percent.low is None or percent.high is None:
        return "without intervals: whether that is more than the fits' error is not known"
    if percent.low < 0 < percent.high:
        return "not told apart: the interval holds zero"
    return "lower" if percent.value < 0 else "higher"


def make(
    forecasts: Sequence[Forecast],
    budget: Budget | None,
    N: float | None = None,
    served: float | None = None,
    config: shipped.Config | None = None,
    tokens: Sequence[float] = (),
) -> dict[str, Any]:
    """The plan, ready for plan_tables and for JSON; of a model whose N is given, which a config may have.

    Raises:
      PlanError: neither a budget nor a model is given, or one that the laws say nothing of.
    """
    if not forecasts:
        raise PlanError("by which law? --fit=fit.json of nmm_jax.scaling.fit, or --law=published:early")
    if budget is None and N is None:
        raise PlanError("plan what? --flops=1e21, or --chips, --chip and --hours; or a model: --config or --n")
    if served is not None and (N is not None or not served > 0):
        raise PlanError(f"--served={served:g} chooses N for a budget: tokens above 0, and without --config and --n")
    if tokens and (N is None or not min(tokens) > 0):
        raise PlanError("--tokens: what a model is trained on, above 0; which model? --config or --n")
    found: dict[str, Any] = {"budget": budget and dataclasses.asdict(budget), "model": N}
    if N is None and budget:
        found["laws"] = [of_budget(forecast, budget, served) for forecast in forecasts]
        found["differences"] = differences([at_best(each, budget.flops) for each in forecasts], budget.flops)
    elif N is not None:
        found["laws"] = [of_model(forecast, N, budget, config, tokens) for forecast in forecasts]
    return found


def forecasts_of(
    fits: Sequence[str], laws: Sequence[str], sparsity: float | None, mixture: Mapping[str, float]
) -> list[Forecast]:
    """Of files and of published:NAME, with their other columns held.

    Raises:
      PlanError: a law is no published one, or no law has the column that is to be held.
    """
    found = [fit.forecast for path in fits for fit in read(path)]
    for name in laws:
        if not name.startswith(PUBLISHED):
            known = ", ".join(PUBLISHED + each for each in published.LAWS)
            raise PlanError(f"--law={name}: expected one of {known}; one's own fits are --fit=fit.json")
        found.append(of_published(name.removeprefix(PUBLISHED)))
    if sparsity is not None:  # one of each fit, instead of one for each sparsity that was run
        if not any("S" in forecast.law.columns for forecast in found):
            raise PlanError(f"--sparsity={sparsity:g}: none of these laws is one of sparsity")
        of_sparsity = {forecast.source: forecast for forecast in found if "S" in forecast.law.columns}
        found = [forecast for forecast in found if "S" not in forecast.law.columns]
        found += [
            dataclasses.replace(forecast, name=f"S={sparsity:g}", held={"S": sparsity})
            for forecast in of_sparsity.values()
        ]
    if mixture:
        sources = [{source_of(column): column for column in forecast.mixtures} for forecast in found]
        if set(mixture) not in map(set, sources):
            there = [", ".join(each) for each in sources if each] or ["no law of mixtures"]
            raise PlanError(f"--mixture is of {', '.join(mixture)}; here is {'; '.join(there)}")
        found = [
            dataclasses.replace(forecast, held={each[source]: share for source, share in mixture.items()})
            if set(each) == set(mixture)
            else forecast
            for forecast, each in zip(found, sources, strict=True)
        ]
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PlanError(f"--tokens: {text!r} is no number; --tokens=10e9,100e9") from None


if __name__ == "__main__":
    FLOPS_FLAG = flags.DEFINE_float("flops", None, "the budget, in training FLOPs")
    CHIPS_FLAG = flags.DEFINE_integer("chips", None, "the budget: how many chips, or GPUs", 1)
    CHIP = flags.DEFINE_string("chip", "", "their generation: v5p, v6e, h100")
    TOPOLOGY = flags.DEFINE_string("topology", "", "instead of both, GENERATION:SHAPE such as v5p:4x8x8")
    SLICES = flags.DEFINE_integer("slices", 1, "slices of that shape", 1)
    HOURS = flags.DEFINE_float("hours", None, "for how long")
    MFU = flags.DEFINE_float("mfu", 0.4, "the share of their peak that is needed work")
    CONFIG = flags.DEFINE_string("config", "", "a model: a config, as FILE[:ARGUMENT]")
    N_FLAG = flags.DEFINE_float("n", None, "a model: its parameters, as the paper counts them")
    TOKENS = flags.DEFINE_list("tokens", [], "of a model, 10e9,100e9: what its loss is after so many")
    FITS = flags.DEFINE_multi_string("fit", [], "the JSON of nmm_jax.scaling.fit; several are compared")
    LAWS_FLAG = flags.DEFINE_multi_string("law", [], "published:NAME; several are compared")
    LIST = flags.DEFINE_bool("published", False, "only list what was published, and where it contradicts itself")
    SPARSITY = flags.DEFINE_float("sparsity", None, "1 - N/(parameters in all), of a law of sparsity", 0, 1)
    MIXTURE_FLAG = flags.DEFINE_string("mixture", "", "captions=0.45,text=0.55: of a law of mixtures, not the best")
    SERVED = flags.DEFINE_float("served", None, "tokens that the model will serve: N for training and serving together")
    FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "a table for a reader, JSON for a program")

    def main(_: list[str]) -> None:
        jax.config.update("jax_platforms", "cpu")  # sums: no accelerator of this machine is touched
        if LIST.value:
            return print(published.table())
        if CONFIG.value and N_FLAG.value is not None:
            raise PlanError("--config and --n both say which model; give one of them")
        config = shipped.read(CONFIG.value) if CONFIG.value else None
        N = float(config.N) if config else N_FLAG.value
        if N is not None and not N > 0:
            raise PlanError(f"--n={N:g}: parameters are positive")
        hardware = (CHIPS_FLAG.value, CHIP.value, TOPOLOGY.value, SLICES.value, HOURS.value, MFU.value)
        budget = Budget.of(FLOPS_FLAG.value, *hardware)
        mixture = parse_mixture(MIXTURE_FLAG.value) if MIXTURE_FLAG.value else {}
        forecasts = forecasts_of(FITS.value, LAWS_FLAG.value, SPARSITY.value, mixture)
        found = make(forecasts, budget, N, SERVED.value, config, [_number(text) for text in TOKENS.value])
        print(json.dumps(plan_tables.plain(found), indent=2) if FORMAT.value == "json" else plan_tables.table(found))

    command_line.run(main)
