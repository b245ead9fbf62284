"""Plans against arithmetic by hand, published optima, and laws whose answers are known."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from nmm_jax.scaling import plan, plan_tables, published, shipped
from nmm_jax.scaling.forecast import Forecast, Quantity, balanced_tokens, cheapest, of_published, tokens_for
from nmm_jax.scaling.laws import law
from nmm_jax.scaling.mixtures import at_edges, best_mixture, parse_mixture
from nmm_jax.scaling.plan import Budget, PlanError

VALUES = {"E": 1.9, "A": 260.0, "B": 1800.0, "alpha": 0.3, "beta": 0.33}


def forecast(**more):
    return Forecast(**{"name": "mine", "law": law("dense"), "values": VALUES, "source": "fit.json"} | more)


def drawn(E=0.0, seed=0, count=200, **more):
    """A forecast of draws that differ from VALUES in E alone, so that intervals are known."""
    noise = np.random.default_rng(seed).normal(0, 0.02, count)
    draws = tuple(VALUES | {"E": VALUES["E"] + E + n} for n in noise)
    return forecast(values=VALUES | {"E": VALUES["E"] + E}, draws=draws, **more), noise


def test_budgets_by_hand():
    """256 chips of 459 TFLOP/s for 72 hours at 45%."""
    budget = Budget.of(chips=256, chip="v5p", hours=72, mfu=0.45)
    assert budget.flops == pytest.approx(256 * 459e12 * 0.45 * 72 * 3600)
    assert budget.told == "256 x v5p for 72 hours at 45% of 117.5 PFLOP/s"
    assert Budget.of(topology="v5p:4x8x8", hours=72, mfu=0.45).flops == pytest.approx(budget.flops)
    assert Budget.of(topology="v5p:4x8x8", slices=2, hours=36, mfu=0.45).flops == pytest.approx(budget.flops)
    two_devices_a_chip = Budget.of(chips=4, chip="tpu7x", hours=1, mfu=0.5)
    assert two_devices_a_chip.flops == pytest.approx(4 * 2307e12 * 0.5 * 3600)
    assert Budget.of(flops=1e21) == Budget(1e21, "1e+21 FLOPs")
    assert Budget.of() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"flops": 1e21, "hours": 72.0}, "--flops and --hours both say"),
        ({"flops": 1e21, "chips": 8, "chip": "v5p"}, "--flops and --chips, --chip both say"),
        ({"flops": -1.0}, "a budget is positive"),
        ({"flops": math.nan}, "a budget is positive"),
        ({"chips": 8, "chip": "v5p"}, "how long"),
        ({"chips": 8, "hours": 3.0}, "needs --chips and --chip"),
        ({"hours": 3.0}, "needs --chips and --chip"),
        ({"chips": 8, "chip": "v9", "hours": 3.0}, "--chip=v9: there is none; there are v4"),
        ({"chips": 8, "topology": "v5p:4x4x4", "hours": 3.0}, "leave out --chips"),
        ({"topology": "v5p:4x4", "hours": 3.0}, "3 dimensions"),
        ({"chips": 8, "chip": "v5p", "hours": 3.0, "mfu": 45.0}, "--mfu=45: a share"),
    ],
)
def test_budgets_that_contradict_themselves(given, message):
    with pytest.raises(ValueError, match=message):
        Budget.of(**given)


def test_the_published_mixture_at_1e21():
    """N = 0.96 B, D = 174 B and the loss that follow from Table 12; the nearest config is the paper's own size."""
    answer = plan.of_budget(of_published("moe"), Budget.of(flops=1e21))
    assert f"{answer['N'].value / 1e9:.2f} {answer['D'].value / 1e9:.0f} {answer['loss'].value:.3f}" == "0.96 174 2.625"
    config = answer["config"]
    assert (config["path"], config["N"], round(config["N_total"] / 1e9, 2)) == (
        "configs/moe.py:932m-8e",
        24 * (4 * 1632**2 + 3 * 1632 * 4352) + 2 * 50_432 * 1632,
        4.51,
    )
    assert config["steps"] == round(1e21 / (6 * config["N"]) / (2048 * 1024))
    assert f"--config=configs/moe.py:932m-8e,{config['steps']} " in config["command"]
    assert answer["loss"].value <= config["loss"].value < 1.001 * answer["loss"].value
    assert answer["warnings"] == config["warnings"] == []


def test_intervals_are_the_draws():
    one, noise = drawn()
    low, high = np.quantile(noise, [0.05, 0.95])
    loss = one.loss(1e9, 1e11)
    assert (loss.low - loss.value, loss.high - loss.value) == pytest.approx((low, high), abs=1e-3)
    best = one.best(1e21)
    assert best.N.low == best.N.value == best.N.high  # E moves no optimum
    assert f"{Quantity(0.52, 0.5, 0.55):.2f}" == "0.52 [0.50, 0.55]"


