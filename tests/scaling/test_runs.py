"""Tables as people keep them: what is refused, what is repaired and told."""

import csv
import dataclasses
import re

import numpy as np
import pytest

from nmm_jax.scaling import checks
from nmm_jax.scaling.laws import law
from nmm_jax.scaling.runs import MEAN, Roles, TableError, read, read_table, runs_of
from tests.scaling.scaling_data import TRUTH, crossed

ROLES = Roles(n="n", d="d", losses=("loss",))


def table(**changed):
    columns = crossed(N=np.array([1e8, 2e8, 4e8, 8e8]), D=np.array([1e9, 4e9, 16e9]))
    loss = law("dense").predict(TRUTH, columns)
    names = [f"run-{n}" for n in range(12)]
    return {"name": names, "n": list(columns["N"]), "d": list(columns["D"]), "loss": list(loss)} | changed


def with_cell(column, row, value):
    made = table()
    made[column][row] = value
    return made


def refused(made, message, roles=ROLES):
    with pytest.raises(TableError, match=message):
        runs_of(made, roles)


def test_a_good_table():
    found = runs_of(table(), ROLES)
    assert len(found) == 12 and not found.warnings and not found.held_out.any()
    assert found.columns["C"] == pytest.approx(6 * found.columns["N"] * found.columns["D"])
    assert found.labels[2] == "row 3 (run-2)"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (with_cell("n", 3, "-1"), r"N must be positive; row 4 \(run-3\): -1"),
        (with_cell("d", 0, 0.0), r"D must be positive; row 1 \(run-0\): 0"),
        (with_cell("loss", 11, "-0.5"), r"loss must be positive; row 12 \(run-11\): -0.5"),
        (with_cell("n", 5, "large"), r"row 6 \(run-5\): column 'n' is 'large', which is no number"),
        (with_cell("n", 5, ""), r"N must be positive; row 6 \(run-5\): nan"),
        (table(loss=["nan"] * 12), "no row has a finite loss in loss"),
        (
            table(tokenizer=["a"] * 9 + ["b"] * 3),
            r"'tokenizer' differs: a \(9 runs\), b \(3 runs\).*--where='tokenizer==a'",
        ),
        (table(validation=["x"] + ["y"] * 11), "'validation' differs"),
        (table(Tokenizer_Name=["a"] * 9 + ["b"] * 3), "'Tokenizer_Name' differs"),
        (table(val_set=["a"] * 9 + ["b"] * 3), "'val_set' differs"),
    ],
)
def test_refused_by_name(made, message):
    refused(made, message)


def test_columns_that_are_not_there():
    refused(
        table(),
        "--loss: the table has no column 'los'; did you mean 'loss'",
        dataclasses.replace(ROLES, losses=("los",)),
    )
    refused(
        table(),
        "--n: the table has no column 'params'.* It has name, n, d, loss",
        dataclasses.replace(ROLES, n="params"),
    )
    refused(table(), "--d or --compute", dataclasses.replace(ROLES, d=""))
    refused(table(), "--n_vision and --d_vision", dataclasses.replace(ROLES, n_vision="n"))


def test_diverged_runs_are_left_out_by_name():
    made = with_cell("loss", 4, "nan") | {"diverged": ["False"] * 9 + ["True"] + ["False"] * 2}
    made["loss"][6] = ""
    made["d"][6] = ""  # what a run that diverged was trained on may not be known
    found = runs_of(made, ROLES)
    assert len(found) == 9
    (warning,) = found.warnings
    assert all(f"(run-{n})" in warning for n in (4, 6, 9)) and "left out" in warning


def test_empty_fingerprints_of_diverged_runs_are_no_other_tokenizer():
    made = with_cell("loss", 4, "") | {"tokenizer": ["a"] * 4 + [""] + ["a"] * 7}
    assert len(runs_of(made, ROLES)) == 11


def test_what_all_runs_have_alike_is_told():
    found = runs_of(table(tokenizer=["a"] * 12, val_loss=list(range(12)), test_set=["no"] * 12), ROLES)
    assert found.alike == {"tokenizer": "a"} and found.take(np.arange(12) < 3).alike == found.alike


