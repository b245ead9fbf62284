import numpy as np
import pytest

from nmm_jax.scaling import frontier
from nmm_jax.scaling.laws import law
from tests.scaling.scaling_data import TRUTH, crossed

DENSE = law("dense")


def test_a_power_law_by_hand():
    found = frontier.power_law(np.array([1.0, 10.0, 100.0]), np.array([5.0, 0.5, 0.05]))
    assert found == pytest.approx((5.0, -1.0, 0.0), abs=1e-12)
    assert found(np.array([1000.0])) == pytest.approx([0.005])
    with pytest.raises(ValueError, match="two different points"):
        frontier.power_law(np.array([2.0, 2.0]), np.array([1.0, 3.0]))


def test_its_standard_error_is_least_squares():
    scipy = pytest.importorskip("scipy.stats")
    r = np.random.default_rng(0)
    x = np.geomspace(1, 1e4, 12)
    y = 3 * x**-0.2 * np.exp(0.1 * r.normal(size=12))
    theirs = scipy.linregress(np.log(x), np.log(y))
    found = frontier.power_law(x, y)
    assert (found.exponent, found.standard_error) == pytest.approx((theirs.slope, theirs.stderr))


@pytest.mark.parametrize("seed", range(4))
def test_the_hull_has_no_point_below(seed):
    x, y = np.random.default_rng(seed).normal(size=(2, 60))
    hull = frontier.lower_hull(x, y)
    assert hull[0] in np.flatnonzero(x == x.min()) and y[hull[-1]] == y.min()
    assert (np.diff(x[hull]) > 0).all() and (np.diff(y[hull]) < 0).all()
    slopes = np.diff(y[hull]) / np.diff(x[hull])
    assert (np.diff(slopes) > 0).all()
    within = (x >= x[hull[0]]) & (x <= x[hull[-1]])
    assert (y[within] >= np.interp(x[within], x[hull], y[hull]) - 1e-12).all()


def test_the_envelope_of_many_sizes_is_the_laws_frontier():
    columns = crossed(N=np.geomspace(1e8, 1e10, 30), D=np.geomspace(1e8, 1e12, 60))
    C = 6 * columns["N"] * columns["D"]
    found = frontier.envelope(columns["N"], C, DENSE.predict(TRUTH, columns))
    inner = (found.C > 1e19) & (found.C < 1e21)  # at the ends there is no larger and no smaller size
    best = DENSE.at(TRUTH).optimum(found.C[inner])
    assert inner.sum() > 10
    assert found.loss[inner] == pytest.approx(best.loss, rel=2e-3)
    assert np.polyfit(np.log(found.C[inner]), np.log(found.N[inner]), 1)[0] == pytest.approx(0.527, abs=0.03)


def test_parabolas_find_the_optimum_of_each_budget():
    columns = crossed(C=np.geomspace(1e19, 1e21, 4), size=np.geomspace(0.6, 1 / 0.6, 7))
    best = DENSE.at(TRUTH).optimum(columns["C"])
    N = best.N * columns["size"]
    D = columns["C"] / (6 * N)
    found = frontier.isoflop(N, D, columns["C"], DENSE.predict(TRUTH, {"N": N, "D": D}))
    assert [b.runs for b in found] == [7] * 4 and all(b.inside for b in found)
    assert [b.N for b in found] == pytest.approx(best.N.reshape(4, 7)[:, 0], rel=0.02)
    assert [b.loss for b in found] == pytest.approx(best.loss.reshape(4, 7)[:, 0], rel=1e-4)
    assert all(6 * b.N * b.D == pytest.approx(b.C) for b in found)
    exponents = frontier.isoflop_exponents(found)
    assert exponents["a"].exponent == pytest.approx(0.335 / 0.636, abs=0.005)
    assert exponents["a"].exponent + exponents["b"].exponent == pytest.approx(1)


def test_a_parabola_by_hand():
    x = np.log(np.array([1e8, 2e8, 4e8, 8e8]))
    N, loss = np.exp(x), 2.5 + 0.1 * (x - np.log(3e8)) ** 2
    budget = frontier.isoflop(N, 1e19 / N, np.full(4, 6e19), loss)[0]
    assert (budget.N, budget.loss, budget.curvature) == pytest.approx((3e8, 2.5, 0.1))
    assert budget.inside and budget.D == pytest.approx(1e19 / 3e8)


def test_parabolas_that_say_nothing():
    N = np.array([1e8, 2e8, 4e8])
    C = np.full(3, 1e19)
    assert frontier.isoflop(N[:2], C[:2] / N[:2], C[:2], np.array([3.0, 2.9])) == []  # two sizes
    assert frontier.isoflop(N, C / N, C, np.array([3.0, 3.1, 3.0])) == []  # bends downwards
    falling = frontier.isoflop(N, C / N, C, np.array([3.0, 2.5, 2.1]))
    assert not falling[0].inside and frontier.isoflop_exponents(falling) == {}


def test_budgets_are_told_apart():
    C = np.array([1e20, 1.02e20, 1e19, 3e20, 1.05e20])
    assert [sorted(group.tolist()) for group in frontier.budgets(C)] == [[2], [0, 1, 4], [3]]
    assert frontier.budgets(np.array([])) == []
