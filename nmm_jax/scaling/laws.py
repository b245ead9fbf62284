"""Laws of the loss: what each predicts, in logarithms, and the best N and D for a budget that follows from it.

    dense             L = E + A/N^alpha + B/D^beta                                          Hoffmann et al., 2203.15556
    late              the same; N has the vision tower's parameters, C = 6 (N_v D_v + (N - N_v) D)
    sparse            L = E + A/N^alpha + B/D^beta + C/(1-S)^lambda + d/((1-S)^delta N^gamma)  Shukor et al., 2504.07951
    overtraining      L = E + A/N^alpha + B 6^(-alpha/2)/D^alpha                               Gadre et al., 2403.08540
    mixture-additive  L = E + 1/sum_i C_i h_i^gamma_i + A/N^alpha + B/D^beta                   Shukor et al., 2507.09404
    mixture-joint     the same, with A = (sum_i C_A,i h_i)^gamma_A and B = (sum_i C_B,i h_i)^gamma_B
    frontier          L = K C^c

S is the sparsity, one minus the active share of the experts; h_i is the share of domain i in the mixture.

A law's parameters are fitted as logarithms where they must be positive (`fitted`), and are told as they stand in the
formula (`values`). Predictions are sums of positive terms, so log L is a log-sum-exp of theirs: nothing overflows.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nmm_jax.scaling.optima import Slice

Values = Mapping[str, float]
Logs = Mapping[str, Array | np.ndarray]  # of columns, [n] each: log N, log D, log(1-S), log h_i, log C
Means = Mapping[str, float]  # of the logs of columns, and of log loss as "L"

MIXTURE = "h/"  # prefix of the columns of a mixture: h/captions
_NONE = -1e4  # log of a share of zero: its power underflows to zero, and so do all gradients
_LEVELS = (-4.0, 0.0)  # logs of what a term may make of the loss, at the mean of the rows, in starts that are drawn


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Doubles, on the CPU, for what runs within; the process keeps its precision and its device."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@dataclasses.dataclass(frozen=True)
class Law:
    """What predicts a loss.

    Attributes:
      parameters: their names, in the order of the fitted vector.
      free: those that may have either sign and are fitted as they are; the others are positive, and fitted as logs.
      columns: what it needs of each run.
      log_terms: logs of the positive terms that sum to the loss, each [n], of the fitted parameters by name and of the
        columns' logs.
      starts: fitted parameters to begin from, [starts, p], given the means of the rows.
      reduce: the law where all but N and D is held, as curves of N and D; None if it has no N and D.
    """

    name: str
    formula: str
    parameters: tuple[str, ...]
    free: frozenset[str]
    columns: tuple[str, ...]
    log_terms: Callable[[Mapping[str, Any], Logs], Sequence[Any]]
    starts: Callable[[Means], Float[np.ndarray, "starts p"]]
    reduce: Callable[[Values, Values], Slice] | None = None

    def log_loss(self, fitted: Any, logs: Logs) -> Any:
        """log L [n] of fitted parameters [p], a pure function for JAX to differentiate and map."""
        terms = self.log_terms(dict(zip(self.parameters, fitted, strict=True)), logs)
        return log_sum_exp(terms)

    def logs(self, columns: Mapping[str, Float[np.ndarray, "n"]]) -> dict[str, Float[np.ndarray, "n"]]:
        """The logs that log_loss takes, of columns as they stand in a table."""
        return {name: _log(name, np.asarray(columns[name], np.float64)) for name in self.columns}

    def predict(self, values: Values, columns: Mapping[str, Float[np.ndarray, "n"]]) -> Float[np.ndarray, "n"]:
        """The loss, in float64."""
        return np.exp(self.log_loss(self.fitted(values), self.logs(columns)))

    def fitted(self, values: Values) -> Float[np.ndarray, "p"]:
        with np.errstate(divide="ignore"):  # of a term that runs have no use for
            return np.array([values[p] if p in self.free else np.log(values[p]) for p in self.parameters])

    def values(self, fitted: Float[np.ndarray, "*batch p"]) -> dict[str, Float[np.ndarray, "*batch"]]:
        moved = np.moveaxis(np.asarray(fitted), -1, 0)
        with np.errstate(over="ignore"):  # a coefficient of a steep enough power is inf
            return {p: v if p in self.free else np.exp(v) for p, v in zip(self.parameters, moved, strict=True)}

    def exponents(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """How the optimum moves, with the paper's letters (table 2 and table 9): {} of laws without a closed form.

        N ~ C^a, D ~ C^b, D ~ N^d, N ~ D^n, D/N ~ C^dn. Values and exponents are numbers or arrays.
        """
        alpha, beta = values.get("alpha"), values.get("beta", values.get("alpha"))
        if alpha is None or beta is None or self.reduce is None or "gamma" in values:
            return {}
        a, b = beta / (alpha + beta), alpha / (alpha + beta)
        return {"a": a, "b": b, "d": b / a, "n": a / b, "dn": b - a}

    def at(self, values: Values, **held: float) -> Slice:
        """The law as curves of N and D alone; `held` gives its other columns: S=0.875, or **{"h/text": 0.1, ...}.

        Raises:
          ValueError: the law has no N and D, or a column that it needs is not given.
        """
        if self.reduce is None:
            raise ValueError(f"the law {self.name!r} has no N and D to choose")
        if missing := [name for name in self.columns if name not in ("N", "D") and name not in held]:
            raise ValueError(f"the optimum of the law {self.name!r} needs a value of {', '.join(missing)}")
        return self.reduce(values, held)


def log_sum_exp(terms: Sequence[Any]) -> Any:
    """Of JAX's arrays by JAX, of NumPy's by NumPy: predictions need no compilation, and keep their doubles."""
    if any(isinstance(term, jax.Array) for term in terms):
        most = jax.lax.stop_gradient(functools.reduce(jnp.maximum, terms))
        return most + jnp.log(sum(jnp.exp(term - most) for term in terms))
    most = functools.reduce(np.maximum, terms)
    return most + np.log(sum(np.exp(term - most) for term in terms))


def _log(name: str, column: np.ndarray) -> np.ndarray:
    if name == "S":
        return np.log1p(-column)
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(column), _NONE) if name.startswith(MIXTURE) else np.log(column)


def grid(parameters: Sequence[str], axes: Mapping[str, Sequence[float]]) -> Float[np.ndarray, "starts p"]:
    return np.array(list(itertools.product(*(axes[p] for p in parameters))), np.float64)


# Appendix of arXiv 2504.07951, where alpha and beta read "0, 0.5, 2.5": taken as steps of 0.5. 7,056 starts.
_STEPS = tuple(np.arange(0.0, 2.51, 0.5))
PAPER_GRID = {
    "E": (-1.0, -0.5, 0.5, 1.0),
    "A": tuple(np.arange(0.0, 31.0, 5.0)),
    "B": tuple(np.arange(0.0, 31.0, 5.0)),
    "alpha": _STEPS,
    "beta": _STEPS,
}


def _dense(name: str) -> Law:
    parameters = ("E", "A", "B", "alpha", "beta")
    return Law(
        name=name,
        formula="E + A/N^alpha + B/D^beta",
        parameters=parameters,
        free=frozenset({"alpha", "beta"}),
        columns=("N", "D"),
        log_terms=lambda p, x: (p["E"], p["A"] - p["alpha"] * x["N"], p["B"] - p["beta"] * x["D"]),
        starts=lambda means: grid(parameters, PAPER_GRID),
        reduce=lambda v, held: Slice(v["E"], ((v["A"], v["alpha"]),), (v["B"], v["beta"])),
    )


def _overtraining() -> Law:
    parameters = ("E", "A", "B", "alpha")
    six = np.log(6) / 2

    def log_terms(p, x):
        return p["E"], p["A"] - p["alpha"] * x["N"], p["B"] - p["alpha"] * (six + x["D"])

    return Law(
        name="overtraining",
        formula="E + A/N^alpha + B 6^(-alpha/2)/D^alpha",
        parameters=parameters,
        free=frozenset({"alpha"}),
        columns=("N", "D"),
        log_terms=log_terms,
        starts=lambda means: grid(parameters, PAPER_GRID),
        reduce=lambda v, held: Slice(v["E"], ((v["A"], v["alpha"]),), (v["B"] * 6 ** (-v["alpha"] / 2), v["alpha"])),
    )


def _drawn(means: Means, count: int, names: Sequence[str], exponents: Mapping[str, tuple[float, float]]):
    """Exponents, uniform within their bounds, and logs of what each named term makes of the loss at the rows' mean."""
    draw = np.random.default_rng(0)
    found = {name: draw.uniform(*bounds, count) for name, bounds in exponents.items()}
    return found, {name: means["L"] + draw.uniform(*_LEVELS, count) for name in names}


