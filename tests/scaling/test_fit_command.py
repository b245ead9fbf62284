"""The command, from a file of runs to a JSON that says all."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from nmm_jax.scaling import fit, fitting
from nmm_jax.scaling.laws import law
from nmm_jax.scaling.runs import MEAN, Roles, runs_of
from tests.scaling.scaling_data import TRUTH, crossed, runs
from tests.training_runs import ROOT

COLUMNS = crossed(N=np.geomspace(3e7, 3e9, 5), D=np.geomspace(1e9, 2e11, 5))
TEXT = TRUTH | {"E": 2.2, "A": 300.0}


@pytest.fixture
def few_starts(monkeypatch):
    """The whole grid is for benchmarks/fits.py."""
    whole = fitting.fit

    def thinned(of, columns, losses, how="huber", starts=None, report=None):
        return whole(of, columns, losses, how, of.starts({})[::43] if starts is None else starts, report)

    monkeypatch.setattr(fit.fitting, "fit", thinned)


def table():
    made = {"size": COLUMNS["N"], "tokens": COLUMNS["D"]}
    made["loss_captions"] = runs(law("dense"), TRUTH, COLUMNS, 0.003)[0]
    made["loss_text"] = runs(law("dense"), TEXT, COLUMNS, 0.003, seed=1)[0]
    return made


def roles(**changed):
    return Roles(n="size", d="tokens", **{"losses": ("loss_captions", "loss_text")} | changed)


def test_the_record_of_several_losses(few_starts):
    found = fit.fit_runs(law("dense"), runs_of(table(), roles(held_out="N>2e9")), "huber", 20)
    json.dumps(fit.finite(found), allow_nan=False)
    assert found["source"] == MEAN and set(found["sources"]) == {"loss_captions", "loss_text"}
    for record in (found, *found["sources"].values()):
        assert {"E", "A", "B", "alpha", "beta", "objective", "intervals", "law"} <= set(record)
        assert set(record["intervals"]) == {"E", "A", "B", "alpha", "beta", "a", "b", "d", "n", "dn"}
        assert len(record["bootstrap"]["draws"]["alpha"]) == 20
        low, high = np.quantile(record["bootstrap"]["draws"]["alpha"], (0.05, 0.95))
        assert record["intervals"]["alpha"] == pytest.approx([low, high]) and low < record["alpha"] < high
        assert sum(m["starts"] for m in record["starts"]["minima"]) <= record["starts"]["count"]
        rows = record["rows"]
        assert len(rows) == 25 and sum(row["held_out"] for row in rows) == 5
        worst = [abs(row["loss"] / row["predicted"] - 1) for row in rows if row["held_out"]]
        assert max(worst) < 0.03
        assert record["errors"]["held_out"]["runs"] == 5
        assert record["errors"]["held_out"]["mae_percent"] == pytest.approx(
            100 * np.mean([abs(row["predicted"] - row["loss"]) / row["loss"] for row in rows if row["held_out"]])
        )
        assert rows[3]["residual"] == pytest.approx(np.log(rows[3]["loss"] / rows[3]["predicted"]))
    assert found["sources"]["loss_text"]["E"] > found["E"] > found["sources"]["loss_captions"]["E"]
    assert found["frontier"]["c"] < 0 and found["frontier"]["points"]
    low, high = found["frontier"]["intervals"]["c"]
    assert low < found["frontier"]["c"] < high
    shown = fit.table(found)
    assert "alpha" in shown and "loss_captions" in shown and "c, L = K C^c of the envelope" in shown
    worst = next(row for row in found["rows"] if row["held_out"])
    assert f"held out: {worst['run']}: mean {worst['loss']:.4f}, predicted {worst['predicted']:.4f}" in shown


def test_laws_are_compared_by_what_was_held_out(few_starts):
    made = runs_of(table(), roles(losses=("loss_captions",), held_out="N>2e9"))
    records = [fit.fit_runs(law(name), made, "huber", 0) for name in ("overtraining", "dense", "frontier")]
    compared = fit.compare(records)
    errors = {row["law"]: row["errors"]["held_out"]["mse"] for row in compared}
    assert list(errors.values()) == sorted(errors.values()) and compared[-1]["law"] == "frontier"
    assert "frontier, 2 parameters: held-out mse" in fit.table(records[0] | {"comparison": compared})


def test_parabolas_have_intervals():
    columns = crossed(N=np.geomspace(5e7, 5e9, 7), C=np.geomspace(1e19, 1e21, 4))
    columns["D"] = columns["C"] / (6 * columns["N"])
    made = {"size": columns["N"], "tokens": columns["D"], "loss": runs(law("dense"), TRUTH, columns, 0.002)[0]}
    found = runs_of(made, roles(losses=("loss",)))
    told = fit.measured(found, "loss", fitting.resampled(len(found), 50, 5))["isoflop"]
    for name in "ab":
        low, high = told["intervals"][name]
        assert low < told[name]["exponent"] < high and high - low < 0.2
    assert "intervals" not in fit.measured(found, "loss", fitting.resampled(len(found), 0))["isoflop"]


def test_infinities_become_null():
    assert fit.finite({"a": [1.0, np.inf, (np.nan, 2)], "b": "x"}) == {"a": [1.0, None, [None, 2]], "b": "x"}


@pytest.fixture
def path(tmp_path):
    made = table()
    with (tmp_path / "runs.csv").open("w", newline="") as f:
        csv.writer(f).writerows([list(made), *zip(*made.values(), strict=True)])
    return str(tmp_path / "runs.csv")


@pytest.mark.slow  # the whole grid of starts
def test_the_command(path, tmp_path):
    line = [sys.executable, "-m", "nmm_jax.scaling.fit", f"--runs={path}", "--n=size", "--d=tokens"]
    line += ["--loss=loss_captions,loss_text", "--bootstrap=20", "--held_out=N>2e9", "--law=dense,overtraining"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    line.append(f"--output={tmp_path}/fit.json")
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "L = E + A/N^alpha + B/D^beta" in done.stdout
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["alpha"] == pytest.approx(TRUTH["alpha"], rel=0.1)
    assert found["command"].startswith("python -m nmm_jax.scaling.fit --runs=")
    assert [row["law"] for row in found["comparison"]] and found["starts"]["count"] == 7056


@pytest.mark.parametrize(
    ("names", "changed", "message"),
    [
        (["dens"], {}, "there is no law 'dens'; there are dense"),
        (["dense", "overtraining"], {}, "--law names several: .* give --held_out"),
        (["sparse"], {}, "--sparsity: the law 'sparse' needs"),
        (["mixture-joint"], {}, "needs the columns of two domains"),
        (["dense"], {"held_out": "N>1"}, "holds 25 of 25 runs out"),
        (["dense"], {"held_out": "N<1"}, "holds 0 of 25 runs out"),
    ],
)
def test_flags_that_contradict(names, changed, message, path):
    with pytest.raises(ValueError, match=message):
        fit.fit_table(path, roles(**changed), names, "huber", 0)


def test_several_laws_of_a_file(few_starts, path):
    found = fit.fit_table(path, roles(losses=("loss_text",), held_out="N>2e9"), ["dense", "frontier"], "huber", 0)
    assert found["law"] == "dense" and [row["law"] for row in found["comparison"]] == ["dense", "frontier"]
