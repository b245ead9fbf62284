"""Parameters that runs do not determine are named, and those that they do are not."""

import numpy as np
import pytest

from nmm_jax.scaling import conditioning, fitting
from nmm_jax.scaling.laws import law
from tests.scaling.scaling_data import TRUTH, crossed, runs

DENSE = law("dense")
SOME = DENSE.starts({})[::29]


def fit(columns, noise=0.003, values=TRUTH):
    return fitting.fit(DENSE, columns, runs(DENSE, values, columns, noise), starts=SOME)[0]


@pytest.fixture(scope="module")
def good():
    return fit(crossed(N=np.geomspace(3e7, 3e9, 5), D=np.geomspace(1e9, 2e11, 5)))


def test_a_good_design_has_no_warnings(good):
    found = conditioning.condition(good)
    assert not found.undetermined and not found.warnings
    assert found.condition_number < 1e4
    assert np.diag(found.correlations) == pytest.approx(1)


def test_standard_errors_are_those_of_many_tables():
    columns = crossed(N=np.geomspace(3e7, 3e9, 5), D=np.geomspace(1e9, 2e11, 5))
    fits = fitting.fit(DENSE, columns, runs(DENSE, TRUTH, columns, 0.003, draws=100), "squares", SOME[::8])
    spread = np.std([f.fitted for f in fits], axis=0)
    told = np.median([list(conditioning.condition(f).standard_errors.values()) for f in fits], axis=0)
    assert told == pytest.approx(spread, rel=0.25)


def test_one_ratio_of_tokens_to_parameters():
    N = np.geomspace(1e8, 1e10, 25)
    found = conditioning.condition(fit({"N": N, "D": 20 * N}))
    assert found.undetermined
    assert any("trades off against" in w or "singular" in w for w in found.warnings), found.warnings


def test_a_term_that_the_runs_do_not_reach():
    """Tokens without end: B/D^beta is nowhere, and only its parameters are named."""
    found = conditioning.condition(
        fit(crossed(N=np.geomspace(3e7, 3e9, 5), D=np.geomspace(1e14, 1e15, 5)), values=TRUTH | {"beta": 0.6})
    )
    assert {"B", "beta"} <= set(found.undetermined) and "alpha" not in found.undetermined


def test_resampled_runs_speak_before_the_jacobian(good):
    draws = good.fitted + np.random.default_rng(0).normal(size=(400, 5)) * [0.01, 0.1, 3.0, 0.01, 0.01]
    found = conditioning.condition(good, draws)
    assert found.undetermined == ("B",)
    assert found.standard_errors["B"] == pytest.approx(3.0, rel=0.2)
    assert "B is hardly determined" in found.warnings[0]


def test_a_run_that_diverged_is_found():
    columns = crossed(N=np.geomspace(3e7, 3e9, 5), D=np.geomspace(1e9, 2e11, 5))
    losses = runs(DENSE, TRUTH, columns, 0.003)
    losses[0, 7] *= 1.3
    found = fitting.fit(DENSE, columns, losses, starts=SOME)[0]
    assert list(conditioning.diverged(found)) == [7]
    assert found.values["alpha"] == pytest.approx(TRUTH["alpha"], rel=0.2)  # Huber is hardly moved


def test_more_that_makes_it_worse():
    columns = crossed(N=np.geomspace(3e7, 3e9, 5), D=np.geomspace(1e9, 2e11, 5))
    found = conditioning.condition(fit(columns, values=TRUTH | {"A": 0.01, "alpha": -0.2}))
    assert any(w.startswith("alpha is -0.2") and "more of N" in w for w in found.warnings), found.warnings