def test_a_loss_may_be_called_validation():
    made = table()
    made["validation"] = made.pop("loss")
    assert len(runs_of(made, dataclasses.replace(ROLES, losses=("validation",)))) == 12


def test_repeats_are_counted_once():
    made = {name: [*cells, cells[2]] for name, cells in table().items()}
    found = runs_of(made, ROLES)
    assert len(found) == 12 and "row 13 (run-2) is row 3 (run-2) again" in found.warnings[0]
    made["loss"][12] *= 1.001  # another seed
    assert len(runs_of(made, ROLES)) == 13


def test_several_losses_have_a_mean():
    made = table(loss_text=[3.0] * 12, loss_captions=list(np.linspace(2, 3, 12)))
    found = runs_of(made, dataclasses.replace(ROLES, losses=("loss_text", "loss_captions")))
    assert list(found.losses) == ["loss_text", "loss_captions", MEAN]
    assert found.losses[MEAN] == pytest.approx((3 + np.linspace(2, 3, 12)) / 2)


def test_tokens_of_a_budget():
    made = table()
    made["c"] = [6 * n * d for n, d in zip(made["n"], made["d"], strict=True)]
    found = runs_of(made, Roles(n="n", compute="c", losses=("loss",)))
    assert found.columns["D"] == pytest.approx(np.array(made["d"]))


def test_a_towers_flops():
    """C = 6 (N_v D_v + (N - N_v) D), both ways."""
    made = table()
    made["n_v"] = [0.2 * n for n in made["n"]]
    made["d_v"] = [0.5 * d for d in made["d"]]
    roles = dataclasses.replace(ROLES, n_vision="n_v", d_vision="d_v")
    found = runs_of(made, roles)
    assert found.columns["C"] == pytest.approx(6 * 0.9 * found.columns["N"] * found.columns["D"])
    back = runs_of(made | {"c": list(found.columns["C"])}, dataclasses.replace(roles, d="", compute="c"))
    assert back.columns["D"] == pytest.approx(found.columns["D"])


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("n>3e8", range(6, 12)),
        ("N>3e8", range(6, 12)),
        ("N >= 4e8 and D < 1e10", [6, 7, 9, 10]),
        ("name == 'run-3'", [3]),
        ("name!=run-3 and n==2e8", [4, 5]),
        ("name!=run-3 and n==2e8 or name==run-0 or n>1e30", [0, 4, 5]),
    ],
)
def test_conditions(condition, rows):
    expected = [f"row {n + 1} (run-{n})" for n in rows]
    assert list(runs_of(table(), dataclasses.replace(ROLES, where=condition)).labels) == expected
    held = runs_of(table(), dataclasses.replace(ROLES, held_out=condition))
    assert [label for label, out in zip(held.labels, held.held_out, strict=True) if out] == expected


def test_conditions_that_say_nothing():
    refused(
        table(),
        "--where: 'n' is neither a column .* nor a condition such as 'N>1e9'",
        dataclasses.replace(ROLES, where="n"),
    )
    refused(table(), "no row meets --where='n>1e30'", dataclasses.replace(ROLES, where="n>1e30"))
    refused(table(), "--held_out: the table has no column 'sise'", dataclasses.replace(ROLES, held_out="sise>3"))


def test_a_column_that_holds_out():
    made = table(test=["no"] * 10 + ["yes"] * 2)
    assert runs_of(made, dataclasses.replace(ROLES, held_out="test")).held_out.sum() == 2
    made["test"][0] = "maybe"
    refused(
        made, r"row 1 \(run-0\): column 'test' is 'maybe'; it must be true", dataclasses.replace(ROLES, held_out="test")
    )


