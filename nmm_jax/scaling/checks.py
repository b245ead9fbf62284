"""Whether runs can say anything about a law, before it is fitted."""

import numpy as np

from nmm_jax.scaling.frontier import budgets
from nmm_jax.scaling.laws import MIXTURE, Law
from nmm_jax.scaling.runs import Runs, TableError

_SAME = 0.02  # sizes, token counts and budgets that differ by less are the same one, relatively
_ONE_RATIO = 0.05  # standard deviation of log(D/N)
_IN_UNITS = 1e4  # the largest N, or D, below which numbers of millions are more likely than so small a study
_ROUGH = 2  # runs for each parameter, below which intervals say little


def check(law: Law, runs: Runs) -> list[str]:
    """What to be wary of, in words.

    Raises:
      TableError: too few runs, or of too few kinds, for the law's parameters.
    """
    n, p = len(runs), len(law.parameters)
    if n <= p:
        raise TableError(
            f"{n} runs are too few for the law {law.name!r}: its {p} parameters ({', '.join(law.parameters)}) need "
            f"{p + 1} or more"
        )
    if "S" in law.columns and _kinds(1 - runs.columns["S"]) < 3:
        raise TableError(f"--sparsity: {_kinds(1 - runs.columns['S'])} different; lambda and C need three or more")
    shares = [column for column in law.columns if column.startswith(MIXTURE)]
    if shares and len(np.unique(np.round([runs.columns[s] for s in shares], 3), axis=1).T) < len(shares):
        raise TableError(f"--mixture: {len(shares)} domains need {len(shares)} different mixtures or more")
    if len(budgets(runs.columns["C"], _SAME)) < 2:
        raise TableError(
            f"all runs have one budget, {runs.columns['C'][0]:.3g} FLOPs: how loss falls with compute is not in them"
        )
    told = []
    if small := [name for name in "ND" if name in law.columns and runs.columns[name].max() < _IN_UNITS]:
        told.append(
            f"{' and '.join(small)} of all runs are below {_IN_UNITS:.0e}: in millions? Exponents stand, but plans, "
            "and D that follows from a budget, count single parameters and tokens"
        )
    if "N" in law.columns:
        # each exponent, its coefficient and E are three unknowns; of a tied exponent one is known from the other side
        least = 3 if "beta" in law.parameters else 2
        for column, flag, exponent in (("N", "--n", "alpha"), ("D", "--d", "beta")):
            kinds = _kinds(runs.columns[column])
            if kinds < least:
                exponent = exponent if exponent in law.parameters else "alpha"
                raise TableError(
                    f"{flag}: {kinds} different {column}, from {runs.columns[column].min():.4g} to "
                    f"{runs.columns[column].max():.4g}; {exponent}, its coefficient and E need {least} or more"
                )
        ratio = np.log(runs.columns["D"] / runs.columns["N"])
        if np.std(ratio) < _ONE_RATIO:
            told.append(
                f"all runs have the same D/N, about {np.exp(ratio.mean()):.3g}: along one ratio A/N^alpha and B/D^beta "
                "are one and the same curve; add runs with more and with fewer tokens"
            )
    if n < _ROUGH * p:
        told.append(f"{n} runs for {p} parameters: take intervals as rough")
    return told


def _kinds(values: np.ndarray) -> int:
    return len(budgets(values, _SAME))