def _sparse() -> Law:
    parameters = ("E", "A", "B", "C", "d", "alpha", "beta", "lambda", "delta", "gamma")

    def log_terms(p, x):
        return (
            p["E"],
            p["A"] - p["alpha"] * x["N"],
            p["B"] - p["beta"] * x["D"],
            p["C"] - p["lambda"] * x["S"],
            p["d"] - p["delta"] * x["S"] - p["gamma"] * x["N"],
        )

    def starts(means: Means) -> np.ndarray:
        bounds = dict.fromkeys(("alpha", "beta", "gamma"), (0.1, 1.0)) | dict.fromkeys(("lambda", "delta"), (-0.5, 0.5))
        p, level = _drawn(means, 512, ("E", "A", "B", "C", "d"), bounds)
        p["E"] = level["E"]
        p["A"] = level["A"] + p["alpha"] * means["N"]
        p["B"] = level["B"] + p["beta"] * means["D"]
        p["C"] = level["C"] + p["lambda"] * means["S"]
        p["d"] = level["d"] + p["delta"] * means["S"] + p["gamma"] * means["N"]
        return np.stack([p[name] for name in parameters], axis=-1)

    def reduce(v: Values, held: Values) -> Slice:
        active = 1 - held["S"]
        return Slice(
            v["E"] + v["C"] / active ** v["lambda"],
            ((v["A"], v["alpha"]), (v["d"] / active ** v["delta"], v["gamma"])),
            (v["B"], v["beta"]),
        )

    return Law(
        name="sparse",
        formula="E + A/N^alpha + B/D^beta + C/(1-S)^lambda + d/((1-S)^delta N^gamma)",
        parameters=parameters,
        free=frozenset({"alpha", "beta", "lambda", "delta", "gamma"}),
        columns=("N", "D", "S"),
        log_terms=log_terms,
        starts=starts,
        reduce=reduce,
    )


