"""Published laws against the digits that their sources print."""

import numpy as np
import pytest

from nmm_jax.scaling import published
from nmm_jax.scaling.laws import law


def of(name):
    one = published.LAWS[name]
    return law(one.law).at(one.values)


# L(N, D) that follow from Table 12's coefficients, at 10, 100 and 400 billion tokens.
MOE = {275e6: ("3.435", "2.924", "2.772"), 932e6: ("3.209", "2.698", "2.547")}


@pytest.mark.parametrize("size", MOE)
def test_the_mixtures_losses(size):
    assert tuple(f"{of('moe').loss(size, tokens):.3f}" for tokens in (10e9, 100e9, 400e9)) == MOE[size]


# From the same coefficients: C, N in billions, D in billions.
@pytest.mark.parametrize(("C", "N", "D"), [(1e20, "0.43", "38"), (1e21, "0.96", "174"), (1e22, "2.11", "790")])
def test_the_mixtures_optima(C, N, D):
    best = of("moe").optimum(C)
    assert (f"{best.N / 1e9:.2f}", f"{best.D / 1e9:.0f}") == (N, D)
    assert 6 * best.N * best.D == pytest.approx(C)


# L(N, D) of the reconstructed dense law at 2.5, 10, 100 and 400 billion tokens; good to 1%.
EARLY = {
    274.8e6: (3.945, 3.468, 3.034, 2.895),
    464e6: (3.834, 3.358, 2.924, 2.785),
    931.7e6: (3.712, 3.235, 2.802, 2.663),
}


@pytest.mark.parametrize("size", EARLY)
def test_the_reconstructed_losses(size):
    assert [of("early").loss(size, tokens) for tokens in (2.5e9, 10e9, 100e9, 400e9)] == pytest.approx(
        EARLY[size], rel=1e-3
    )


def test_the_reconstruction():
    """Its A and B come out of the printed frontier and D/N of 50 at 1e21; it stays within 1% of it from 1e20 on."""
    early, frontier = published.LAWS["early"], published.FRONTIERS[0]
    assert early.reconstructed == ("A", "B")
    known = {name: early.values[name] for name in ("E", "alpha", "beta")}
    A, B = published.reconstruct(**known, frontier=frontier, tokens_per_parameter=50)
    assert (early.values["A"], early.values["B"]) == pytest.approx((A, B), rel=2e-3)
    budgets = np.geomspace(3e19, 1e22, 61)
    off = of("early").optimum(budgets).loss / [frontier.loss(C) for C in budgets] - 1
    assert np.sqrt(np.mean(off**2)) < 0.008
    assert np.abs(off[budgets > 1e20]).max() < 0.01 < off[0] < 0.021
    best = of("early").optimum(1e21)
    assert best.D / best.N == pytest.approx(50, rel=0.01)
    assert best.N == pytest.approx(1.8e9, rel=0.02)


def test_closed_forms_to_the_printed_digits():
    """Table 9's closed forms follow from each other, and from alpha and beta as far as those are printed."""
    forms = published.TABLE_9["closed form"]
    bounds = published.closed_forms(".301", ".335")
    for name, digits in forms.items():
        assert published.gap(digits, bounds[name]) == 0, name
    a, b = float(forms["a"]), float(forms["b"])
    assert a + b == pytest.approx(1)
    for name, expected in (("d", b / a), ("n", a / b), ("dn", b - a)):
        assert float(forms[name]) == pytest.approx(expected, abs=3e-5)  # of digits that are rounded to 1e-5


@pytest.mark.parametrize(
    ("alpha", "beta", "a", "b"), [(".3111", ".3386", 0.5212, 0.4788), (".710", ".372", 0.3438, 0.6562)]
)
def test_closed_forms_by_hand(alpha, beta, a, b):
    forms = published.closed_forms(alpha, beta)
    for name, expected in (("a", a), ("b", b), ("d", b / a), ("n", a / b), ("dn", b - a)):
        low, high = forms[name]
        assert low < expected < high and high - low < 0.01


def test_what_contradicts_itself():
    found = {(each.where, each.name) for each in published.contradictions()}
    assert found == {
        ("Table 2, late, mean", "a"),
        ("Table 2, late, mean", "d"),
        ("Table 2, moe, mean", "a"),
        ("Table 2, moe, mean", "d"),
        ("Figure 2, late, mean", "alpha"),
        ("Figure 2, late, mean", "beta"),
    }
    late = published.contradictions()[0]
    assert (late.printed, round(late.otherwise, 3), round(late.gap, 2)) == (".6358", 0.538, 0.1)
    assert str(late) == "Table 2, late, mean: a is printed .6358, and by its alpha and beta 0.5382"


def test_the_tolerance_lies_in_a_gap():
    """No row disagrees by about as much as is tolerated: all do by less than 0.006, or by more than 0.016."""
    assert (
        len(published.contradictions(0.006)) == len(published.contradictions(0.016)) == len(published.contradictions())
    )


def test_figures_agree_with_the_closed_forms():
    """D/N of the figures is of alpha and beta, also where the table's own a contradicts them."""
    for row in published.ROWS:
        if row.dn:
            assert published.gap(row.dn, published.closed_forms(row.alpha, row.beta)["dn"]) == 0
            contradicted = abs(float(row.b) - float(row.a) - float(row.dn)) > 0.01
            assert contradicted == (row.architecture != "early")


# From the printed frontiers: architecture, data, losses at 1e19, 1e20, 1e21, 1e22.
LOSSES = {
    "early-mean": ("3.436", "3.068", "2.740", "2.446"),
    "late-mean": ("3.447", "3.076", "2.745", "2.450"),
    "moe-mean": ("3.317", "2.970", "2.659", "2.381"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_frontiers(name):
    frontier = next(each for each in published.FRONTIERS if each.name == name)
    assert tuple(f"{frontier.loss(C):.3f}" for C in (1e19, 1e20, 1e21, 1e22)) == LOSSES[name]
    one = published.find(name)
    assert law(one.law).predict(one.values, {"C": [1e21]})[0] == pytest.approx(frontier.loss(1e21))
    assert ("no N and D" in one.notes[0]) == (name == "late-mean")


def test_frontiers_by_source():
    expected = {"captions": (2.512, 2.494, 2.349), "interleaved": (2.742, 2.736, 2.706), "text": (2.980, 2.971, 2.896)}
    for data, losses in expected.items():
        for architecture, loss in zip(("early", "late", "moe"), losses, strict=True):
            one = published.find(f"{architecture}-{data}")
            assert law("frontier").predict(one.values, {"C": [1e21]})[0] == pytest.approx(loss, abs=6e-4)


def test_the_law_of_sparsity_is_the_plain_one_at_no_sparsity():
    """And with N active parameters it has the loss rise with the sparsity."""
    losses = [float(law("sparse").at(published.SPARSITY, S=S).loss(275e6, 100e9)) for S in (0, 0.5, 0.875)]
    assert losses[0] == pytest.approx(of("moe").loss(275e6, 100e9), rel=2e-3)
    assert losses == sorted(losses)


def test_unknown_names():
    with pytest.raises(ValueError, match="no published law 'palm'; there are early, moe, chinchilla"):
        published.find("palm")
    with pytest.raises(ValueError, match="A and B are not printed.* published:late-mean"):
        published.find("late")