def test_shares_and_sparsity():
    roles = dataclasses.replace(ROLES, mixture=("text", "captions"))
    shares = {"text": [0.25] * 12, "captions": [0.75] * 12}
    found = runs_of(table(**shares), roles)
    assert found.columns["h/captions"] == pytest.approx(0.75)
    refused(table(**shares | {"text": [0.5] + [0.25] * 11}), r"must sum to 1; row 1 \(run-0\): 1.25", roles)
    refused(table(text=[25] * 12, captions=[75] * 12), "h/text must be a share, 0 to 1", roles)
    refused(table(s=[1.0] * 12), "S must be in 0 <= S < 1", dataclasses.replace(ROLES, sparsity="s"))


def test_files(tmp_path):
    made = table()
    rows = list(zip(*made.values(), strict=True))
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([list(made), *rows])
    found = read(str(path), ROLES)
    assert found.losses["loss"] == pytest.approx(np.array(made["loss"]))

    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(made), tmp_path / "runs.parquet")
    again = read(str(tmp_path / "runs.parquet"), ROLES)
    assert all((again.columns[name] == column).all() for name, column in found.columns.items())

    for begin, between in (("\ufeff", ","), ("", "\t"), ("", ";"), (" ", " ,")):
        lines = [between.join(map(str, cells)) for cells in (list(made), *rows)]
        path.write_text(begin + "\n".join(lines) + "\n")
        assert read(str(path), ROLES).losses["loss"] == pytest.approx(np.array(made["loss"])), (begin, between)

    path.write_text("n,d,loss\n1,2,3\n1,2\n")
    with pytest.raises(TableError, match="row 2: not as many cells as the header"):
        read_table(str(path))
    path.write_text("n,d,loss\n")
    with pytest.raises(TableError, match="has no rows"):
        read_table(str(path))


def of(law_name="dense", domains=(), **columns):
    """What check says of runs with these columns."""
    made = crossed(N=np.array([1e8, 2e8, 4e8, 8e8]), D=np.array([1e9, 4e9, 16e9]))
    made = {
        name: np.resize(column, 12 if len(column) < 12 else len(column)) for name, column in (made | columns).items()
    }
    found = runs_of({"n": made["N"], "d": made["D"], "loss": np.linspace(4, 3, len(made["N"]))}, ROLES)
    return checks.check(law(law_name, domains), dataclasses.replace(found, columns=found.columns | made))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"N": np.full(12, 1e8)}, "--n: 1 different N, from 1e+08 to 1e+08; alpha, its coefficient and E need 3"),
        ({"D": np.array([1e9, 4e9])}, "--d: 2 different D, from 1e+09 to 4e+09; beta, its coefficient and E need 3"),
        ({"C": np.full(12, 1e20)}, "all runs have one budget, 1e+20 FLOPs"),
    ],
)
def test_designs_that_hold_no_law(columns, message):
    with pytest.raises(TableError, match=re.escape(message)):
        of(**columns)


def test_designs_of_other_laws():
    with pytest.raises(TableError, match="--sparsity: 2 different; lambda and C need three or more"):
        of("sparse", S=np.array([0.0, 0.5]))
    one = {"h/a": np.full(12, 0.5), "h/b": np.full(12, 0.5)}
    with pytest.raises(TableError, match="--mixture: 2 domains need 2 different mixtures"):
        of("mixture-additive", ("a", "b"), **one)
    assert of("overtraining", N=np.array([1e8, 2e8])) == []


def test_designs_to_be_wary_of():
    assert of() == []
    millions = of(N=np.repeat([100.0, 200.0, 400.0, 800.0], 3))
    assert len(millions) == 1 and "N of all runs are below 1e+04: in millions?" in millions[0]
    N = np.geomspace(1e8, 1e10, 12)
    assert "same D/N, about 20" in of(N=N, D=20 * N)[0]
    few = {
        name: np.geomspace(1e8, 1e10, 7)[order] for name, order in (("N", slice(None)), ("D", [3, 1, 4, 0, 5, 2, 6]))
    }
    found = runs_of({"n": few["N"], "d": few["D"], "loss": np.linspace(4, 3, 7)}, ROLES)
    assert "7 runs for 5 parameters" in checks.check(law("dense"), found)[0]
    with pytest.raises(TableError, match="5 runs are too few for the law 'dense'"):
        checks.check(law("dense"), found.take(np.arange(7) < 5))