def _mixture(name: str, domains: Sequence[str], joint: bool) -> Law:
    columns = tuple(MIXTURE + domain for domain in domains)
    weights, powers = tuple(f"C/{domain}" for domain in domains), tuple(f"gamma/{domain}" for domain in domains)
    blends = {term: tuple(f"C_{term}/{domain}" for domain in domains) for term in ("A", "B")} if joint else {}
    own = tuple(n for term in blends for n in (*blends[term], f"gamma_{term}")) if joint else ("A", "B")
    parameters = ("E", "alpha", "beta", *own, *weights, *powers)
    free = frozenset({"alpha", "beta", *powers} | ({"gamma_A", "gamma_B"} if joint else set()))

    def coefficient(p, x, term):  # log of A or of B
        if not joint:
            return p[term]
        return p[f"gamma_{term}"] * log_sum_exp([p[w] + x[h] for w, h in zip(blends[term], columns, strict=True)])

    def log_terms(p, x):
        mixed = log_sum_exp([p[w] + p[g] * x[h] for w, g, h in zip(weights, powers, columns, strict=True)])
        return (
            p["E"],
            -mixed,
            coefficient(p, x, "A") - p["alpha"] * x["N"],
            coefficient(p, x, "B") - p["beta"] * x["D"],
        )

    def starts(means: Means) -> np.ndarray:
        bounds = {"alpha": (0.1, 1.0), "beta": (0.1, 1.0)} | dict.fromkeys(powers, (0.0, 1.0))
        bounds |= dict.fromkeys(("gamma_A", "gamma_B"), (0.3, 3.0)) if joint else {}
        p, level = _drawn(means, 512, ("E", "A", "B", *weights), bounds)
        p["E"] = level["E"]
        for w, g, h in zip(weights, powers, columns, strict=True):
            p[w] = -level[w] - np.log(len(domains)) - p[g] * means[h]
        for term, exponent, size in (("A", "alpha", "N"), ("B", "beta", "D")):
            log = level[term] + p[exponent] * means[size]
            if joint:
                tilt = np.random.default_rng(1).uniform(-0.5, 0.5, (len(domains), len(log)))
                p |= {w: log / p[f"gamma_{term}"] + tilt[i] for i, w in enumerate(blends[term])}
            else:
                p[term] = log
        return np.stack([p[n] for n in parameters], axis=-1)

    def reduce(v: Values, held: Values) -> Slice:
        h = [held[column] for column in columns]
        mixed = 1 / sum(v[w] * share ** v[g] for w, g, share in zip(weights, powers, h, strict=True))
        size = {
            term: sum(v[w] * share for w, share in zip(blends[term], h, strict=True)) ** v[f"gamma_{term}"]
            if joint
            else v[term]
            for term in ("A", "B")
        }
        return Slice(v["E"] + mixed, ((size["A"], v["alpha"]),), (size["B"], v["beta"]))

    return Law(
        name=name,
        formula="E + 1/sum C_i h_i^gamma_i + "
        + ("(sum C_A,i h_i)^gamma_A/N^alpha + (sum C_B,i h_i)^gamma_B/D^beta" if joint else "A/N^alpha + B/D^beta"),
        parameters=parameters,
        free=free,
        columns=("N", "D", *columns),
        log_terms=log_terms,
        starts=starts,
        reduce=reduce,
    )


