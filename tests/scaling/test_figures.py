"""Figures show what they were given: numbers are read back from the artists that were drawn."""

import numpy as np
import pytest

from nmm_jax.pages import drawing
from nmm_jax.scaling import figures
from nmm_jax.scaling.forecast import Forecast, of_published
from nmm_jax.scaling.laws import law
from nmm_jax.scaling.mixtures import at_best, losses_of
from nmm_jax.scaling.points import Points

VALUES = {"E": 1.9, "A": 260.0, "B": 1800.0, "alpha": 0.3, "beta": 0.33}
SIZES = (2.75e8, 9.32e8, 2.28e9, 3.35e9)


@pytest.fixture(autouse=True)
def on_paper():
    with drawing.on_paper():
        yield


def points(in_budgets=False, noise=0.0):
    """Runs of the law: sizes by tokens with the largest run held out, or sizes by budgets."""
    if in_budgets:
        C = np.repeat([1e20, 1e21], 5)
        N = np.tile(np.geomspace(0.4, 2.5, 5), 2) * (C / 1e21) ** 0.5 * 1.8e9
        D = C / (6 * N)
    else:
        N, D = (a.ravel() for a in np.meshgrid(SIZES, np.geomspace(5e9, 3e11, 5), indexing="ij"))
        C = 6 * N * D
    predicted = law("dense").predict(VALUES, {"N": N, "D": D})
    loss = predicted * np.exp(np.random.default_rng(0).normal(0, noise, len(N)))
    return Points(N, D, C, loss, predicted, C == C.max())


def forecast(count=40, **more):
    draws = np.random.default_rng(1).normal(0, 0.01, (count, 4))
    several = tuple(
        {"E": 1.9 + e, "alpha": 0.3 + a, "A": 260 * np.exp(20.5 * a), "beta": 0.33 + b, "B": 1800 * (1 + c)}
        for e, a, b, c in draws
    )
    return Forecast(**{"name": "mine", "law": law("dense"), "values": VALUES, "source": "", "draws": several} | more)


def lines(axes):
    return [line for line in axes.lines if len(line.get_xdata()) > 1]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_sizes_and_budgets():
    runs = points()
    assert [set(runs.N[rows]) for rows in runs.sizes()] == [{size} for size in SIZES]
    assert all(np.all(np.diff(runs.D[rows]) > 0) for rows in runs.sizes())
    found = points(in_budgets=True).parabolas()
    assert [len(rows) for rows, _ in found] == [5, 5]
    for _, budget in found:  # a parabola leans, but not far over so few sizes
        assert budget.N == pytest.approx(float(forecast().best(budget.C).N.value), rel=0.12)


def test_budgets_read_off_between_runs():
    """On the law's own losses straight lines in logs are off by little; a study of two sizes has no such budgets."""
    runs = points().at_budgets()
    assert len(runs.parabolas()) >= 3
    assert runs.loss == pytest.approx(law("dense").predict(VALUES, {"N": runs.N, "D": runs.D}), rel=0.01)
    assert runs.C == pytest.approx(6 * runs.N * runs.D)
    two = points().take(np.flatnonzero(points().N < 1e9))
    assert len(two.at_budgets().N) == 0


def test_the_frontier():
    runs, one = points(noise=0.002), forecast()
    figure = figures.frontier(runs, one, [of_published("moe")])
    axes = figure.axes[0]
    assert {"275M", "932M", "2.28B", "3.35B", "least loss of a budget", "moe (published)"} == set(texts(figure))
    (dashed,) = [line for line in lines(axes) if line.get_linestyle() == "--"]
    x, y = dashed.get_data()
    assert y[0] == pytest.approx(of_published("moe").best(x[0]).loss.value)
    frontier = max((line for line in lines(axes) if line is not dashed), key=lambda line: line.get_xdata()[-1])
    x, y = frontier.get_data()
    assert x[-1] > 2 * runs.C.max()
    assert y == pytest.approx([one.best(C).loss.value for C in x])
    drawn = sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o")
    assert drawn == len(runs.N)
    assert "FLOPs" in axes.get_xlabel() and "nats" in axes.get_ylabel()