def test_draws_without_an_optimum_widen_the_interval():
    bad = VALUES | {"alpha": -0.1}
    best = forecast(draws=(VALUES,) * 15 + (bad,) * 5).best(1e21)
    assert best.N.value == pytest.approx(best.N.low if math.isfinite(best.N.low) else best.N.value)
    assert (best.N.low, best.N.high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="must all be positive"):
        forecast(values=bad).best(1e21)


def test_draws_without_an_optimum_say_nothing_of_a_plan():
    bad = VALUES | {"alpha": -0.1}
    answer = plan.of_budget(forecast(draws=(VALUES,) * 5 + (bad,) * 15), Budget.of(flops=1e21))
    assert answer["smaller"][0]["excess"].value == pytest.approx(0, abs=1e-9)
    assert (answer["smaller"][0]["excess"].low, answer["smaller"][0]["excess"].high) == (-math.inf, math.inf)
    assert "[-inf, inf]" in plan_tables.table({"budget": None, "model": None, "laws": [answer]})


def test_smaller_models_and_longer_training():
    one = forecast()
    rows = plan.smaller(one, 1e21)
    curve, best = one.slice(VALUES), one.best(1e21)
    assert rows[0]["excess"].value == pytest.approx(0, abs=1e-9)
    assert rows[0]["C_same_loss"] == pytest.approx(1e21)
    for row in rows:
        assert 6 * row["N"] * row["D"] == pytest.approx(1e21)
        assert row["loss"].value == pytest.approx(best.loss.value * (1 + row["excess"].value / 100))
        if math.isfinite(row["D_same_loss"]):
            assert curve.loss(row["N"], row["D_same_loss"]) == pytest.approx(best.loss.value)
    excess = [row["excess"].value for row in rows]
    assert excess == sorted(excess) and excess[-1] > 1
    assert tokens_for(curve, 1e6, best.loss.value) == math.inf  # no tokens take so small a model there


def test_the_tokens_of_a_model():
    """Balanced tokens are those of the budget whose optimum is this N."""
    one = forecast()
    best = one.best(3e20)
    assert balanced_tokens(one.slice(VALUES), best.N.value) == pytest.approx(best.D.value)
    answer = plan.of_model(one, best.N.value, Budget.of(flops=1.2e21))
    assert answer["D"].value == pytest.approx(best.D.value)
    assert answer["in_budget"]["D"] == pytest.approx(4 * best.D.value)
    assert answer["longer"][1]["excess"].value == pytest.approx(0, abs=1e-9)
    assert answer["longer"][3]["loss"].value == pytest.approx(answer["in_budget"]["loss"].value)


def test_the_tokens_that_are_asked_for():
    """Shukor et al., Table 12, its law of experts at two sizes."""
    moe = of_published("moe")
    for N, losses in ((275e6, (3.435, 2.924, 2.772)), (932e6, (3.209, 2.698, 2.547))):
        rows = plan.make([moe], None, N, tokens=[10e9, 100e9, 400e9])["laws"][0]["longer"]
        assert [round(row["loss"].value, 3) for row in rows] == list(losses)
    for N, tokens in ((None, [1e9]), (1e9, [1e9, 0.0])):
        with pytest.raises(plan.PlanError, match="--tokens: .* above 0; which model"):
            plan.make([moe], Budget.of(flops=1e20), N, tokens=tokens)


def test_the_steps_of_a_config():
    config = shipped.read("configs/early_fusion.py:hw-1b")
    answer = plan.of_model(forecast(), config.N, Budget.of(flops=1e21), config)["config"]
    assert answer["steps"] == round(1e21 / (6 * config.N * 2048 * 1024))
    assert answer["flops"] == answer["steps"] * config.flops
    assert f"hw-1b,{answer['steps']} " in answer["command"]


