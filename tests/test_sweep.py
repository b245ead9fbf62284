"""The sweep's bookkeeping, with commands that take no time; and that the ablations are what they say."""

import json

import pytest

from configs import ablations, loading
from nmm_jax import sweep
from nmm_jax.evaluation import comparison

FILE = """
from configs import late_fusion
RUNS = {"encoder": {}, "base": {}, "seed-1": {}, "wide": {}}
GROUPS = {"noise": ("base", "seed-1"), "width": ("base", "wide")}
LABELS = {"base": "the base"}

def get_config(name):
    c = late_fusion.get_config("quickstart").unlock()
    c.start.vision = "" if name == "encoder" else "elsewhere/encoder"
    return c.lock()
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sweep_file.py"
    path.write_text(FILE)
    return str(path)


def evaluation(loss, drop=0.1, gain=0.2):
    return {
        "step": 7,
        "notes": [],
        "held_out": {"captions": {"loss": loss, "standard_error": 0.1, "tokens": 9, "rows": 3}},
        "shuffled_images": {"captions": {"loss": 5.0, "standard_error": 0.1}},
        "image_gain": {"captions": {"drop": drop, "standard_error": 0.01}},
        "in_context": {
            "captions": {
                "captions": 3, "tokens": 9, "cut": 0,
                "alone": {"loss": 4.0, "standard_error": 0.1},
                "pair": {"loss": 4.0 - gain, "standard_error": 0.1, "gain": gain, "gain_error": 0.02},
                "text": {"loss": 3.9, "standard_error": 0.1, "gain": 0.1, "gain_error": 0.02},
                "other_image": {"loss": 3.9, "standard_error": 0.1, "gain": 0.15, "gain_error": 0.02},
                "picture": {"gain": 0.05, "gain_error": 0.03},
            }
        },
    }  # fmt: skip


class Faked(sweep.Sweep):
    """Its commands write what evaluate would, or fail."""

    def commands(self, name):
        if name == "wide" and not (self.folder / "mended").exists():
            return [["python", "-c", "import sys; sys.exit('no such width')"], ["python", "-c", "assert False"]]
        loss = {"encoder": 3.0, "base": 4.0, "seed-1": 4.2, "wide": 3.5}[name]
        target = self.folder / name / "evaluation" / "7.json"
        written = f"t.write_text({json.dumps(evaluation(loss))!r})"
        write = f"import pathlib; t = pathlib.Path({str(target)!r}); t.parent.mkdir(); {written}"
        return [["python", "-c", "print('trained')"], ["python", "-c", write]]


def test_runs_are_made_once_in_order_and_a_failure_stops_no_other(file, tmp_path, capsys):
    runs = Faked(file, str(tmp_path / "runs"), steps=7)
    assert runs.run(list(runs.module.RUNS)) == ["wide"]
    said = capsys.readouterr().err
    assert said.index("1/4 python") < said.index("2/4 python") and "wide failed (exit code 1)" in said
    assert "no such width" in (tmp_path / "runs" / "wide" / "log.txt").read_text()
    assert set(runs.outcomes()) == {"encoder", "base", "seed-1"}
    tables = runs.write()
    assert "### width" in tables and "| the base |" in tables and "wide" not in tables

    (tmp_path / "runs" / "mended").touch()
    assert runs.run(list(runs.module.RUNS)) == []
    said = capsys.readouterr().err
    assert said.count("finished before") == 3 and "4/4 python" in said
    tables = runs.write()
    assert "| wide | " in tables and "| 3.500 | +10.0 ± 1.0 |" in tables
    assert "| captions | 4.100 ± 0.141 |" in tables  # of 4.0 and 4.2
    kept = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert kept["wide"]["evaluation"]["held_out"]["captions"]["loss"] == 3.5
    assert kept["base"]["positions"] == 7 * 8 * 128
    assert (tmp_path / "runs" / "figure.png").stat().st_size > 5_000


def test_the_commands_are_those_that_one_would_type(file, tmp_path):
    runs = sweep.Sweep(file, "runs/here", steps=5)
    train, evaluate = runs.commands("base")
    assert train[:3] == ["python", "-m", "nmm_jax.train"] and evaluate[2] == "nmm_jax.evaluate"
    assert f"--config={file}:base" in train and "--config.start.vision=runs/here/encoder" in train
    assert "--config.steps=5" in train and train[-1] == evaluate[3] == "--workdir=runs/here/base"
    plain, _ = sweep.Sweep(file, "runs/here").commands("encoder")
    assert plain[3:] == [f"--config={file}:encoder", "--workdir=runs/here/encoder"]


def test_wrong_use(file, tmp_path):
    assert sweep.select(["a-1", "b", "a-2"], ["a-*"]) == ["a-1", "a-2"]
    with pytest.raises(loading.ConfigError, match="no run is called 'c'; there are a-1, b"):
        sweep.select(["a-1", "b"], ["b", "c"])
    with pytest.raises(loading.ConfigError, match="has no RUNS"):
        sweep.load_sweep("configs/small.py")
    with pytest.raises(loading.ConfigError, match="there is no config file"):
        sweep.load_sweep("configs/none.py")
    (tmp_path / "wrong.py").write_text('RUNS = {"a": {}}\nGROUPS = {"g": ("a", "b")}\n')
    with pytest.raises(loading.ConfigError, match=r"group 'g' has runs that are not in RUNS: \['b'\]"):
        sweep.load_sweep(str(tmp_path / "wrong.py"))


def test_numbers_of_a_run():
    found = comparison.numbers(evaluation(4.0))
    assert {column: str(number) for column, number in found.items()} == {
        "captions": "4.000",
        "captions: drop, %": "+10.0 ± 1.0",
        "captions: gain": "+0.200 ± 0.020",
        "captions: of it the picture": "+0.050 ± 0.030",
    }


@pytest.mark.parametrize("name", ablations.RUNS)
def test_an_ablation_is_valid_and_changes_what_it_says(name):
    config, plain = (loading.load(f"configs/ablations.py:{n}") for n in (name, "base"))
    if name in ablations.GROUPS["families"] or not name.startswith(("scenes", *ablations.ENCODERS)):
        mine, others = loading.flatten(config), loading.flatten(plain)
        changed = {key for key in mine if mine[key] != others[key]}
        said = set(ablations.RUNS[name]) - {"encoder"}
        tower = {"start.vision", "image.mean", "image.std"}
        assert said <= changed
        assert all(key in said | tower or key.startswith("model.vision.") for key in changed)