def test_isoflops():
    runs = points(in_budgets=True)
    axes = figures.isoflop(runs).axes[0]
    diamonds = sorted(line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D")
    assert diamonds == pytest.approx([budget.N for _, budget in runs.parabolas()])
    curve = next(line for line in lines(axes) if line.get_marker() == "None")
    assert min(curve.get_ydata()) == pytest.approx(runs.parabolas()[0][1].loss, rel=1e-4)
    assert [text.get_text() for text in axes.texts] == ["10²¹ FLOPs", "10²⁰ FLOPs"]


def test_the_optimum():
    one = forecast()
    figure = figures.optimum(points(in_budgets=True), one)
    for axes, name, letter in zip(figure.axes, "ND", "ab", strict=True):
        curve = next(line for line in lines(axes) if line.get_marker() == "None")
        expected = [getattr(one.best(C), name).value for C in curve.get_xdata()]
        assert curve.get_ydata() == pytest.approx(expected)
        slope = one.exponent(letter)
        assert f"{slope.value:.3f} [{slope.low:.3f}, {slope.high:.3f}]" in axes.get_title(loc="left")
        assert len(axes.collections) == 1  # the band


def test_residuals_are_in_percent():
    runs = points(noise=0.01)
    axes = figures.residuals(runs).axes[0]
    drawn = np.concatenate([line.get_ydata() for line in axes.lines if line.get_marker() == "o"])
    assert sorted(drawn) == pytest.approx(sorted(100 * (runs.loss / runs.predicted - 1)))


def test_the_bootstrap_shows_what_trades_off():
    """A follows alpha in the draws, and nothing else anything."""
    figure = figures.bootstrap(forecast(count=400))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 15  # five parameters against each other, and each by itself
    found = {axes.get_title(loc="right") for axes in shown}
    assert "r = +1.00" in found
    assert sum(abs(float(title[4:].replace("−", "-"))) > 0.3 for title in found if title) == 1
    assert {axes.get_xlabel() for axes in shown} >= {"E", "log$_{10}$ A", "α", "β"}


def test_draws_without_a_finite_coefficient_are_left_out():
    one = forecast(count=50)
    stray = tuple(one.draws[0] | {"A": A, "alpha": alpha} for A, alpha in ((0.0, -9.0), (np.inf, 99.0), (np.nan, 1.0)))
    figure = figures.bootstrap(forecast(count=50, draws=one.draws + stray))
    below = lines(figure.axes[len(figure.axes) // 2])
    assert all(np.isfinite(line.get_xydata()).all() for line in below)
    assert all(np.isfinite(axes.get_xlim()).all() for axes in figure.axes)


def test_held_out_runs_are_hollow_and_told():
    runs = points(noise=0.01)
    axes = figures.held_out(runs, forecast()).axes[0]
    hollow = [line for line in axes.lines if line.get_marker() == "o" and line.get_color() == "none"]
    assert sum(len(line.get_xdata()) for line in hollow) == 1
    off = 100 * abs(runs.predicted[-1] / runs.loss[-1] - 1)
    assert axes.get_title(loc="left") == f"1 held-out run (hollow): off by {off:.2f}% in the mean"


NAMES = ("captions", "interleaved", "text")
MIXED = {k: v for k, v in VALUES.items()} | {f"gamma/{n}": 0.5 for n in NAMES} | {f"C/{n}": 1.0 for n in NAMES}


def test_the_triangle():
    """Equal weights have their best mixture in the middle; shares are at the corners that say so."""
    one = Forecast(
        "mix", law("mixture-additive", NAMES), MIXED, "", mixtures=dict.fromkeys([f"h/{n}" for n in NAMES], (0.1, 0.8))
    )
    one = at_best(one, 1e20)
    tried = np.array([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    runs = points().take(np.arange(4))
    runs = Points(runs.N, runs.D, runs.C, runs.loss, runs.predicted, runs.held_out,
                  {f"h/{n}": tried[:, i] for i, n in enumerate(NAMES)})  # fmt: skip
    figure = figures.mixture(runs, lambda shares: losses_of(one, 1e20, MIXED, shares), one.held, "title")
    axes = figure.axes[0]
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((0.5, np.sqrt(3) / 6), abs=1e-3)
    corners = {text.get_text(): text.xy for text in axes.texts if text.get_text().startswith("all ")}
    assert corners["all captions"] == pytest.approx((0.5, np.sqrt(3) / 2))
    assert corners["all interleaved"] == pytest.approx((0, 0))
    (hull,) = [line for line in axes.lines if line.get_color() == "white" and line.get_linestyle() == "--"]
    assert len(hull.get_xdata()) == 4  # three corners and back: the fourth mixture lies inside


def test_comparison_is_relative_to_the_first():
    early, late = of_published("early-mean"), of_published("late-mean")
    axes = figures.comparison([early, late], (1e20, 1e22)).axes[0]
    first, second = (line.get_ydata() for line in lines(axes))
    assert first == pytest.approx(0)
    assert second[-1] == pytest.approx(100 * (29.923 * 1e22**-0.0494 / (29.574 * 1e22**-0.0492) - 1))