def test_serving_tokens_wants_a_smaller_model():
    """Against a brute-force search over N; nothing served gives back the compute-optimal model."""
    one = forecast()
    curve, best = one.slice(VALUES), one.best(1e21)
    N, D = cheapest(curve, best.loss.value, 6.0, 0.0)
    assert (N, D) == pytest.approx((best.N.value, best.D.value), rel=2e-3)
    served = 2e12
    N, D = cheapest(curve, best.loss.value, 6.0, served)
    sizes = np.linspace(0.05, 1, 20_000) * best.N.value
    tokens = np.array([tokens_for(curve, n, best.loss.value) for n in sizes])
    cost = 6 * sizes * tokens + 2 * sizes * served
    assert 6 * N * D + 2 * N * served == pytest.approx(cost.min(), rel=1e-6)
    assert N == pytest.approx(sizes[cost.argmin()], rel=1e-2)
    assert curve.loss(N, D) == pytest.approx(best.loss.value)
    answer = plan.with_serving(one, 1e21, served)
    assert answer["saved"] == pytest.approx(1 - cost.min() / (1e21 + 2 * best.N.value * served), rel=1e-6)


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.5, "higher"), (-0.5, "lower"), (0.001, "not told apart: the interval holds zero")]
)
def test_laws_are_compared_with_their_uncertainty(shift, verdict):
    first, second = drawn()[0], drawn(E=shift, seed=1)[0]
    (found,) = plan.differences([first, second], 1e21)
    expected = 100 * (second.best(1e21).loss.value / first.best(1e21).loss.value - 1)
    assert found["percent"].value == pytest.approx(expected)
    assert found["percent"].low < expected < found["percent"].high
    assert found["verdict"] == verdict


def test_extrapolation_is_told():
    one = forecast(fitted={"N": (1e8, 1e9), "D": (1e9, 1e11), "C": (1e18, 1e20)})
    answer = plan.of_budget(one, Budget.of(flops=1e21))
    assert answer["warnings"][0] == "C = 1e+21 is 10 times the largest of the fit, 1e+20"
    assert any(text.startswith("N = ") for text in answer["warnings"])
    assert one.beyond(N=1e7) == ["N = 1e+07 is 1/10 of the smallest of the fit, 1e+08"]
    assert one.beyond(N=5e8, D=1e10, C=1e19) == []
    longer = plan.of_model(one, 5e8)["longer"]
    assert [row["beyond"] for row in longer] == [[] if row["D"] <= 1e11 else ["D"] for row in longer]
    assert longer[-1]["beyond"] == ["D"]


MIXED = {
    "E": 1.2, "alpha": 0.3, "beta": 0.33, "A": 260.0, "B": 1800.0,
    "C/captions": 1.0, "C/text": 1.0, "gamma/captions": 0.5, "gamma/text": 0.5,
}  # fmt: skip


def test_the_best_mixture():
    """1/(sqrt(h) + sqrt(1-h)) is least at h = 1/2; where that was not tried, at the end of what was."""
    columns = {"h/captions": (0.1, 0.9), "h/text": (0.1, 0.9)}
    one = forecast(law=law("mixture-additive", ("captions", "text")), values=MIXED, mixtures=columns)
    best = best_mixture(one, 1e20)
    assert {name: share.value for name, share in best.items()} == pytest.approx(
        {"h/captions": 0.5, "h/text": 0.5}, abs=2e-4
    )
    assert at_edges(one, best) == []
    narrow = forecast(law=one.law, values=MIXED, mixtures={"h/captions": (0.6, 0.8), "h/text": (0.2, 0.4)})
    best = best_mixture(narrow, 1e20)
    assert best["h/captions"].value == pytest.approx(0.6, abs=2e-4)
    assert at_edges(narrow, best) == [
        "captions 60.0% is the least that was tried: the best may lie beyond",
        "text 40.0% is the most that was tried: the best may lie beyond",
    ]
    answer = plan.of_budget(one, Budget.of(flops=1e20))
    at_half = forecast(law=one.law, values=MIXED, held={"h/captions": 0.5, "h/text": 0.5})
    assert answer["loss"].value == pytest.approx(at_half.best(1e20).loss.value, rel=1e-6)


def test_the_best_of_three_by_hand():
    """With C_i all one and gamma 1/2 the best shares are equal; with weights w_i they go as w_i squared."""
    names = ("captions", "interleaved", "text")
    weights = dict(zip(names, (1.0, 2.0, 3.0), strict=True))
    values = {k: v for k, v in MIXED.items() if "/" not in k} | {f"gamma/{n}": 0.5 for n in names}
    values |= {f"C/{n}": w for n, w in weights.items()}
    one = forecast(law=law("mixture-joint", names), values=values, mixtures={f"h/{n}": (0.01, 0.9) for n in names})
    one = forecast(law=law("mixture-additive", names), values=values, mixtures=one.mixtures)
    best = best_mixture(one, 1e20)
    expected = {f"h/{n}": w**2 / 14 for n, w in weights.items()}
    assert {name: share.value for name, share in best.items()} == pytest.approx(expected, abs=3e-4)


def test_mixtures_as_they_are_typed():
    assert parse_mixture("captions=0.45, text=0.55") == {"captions": 0.45, "text": 0.55}
    for text, message in (("captions", "is not SOURCE=SHARE"), ("a=x,b=1", "is not"), ("a=0.5,b=0.6", "sum to 1.1")):
        with pytest.raises(ValueError, match=message):
            parse_mixture(text)


