"""Laws against their formulas written out, and optima against search."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmm_jax.scaling import laws
from nmm_jax.scaling.laws import law
from nmm_jax.scaling.optima import FLOPS, Slice, flops_per_pair

ABC = ("a", "b", "c")
DENSE = {"E": 1.9, "A": 260.0, "B": 1800.0, "alpha": 0.301, "beta": 0.335}
SPARSE = DENSE | {"C": 0.5, "d": 2000.0, "lambda": 0.25, "delta": 0.3, "gamma": 0.45}
MIXED = {"C/a": 3.0, "C/b": 1.0, "C/c": 0.5, "gamma/a": 0.3, "gamma/b": 0.5, "gamma/c": 0.4}
JOINT = {"E": 1.2, "alpha": 0.3, "beta": 0.33, "gamma_A": 0.9, "gamma_B": 1.05} | MIXED
JOINT |= {"C_A/a": 200.0, "C_A/b": 400.0, "C_A/c": 800.0, "C_B/a": 3e3, "C_B/b": 800.0, "C_B/c": 1500.0}
RUN = {"N": 3e8, "D": 7e9, "S": 0.875, "C": 1e20, "h/a": 0.5, "h/b": 0.3, "h/c": 0.2}


def dense(v, r):
    return v["E"] + v["A"] / r["N"] ** v["alpha"] + v["B"] / r["D"] ** v["beta"]


def sparse(v, r):
    active = 1 - r["S"]
    return dense(v, r) + v["C"] / active ** v["lambda"] + v["d"] / (active ** v["delta"] * r["N"] ** v["gamma"])


def gadre(v, r):  # as scaling/laws.py of mlfoundations/scaling has it, of N and M = D/N, with b = -alpha
    b, M = -v["alpha"], r["D"] / r["N"]
    return v["A"] * r["N"] ** b + v["B"] * 6 ** (b / 2) * (M * r["N"]) ** b + v["E"]


def mixed(v, r):
    return 1 / sum(v[f"C/{d}"] * r[f"h/{d}"] ** v[f"gamma/{d}"] for d in ABC)


def joint(v, r):
    a = sum(v[f"C_A/{d}"] * r[f"h/{d}"] for d in ABC) ** v["gamma_A"]
    b = sum(v[f"C_B/{d}"] * r[f"h/{d}"] for d in ABC) ** v["gamma_B"]
    return v["E"] + mixed(v, r) + a / r["N"] ** v["alpha"] + b / r["D"] ** v["beta"]


CASES = {
    "dense": (law("dense"), DENSE, dense),
    "late": (law("late"), DENSE, dense),
    "sparse": (law("sparse"), SPARSE, sparse),
    "overtraining": (law("overtraining"), {k: v for k, v in DENSE.items() if k != "beta"}, gadre),
    "mixture-additive": (law("mixture-additive", ABC), DENSE | MIXED, lambda v, r: dense(v, r) + mixed(v, r)),
    "mixture-joint": (law("mixture-joint", ABC), JOINT, joint),
    "frontier": (law("frontier"), {"K": 29.574, "c": -0.0492}, lambda v, r: v["K"] * r["C"] ** v["c"]),
}


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_the_formula(name):
    found, values, formula = CASES[name]
    assert set(found.parameters) == set(values)
    columns = {column: np.array([RUN[column]]) for column in found.columns}
    assert found.predict(values, columns)[0] == pytest.approx(formula(values, RUN), rel=1e-12)


def test_every_law_is_here():
    assert set(CASES) == set(laws.LAWS)


@pytest.mark.parametrize("name", CASES)
def test_fitted_and_back(name):
    found, values, _ = CASES[name]
    back = found.values(found.fitted(values))
    assert {k: float(v) for k, v in back.items()} == pytest.approx(values)


@pytest.mark.parametrize("name", ["mixture-additive", "mixture-joint"])
def test_a_domain_that_is_not_there(name):
    """h = 0: 0 to a positive power is 0, and no gradient is NaN."""
    found, values, formula = CASES[name]
    run = RUN | {"h/a": 0.0, "h/b": 0.8}
    columns = {column: np.array([run[column]]) for column in found.columns}
    assert found.predict(values, columns)[0] == pytest.approx(formula(values, run), rel=1e-12)
    with laws.float64():
        of_one = jax.jit(jax.grad(lambda z: found.log_loss(z, found.logs(columns))[0]))
        gradient = of_one(jnp.asarray(found.fitted(values)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", CASES)
def test_starts_are_finite_and_so_are_their_gradients(name):
    found, values, formula = CASES[name]
    columns = {column: np.array([RUN[column], 0.7 * RUN[column]]) for column in found.columns}
    logs = found.logs(columns)
    means = {column: float(values.mean()) for column, values in logs.items()} | {"L": math.log(3.0)}
    starts = found.starts(means)
    assert starts.shape[1] == len(found.parameters) and len(np.unique(starts, axis=0)) == len(starts)
    with laws.float64():
        of_one = jax.jit(jax.vmap(jax.value_and_grad(lambda z: found.log_loss(z, logs).sum())))
        value, gradient = of_one(jnp.asarray(starts))
    assert np.isfinite(value).all() and np.isfinite(gradient).all()


def test_the_papers_grid():
    assert law("dense").starts({}).shape == (4 * 7 * 7 * 6 * 6, 5)


def test_doubles_stay_within():
    with laws.float64():
        assert jnp.ones(1).dtype == jnp.float64
    assert jnp.ones(1).dtype == jnp.float32 and not jax.config.jax_enable_x64


# Tables 2 (early, mean), 3 and 9 of arXiv 2504.07951; a and b are by regression but for the first row.
PRINTED = [
    (0.301, 0.335, 0.52649, 0.47351, 0.89938, 5e-4),
    (0.301, 0.335, 0.527, 0.474, 0.901, 2e-3),
    (0.328, 0.348, 0.518, 0.486, 0.937, 6e-3),
    (0.253, 0.338, 0.572, 0.428, 0.748, 6e-4),
    (0.259, 0.354, 0.582, 0.423, 0.726, 6e-3),
]


@pytest.mark.parametrize(("alpha", "beta", "a", "b", "d", "within"), PRINTED)
def test_exponents_that_were_published(alpha, beta, a, b, d, within):
    found = law("dense").exponents({"alpha": alpha, "beta": beta})
    assert found["a"] == pytest.approx(a, abs=within) and found["b"] == pytest.approx(b, abs=within)
    assert found["d"] == pytest.approx(d, abs=4 * within)
    assert found["n"] == pytest.approx(1 / found["d"]) and found["dn"] == pytest.approx(found["b"] - found["a"])


def test_laws_without_closed_exponents_have_none():
    assert law("sparse").exponents(SPARSE) == {} and law("frontier").exponents({"K": 1.0, "c": -0.05}) == {}


def search(loss, C, per_pair):
    """The least loss(N, D) along C = per_pair N D, by looking everywhere."""
    N = np.exp(np.linspace(np.log(1e5), np.log(1e13), 400_001))
    D = C / (per_pair * N)
    best = int(np.argmin(loss(N, D)))
    return N[best], D[best], loss(N, D)[best]


@pytest.mark.parametrize("C", [1e19, 1e22])
@pytest.mark.parametrize("name", [n for n in CASES if n != "frontier"])
def test_the_optimum_is_the_least_of_all(name, C):
    found, values, formula = CASES[name]
    held = {column: RUN[column] for column in found.columns if column not in ("N", "D")}
    expected = search(lambda N, D: formula(values, held | {"N": N, "D": D}), C, FLOPS)
    assert tuple(map(float, found.at(values, **held).optimum(C))) == pytest.approx(expected, rel=2e-4)


def test_late_fusion_spends_on_its_tower():
    share, tokens, C = 0.17, 0.544, 1e21
    N, D, loss = law("late").at(DENSE).optimum(np.array([C]), flops_per_pair(share, tokens))
    assert FLOPS * (share * N * tokens * D + (N - share * N) * D) == pytest.approx([C])
    searched = search(lambda n, d: dense(DENSE, {"N": n, "D": d}), C, FLOPS * (share * tokens + 1 - share))
    assert (N[0], D[0], loss[0]) == pytest.approx(searched, rel=2e-4)


def test_the_published_sparse_models_optimum():
    """Table 12 of arXiv 2504.07951: (N, D) of 1e20, 1e21 and 1e22 FLOPs, by hand."""
    moe = {"E": 2.158, "A": 381773.0, "B": 4659.0, "alpha": 0.710, "beta": 0.372}
    N, D, _ = law("dense").at(moe).optimum(np.array([1e20, 1e21, 1e22]))
    assert N == pytest.approx([0.43e9, 0.96e9, 2.1e9], rel=0.03)
    assert D == pytest.approx([38e9, 174e9, 790e9], rel=0.03)


def test_no_optimum_without_positive_exponents():
    with pytest.raises(ValueError, match="must all be positive"):
        Slice(1.0, ((2.0, 0.3),), (2.0, -0.1)).optimum(np.array(1e20))
    with pytest.raises(ValueError, match="needs a value of S"):
        law("sparse").at(SPARSE)
    with pytest.raises(ValueError, match="no N and D"):
        law("frontier").at({"K": 1.0, "c": -0.05})


def test_names_that_are_no_laws():
    with pytest.raises(ValueError, match="no law 'chinchilla'; there are dense, late"):
        law("chinchilla")
    with pytest.raises(ValueError, match="two domains or more, got text"):
        law("mixture-joint", ("text",))
