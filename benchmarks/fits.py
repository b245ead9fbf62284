"""The whole grid of starts and 100 resampled tables, beside scipy's L-BFGS-B one start at a time.

    python -m benchmarks.fits [--runs=240] [--output=fits.json]          # a minute on 2 cores

The table of runs is made up: Chinchilla's law with noise of 1% on N and D drawn over a hundredfold. Ours fits it from
all 7,056 starts of the grid, and 100 resampled tables from the best 16 each. scipy gets the same objective in NumPy, as
fits of this kind are published (Hoffmann et al. 2022, Besiroglu et al. 2024), once with its gradient written out and
once by finite differences; it runs a sample of the same starts, and `all` is what the whole would take at that pace.
`agree` is the share of starts that came to the best objective of all ways, to 1e-6.
"""

import time
from typing import Any

import numpy as np
import scipy.optimize
from absl import app, flags

from benchmarks import tables, timing
from nmm_jax.scaling import fitting
from nmm_jax.scaling.laws import law
from nmm_jax.scaling.minimization import DELTA

_RUNS = flags.DEFINE_integer("runs", 240, "rows of the table", lower_bound=10)
_BOOTSTRAPS = flags.DEFINE_integer("bootstraps", 100, "resampled tables", lower_bound=1)
_SAMPLE = flags.DEFINE_integer("sample", 100, "starts that scipy is given", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")

TRUTH = {"E": 1.82, "A": 480.0, "B": 2100.0, "alpha": 0.347, "beta": 0.367}
COLUMNS = {
    "way": ("", ""),
    "fits": ("fits", ",.0f"),
    "seconds": ("seconds", ".1f"),
    "milliseconds_per_fit": ("ms a fit", ".2f"),
    "all": ("all, s", ",.0f"),
    "times_ours": ("x ours", ",.0f"),
    "best": ("best objective", ".9f"),
    "agree": ("agree", ".1%"),
}


def objective(z: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
    """The Huber objective of the dense law and its gradient; z is (log E, log A, log B, alpha, beta)."""
    terms = np.stack([np.full_like(log_n, z[0]), z[1] - z[3] * log_n, z[2] - z[4] * log_d])
    most = terms.max(axis=0)
    shares = np.exp(terms - most)
    total = shares.sum(axis=0)
    off = most + np.log(total) - log_loss
    far = np.abs(off) > DELTA
    value = np.where(far, DELTA * (np.abs(off) - DELTA / 2), off**2 / 2).sum()
    slope = np.clip(off, -DELTA, DELTA) * shares / total
    return value, np.array([*slope.sum(axis=1), -(slope[1] @ log_n), -(slope[2] @ log_d)])


def by_scipy(starts: np.ndarray, arguments: tuple[np.ndarray, ...], gradient: bool) -> np.ndarray:
    """Objectives that it comes to."""
    function = objective if gradient else lambda *a: objective(*a)[0]
    return np.array(
        [scipy.optimize.minimize(function, z, arguments, "L-BFGS-B", jac=gradient or None).fun for z in starts]
    )


def clocked(run) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def main(_):
    r = np.random.default_rng(0)
    dense = law("dense")
    columns = {
        "N": np.exp(r.uniform(*np.log([5e7, 5e9]), _RUNS.value)),
        "D": np.exp(r.uniform(*np.log([1e9, 1e11]), _RUNS.value)),
    }
    loss = dense.predict(TRUTH, columns) * np.exp(0.01 * r.normal(size=_RUNS.value))
    count = _BOOTSTRAPS.value

    compiled, fits = clocked(lambda: fitting.fit(dense, columns, loss))
    seconds, fits = clocked(lambda: fitting.fit(dense, columns, loss))
    of_bootstraps, _ = clocked(lambda: fitting.bootstrap(fits, count))
    found = fits[0]
    whole, ours = len(found.starts) + fitting.STARTS * count, seconds + of_bootstraps

    arguments = (np.log(columns["N"]), np.log(columns["D"]), np.log(loss))
    sample = r.permutation(found.starts)[: _SAMPLE.value]
    with_gradient, with_ends = clocked(lambda: by_scipy(sample, arguments, gradient=True))
    without, without_ends = clocked(lambda: by_scipy(sample, arguments, gradient=False))

    best = min(found.objective, with_ends.min(), without_ends.min())

    def row(
        way: str, fits: int, seconds: float, ends: np.ndarray | None, all_of_it: float | None = None
    ) -> dict[str, Any]:
        everything = {} if all_of_it is None else {"all": all_of_it, "times_ours": all_of_it / ours}
        reached = {} if ends is None else {"best": ends.min(), "agree": np.mean(ends <= best * (1 + 1e-6))}
        return (
            {"way": way, "fits": fits, "seconds": seconds, "milliseconds_per_fit": 1e3 * seconds / fits}
            | everything
            | reached
        )

    rows = [
        row("ours: the grid", len(found.starts), seconds, found.objectives, ours),
        row(
            f"ours: {count} resampled tables from {fitting.STARTS} starts", fitting.STARTS * count, of_bootstraps, None
        ),
        row(
            "scipy L-BFGS-B, with gradient", len(sample), with_gradient, with_ends, with_gradient / len(sample) * whole
        ),
        row("scipy L-BFGS-B, finite differences", len(sample), without, without_ends, without / len(sample) * whole),
    ]
    print(f"{_RUNS.value} runs, law dense, {whole:,} fits in all; the first call, which compiles: {compiled:.1f} s\n")
    print(tables.table(rows, COLUMNS))
    if _OUTPUT.value:
        about = {"runs": _RUNS.value, "bootstraps": count, "first_call_seconds": compiled, "ways": rows}
        timing.write(_OUTPUT.value, about | timing.origin(("jax", "numpy", "scipy")))


if __name__ == "__main__":
    app.run(main)