def _frontier() -> Law:
    parameters = ("K", "c")
    axes = {"K": tuple(np.arange(0.0, 7.1, 1.0)), "c": (-0.2, -0.1, -0.05, -0.02, 0.0)}
    return Law(
        name="frontier",
        formula="K C^c",
        parameters=parameters,
        free=frozenset({"c"}),
        columns=("C",),
        log_terms=lambda p, x: (p["K"] + p["c"] * x["C"],),
        starts=lambda means: grid(parameters, axes),
    )


OF_MIXTURES = ("mixture-additive", "mixture-joint")
LAWS = ("dense", "late", "sparse", "overtraining", *OF_MIXTURES, "frontier")


@functools.cache  # a law is the key of its compiled programs
def law(name: str, domains: tuple[str, ...] = ()) -> Law:
    """The law of that name.

    Args:
      domains: of a mixture, as the columns h/<domain> are called.

    Raises:
      ValueError: there is no such law, or a law of mixtures has fewer than two domains.
    """
    if name not in LAWS:
        raise ValueError(f"there is no law {name!r}; there are {', '.join(LAWS)}")
    if name in OF_MIXTURES:
        if len(domains) < 2:
            raise ValueError(
                f"the law {name!r} needs the columns of two domains or more, got {', '.join(domains) or 'none'}"
            )
        return _mixture(name, domains, joint=name == "mixture-joint")
    if name in ("dense", "late"):
        return _dense(name)
    return {"sparse": _sparse, "overtraining": _overtraining, "frontier": _frontier}[name]()
