"""Fits against published ones, against scipy, and against laws that made the runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from nmm_jax.scaling import fitting
from nmm_jax.scaling.laws import law
from tests.scaling.scaling_data import TRUTH, chinchilla, crossed, needs_published, published, runs

DENSE = law("dense")
SOME = DENSE.starts({})[::29]  # of the grid, for tests that need not all of it


def huber(z, columns, loss, delta=1e-3):
    """The objective of dense, in plain NumPy."""
    e, a, b, alpha, beta = z
    predicted = np.exp(e) + np.exp(a - alpha * np.log(columns["N"])) + np.exp(b - beta * np.log(columns["D"]))
    r = np.abs(np.log(predicted) - np.log(loss))
    return np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).sum()


@pytest.fixture(scope="module")
def epoch():
    """Epoch's 240 runs, fitted from every seventh start."""
    columns, loss, kept = chinchilla()
    columns = {name: column[kept] for name, column in columns.items()}
    return fitting.fit(DENSE, columns, loss[kept], starts=DENSE.starts({})[::7])[0]


@needs_published
def test_chinchilla_as_epoch_fits_it(epoch):
    reference = published("chinchilla_epoch_reference.json")
    assert len(epoch.loss) == reference["refit_check"]["rows_kept"] == 240
    assert epoch.objective <= 0.00101827402
    assert epoch.objective == pytest.approx(huber(epoch.fitted, epoch.columns, epoch.loss), rel=1e-12)
    for name, tolerance in {"E": 5e-3, "alpha": 5e-3, "beta": 5e-3, "A": 5e-2, "B": 5e-2}.items():
        assert epoch.values[name] == pytest.approx(reference["refit_check"][name], rel=tolerance)
    se = reference["published"]
    assert abs(epoch.exponents["a"] - se["a_opt_N_exponent"]) < se["a_se"]
    assert epoch.agreed.mean() > 0.2


@needs_published
def test_scipy_finds_nothing_lower(epoch):
    for start in (epoch.fitted, epoch.fitted * 1.02):
        found = scipy.optimize.minimize(
            huber, start, (epoch.columns, epoch.loss), "Nelder-Mead", options={"maxiter": 4000}
        )
        assert found.fun >= epoch.objective * (1 - 1e-9)


@needs_published
def test_chinchilla_with_its_outliers():
    columns, loss, _ = chinchilla()
    reference = published("chinchilla_epoch_reference.json")["refit_all_rows"]
    found = fitting.fit(DENSE, columns, loss, starts=SOME)[0]
    assert found.objective <= reference["objective"] * (1 + 1e-6)
    for name in ("E", "alpha", "beta"):
        assert found.values[name] == pytest.approx(reference[name], rel=5e-3)


@needs_published
def test_spread_of_resampled_runs_is_the_published_standard_error(epoch):
    draws = DENSE.values(fitting.bootstrap([epoch], 200, starts=4)[0])
    reference = published("chinchilla_epoch_reference.json")["published"]
    spread = {name: np.std(drawn) for name, drawn in (draws | DENSE.exponents(draws)).items()}
    # 200 draws know a standard deviation to 5%; theirs are of another objective's minimum (with a fitted scale)
    for name, key in {"E": "E_se", "alpha": "alpha_se", "beta": "beta_se", "a": "a_se"}.items():
        assert spread[name] == pytest.approx(reference[key], rel=0.35), name
    inside = fitting.intervals(epoch, fitting.bootstrap([epoch], 200, starts=1)[0])
    assert all(inside[name][0] < epoch.values[name] < inside[name][1] for name in epoch.values)


@needs_published
def test_gadre_extrapolates_as_published():
    """Five small runs predict the 1.4B at 32 times Chinchilla's tokens and the 6.9B: arXiv 2403.08540's two errors."""
    from tests.scaling.scaling_data import DATA, csv

    with (DATA / "gadre_overtraining_104.csv").open() as f:
        rows = [row for row in csv.DictReader(f) if row["train_dataset"] == "rpj"]
    N, D, times, loss = (
        np.array([float(row[name]) for row in rows])
        for name in ("params", "tokens", "chinchilla_multiplier", "loss_c4_val")
    )
    few = ((times == 1) & (N < 1e9)) | ((times == 16) & (N == 10569312))
    assert few.sum() == 5
    tied = law("overtraining")
    found = fitting.fit(tied, {"N": N[few], "D": D[few]}, loss[few], "squares", tied.starts({})[::3])[0]
    reference = published("gadre_reference.json")
    refit = reference["refit"]
    assert found.values["E"] == pytest.approx(refit["E"], rel=1e-4)
    assert found.values["A"] == pytest.approx(refit["alpha"], rel=1e-3)
    assert found.values["B"] == pytest.approx(refit["beta"], rel=1e-3)
    assert found.values["alpha"] == pytest.approx(-refit["b"], rel=1e-4)
    for name, far in {"1.4B_M640": (times == 32) & (N > 1e9), "6.9B_M20": N > 6e9}.items():
        error = fitting.errors(loss[far], found.predict({"N": N[far], "D": D[far]}))["mae_percent"]
        assert error == pytest.approx(reference["published_rel_err_pct"][name], abs=5e-4)