def test_what_is_held_has_to_be_a_laws():
    with pytest.raises(PlanError, match="--sparsity=0.875: none of these laws is one of sparsity"):
        plan.forecasts_of([], ["published:moe"], 0.875, {})
    with pytest.raises(PlanError, match="--mixture is of text; here is no law of mixtures"):
        plan.forecasts_of([], ["published:moe"], None, {"text": 1.0})
    with pytest.raises(PlanError, match="--law=early: expected one of published:early"):
        plan.forecasts_of([], ["early"], None, {})


def test_what_is_not_enough():
    early, frontier = of_published("early"), of_published("late-mean")
    with pytest.raises(PlanError, match="by which law"):
        plan.make([], Budget.of(flops=1e21), None, None)
    with pytest.raises(PlanError, match="plan what"):
        plan.make([early], None, None, None)
    with pytest.raises(PlanError, match="no N and D, it says nothing of a model"):
        plan.make([frontier], None, 1e9, None)
    with pytest.raises(PlanError, match="--served"):
        plan.make([early], None, 1e9, 1e12)


def test_tables_and_json():
    """What is in the table is in the JSON, which has no number that JSON does not know."""
    forecasts = [drawn(fitted={"C": (1e17, 1e19)})[0], of_published("late-mean")]
    found = plan.make(forecasts, Budget.of(chips=64, chip="v5e", hours=24), None, 1e12)
    shown = plan_tables.table(found)
    for text in (
        "64 x v5e for 24 hours at 40% of 12.61 PFLOP/s", "90% intervals of 200 bootstrap draws", "above that of mine",
        "a smaller model", "to serve 1T tokens", "nearest config: configs/early_fusion.py:", "--workdir=RUN", "hours",
        "times the largest of the fit", "no N and D",
    ):  # fmt: skip
        assert text in shown
    assert max(map(len, shown.splitlines())) < 150
    back = json.loads(json.dumps(plan_tables.plain(found), allow_nan=False))
    assert back["laws"][0]["loss"]["value"] == found["laws"][0]["loss"].value
    assert back["laws"][1]["N"] is None
    of_model = plan.make(forecasts[:1], Budget.of(flops=1e20), 1e9, None)
    assert "in this budget: D = 16.7B" in plan_tables.table(of_model)
    json.dumps(plan_tables.plain(of_model), allow_nan=False)


@pytest.mark.parametrize(
    ("architecture", "N", "path"),
    [
        ("early", 1.7e9, "configs/early_fusion.py:1.6b"),
        ("early", 1e9, "configs/early_fusion.py:hw-1b"),
        ("early", 1e12, "configs/early_fusion.py:hw-8b"),
        ("early", 1e3, "configs/ladder.py:early-w16"),
        ("late", 1e9, "configs/late_fusion.py:1b"),
        ("moe", 3e9, "configs/moe.py:hw-3b-8e"),
    ],
)
def test_the_nearest_config(architecture, N, path):
    assert shipped.nearest(architecture, N).path == path


def test_every_ladder_rises():
    """As halving needs it; a size and its neighbours are found from themselves."""
    for paths in shipped.ladders("late"):
        sizes = [shipped.read(path).N for path in paths]
        assert sizes == sorted(sizes)
        assert [shipped.nearest("late", N).N for N in sizes] == sizes
    with pytest.raises(ValueError, match="no architecture 'middle'; there are early, late, moe"):
        shipped.ladders("middle")


def test_the_command_of_a_mixture(monkeypatch, tmp_path):
    one = shipped.read("configs/moe.py:932m-8e")
    monkeypatch.chdir(tmp_path)  # plans are asked for in other folders, too
    shipped.read.cache_clear()
    assert shipped.read("configs/moe.py:932m-8e") == one
    assert " --config=configs/small.py --config.steps=100 " in shipped.command(shipped.read("configs/small.py"), 100)
    words = shipped.command(one, 3000, {"captions": 0.4504, "text": 0.5496})
    assert words.startswith("python -m nmm_jax.train --config=configs/moe.py:932m-8e,3000 ")
    assert """--config.data.sources="('captions', 'text')" --config.data.weights="(0.45, 0.55)" """ in words


def test_the_command():
    words = ["--law=published:early", "--law=published:moe", "--n=9.317e8", "--format=json"]
    done = subprocess.run([sys.executable, "-m", "nmm_jax.scaling.plan", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    early, moe = json.loads(done.stdout)["laws"]
    assert early["D"]["value"] / early["N"]["value"] == pytest.approx(53.5, rel=0.01)
    assert moe["source"] == published.SHUKOR + ", Table 12"
