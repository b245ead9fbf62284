"""From a study's table through its fits to forecasts, pictures in files and the page."""

import csv
import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from markupsafe import Markup

from nmm_jax.scaling import fit, fitted, fitting, plan, plot, report
from nmm_jax.scaling.laws import law
from nmm_jax.scaling.plan import Budget
from nmm_jax.scaling.runs import Roles, read, read_table
from tests.scaling.scaling_data import TRUTH, crossed, runs
from tests.test_report import Page

SOURCES = ("captions", "text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """table.csv of an early and a late study, whose losses are 2% apart, and their fits with 20 draws."""
    folder = tmp_path_factory.mktemp("study")
    columns = crossed(n=np.geomspace(3e7, 3e9, 5), d=np.geomspace(1e9, 2e11, 5))
    rows = []
    for architecture, times in (("early", 1.0), ("late", 1.02)):
        values = TRUTH | {name: times * TRUTH[name] for name in "EAB"}
        loss = runs(law("dense"), values, {"N": columns["n"], "D": columns["d"]}, 0.003, seed=int(100 * times))[0]
        for i, (n, d) in enumerate(zip(columns["n"], columns["d"], strict=True)):
            rows.append(
                {
                    "run": f"{architecture}-{i}", "architecture": architecture, "n": n, "d": d, "c": 6 * n * d,
                    "flops": 6.5 * n * d, "loss": loss[i], "loss_captions": 0.9 * loss[i], "loss_text": 1.1 * loss[i],
                    "diverged": False, "seconds": 60.0, "commit": "0123456789abcdef", "device": "<cpu>",
                }
            )  # fmt: skip
    rows.append({"run": "early-lost", "architecture": "early", "n": 1e9, "d": 1e10, "c": 6e19, "diverged": True})
    with (folder / "table.csv").open("w") as f:
        table = csv.DictWriter(f, list(rows[0]), restval="")
        table.writeheader()
        table.writerows(rows)
    whole = fitting.fit
    with pytest.MonkeyPatch.context() as patch:  # the whole grid is for benchmarks/fits.py
        patch.setattr(
            fit.fitting,
            "fit",
            lambda of, columns, losses, how="huber", starts=None, report=None: whole(
                of, columns, losses, how, of.starts({})[::300], report
            ),
        )
        for architecture in ("early", "late"):
            where = f"architecture=={architecture}"
            losses = ("loss_captions", "loss_text") if architecture == "early" else ("loss",)
            roles = Roles(n="n", d="d", compute="c", losses=losses, where=where, held_out="n>2e9")
            found = fit.fit_runs(law("dense"), read(str(folder / "table.csv"), roles), "huber", 20)
            about = {
                "command": f"python -m nmm_jax.scaling.fit --where='{where}' --n=n --d=d --compute=c "
                f"--loss={','.join(losses)}",
                "runs": "table.csv",
            }
            (folder / f"{architecture}.json").write_text(json.dumps(fit.finite(about | found)))
    return folder


def test_a_fit_is_read_as_it_was_written(folder):
    found = json.loads((folder / "late.json").read_text())
    (one,) = fitted.read(str(folder / "late.json"))
    assert one.forecast.values == found["parameters"]
    assert len(one.forecast.draws) == 20
    assert one.forecast.draws[3]["alpha"] == found["bootstrap"]["draws"]["alpha"][3]
    assert list(one.parameters["a"]) == [found["exponents"]["a"], *found["intervals"]["a"]]
    assert tuple(one.forecast.exponent("a")) == pytest.approx(tuple(one.parameters["a"]))
    assert one.error == pytest.approx(found["errors"]["fitted"]["mae_percent"])
    assert one.held_out_error == pytest.approx(found["errors"]["held_out"]["mae_percent"])
    assert one.held_out_error < 1
    assert (one.where, one.loss, one.forecast.architecture) == ("architecture==late", "loss", "late")
    assert one.forecast.fitted["N"] == pytest.approx((3e7, 3e9 / 10**0.5))  # the largest size was held out
    assert one.forecast.per_pair == pytest.approx(6)
    points = one.points
    assert (len(points.N), points.held_out.sum()) == (25, 5)
    law_says = [one.forecast.loss(N, D).value for N, D in zip(points.N, points.D, strict=True)]
    assert points.predicted == pytest.approx(law_says)


def test_runs_made_since_are_held_out(folder, tmp_path):
    (one,) = fitted.read(str(folder / "late.json"))
    same = fitted.with_runs(one, str(folder / "table.csv"))
    assert len(same.points.N) == len(one.points.N)  # it has seen them all
    rows = list(csv.DictReader((folder / "table.csv").open()))
    row = dict(next(row for row in rows if row["architecture"] == "late"))
    row |= {"n": "1e10", "d": "1e12", "c": "6e22", "loss": "2.5"}
    with (tmp_path / "table.csv").open("w") as f:
        table = csv.DictWriter(f, list(row))
        table.writeheader()
        table.writerows([*rows, row])
    grown = fitted.with_runs(one, str(tmp_path / "table.csv")).points
    assert (grown.N[-1], grown.loss[-1], grown.held_out[-1]) == (1e10, 2.5, True)
    assert grown.predicted[-1] == pytest.approx(one.forecast.loss(1e10, 1e12).value)
    assert len(grown.N) == len(one.points.N) + 1
    with pytest.raises(ValueError, match="late has no command that names its columns"):
        fitted.with_runs(dataclasses.replace(one, command=""), str(tmp_path / "table.csv"))


def test_each_of_several_losses(folder):
    (mean,), (text,) = (fitted.read(str(folder / name)) for name in ("early.json", "early.json:loss_text"))
    assert (mean.loss, text.loss) == ("mean", "loss_text")
    assert (mean.name, text.name) == ("early", "early loss_text")  # figures' files are named by it
    assert mean.sources["loss_text"] == text.parameters and not text.sources
    assert text.forecast.values["E"] == pytest.approx(1.1 * mean.forecast.values["E"], rel=1e-3)
    with pytest.raises(ValueError, match="no fit of 'loss_code'; it has mean, loss_captions, loss_text"):
        fitted.read(str(folder / "early.json:loss_code"))


def test_what_is_no_fit(tmp_path):
    for text, message in (("{", "is no JSON"), ("[]", "is no fit"), ('{"law": "dense"}', "is no fit")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            fitted.read(str(tmp_path / "x.json"))


def test_a_law_of_sparsity_is_one_at_each_sparsity(tmp_path):
    rows = [
        {"N": n, "D": 20 * n, "C": 120 * n * n, "S": s, "loss": 3.0, "predicted": 3.1, "held_out": False}
        for n in (1e8, 1e9)
        for s in (0.0, 0.874, 0.876)
    ]  # fmt: skip
    values = dict.fromkeys(law("sparse").parameters, 0.3) | {"A": 260.0, "B": 1800.0}
    found = {"law": "sparse", "domains": [], "source": "loss", "parameters": values, "rows": rows}
    (tmp_path / "s.json").write_text(json.dumps(found))
    dense, sparse = fitted.read(str(tmp_path / "s.json"))
    assert [each.forecast.held["S"] for each in (dense, sparse)] == [0.0, 0.875]
    assert [len(each.points.N) for each in (dense, sparse)] == [2, 4]
    assert [each.forecast.architecture for each in (dense, sparse)] == ["early", "moe"]
    (chosen,) = plan.forecasts_of([str(tmp_path / "s.json")], [], 0.5, {})
    assert chosen.held == {"S": 0.5}


def test_a_plan_by_ones_own_fits(folder):
    """The late losses are 2% higher at all N and D; the same data, so they are compared."""
    forecasts = plan.forecasts_of([str(folder / "late.json")], ["published:early"], None, {})
    found = plan.make(forecasts, Budget.of(flops=1e20), None, None)
    assert found["laws"][0]["loss"].low < found["laws"][0]["loss"].value < found["laws"][0]["loss"].high
    assert found["differences"][0]["verdict"].startswith(
        "not comparable: its losses are mean of Shukor et al., not loss of table.csv"
    )
    assert found["laws"][0]["config"]["path"].startswith("configs/late_fusion.py:")


def test_the_page(folder):
    fits = [one for name in ("early.json", "late.json") for one in fitted.read(str(folder / name))]
    path = str(folder / "table.csv")
    text = report.render(fits, read_table(path), path, "A study of <two>")
    page = Page(text)
    assert not page.open and all(
        link.startswith("#") for link in page.links
    )  # well-formed, and it needs nothing from elsewhere
    assert page.tags.count("svg") == 12  # of each fit all but a triangle
    assert "A study of &lt;two&gt;" in text and "&lt;cpu&gt;" in text
    for shown in (
        "51, of which 1 diverged", "early, late", "30M to 3B", "50 minutes", "0123456789ab", "early-lost",
        "held-out run", "Without a law", "by source",
        "90% intervals from bootstrap draws", "E + A/N", ".301", "--where='architecture==early'",
    ):  # fmt: skip
        assert shown in page.text, shown
    for one in fits:
        assert f"{one.parameters['alpha'].value:.4g}" in page.text
        assert f"{one.held_out_error:.2f}%" in page.text
    figure = text[text.index("<svg") : text.index("</svg>") + 6]
    assert "training FLOPs" in "".join(ElementTree.fromstring(figure).itertext())


def test_fits_of_the_same_losses_are_compared(folder):
    (one,) = fitted.read(str(folder / "late.json"))
    found = report.comparison([one, one])
    assert found["names"] == ["late"] and len(found["rows"]) == 3
    assert found["rows"][1][1][0]["percent"].value == pytest.approx(0)
    assert "late is not told apart" in found["verdict"]
    (early,) = fitted.read(str(folder / "early.json"))
    assert report.comparison([early, one]) is None  # of another loss
    assert report.comparison([one]) is None


def test_fits_under_other_tokenizers_are_not_compared(folder, tmp_path):
    """Of one table, by --where."""
    found = json.loads((folder / "late.json").read_text())
    for kind in ("a", "b"):
        (tmp_path / f"{kind}.json").write_text(json.dumps(found | {"alike": {"tokenizer": kind}}))
    a, b = (fitted.read(str(tmp_path / f"{kind}.json"))[0] for kind in ("a", "b"))
    assert report.comparison([a, a]) and report.comparison([a, b]) is None


def test_every_figure_of_a_law_of_mixtures(tmp_path):
    """Its runs have no budgets to draw parabolas of."""
    names = tuple(f"h_{name}" for name in ("captions", "interleaved", "text"))
    values = {"E": 1.2, "A": 260.0, "B": 1800.0, "alpha": 0.3, "beta": 0.33}
    values |= {f"C/{name}": 1.0 for name in names} | {f"gamma/{name}": 0.4 for name in names}
    of = law("mixture-additive", names)
    shares = np.random.default_rng(0).dirichlet([2, 2, 2], 5)
    columns = crossed(mixture=np.arange(5), N=np.geomspace(1e8, 2e9, 3), D=np.geomspace(2e9, 1e11, 3))
    columns |= {f"h/{name}": shares[columns["mixture"].astype(int), i] for i, name in enumerate(names)}
    columns["C"] = 6 * columns["N"] * columns["D"]
    loss = of.predict(values, columns)
    rows = [
        {name: column[i] for name, column in columns.items() if name != "mixture"}
        | {"loss": loss[i], "predicted": loss[i], "held_out": False}
        for i in range(len(loss))
    ]
    found = {"law": of.name, "domains": names, "source": "loss", "parameters": values, "rows": rows}
    (tmp_path / "mix.json").write_text(json.dumps(found, default=float))
    (one,) = fitted.read(str(tmp_path / "mix.json"))
    drawn = plot.of_fit(one)
    assert set(drawn) == {"frontier", "optimum", "residuals", "mixture"}
    for draw in drawn.values():
        assert draw().axes


def test_formulas():
    assert report.formula("E + A/N^alpha") == Markup("E + A/N<sup>α</sup>")
    assert report.formula("(sum C_A,i h_i)^gamma_A") == "(Σ C<sub>A,i</sub> h<sub>i</sub>)<sup>γ<sub>A</sub></sup>"
    assert report.symbol("C_A/h_captions") == "C<sub>A,captions</sub>"
    assert report.symbol("alpha") == "α"
    assert report.formula("<b>^2") == "&lt;b&gt;<sup>2</sup>"