GRID = crossed(N=np.geomspace(3e7, 3e9, 5), D=np.geomspace(1e9, 2e11, 5))
ABC = ("a", "b", "c")
SHARES = np.random.default_rng(0).dirichlet([1, 1, 1], 16)
EXACT = {
    "dense": (law("dense"), TRUTH, GRID),
    "overtraining": (law("overtraining"), {k: v for k, v in TRUTH.items() if k != "beta"}, GRID),
    "sparse": (
        law("sparse"),
        TRUTH | {"E": 1.2, "A": 200, "C": 0.5, "d": 2000, "lambda": 0.25, "delta": 0.3, "gamma": 0.45},
        crossed(N=np.geomspace(3e7, 3e9, 5), D=np.geomspace(1e9, 2e11, 4), S=np.array([0, 0.5, 0.75, 0.875, 0.96875])),
    ),
    "frontier": (law("frontier"), {"K": 29.574, "c": -0.0492}, {"C": np.geomspace(1e18, 1e22, 9)}),
}


@pytest.mark.parametrize("how", ["huber", "squares"])
@pytest.mark.parametrize("name", EXACT)
def test_runs_without_noise_give_the_law_back(name, how):
    of, truth, columns = EXACT[name]
    means = {column: float(log.mean()) for column, log in of.logs(columns).items()} | {"L": 1.0}
    starts = of.starts(means)
    found = fitting.fit(of, columns, runs(of, truth, columns), how, starts[:: max(1, len(starts) // 64)])[0]
    assert found.fitted == pytest.approx(of.fitted(truth), rel=2e-3, abs=2e-3)
    assert np.abs(found.residuals).max() < 1e-6


def test_least_squares_is_scipys():
    losses = runs(DENSE, TRUTH, GRID, 0.01)[0]

    def off(z):
        return np.exp(z[0]) + np.exp(z[1]) / GRID["N"] ** z[3] + np.exp(z[2]) / GRID["D"] ** z[4] - losses

    theirs = scipy.optimize.least_squares(off, DENSE.fitted(TRUTH), x_scale="jac", xtol=1e-14, ftol=1e-14, gtol=1e-14)
    ours = fitting.fit(DENSE, GRID, losses, "squares", SOME)[0]
    assert ours.objective == pytest.approx(theirs.cost, rel=1e-9)
    assert ours.fitted == pytest.approx(theirs.x, rel=1e-5)


def test_several_losses_at_once_are_each_alone():
    losses = runs(DENSE, TRUTH, GRID, 0.004, draws=2)
    both = fitting.fit(DENSE, GRID, losses, starts=SOME)
    alone = fitting.fit(DENSE, GRID, losses[1], starts=SOME)[0]
    assert both[1].objective == pytest.approx(alone.objective, rel=1e-9) and both[0].objective != both[1].objective
    together = fitting.bootstrap(both, 3, starts=2)
    assert together[1] == pytest.approx(fitting.bootstrap([alone], 3, starts=2)[0], rel=1e-6)


def test_the_same_seed_draws_the_same():
    found = fitting.fit(DENSE, GRID, runs(DENSE, TRUTH, GRID, 0.004), starts=SOME)
    first, again, other = (fitting.bootstrap(found, 3, seed=seed, starts=2) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_a_resampled_minimum_is_the_objectives(monkeypatch):
    """Weights count a row as often as it was drawn: the refit equals a fit of the rows written out."""
    losses = runs(DENSE, TRUTH, GRID, 0.004)
    found = fitting.fit(DENSE, GRID, losses, starts=SOME)
    drawn = fitting.bootstrap(found, 1, seed=5, starts=8)[0, 0]
    counts = np.random.default_rng(5).multinomial(25, np.full(25, 1 / 25), 1)[0]
    columns = {name: np.repeat(column, counts) for name, column in GRID.items()}
    written_out = fitting.fit(DENSE, columns, np.repeat(losses[0], counts), starts=SOME)[0]
    assert huber(drawn, columns, np.repeat(losses[0], counts)) == pytest.approx(written_out.objective, rel=1e-6)


def test_nothing_is_left_switched_to_doubles():
    fitting.fit(DENSE, GRID, runs(DENSE, TRUTH, GRID), starts=SOME[:4])
    assert jnp.ones(1).dtype == jnp.float32 and not jax.config.jax_enable_x64


def test_errors_by_hand():
    found = fitting.errors(np.array([2.0, 3.0, 4.0]), np.array([2.1, 3.0, 3.8]))
    assert found["mse"] == pytest.approx((0.01 + 0.04) / 3)
    assert found["r2"] == pytest.approx(1 - 0.05 / 2)
    assert found["mae_percent"] == pytest.approx(100 * (0.05 + 0.05) / 3)
    assert fitting.errors(np.array([2.0]), np.array([2.1]))["r2"] is None


def test_too_few_runs():
    few = {name: column[:5] for name, column in GRID.items()}
    with pytest.raises(ValueError, match="5 runs are too few for the law 'dense': its 5 parameters .* need 6"):
        fitting.fit(DENSE, few, np.ones(5))
